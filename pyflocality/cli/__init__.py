"""The command line.

    pyflocality generate | compare | calibrate | moments | sensitivity | spectrum | memorize
    | pack | plan | bench | reproduce | cache | doctor

Every command answers a mistake with one line on standard error. Exit codes: 0 done, 1 this
machine cannot do it (missing package, backend, memory, disk), 2 wrong arguments or inputs,
128 + n ended by signal n (130 interrupted). What cannot be written to standard output or standard
error changes none of them, but for an answer that is asked for there (`--json`, `plan`, `cache`,
`doctor`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from pyflocality._support.signals import ended_by_signals, nothing_to_end
from pyflocality._support.streams import (
    answer,
    forgiving_streams,
    occupy_standard_descriptors,
    tell,
)
from pyflocality._support.waiting import has_abandoned_calls
from pyflocality.cli._analysis import memorize, sensitivity, spectrum
from pyflocality.cli._bench import bench
from pyflocality.cli._cache import cache
from pyflocality.cli._calibrate import calibrate
from pyflocality.cli._compare import compare
from pyflocality.cli._doctor import doctor
from pyflocality.cli._errors import in_one_line, show_traceback
from pyflocality.cli._generate import generate
from pyflocality.cli._moments import moments
from pyflocality.cli._pack import pack
from pyflocality.cli._plan import plan
from pyflocality.cli._ranks import in_job, one_voice
from pyflocality.cli._reproduce import reproduce

# What typer raises for words that it cannot read, whichever click it goes by.
_Mistake: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="pyflocality",
    help="Exact, training-free diffusion models straight from a set of images.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    generate,
    compare,
    calibrate,
    moments,
    sensitivity,
    spectrum,
    memorize,
    pack,
    plan,
    bench,
    reproduce,
    cache,
    doctor,
):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from pyflocality._version import __version__

        answer(f"pyflocality {__version__}", only_here=False)
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
            code = app(args=words or ["--help"], prog_name="pyflocality", standalone_mode=False)
        except _Mistake as mistake:
            return _refused(mistake)
        if not words:
            return 2
        # A command that ends by itself has none.
        return code if isinstance(code, int) else 0

    if arguments is not None:
        return _answered(words, run)
    occupy_standard_descriptors()
    sys.excepthook = show_traceback
    code = _answered(words, run)
    if not in_job():
        nothing_to_end()
    if has_abandoned_calls():
        # Python's own end, and that of the libraries, would wait for them or trip over them.
        os._exit(code)
    return code


def _answered(words: Sequence[str], run: Callable[[], int]) -> int:
    """Run a command with signals and streams as a command line has them."""
    with forgiving_streams():
        # torchrun tells its ranks when to end: see `joined`.
        if in_job():
            return one_voice(run) if words[:1] == ["generate"] else run()
        with ended_by_signals():
            return run()


def _refused(mistake: Any) -> int:  # noqa: ANN401
    """Tell in one line what is wrong with the words of a command; the exit code."""
    message, context = in_one_line(mistake.format_message()), getattr(mistake, "ctx", None)
    hint = "" if context is None else f" (see {context.command_path} --help)"
    tell(f"pyflocality: error: {message}{hint}")
    return mistake.exit_code
