"""The CPU benchmarks in one command, from a checkout with the extension built in place.

    python -m benchmarks.cpu_suite --out benchmarks/results/NAME.json

writes one JSON, prints a table and draws the scaling curves beside the JSON where matplotlib is
installed. Without `--cifar10` it runs on synthetic images. Interrupted and started again, it goes
on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from pyflocality._support.progress import progress_bar

from .command import (
    SCHEMA,
    Record,
    check_results,
    path_option,
    read_json,
    results_parser,
    write_json,
)
from .kernels.registry import FULL, QUICK, Case, Plan, cases
from .kernels.runner import run_case
from .kernels.sets import BenchmarkSet
from .machine import machine_facts, machine_rates
from .publish.summary import summarise, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite as the command line asks; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    chosen = [case for case in cases(plan) if options.case in case.id]
    if not chosen:
        parser.error(f"--case: no case has {options.case!r} in its name")
    if options.list:
        print("\n".join(case.id for case in chosen))
        return 0
    check_results(parser, options)
    data = BenchmarkSet.build(plan.images, plan.shape, options.cifar10)
    report = run_suite(
        chosen, data, plan, quick=options.quick, unfinished=unfinished_twin(options.out)
    )
    write_json(report, options.out)
    print(table(report["results"], report["summary"]))
    print(f"\nwritten: {options.out}")
    _draw(options.out)
    return 0


def run_suite(
    chosen: Sequence[Case],
    data: BenchmarkSet,
    plan: Plan,
    *,
    quick: bool,
    unfinished: Path | None = None,
    progress: bool = True,
) -> Record:
    """Run the cases and gather what the JSON holds; the numbers of a quick run mean nothing.

    A run that finds `unfinished`, of the same machine, software and data, goes on where that one
    was interrupted; the file is gone at the end.
    """
    report: Record = {
        "schema": SCHEMA,
        "suite": "cpu",
        "quick": quick,
        "machine": machine_facts(),
        "data": data.facts(),
    }
    known = _done_before(report, unfinished)
    started = known.get("date", datetime.now(timezone.utc).isoformat(timespec="seconds"))
    report |= {"date": started, "seconds": known.get("seconds", 0.0)}
    report["rates"] = known.get("rates") or machine_rates()
    done = {record["id"]: record for record in known.get("results", [])}
    clock = time.perf_counter()
    for case in progress_bar(chosen, description="benchmarks", enabled=progress):
        if case.id in done:
            continue
        done[case.id] = run_case(case, data)
        now = time.perf_counter()
        report["seconds"] += now - clock
        clock = now
        if unfinished is not None:
            write_json(report | {"results": list(done.values())}, unfinished)
    results = [done[case.id] for case in chosen]
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return report | {
        "preparation_seconds": data.preparation,
        "complete": len(chosen) == len(cases(plan)),
        "results": results,
        "summary": summarise(results, judged=not quick),
    }


def unfinished_twin(out: Path) -> Path:
    """Where a run that is to write `out` keeps what is done."""
    return out.with_name(out.name + ".unfinished")


def _done_before(report: Record, unfinished: Path | None) -> Record:
    """What an interrupted run left, if it is of the same machine, software and data."""
    if unfinished is None or not unfinished.is_file():
        return {}
    known = read_json(unfinished)
    same = all(known.get(key) == value for key, value in report.items())
    told = "going on from there" if same else "of another run, left out"
    print(f"{unfinished}: {told}", file=sys.stderr)
    return known if same else {}


def _parser() -> argparse.ArgumentParser:
    parser = results_parser("cpu_suite", "Run the CPU benchmarks.", required=False)
    parser.add_argument(
        "--cifar10",
        type=path_option,
        help="zip of CIFAR-10's training images; synthetic without it",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, for a look: its numbers mean nothing"
    )
    parser.add_argument("--case", default="", help="run only cases with this in their name")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    return parser


def _draw(path: Path) -> None:
    """Draw the scaling curves where there are some and matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return
    from .publish.plots import draw

    picture = draw(path)
    if picture is not None:
        print(f"drawn:   {picture}")


if __name__ == "__main__":
    raise SystemExit(main())
