"""`pyflocality bench`: how fast the operations are on this machine."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer

from pyflocality._support.outputs import Outputs
from pyflocality._support.streams import answer, listed
from pyflocality.cli._errors import reported
from pyflocality.cli._groups import OUTPUT
from pyflocality.cli._options import ResultOptions, given_path


@reported()
def bench(
    *,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Tiny sizes, in less than a minute: the numbers mean little."),
    ] = False,
    filter: Annotated[
        str, typer.Option(help="Run only cases with this in their name.", metavar="SUBSTRING")
    ] = "",
    list_cases: Annotated[
        bool, typer.Option("--list", help="Print the names of the cases and stop.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="JSON file for all that was measured. Interrupted, a run with the same file goes "
            "on where it was.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    results: ResultOptions,
) -> None:
    """Time every operation beside other ways to compute the same, on synthetic images.

    Each case is checked against the reference in float64 before it is timed, and takes turns with
    its yardsticks: the published algorithms in plain torch and through torch.compile, torch's
    attention, KeOps and faiss, those of them that are installed.
    """
    from pyflocality.benchmarks.command import write_json
    from pyflocality.benchmarks.cpu_suite import run_suite, unfinished_twin
    from pyflocality.benchmarks.kernels.registry import FULL, QUICK, cases
    from pyflocality.benchmarks.kernels.sets import BenchmarkSet
    from pyflocality.benchmarks.publish.summary import table

    file = given_path(out, "out")
    plan = QUICK if quick else FULL
    chosen = [case for case in cases(plan) if filter in case.id]
    if not chosen:
        raise ValueError(f"`filter` must be part of the name of a case (--list), got {filter!r}")
    if list_cases:
        answer("\n".join(case.id for case in chosen), only_here=True)
        return
    written: AbstractContextManager[Outputs | None] = nullcontext()
    if file is not None:
        asked = {"command": "bench", "quick": quick, "filter": filter}
        written = Outputs([file], force=results.force, run=asked)
    with written as outputs:
        report = run_suite(
            chosen,
            BenchmarkSet.build(plan.images, plan.shape, None),
            plan,
            quick=quick,
            unfinished=None if file is None else unfinished_twin(file),
            progress=results.progress,
        )
        if outputs is not None and file is not None:
            write_json(report, outputs.temporary[file])
            outputs.commit()
    if results.as_json:
        answer(json.dumps(report, indent=2), only_here=True)
        return
    lines = [table(report["results"], report["summary"])]
    if quick:
        lines.append("quick: tiny sizes, the numbers mean little")
    if file is not None:
        lines.append(f"written: {listed([file])}")
    answer("\n".join(lines), only_here=file is None)
