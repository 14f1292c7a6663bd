"""`pyflocality doctor`: what is installed and what can run here."""

from __future__ import annotations

from typing import Annotated

import typer

from pyflocality.cli._errors import reported


@reported()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show versions, the backends that can run here or why not, and the settings in force."""
    from pyflocality._config import configuration, format_configuration

    if json:
        from json import dumps

        typer.echo(dumps(configuration(), indent=2))
    else:
        typer.echo(format_configuration(configuration()))
