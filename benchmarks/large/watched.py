"""Commands in processes of their own, whose time and memory are measured from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

# How often memory is looked at, in seconds.
_PAUSE = 0.01


@dataclass
class Watched:
    """What a command took, as its parent saw it.

    Attributes:
        seconds: From its start to its end.
        peak_bytes: Largest resident memory.
        output: What it printed on standard output.
        marks: When it wrote which line on standard error, in seconds from its start.
        peaks: Largest resident memory between a line and the next one, in the same order.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    output: str = ""
    marks: list[tuple[float, str]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


class CommandFailedError(RuntimeError):
    """A command that ended with an error; its last words are the message."""


def watched(words: Sequence[object], environment: dict[str, str]) -> Watched:
    """Run a command of this Python, from its start to its end.

    Args:
        words: What stands behind `python`.
        environment: Variables beside those of this process.

    Raises:
        CommandFailedError: It has ended with an error.
    """
    result, start = Watched(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    output: list[str] = []
    readers = [
        threading.Thread(target=_gather, args=(process.stdout, output)),
        threading.Thread(target=_note, args=(process.stderr, result, start)),
    ]
    for reader in readers:
        reader.start()
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        _look(status, result)
        time.sleep(_PAUSE)
    result.seconds = time.perf_counter() - start
    for reader in readers:
        reader.join()
    result.output = "".join(output)
    if process.returncode:
        last = result.marks[-1][1] if result.marks else f"exit code {process.returncode}"
        raise CommandFailedError(last)
    return result


def _gather(stream: IO[str], output: list[str]) -> None:
    """All that comes from a stream."""
    output.append(stream.read())


def _note(stream: IO[str], result: Watched, start: float) -> None:
    """Each line of a stream, and when it comes."""
    for line in stream:
        result.marks.append((time.perf_counter() - start, line.rstrip()))
        result.peaks.append(0)


def _look(status: Path, result: Watched) -> None:
    """Look at the memory of a process: the most of it so far, and now."""
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    sizes = {line[:5]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    result.peak_bytes = max(result.peak_bytes, sizes.get("VmHWM", 0))
    if result.peaks:
        result.peaks[-1] = max(result.peaks[-1], sizes.get("VmRSS", 0))
