"""The GPU suite in one command, from a checkout, on a machine with an NVIDIA GPU.

    python -m benchmarks.gpu_suite --out benchmarks/results/NAME.json [--cifar10 ZIP --mnist ZIP]

runs every case (checked against float64 before it is timed, in turns with its yardsticks, from a
cold L2 cache), the kernels' tests, and first calls with and without what was compiled before,
within `--budget` seconds. Cases name their backend, so kernels that run by name only take part.
They run in a process of their own, which is started again where a kernel breaks it or hangs.
Results are written after every case; `--resume` goes on with a file where the time ran out.
`--dry-run` runs the same code on tiny sizes in Triton's interpreter, without a GPU: its numbers
mean nothing, but whatever would fail for a silly reason fails there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone

import torch

from .command import SCHEMA, Record, check_results, read_json, results_parser, write_json
from .kernels.gpu_checks import run_sanitizers, run_tests
from .kernels.gpu_machine import gpu_state
from .kernels.gpu_start import OPERATIONS, start_times
from .kernels.gpu_worker import line_of, missing_cases
from .machine import machine_facts

# Exit code of a whole run in which a case or a test failed; an error ends with others.
FAILED = 3
# Seconds that are left for the tests, and by which a case may overrun into them.
_TEST_SECONDS, _OVERRUN_SECONDS = 120, 30
# A case that takes longer hangs; processes of a run at most.
_CASE_SECONDS, _MOST_PROCESSES = 180, 6
# Status and reason of cases that `--resume` runs.
_NO_TIME = "skipped", "no time left"
_NOT_REACHED = "failed", "no process came to it"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite as the command line asks; returns `FAILED` where something failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_results(parser, options)
    if options.dry_run:
        # The processes of the cases inherit it.
        os.environ["TRITON_INTERPRET"] = "1"
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: --dry-run runs without one")
    if not missing_cases(options, {"results": []}):
        parser.error(f"--case: no case has {options.case!r} in its name")
    try:
        suite = Suite(options)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    report = suite.run()
    print(table(report))
    print(f"\nwritten: {options.out}")
    failed = [record for record in report["results"] if record["status"] == "failed"]
    checks = (report["tests"], report["sanitizers"])
    return FAILED if failed or any(one.get("exit_code") for one in checks) else 0


class Suite:
    """One run of the suite.

    Args:
        options: What the command line holds.

    Raises:
        ValueError: The file to go on with is of another run.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = time.perf_counter()
        self.report = self._begun()
        # Seconds of earlier runs that this one goes on with.
        self.before = self.report.get("seconds", 0.0)

    def _begun(self) -> Record:
        report: Record = {
            "schema": SCHEMA,
            "suite": "gpu",
            "quick": self.options.quick,
            "dry_run": self.options.dry_run,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine_facts(),
            "gpu_before": gpu_state(),
            "start": {},
            "results": [],
            "tests": {},
            "sanitizers": {},
        }
        if self.options.commit:
            report["machine"]["commit"] = self.options.commit
        if not (self.options.resume and self.options.out.exists()):
            return report
        result = read_json(self.options.out)
        for key in ("schema", "suite", "quick", "dry_run"):
            if result.get(key) != report[key]:
                raise ValueError(f"{key} of the file is {result.get(key)}, not {report[key]}")
        commits = [one["machine"].get("commit") for one in (result, report)]
        if commits[0] != commits[1]:
            raise ValueError(f"the file is of commit {commits[0]}, this is {commits[1]}")
        # A case in which the run was interrupted runs again.
        result.pop("running", None)
        result["results"] = [
            one
            for one in result["results"]
            if one["status"] != "skipped" and one.get("reason") != _NOT_REACHED[1]
        ]
        return result

    def run(self) -> Record:
        """Run the cases, then the tests, then first calls, which matter least."""
        self._write()
        self._run_cases()
        # What an earlier run has done need not be done again.
        if self.options.tests and self.report["tests"].get("exit_code") != 0:
            self.report["tests"] = run_tests(self._left)
            self._write()
        if self.options.sanitize:
            self.report["sanitizers"] = run_sanitizers(self._left)
            self._write()
        if self.options.start and not self.report["start"]:
            few = list(OPERATIONS)[: 1 if self.options.dry_run else None]
            self.report["start"] = start_times(few, self._left)
        self.report["gpu_after"] = gpu_state()
        self._write()
        return self.report

    def _run_cases(self) -> None:
        """Run the cases in processes that go on from one another."""
        for _ in range(_MOST_PROCESSES):
            count = len(missing_cases(self.options, self.report))
            if count == 0 or self._left() < self._reserve():
                break
            status, why = self._work()
            self.report = read_json(self.options.out)
            if (running := self.report.pop("running", None)) is not None:
                self._add(running, status, f"its process {why}")
            self._write()
            if len(missing_cases(self.options, self.report)) == count:
                # The next process would do no better.
                print(f"the process of the cases {why} before its first case", flush=True)
                break
        in_time = self._left() > self._reserve()
        status, why = _NOT_REACHED if in_time else _NO_TIME
        for case in missing_cases(self.options, self.report):
            self._add(case.id, status, why)
        self._write()

    def _work(self) -> tuple[str, str]:
        """Run cases in a process of its own: status of the case in which it ended, and how."""
        process = subprocess.Popen(self._command())
        changed, since = None, time.perf_counter()
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return "failed", f"ended with code {process.wait(timeout=0.5)}"
                now = time.perf_counter()
                # It writes when a case begins and when it ends.
                stamp = self.options.out.stat().st_mtime_ns
                if stamp != changed:
                    changed, since = stamp, now
                if now - since > _CASE_SECONDS:
                    return "failed", f"was killed after {_CASE_SECONDS} s"
                if self._left() < self._reserve() - _OVERRUN_SECONDS:
                    return "skipped", "was killed at the end of the time"
        finally:
            process.kill()
            # A process in the driver's hands may not end at all.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)

    def _command(self) -> list[str]:
        names = ("quick", "dry_run", "case", "cifar10", "mnist")
        words = {name: getattr(self.options, name) for name in names}
        words |= {"out": str(self.options.out), "seconds": self._left() - self._reserve()}
        return [sys.executable, "-m", f"{__package__}.kernels.gpu_worker", json.dumps(words)]

    def _add(self, name: str, status: str, why: str) -> None:
        """Record a case of which nothing was measured."""
        op, backend, _ = name.split("/")
        record = {"id": name, "op": op, "backend": backend, "status": status, "reason": why}
        self.report["results"].append(record)
        print(line_of(record), flush=True)

    def _reserve(self) -> float:
        """Seconds that the cases leave."""
        return _TEST_SECONDS if self.options.tests else 0

    def _left(self) -> float:
        return self.options.budget - (time.perf_counter() - self.start)

    def _write(self) -> None:
        self.report["seconds"] = self.before + time.perf_counter() - self.start
        write_json(self.report, self.options.out)


