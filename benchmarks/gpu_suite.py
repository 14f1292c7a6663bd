"""The GPU suite in one command, from a checkout, on a machine with an NVIDIA GPU.

    python -m benchmarks.gpu_suite --out benchmarks/results/NAME.json [--cifar10 ZIP --mnist ZIP]

runs first calls with and without what was compiled before, every case (checked against float64
before it is timed, in turns with its yardsticks, from a cold L2 cache) and the kernels' tests,
within `--budget` seconds. Cases name their backend, so kernels that run by name only take part.
Results are written after every case. `--dry-run` runs the same code on tiny sizes in Triton's
interpreter, without a GPU: its numbers mean nothing, but whatever would fail for a silly reason
fails there.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gpu_kernels import ROOT, find_checkout_packages, pretend_gpu

if TYPE_CHECKING:
    from .gpu_cases import GpuCase, GpuPlan
    from .gpu_workload import GpuSet

SCHEMA = 1
# Exit code of a whole run in which a case or a test failed; an error ends with others.
FAILED = 3
# Seconds that are left for the tests at the end, and that a case must have left to start.
_TEST_SECONDS, _LEAST_SECONDS = 120, 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite as the command line asks; returns `FAILED` where something failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} is there already; --force replaces it")
    if not options.out.parent.is_dir():
        parser.error(f"there is no folder {options.out.parent}")
    if options.dry_run:
        # Before anything imports Triton.
        os.environ["TRITON_INTERPRET"] = "1"
    find_checkout_packages()
    import torch

    from .gpu_cases import gpu_cases

    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: --dry-run runs without one")
    cases = [
        case for case in gpu_cases(few=options.quick or options.dry_run) if options.case in case.id
    ]
    if not cases:
        parser.error(f"--case: no case has {options.case!r} in its name")
    report = Suite(options).run(cases)
    print(table(report))
    print(f"\nwritten: {options.out}")
    failed = [record for record in report["results"] if record["status"] == "failed"]
    return FAILED if failed or report["tests"].get("exit_code") else 0


class Suite:
    """One run of the suite.

    Args:
        options: What the command line holds.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from .gpu_cases import DRY, FULL, QUICK
        from .gpu_machine import Timer

        self.options = options
        self.start = time.perf_counter()
        self.plan: GpuPlan = DRY if options.dry_run else QUICK if options.quick else FULL
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.sets: dict[str, GpuSet] = {}
        self.timer = Timer(self.device)
        self.report: dict[str, Any] = {}

    def run(self, cases: Sequence[GpuCase]) -> dict[str, Any]:
        """Run all cases, then the tests."""
        from .gpu_machine import gpu_facts, gpu_state
        from .machine import machine_facts

        self.report = {
            "schema": SCHEMA,
            "suite": "gpu",
            "quick": self.options.quick,
            "dry_run": self.options.dry_run,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine_facts() | gpu_facts(),
            "gpu_before": gpu_state(),
            "start": {},
            "results": [],
            "tests": {},
        }
        if self.options.commit:
            self.report["machine"]["commit"] = self.options.commit
        with ExitStack() as stack:
            if self.options.dry_run:
                pretend_gpu(stack)
            if self.options.start:
                self.report["start"] = self._start_times()
            for case in cases:
                self._take(self._record(case))
        if self.options.tests:
            self.report["tests"] = run_tests(self._left())
        self.report["preparation_seconds"] = {
            name: data.preparation for name, data in self.sets.items()
        }
        self.report["gpu_after"] = gpu_state()
        self._write()
        return self.report

    def _start_times(self) -> dict[str, Any]:
        from .gpu_start import OPERATIONS, start_times

        return start_times(list(OPERATIONS)[: 1 if self.options.dry_run else None])

    def _record(self, case: GpuCase) -> dict[str, Any]:
        """Run a case; a failure is a record like any other."""
        record = {"id": case.id, "op": case.op, "backend": case.backend}
        needed = _LEAST_SECONDS + (_TEST_SECONDS if self.options.tests else 0)
        if self._left() < needed:
            return record | {"status": "skipped", "reason": "no time left"}
        why_not = self._unavailable(case)
        if why_not is not None:
            return record | {"status": "unavailable", "reason": why_not}
        started = time.perf_counter()
        try:
            record |= {"status": "ok"} | self._measure(case)
        except Exception as error:  # noqa: BLE001  (a broken kernel must not hide the others)
            trace = traceback.format_exc().splitlines()[-12:]
            record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            record["trace"] = trace
        record["whole_seconds"] = time.perf_counter() - started
        self._free()
        return record

    def _unavailable(self, case: GpuCase) -> str | None:
        """Why the backend cannot serve the case."""
        from pyflocality import _backends

        if self.options.dry_run and case.backend != "triton":
            return "a dry run has no CUDA device"
        return _backends.machine_reason(case.backend)

    def _measure(self, case: GpuCase) -> dict[str, Any]:
        import pyflocality as pf

        from .gpu_workload import GpuWorkload
        from .libraries import UnavailableError
        from .runner import spread

        workload = GpuWorkload(case, self._set(case.data), self.plan, self.options.dry_run)
        with pf.trace_backends() as calls:
            check = workload.check()
        op = "masked_posterior" if case.op == "ddim" else case.op
        if (op, case.backend) not in calls:
            raise RuntimeError(f"{op} did not run on {case.backend}: {sorted(set(calls))}")
        memory = self.timer.peak_memory(workload.run)
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
            "peak_extra_bytes": memory,
            "terms": workload.terms(),
            "yardsticks": beside,
        }

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
        return self.options.budget - (time.perf_counter() - self.start)

    def _take(self, record: dict[str, Any]) -> None:
        self.report["results"].append(record)
        print(line_of(record), flush=True)
        self._write()

    def _write(self) -> None:
        from .cpu_suite import write_json

        self.report["seconds"] = time.perf_counter() - self.start
        write_json(self.report, self.options.out)

    def _free(self) -> None:
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run_tests(seconds: float) -> dict[str, Any]:
    """The kernels' tests and all marked `gpu`, on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-k", "not compiled"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    runs = {}
    for name, chosen in (("kernels", ["tests/triton_kernels"]), ("marked", ["-m", "gpu", "tests"])):
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, *chosen],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=max(5.0, seconds),
                check=False,
            )
            # 5: no test was chosen.
            code, tail = done.returncode % 5, done.stdout.splitlines()[-15:]
        except subprocess.TimeoutExpired:
            code, tail = None, ["out of time"]
        runs[name] = {"exit_code": code, "tail": tail, "seconds": time.perf_counter() - start}
        seconds -= time.perf_counter() - start
    return runs | {"exit_code": max(run["exit_code"] or 0 for run in runs.values())}


def line_of(record: dict[str, Any]) -> str:
    """A case in one line."""
    head = f"{record['id']:<58} "
    if record["status"] != "ok":
        return f"{head}{record['status'].upper()}: {record['reason'][:200]}"
    seconds, memory = record["seconds"], record["peak_extra_bytes"]
    times = " ".join(f"{seconds[key] * 1e3:8.3f}" for key in ("median", "p20", "p80"))
    beside = ", ".join(
        f"{name} x{mark['ratio']['median']:.3g}"
        if "ratio" in mark
        else f"{name} {'FAILED' if 'failed' in mark else 'unavailable'}"
        for name, mark in record["yardsticks"].items()
    )
    room = "" if memory is None else f"{memory / 2**20:7.0f} MiB  "
    return f"{head}{times} ms  {room}{beside}"


def table(report: dict[str, Any]) -> str:
    """Cases, the sum of the ten DDIM steps, and the tests."""
    lines = ["", f"{'case':<58} {'median':>8} {'p20':>8} {'p80':>8}"]
    lines += [line_of(record) for record in report["results"]]
    for precision, ending in (("exact", ""), ("auto", "-auto")):
        name = rf"masked_posterior/triton/cifar-B8-t\d+{ending}"
        steps = [
            record["seconds"]["median"]
            for record in report["results"]
            if re.fullmatch(name, record["id"]) and record["status"] == "ok"
        ]
        if steps:
            told = f"{len(steps)} PCA-locality steps at B = 8, precision {precision!r}"
            lines.append(f"sum of {told}: {sum(steps) * 1e3:.1f} ms")
    for op, calls in report["start"].items():
        told = ", ".join(
            f"{name} {call['first_seconds']:.2f} s" if "first_seconds" in call else f"{name} FAILED"
            for name, call in calls.items()
        )
        lines.append(f"first call of {op}: {told}")
    for name, run in report["tests"].items():
        if isinstance(run, dict):
            lines.append(f"tests {name}: exit code {run['exit_code']}: {run['tail'][-1:]}")
    if report["dry_run"]:
        lines.append("dry run: no number means anything")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description="Run the GPU tests and benchmarks."
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--force", action="store_true", help="replace --out where it exists")
    parser.add_argument("--quick", action="store_true", help="smaller sets, fewer cases")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU"
    )
    parser.add_argument("--budget", type=float, default=510.0, help="seconds to finish within")
    parser.add_argument("--case", default="", help="run only cases with this in their name")
    parser.add_argument("--cifar10", help="CIFAR-10's training images; synthetic ones without them")
    parser.add_argument("--mnist", help="MNIST's training images; synthetic ones without them")
    parser.add_argument(
        "--no-start", dest="start", action="store_false", help="no first calls in new processes"
    )
    parser.add_argument("--commit", help="commit to record where git does not tell")
    parser.add_argument(
        "--no-tests", dest="tests", action="store_false", help="benchmarks only, without pytest"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
