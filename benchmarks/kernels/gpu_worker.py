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
from typing import TYPE_CHECKING, Any

from .gpu_kernels import find_checkout_packages, pretend_gpu

if TYPE_CHECKING:
    from .gpu_cases import GpuCase, GpuPlan
    from .gpu_workload import GpuSet, GpuWorkload

# Exit code of a process that another one should go on from.
BROKEN = 4
# Seconds that a case must have left to start.
_LEAST_SECONDS = 10
# Longest reference on a whole set, seconds.
_WHOLE_SECONDS = 20


def main(words: Sequence[str]) -> int:
    """Run what is missing; returns `BROKEN` where the CUDA context is."""
    options = argparse.Namespace(**json.loads(words[0]))
    options.out = Path(options.out)
    find_checkout_packages()
    from ..gpu_suite import missing_cases, read_report

    report = read_report(options.out)
    return Worker(options, report).run(missing_cases(options, report))


class Worker:
    """Runs cases and writes the results after each.

    Args:
        options: What the command line of the suite holds, and `seconds`.
        report: What the file holds so far.
    """

    def __init__(self, options: argparse.Namespace, report: dict[str, Any]) -> None:
        import torch

        from .gpu_cases import DRY, FULL, QUICK
        from .gpu_machine import Timer

        self.options, self.report = options, report
        self.start = time.perf_counter()
        self.plan: GpuPlan = DRY if options.dry_run else QUICK if options.quick else FULL
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.sets: dict[str, GpuSet] = {}
        self.timer = Timer(self.device)

    def run(self, cases: Sequence[GpuCase]) -> int:
        """Run the cases; returns `BROKEN` where another process should go on, else 0."""
        from .gpu_machine import gpu_facts

        self.report["machine"] |= gpu_facts()
        with ExitStack() as stack:
            if self.options.dry_run:
                pretend_gpu(stack)
            for case in cases:
                # If this is the last that is heard of the process, it is known why.
                self.report["running"] = case.id
                self._write()
                record, usable = self._record(case)
                del self.report["running"]
                self._take(record)
                if not usable:
                    return BROKEN
        return 0

    def _record(self, case: GpuCase) -> tuple[dict[str, Any], bool]:
        """Run a case, a failure is a record like any other; and whether the GPU is usable then."""
        record = {"id": case.id, "op": case.op, "backend": case.backend}
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
        import torch

        try:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001  (of torch or CuPy, by version)
            return f"{type(error).__name__}: {error}"
        return None

    def _unavailable(self, case: GpuCase) -> str | None:
        """Why the backend cannot serve the case."""
        from pyflocality.backends import selection as _backends

        if self.options.dry_run and case.backend != "triton":
            return "a dry run has no CUDA device"
        return _backends.machine_reason(case.backend)

    def _measure(self, case: GpuCase) -> dict[str, Any]:
        import pyflocality as pf

        from .gpu_workload import GpuWorkload
        from .runner import spread

        workload = GpuWorkload(case, self._set(case.data), self.plan, self.options.dry_run)
        workload.prepare()
        inputs_only = self.timer.allocated()
        with pf.trace_backends() as calls:
            check = workload.check()
        op = "masked_posterior" if case.op == "ddim" else case.op
        if (op, case.backend) not in calls:
            raise RuntimeError(f"{op} did not run on {case.backend}: {sorted(set(calls))}")
        # The first call over the set, which makes what is kept for later ones.
        with_kept = self.timer.peak_memory(workload.run, inputs_only)
        check["whole"] = self._whole_check(case, workload)
        memory = self.timer.peak_memory(workload.run)
        functions, beside, shares = self._yardsticks(case, workload)
        seconds = self.timer.in_turns(functions, min(case.seconds, self._left() / 2))
        mine = seconds.pop("")
        for name, times in seconds.items():
            whole = [one / shares[name] for one in times]
            ratios = [other / own for other, own in zip(whole, mine, strict=True)]
            beside[name] |= {"seconds": spread(whole), "ratio": spread(ratios)}
            beside[name]["measured_share"] = shares[name]
        return {
            "check": check,
            "images": len(workload.images),
            "shape": list(workload.images.shape[1:]),
            "rounds": len(mine),
            "seconds": spread(mine),
            # After the timing, which a profiler would disturb.
            "busy": self.timer.busy(workload.run),
            "peak_extra_bytes": memory,
            "peak_with_kept_bytes": with_kept,
            "terms": workload.terms(),
            "yardsticks": beside,
        }

    def _whole_check(self, case: GpuCase, workload: GpuWorkload) -> dict[str, Any]:
        """The check on the whole set, for the first case of each kernel, set and precision."""
        kind = [*case.kind, case.data, case.precision]
        done = [record.get("check", {}).get("whole", {}) for record in self.report["results"]]
        if any(one.get("kind") == kind and "error" in one for one in done):
            return {"unchecked": "another case of its kind is compared"}
        found = workload.check_whole(min(_WHOLE_SECONDS, self._left() / 2))
        return {"kind": kind} | found

    def _yardsticks(
        self, case: GpuCase, workload: GpuWorkload
    ) -> tuple[dict[str, Callable[[], object]], dict[str, dict[str, Any]], dict[str, float]]:
        """What is timed by name, what is known of each yardstick, and its share of the work."""
        from .libraries import UnavailableError

        functions: dict[str, Callable[[], object]] = {"": workload.run}
        beside: dict[str, dict[str, Any]] = {}
        shares: dict[str, float] = {}
        for name in case.yardsticks:
            try:
                functions[name], shares[name], note = workload.yardstick(name)
                functions[name]()
                beside[name] = {"note": note}
            except UnavailableError as reason:
                beside[name] = {"unavailable": str(reason)}
            except Exception as error:  # noqa: BLE001  (the case itself is still worth a number)
                functions.pop(name, None)
                beside[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        return functions, beside, shares

    def _set(self, name: str) -> GpuSet:
        from .gpu_workload import MASK_THRESHOLD, GpuSet

        if name not in self.sets:
            # The published threshold of the masks for MNIST.
            (count, shape), real, threshold = {
                "cifar": (self.plan.small, self.options.cifar10, MASK_THRESHOLD),
                "64x64": (self.plan.large, None, MASK_THRESHOLD),
                "mnist": (self.plan.digits, self.options.mnist, 0.005),
            }[name]
            real = None if self.options.dry_run else real
            self.sets[name] = GpuSet.on(self.device, count, shape, real, threshold)
        return self.sets[name]

    def _left(self) -> float:
        return self.options.seconds - (time.perf_counter() - self.start)

    def _take(self, record: dict[str, Any]) -> None:
        from ..gpu_suite import line_of

        self.report["results"].append(record)
        print(line_of(record), flush=True)
        self._write()

    def _write(self) -> None:
        from ..cpu_suite import write_json

        self.report.setdefault("preparation_seconds", {}).update(
            {name: data.preparation for name, data in self.sets.items()}
        )
        write_json(self.report, self.options.out)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
