"""`pyflocality bench`: how fast the operations are on this machine."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pyflocality.cli import _options as common
from pyflocality.cli._errors import reported
from pyflocality.cli._files import Outputs


@reported()
def bench(
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
        Path | None,
        typer.Option(
            help="JSON file for all that was measured. Interrupted, a run with the same file goes "
            "on where it was.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    force: common.Force = False,
    as_json: common.Json = False,
    progress: common.Progress = True,
) -> None:
    """Time every operation beside other ways to compute the same, on synthetic images.

    Each case is checked against the reference in float64 before it is timed, and takes turns with
    its yardsticks: the published algorithms in plain torch and through torch.compile, torch's
    attention, KeOps and faiss, those of them that are installed.
    """
    from pyflocality.benchmarks.cpu_suite import run_suite, unfinished_twin, write_json
    from pyflocality.benchmarks.registry import FULL, QUICK, cases
    from pyflocality.benchmarks.sets import BenchmarkSet
    from pyflocality.benchmarks.summary import table

    plan = QUICK if quick else FULL
    chosen = [case for case in cases(plan) if filter in case.id]
    if not chosen:
        raise ValueError(f"`filter` must be part of the name of a case (--list), got {filter!r}")
    if list_cases:
        typer.echo("\n".join(case.id for case in chosen))
        return
    with nullcontext() if out is None else Outputs([out], force=force) as outputs:
        report = run_suite(
            chosen,
            BenchmarkSet.build(plan.images, plan.shape, None),
            plan,
            quick=quick,
            unfinished=None if out is None else unfinished_twin(out),
            progress=progress,
        )
        if outputs is not None:
            write_json(report, outputs.temporary[out])
            outputs.commit()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(table(report["results"], report["summary"]))
    if quick:
        typer.echo("quick: tiny sizes, the numbers mean little")
    if out is not None:
        typer.echo(f"written: {out}")
