"""One line on standard error where Python would print a traceback."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import format_exception
from types import TracebackType

import typer

from pyflocality._support.signals import last_word
from pyflocality._support.streams import tell
from pyflocality.cli._groups import expanded

# Wrong arguments and inputs; everything else that is foreseen is the machine's fault.
_INPUT_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)


def reported(**aliases: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: its groups become options, foreseen errors one line and an exit code.

    Messages of the library name its arguments; the line names the command's options instead.

    Args:
        **aliases: Parameter of the command for each library argument of another name.
    """

    def decorate(grouped: Callable[..., None]) -> Callable[..., None]:
        command = expanded(grouped)
        parameters = {name: name for name in inspect.signature(command).parameters}
        options = {
            argument: "SOURCE" if name == "source" else f"--{name.replace('_', '-')}"
            for argument, name in (parameters | aliases).items()
        }

        @functools.wraps(command)
        def run(**given: object) -> None:
            with warnings.catch_warnings(), _log_told():
                warnings.showwarning = _show_warning
                try:
                    command(**given)
                except KeyboardInterrupt as error:
                    words, code = last_word(error)
                    tell(f"pyflocality: {words}")
                    raise typer.Exit(code) from None
                except Exception as error:
                    foreseen = _exit_code(error)
                    if foreseen is None:
                        raise
                    tell(f"pyflocality: error: {_one_line(error, options)}")
                    raise typer.Exit(foreseen) from None

        return run

    return decorate


def in_one_line(message: str) -> str:
    """A message of several lines as one."""
    return " ".join(message.split("\n"))


def _exit_code(error: Exception) -> int | None:
    """2 for a user's mistake, 1 for what the machine lacks, None for a fault of the library."""
    import torch

    from pyflocality import BackendUnavailableError

    machine = (BackendUnavailableError, ImportError, OSError, MemoryError, torch.OutOfMemoryError)
    if isinstance(error, _INPUT_ERRORS):
        return 2
    # torch's own word for a failed allocation in main memory.
    if isinstance(error, machine) or "DefaultCPUAllocator" in str(error):
        return 1
    return None


def _one_line(error: Exception, options: Mapping[str, str]) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = in_one_line(str(error)) or type(error).__name__
    names = "|".join(map(re.escape, options))
    text = re.sub(rf"`({names})`", lambda match: f"`{options[match[1]]}`", text)
    # "pass resolution= to ..." and "pass channels=1 ..." advise a caller in Python.
    return re.sub(
        rf"(?<=pass )({names})=(\S*)",
        lambda match: options[match[1]] + (f" {match[2]}" if match[2] else ""),
        text,
    )


@contextmanager
def _log_told() -> Iterator[None]:
    """Say what the library logs as it says everything else."""
    logger, handler = logging.getLogger("pyflocality"), _Telling(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Telling(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(f"pyflocality: {in_one_line(record.getMessage())}")


def show_traceback(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Show a fault of the library, for `sys.excepthook`: names in it cannot speak to a terminal."""
    for lines in format_exception(kind, error, traceback):
        for line in lines.rstrip("\n").split("\n"):
            tell(line)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    tell(f"pyflocality: warning: {in_one_line(str(message))}")
