"""The runner: checks a case, asserts which backend ran, times it in turns with its yardsticks."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

import pyflocality as pf
from pyflocality.storage.reader import training_values

from ..command import Record
from .libraries import UnavailableError
from .registry import Case
from .sets import BenchmarkSet
from .workload import Workload, Yardstick, errors_of
from .workloads import make_workload

# An eager algorithm in float32 is allowed this much; it is a yardstick, not a result.
_EAGER_ERROR = 0.02


class CheckError(RuntimeError):
    """A case computes something else than the reference, or an eager yardstick does."""


class WrongBackendError(RuntimeError):
    """Another backend ran than the one that is being timed."""


def run_case(case: Case, data: BenchmarkSet) -> Record:
    """Check and time a case on this machine's processor.

    Returns:
        A record for JSON: parameters, check, operations and bytes, seconds, yardsticks.

    Raises:
        CheckError: A result is wrong; nothing was timed.
        WrongBackendError: Another backend ran.
    """
    with torch_threads(case.threads):
        workload = make_workload(case, data)
        check = check_workload(workload)
        yardsticks, missing = available_yardsticks(workload)
        check |= check_yardsticks(workload, yardsticks)
        functions = {"": workload.run, **{name: y.run for name, y in yardsticks.items()}}
        with pf.trace_backends() as calls:
            seconds = time_in_turns(functions, case.repetitions)
        assert_backend(case, calls)
        mine = seconds[""]
        record: Record = {
            "id": case.id,
            "suite": case.suite,
            "op": case.op,
            "backend": case.backend,
            "values": workload.values,
            "batch": case.batch,
            "timestep": case.timestep,
            "window": case.window,
            "tangents": case.tangents,
            "threads": torch.get_num_threads(),
            "repetitions": case.repetitions,
            "check": check,
            "missing": missing,
        } | measured(workload, mine)
        record["seconds"]["all"] = mine
        record["yardsticks"] = {
            name: compared(yardstick, seconds[name], mine) for name, yardstick in yardsticks.items()
        }
        return record


def measured(workload: Workload, seconds: Sequence[float]) -> Record:
    """What every record tells of a case that was timed."""
    work, typical = workload.work(), spread(seconds)
    record = {
        "images": len(workload.images),
        "shape": list(workload.shape),
        "seconds": typical,
        "facts": workload.facts(),
    }
    if work is None:
        return record
    return record | {
        "flops": work.flops,
        "bytes": work.bytes,
        "gflops_per_second": work.flops / typical["median"] / 1e9,
        "gbytes_per_second": work.bytes / typical["median"] / 1e9,
    }


def compared(yardstick: Yardstick, seconds: Sequence[float], mine: Sequence[float]) -> Record:
    """What a record tells of a yardstick: its time for the whole case, over the case's own."""
    whole = [value / yardstick.share for value in seconds]
    return {
        "note": yardstick.note,
        "seconds": spread(whole),
        "measured_share": yardstick.share,
        # Of the yardstick's time to the case's, round by round.
        "ratio": spread([other / own for other, own in zip(whole, mine, strict=True)]),
    }


def available_yardsticks(workload: Workload) -> tuple[dict[str, Yardstick], dict[str, str]]:
    """Yardsticks of a case by name, and why others cannot run here."""
    there, missing = {}, {}
    for name in workload.case.yardsticks:
        try:
            there[name] = workload.yardstick(name)
        except UnavailableError as error:
            missing[name] = str(error)
    return there, missing


def check_workload(
    workload: Workload, images: Tensor | None = None, rows: slice | None = None
) -> Record:
    """Compare a case with the reference in float64.

    The budget is twice the error of the reference in float32, and what `Workload.rounding` allows.

    Args:
        workload: The case with its tensors.
        images: Training images to compare on; None for as many as the case has for that.
        rows: Noisy images to compare, all of which run; None for all. What one gets does not
            depend on its batch, so that a few tell of all.

    Raises:
        CheckError: The error of one of the answers is larger.
        WrongBackendError: Another backend ran.
    """
    case, few = workload.case, workload if rows is None else workload.of_rows(rows)
    images = workload.images[: case.check_images] if images is None else images
    with pf.trace_backends() as calls:
        answers = workload.answers(images, case.backend)
    assert_backend(case, calls, workload.ran)
    if rows is not None:
        answers = tuple(one[..., rows, :, :, :] for one in answers)
    exact = few.answers(images, "reference", torch.float64)
    rounding = few.rounding(images)
    budgets = [rounding] * len(exact)
    if rounding > 0:
        plain = few.answers(images, "reference", torch.float32)
        budgets = [rounding + few.tolerance * error for error in errors_of(plain, exact)]
    pairs = list(zip(errors_of(answers, exact), budgets, strict=True))
    for error, budget in pairs:
        # Turned round, so that NaN fails.
        if not error <= budget:
            raise CheckError(
                f"{case.id}: the result on {len(images)} images is wrong by {error:.3g}, expected "
                f"at most {budget:.3g}"
            )
    # The one nearest to its budget.
    error, budget = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)
    record = {"images": len(images), "error": error, "budget": budget}
    return record if few.x is None else record | {"noisy_images": len(few.x)}


def check_yardsticks(workload: Workload, yardsticks: Mapping[str, Yardstick]) -> Record:
    """Compare the yardsticks that give the same answer with the reference in float64.

    Raises:
        CheckError: One of them gives another answer.
    """
    errors = {}
    exact: dict[int, tuple[Tensor, ...]] = {}
    for name, yardstick in yardsticks.items():
        if yardstick.answer is None:
            continue
        count = yardstick.check_images or workload.case.check_images
        images = workload.images[:count]
        if count not in exact:
            exact[count] = workload.answers(images, "reference", torch.float64)
        answer = yardstick.answer(training_values(images, torch.float32))
        [errors[name]] = errors_of((answer,), exact[count])
        if not errors[name] <= _EAGER_ERROR:
            raise CheckError(
                f"{workload.case.id}: the yardstick {name} is wrong by {errors[name]:.3g}, "
                f"expected at most {_EAGER_ERROR}"
            )
    return {"yardstick_errors": errors} if errors else {}


def assert_backend(case: Case, calls: Sequence[tuple[str, str]], op: str | None = None) -> None:
    """The case's operation ran, and everything ran on its backend.

    Raises:
        WrongBackendError: It did not.
    """
    op = op or case.op
    if (op, case.backend) not in calls or {backend for _, backend in calls} != {case.backend}:
        ran = ", ".join(f"{name} on {backend}" for name, backend in dict.fromkeys(calls))
        raise WrongBackendError(
            f"{case.id}: expected {op} on {case.backend}, ran: {ran or 'nothing'}"
        )


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds that a function takes on the processor."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    clock: Callable[[Callable[[], object]], float] = seconds_of,
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each function, A B C A B C .., after one round that does not count.

    Args:
        functions: What to time, by name.
        repetitions: Rounds at most.
        clock: What times one run of a function.
        budget: Seconds after which no round begins; one is timed anyhow. Where there is such a
            limit, all have run before and every round counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    start, untimed = time.perf_counter(), budget == math.inf
    gc.collect()
    gc.disable()
    try:
        for turn in range(repetitions + untimed):
            for name, function in functions.items():
                elapsed = clock(function)
                if turn or not untimed:
                    seconds[name].append(elapsed)
            if time.perf_counter() - start > budget:
                break
    finally:
        gc.enable()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """That many torch threads inside a `with` block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
