"""`pyflocality doctor`: what is installed and what can run here."""

from __future__ import annotations

from typing import Annotated

import typer

from pyflocality._support.streams import answer
from pyflocality.cli._errors import reported


@reported()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show versions, the backends that can run here or why not, and the settings in force."""
    from pyflocality.backends.report import configuration, format_configuration

    report = configuration()
    if json:
        from json import dumps

        text = dumps(report, indent=2)
    else:
        text = format_configuration(report)
    answer(text, only_here=True)