def table(report: Record) -> str:
    """Cases, the ten DDIM steps, the tests and first calls."""
    lines = ["", f"{'case':<58} {'median':>8} {'p20':>8} {'p80':>8} {'busy':>8}"]
    lines += [line_of(record) for record in report["results"]]
    lines.append("busy: kernels alone, by torch's profiler. MiB: beyond what is kept (with it)")
    for precision, ending in (("exact", ""), ("auto", "-auto")):
        lines += _step_lines(report["results"], precision, ending)
    for op, calls in report["start"].items():
        told = ", ".join(
            f"{name} {call['first_seconds']:.2f} s"
            if "first_seconds" in call
            else f"{name} {'FAILED' if 'failed' in call else 'skipped'}"
            for name, call in calls.items()
        )
        lines.append(f"first call of {op}: {told}")
    for part in ("tests", "sanitizers"):
        lines += [
            f"{part} {name}: exit code {run['exit_code']}: {run['tail'][-1:]}"
            for name, run in report[part].items()
            if isinstance(run, dict)
        ]
        if "unavailable" in report[part]:
            lines.append(f"{part}: {report[part]['unavailable']}")
    if report["dry_run"]:
        lines.append("dry run: no number means anything")
    return "\n".join(lines)


def _step_lines(results: Sequence[Record], precision: str, ending: str) -> list[str]:
    """A run of ten DDIM steps, and the means of its noise levels one by one."""
    done = {one["id"]: one["seconds"]["median"] for one in results if one["status"] == "ok"}
    lines = []
    run = f"ddim/triton/cifar-B8{ending}"
    if run in done:
        told = f"PCA-locality by DDIM at B = 8, precision {precision!r}: {done[run] * 1e3:.1f} ms"
        lines.append(f"{told} a run ({run})")
    name = rf"masked_posterior/triton/cifar-B8-t\d+{ending}"
    steps = [seconds for one, seconds in done.items() if re.fullmatch(name, one)]
    if steps:
        # A run has other masks in every step.
        told = "with the norms of the masks kept, which a run makes anew in every step"
        count = f"{len(steps)} PCA-locality steps at B = 8, precision {precision!r}"
        lines.append(f"sum of {count}: {sum(steps) * 1e3:.1f} ms, {told}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = results_parser("gpu_suite", "Run the GPU tests and benchmarks.")
    parser.add_argument(
        "--resume", action="store_true", help="go on with --out: run what had no time"
    )
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
    parser.add_argument(
        "--sanitize", action="store_true", help="some tests under compute-sanitizer as well"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
