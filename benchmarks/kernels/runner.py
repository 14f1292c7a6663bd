"""The runner: checks a case, asserts which backend ran, times it in turns with its yardsticks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyflocality as pf
from pyflocality.storage.reader import training_values

from .libraries import UnavailableError
from .registry import Case
from .sets import BenchmarkSet
from .workload import Workload, Yardstick, largest_error
from .workloads import make_workload

# An eager algorithm in float32 is allowed this much; it is a yardstick, not a result.
_EAGER_ERROR = 0.02


class CheckError(RuntimeError):
    """A case computes something else than the reference, or an eager yardstick does."""


class WrongBackendError(RuntimeError):
    """Another backend ran than the one that is being timed."""


def run_case(case: Case, data: BenchmarkSet) -> dict[str, Any]:
    """Check and time a case.

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
        return _record(workload, check, seconds, yardsticks) | {"missing": missing}


def available_yardsticks(workload: Workload) -> tuple[dict[str, Yardstick], dict[str, str]]:
    """Yardsticks of a case by name, and why others cannot run here."""
    found, missing = {}, {}
    for name in workload.case.yardsticks:
        try:
            found[name] = workload.yardstick(name)
        except UnavailableError as error:
            missing[name] = str(error)
    return found, missing


def check_workload(workload: Workload) -> dict[str, Any]:
    """Compare a case with the reference in float64, on some of its images.

    The budget is twice the error of the reference in float32, and what `Workload.rounding` allows.

    Raises:
        CheckError: The error is larger.
        WrongBackendError: Another backend ran.
    """
    case = workload.case
    images = workload.images[: case.check_images]
    with pf.trace_backends() as calls:
        found = workload.answers(images, case.backend)
    assert_backend(case, calls)
    exact = workload.answers(images, "reference", torch.float64)
    error, budget = largest_error(found, exact), workload.rounding(images)
    if budget > 0:
        budget += 2 * largest_error(workload.answers(images, "reference", torch.float32), exact)
    if not error <= budget:
        raise CheckError(
            f"{case.id}: the result on {len(images)} images is wrong by {error:.3g}, expected at "
            f"most {budget:.3g}"
        )
    return {"images": len(images), "error": error, "budget": budget}


def check_yardsticks(workload: Workload, yardsticks: Mapping[str, Yardstick]) -> dict[str, Any]:
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
        errors[name] = largest_error((answer,), exact[count])
    for name, error in errors.items():
        if not error <= _EAGER_ERROR:
            raise CheckError(
                f"{workload.case.id}: the yardstick {name} is wrong by {error:.3g}, expected at "
                f"most {_EAGER_ERROR}"
            )
    return {"yardstick_errors": errors} if errors else {}


def assert_backend(case: Case, calls: Sequence[tuple[str, str]]) -> None:
    """The case's operation ran, and everything ran on its backend.

    Raises:
        WrongBackendError: It did not.
    """
    if (case.op, case.backend) not in calls or {backend for _, backend in calls} != {case.backend}:
        ran = ", ".join(f"{op} on {backend}" for op, backend in dict.fromkeys(calls)) or "nothing"
        raise WrongBackendError(f"{case.id}: expected {case.op} on {case.backend}, ran: {ran}")


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each function, A B C A B C .., after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for turn in range(repetitions + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                elapsed = time.perf_counter() - start
                if turn > 0:
                    seconds[name].append(elapsed)
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


def _record(
    workload: Workload,
    check: dict[str, Any],
    seconds: Mapping[str, list[float]],
    yardsticks: Mapping[str, Yardstick],
) -> dict[str, Any]:
    case, mine = workload.case, seconds[""]
    typical = spread(mine)["median"]
    beside = {}
    for name, yardstick in yardsticks.items():
        whole = [value / yardstick.share for value in seconds[name]]
        beside[name] = {
            "note": yardstick.note,
            "seconds": spread(whole),
            "measured_share": yardstick.share,
            # Of the yardstick's time to the case's, round by round.
            "ratio": spread([other / own for other, own in zip(whole, mine, strict=True)]),
        }
    return {
        "id": case.id,
        "suite": case.suite,
        "op": case.op,
        "backend": case.backend,
        "images": case.images,
        "shape": list(workload.shape),
        "values": workload.values,
        "batch": case.batch,
        "timestep": case.timestep,
        "window": case.window,
        "tangents": case.tangents,
        "threads": torch.get_num_threads(),
        "repetitions": case.repetitions,
        "check": check,
        "flops": workload.flops(),
        "bytes": workload.bytes(),
        "seconds": {**spread(mine), "all": mine},
        "gflops_per_second": workload.flops() / typical / 1e9,
        "gbytes_per_second": workload.bytes() / typical / 1e9,
        "yardsticks": beside,
        "facts": workload.facts(),
    }
