"""The command line.

    pyflocality generate | compare | moments | sensitivity | spectrum | memorize | pack
    | plan | bench | reproduce | doctor

Every command answers a mistake with one line on standard error. Exit codes: 0 done, 1 this
machine cannot do it (missing package, backend, memory, disk), 2 wrong arguments or inputs,
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pyflocality.cli._analysis import memorize, sensitivity, spectrum
from pyflocality.cli._bench import bench
from pyflocality.cli._compare import compare
from pyflocality.cli._doctor import doctor
from pyflocality.cli._generate import generate
from pyflocality.cli._moments import moments
from pyflocality.cli._pack import pack
from pyflocality.cli._plan import plan
from pyflocality.cli._ranks import one_voice
from pyflocality.cli._reproduce import reproduce

app = typer.Typer(
    name="pyflocality",
    help="Exact, training-free diffusion models straight from a set of images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    generate,
    compare,
    moments,
    sensitivity,
    spectrum,
    memorize,
    pack,
    plan,
    bench,
    reproduce,
    doctor,
):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from pyflocality._version import __version__

        typer.echo(f"pyflocality {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `pyflocality`; None takes those of the process.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> int:
        try:
            app(args=words, prog_name="pyflocality")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return 0

    return one_voice(run) if words[:1] == ["generate"] else run()
