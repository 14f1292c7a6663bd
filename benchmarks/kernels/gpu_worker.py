"""The process of the GPU suite that runs its cases.

An illegal access breaks the CUDA context of its process for good, a hanging kernel the process:
`gpu_suite` starts this one, ends it where it hangs, and starts it again for the cases that are
missing in the file that both write. Its only argument is what the command line of the suite holds,
as JSON, with `seconds` for all cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from pyflocality.backends import selection

from ..command import Record, read_json, write_json
from .gpu_cases import DRY, FULL, QUICK, gpu_cases
from .gpu_machine import Timer, gpu_facts, pretended_gpu
from .libraries import UnavailableError
from .registry import Case
from .runner import check_workload, check_yardsticks, compared, measured, time_in_turns
from .sets import MASK_THRESHOLD, BenchmarkSet
from .workload import Workload, Yardstick
from .workloads import make_workload

# Exit code of a process that another one should go on from.
BROKEN = 4
# Seconds that a case must have left to start.
_LEAST_SECONDS = 10
# Longest reference on a whole set, seconds; its time is estimated on one image of so many.
_WHOLE_SECONDS, _PROBED_SHARE = 20, 16
# Noisy images of a batch that are compared on the whole set.
_WHOLE_ROWS = slice(2)
_MOST_ROUNDS = 30
# Published thresholds of the masks.
_THRESHOLDS = {"cifar": MASK_THRESHOLD, "64x64": MASK_THRESHOLD, "mnist": 0.005}


def main(words: Sequence[str]) -> int:
    """Run what is missing; returns `BROKEN` where the CUDA context is."""
    options = argparse.Namespace(**json.loads(words[0]))
    options.out = Path(options.out)
    report = read_json(options.out)
    return Worker(options, report).run(missing_cases(options, report))


def missing_cases(options: argparse.Namespace, report: Record) -> list[Case]:
    """The cases that the options ask for and the report does not hold."""
    done = {record["id"] for record in report["results"]}
    return [
        case
        for case in gpu_cases(few=options.quick or options.dry_run)
        if options.case in case.id and case.id not in done
    ]


class Worker:
    """Runs cases and writes the results after each.

    Args:
        options: What the command line of the suite holds, and `seconds`.
        report: What the file holds so far.
    """

    def __init__(self, options: argparse.Namespace, report: Record) -> None:
        self.options, self.report = options, report
        self.start = time.perf_counter()
        self.plan = DRY if options.dry_run else QUICK if options.quick else FULL
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.sets: dict[str, BenchmarkSet] = {}
        self.timer = Timer(self.device)

    def run(self, cases: Sequence[Case]) -> int:
        """Run the cases; returns `BROKEN` where another process should go on, else 0."""
        self.report["machine"] |= gpu_facts()
        with ExitStack() as stack:
            if self.options.dry_run:
                stack.enter_context(pretended_gpu())
            for case in cases:
                # If this is the last that is heard of the process, it is known why.
                self.report["running"] = case.id
                self._write()
                record, usable = self._record(case)
                del self.report["running"]
                self.report["results"].append(record)
                print(line_of(record), flush=True)
                self._write()
                if not usable:
                    return BROKEN
        return 0

    def _record(self, case: Case) -> tuple[Record, bool]:
        """Run a case, a failure is a record like any other; and whether the GPU is usable then."""
        record: Record = {"id": case.id, "op": case.op, "backend": case.backend}
        if self._left() < _LEAST_SECONDS:
            return record | {"status": "skipped", "reason": "no time left"}, True
        why_not = self._unavailable(case)
        if why_not is not None:
            return record | {"status": "unavailable", "reason": why_not}, True
        started = time.perf_counter()
        try:
            record |= {"status": "ok"} | self._measure(case)
        except Exception as error:  # noqa: BLE001  (a broken kernel must not hide the others)
            trace = traceback.format_exc().splitlines()[-12:]
            record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            record["trace"] = trace
        record["whole_seconds"] = time.perf_counter() - started
        broken = self._broken()
        if broken is not None:
            # Numbers of a case that breaks the context are kept, but do not count.
            record = {"reason": broken} | record | {"status": "failed", "broken": broken}
        return record, broken is None

    def _broken(self) -> str | None:
        """Free what a case left; says why the CUDA context is of no use any more."""
        try:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001  (of torch or CuPy, by version)
            return f"{type(error).__name__}: {error}"
        return None

    def _unavailable(self, case: Case) -> str | None:
        """Why the backend cannot serve the case."""
        if self.options.dry_run and case.backend != "triton":
            return "a dry run has no CUDA device"
        return selection.machine_reason(case.backend)

    def _measure(self, case: Case) -> Record:
        data = self._set(case.data or "")
        workload = make_workload(self.plan.sized(case), data, self.plan.interpreted)
        inputs_only = self.timer.allocated()
        check = check_workload(workload)
        # The first call over the set, which makes what is kept for later ones.
        with_kept = self.timer.peak_memory(workload.run, inputs_only)
        check["whole"] = self._whole_check(case, workload)
        memory = self.timer.peak_memory(workload.run)
        yardsticks, beside = self._yardsticks(workload)
        functions = {"": workload.run, **{name: y.run for name, y in yardsticks.items()}}
        budget = min(case.seconds, self._left() / 2)
        rounds, budget = (1, 0.0) if self.plan.interpreted else (_MOST_ROUNDS, budget)
        seconds = time_in_turns(functions, rounds, clock=self.timer.seconds, budget=budget)
        mine = seconds[""]
        for name, yardstick in yardsticks.items():
            beside[name] = compared(yardstick, seconds[name], mine)
        return measured(workload, mine) | {
            "check": check,
            "rounds": len(mine),
            # After the timing, which a profiler would disturb.
            "busy": self.timer.busy(workload.run),
            "peak_extra_bytes": memory,
            "peak_with_kept_bytes": with_kept,
            "terms": workload.terms(),
            "yardsticks": beside,
        }

    def _whole_check(self, case: Case, workload: Workload) -> Record:
        """The check on the whole set, for the first case of each kernel, set and precision."""
        kind = [*case.kind, case.data, case.precision]
        done = [record.get("check", {}).get("whole", {}) for record in self.report["results"]]
        if any(one.get("kind") == kind and "error" in one for one in done):
            return {"unchecked": "another case of its kind is compared"}
        limit = min(_WHOLE_SECONDS, self._left() / 2)
        rows = None if workload.x is None else _WHOLE_ROWS
        try:
            needed = _reference_seconds(workload, rows)
            if needed > limit:
                return {"kind": kind, "unchecked": f"the reference would take {needed:.0f} s"}
            return {"kind": kind} | check_workload(workload, workload.images, rows)
        except torch.OutOfMemoryError as error:
            return {"kind": kind, "unchecked": str(error)[:200]}

    def _yardsticks(self, workload: Workload) -> tuple[dict[str, Yardstick], dict[str, Record]]:
        """What runs beside the case by name, each called once, and why others do not."""
        there: dict[str, Yardstick] = {}
        beside: dict[str, Record] = {}
        for name in workload.case.yardsticks:
            try:
                yardstick = workload.yardstick(name)
                check_yardsticks(workload, {name: yardstick})
                yardstick.run()
                there[name] = yardstick
            except UnavailableError as reason:
                beside[name] = {"unavailable": str(reason)}
            except Exception as error:  # noqa: BLE001  (the case itself is still worth a number)
                beside[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        return there, beside

    def _set(self, name: str) -> BenchmarkSet:
        if name not in self.sets:
            real = {"cifar": self.options.cifar10, "mnist": self.options.mnist}.get(name)
            source = None if self.options.dry_run else real
            sizes = self.plan.sets[name]
            self.sets[name] = BenchmarkSet.on_gpu(self.device, *sizes, source, _THRESHOLDS[name])
        return self.sets[name]

    def _left(self) -> float:
        seconds: float = self.options.seconds
        return seconds - (time.perf_counter() - self.start)

    def _write(self) -> None:
        self.report.setdefault("preparation_seconds", {}).update(
            {name: data.preparation for name, data in self.sets.items()}
        )
        write_json(self.report, self.options.out)


def _reference_seconds(workload: Workload, rows: slice | None) -> float:
    """What the reference would take on the whole set, once in float64 and again in float32."""
    few = workload.images[: max(1, len(workload.images) // _PROBED_SHARE)]
    compare: Callable[..., tuple[torch.Tensor, ...]]
    compare = (workload if rows is None else workload.of_rows(rows)).answers
    start = time.perf_counter()
    for one in compare(few, "reference", torch.float64):
        # The copy waits for the GPU.
        one.cpu()
    return 2 * (time.perf_counter() - start) * len(workload.images) / len(few)


def line_of(record: Record) -> str:
    """A case in one line."""
    head = f"{record['id']:<58} "
    if record["status"] != "ok":
        return f"{head}{record['status'].upper()}: {record['reason'][:200]}"
    seconds, memory = record["seconds"], record["peak_extra_bytes"]
    times = [seconds[key] for key in ("median", "p20", "p80")] + [record["busy"].get("seconds")]
    told = " ".join(f"{'-':>8}" if one is None else f"{one * 1e3:8.3f}" for one in times)
    beside = ", ".join(
        f"{name} x{mark['ratio']['median']:.3g}"
        if "ratio" in mark
        else f"{name} {'FAILED' if 'failed' in mark else 'unavailable'}"
        for name, mark in record["yardsticks"].items()
    )
    kept = record["peak_with_kept_bytes"]
    room = "" if memory is None else f"{memory / 2**20:7.0f} ({kept / 2**20:.0f}) MiB  "
    return f"{head}{told} ms  {room}{beside}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
