"""The memory of this process and of the machine, and jobs that do not fit what is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from pyflocality._support.text import bytes_told

# By the version of control groups: the folder of the topmost one, and files of limit and use.
_GROUPS = {
    2: (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", ""),
    1: (
        ("sys/fs/cgroup/memory",),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
}

_ignored: ContextVar[bool] = ContextVar("ignored", default=False)


def memory_bytes() -> dict[str, int]:
    """Memory of this process in bytes, by the names that Linux has for its kinds.

    Raises:
        OSError: The system does not tell.
    """
    return _told(Path("/proc/self/status"))


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far, or None where the system does not tell."""
    # Linux's getrusage would count what a parent process held when it started this one.
    with suppress(OSError, KeyError):
        return memory_bytes()["VmHWM"]
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes that this process may take beside what it has, or None where the system does not tell.

    The least of what the machine has left and what the control groups of the process, those of a
    container or a batch job, leave it. Cached files count as free, since they make room.

    Args:
        root: Where the folders `proc` and `sys` are.
    """
    found = _left_by_groups(Path(root))
    with suppress(OSError, KeyError):
        found.append(_told(Path(root, "proc/meminfo"))["MemAvailable"])
    if not found:
        # Of a system that tells no more, all the memory that the machine has.
        with suppress(AttributeError, OSError, ValueError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def check_memory(needed: int, what: str, instead: str = "") -> None:
    """Refuse a job that the memory which is there cannot hold, unless that is to be ignored.

    Args:
        needed: Bytes that the job takes beside what the process has.
        what: What takes them, such as "the covariance of 12288 values".
        instead: What would run, as the end of a sentence.

    Raises:
        MemoryError: There is less.
    """
    there = None if _ignored.get() else available_memory()
    if there is None or needed <= there:
        return
    told = f"{what} takes {bytes_told(needed)} of memory, and {bytes_told(there)} are there"
    raise MemoryError(f"{told}: {instead}" if instead else told)


@contextmanager
def ignoring_memory(ignored: bool = True) -> Iterator[None]:
    """Inside the block `check_memory` refuses nothing; a block that is not to be is none."""
    token = _ignored.set(ignored or _ignored.get())
    try:
        yield
    finally:
        _ignored.reset(token)


def _told(file: Path) -> dict[str, int]:
    """The sizes in a file of /proc, by their names."""
    fields = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return {field[0][:-1]: int(field[1]) * 1024 for field in fields if field[-1:] == ["kB"]}


def _left_by_groups(root: Path) -> list[int]:
    """What the control groups leave: the process's own, and all those that it lies in."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        tops, limit, use, prefix = _GROUPS[1 if controllers else 2]
        own = path.strip("/")
        # A container may see its own group as the topmost one, under a path of the host's.
        for place in (own, *map(str, Path(own).parents)):
            for top in tops:
                with suppress(OSError, ValueError, KeyError):
                    left.append(_left_by(root / top / place, limit, use, prefix))
    return left


def _left_by(group: Path, limit: str, use: str, prefix: str) -> int:
    """What one control group leaves; ValueError where its limit is the word "max"."""
    allowed = int((group / limit).read_text(encoding="ascii"))
    lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    kinds = dict(line.split() for line in lines)
    cached = sum(int(kinds[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
    return max(0, allowed - int((group / use).read_text(encoding="ascii")) + cached)
