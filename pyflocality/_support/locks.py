"""Advisory locks on folders and files, and files that appear whole or not at all.

One process works, others wait or are refused. The system keeps a lock for as long as its holder
lives, so none is left by a process that was killed. Where the system or the file system has no
locks, work goes on without.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # not on Windows

logger = logging.getLogger("pyflocality")

# Without locks nobody can be asked whether a file is still being written.
_GRACE_SECONDS = 86_400.0
_SILENT_SECONDS, _PAUSE_SECONDS = 1.0, 0.02


class HeldError(OSError):
    """Somebody else holds the lock."""


@contextmanager
def locked(path: Path, *, waiting_for: str | None = None) -> Iterator[bool]:
    """Hold a lock inside a `with` block; threads of one process exclude each other, too.

    Args:
        path: A folder, which is locked itself; or the name of a lock file, which is empty, made
            if need be and removed after the block.
        waiting_for: What the others do meanwhile, as a message says it to whoever waits longer
            than a second. None does not wait.

    Yields:
        Whether there are locks here: False goes on without.

    Raises:
        HeldError: Somebody else holds the lock, and `waiting_for` is None.
        OSError: The lock file cannot be made.
    """
    descriptor, has_locks = _acquire(path, waiting_for)
    try:
        yield has_locks
    finally:
        _release(path, descriptor)


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove temporary and lock files whose writers are gone.

    Writers hold a lock on what they write (see `replacing`). Files that are locked stay; where
    there are no locks, all of the last day do.
    """
    for path in paths:
        # Somebody else may be faster, or it belongs to somebody else.
        with suppress(OSError):
            _remove_if_abandoned(path)


@contextmanager
def replacing(path: Path, mode: int = 0o600, *, force: bool = True) -> Iterator[IO[bytes]]:
    """A file that appears whole or not at all, in place of what is there, links too.

    Args:
        path: The file; its folder is there.
        mode: Permissions of the file, from which the umask takes.
        force: Whether what is there may be replaced; also what somebody else puts there meanwhile.

    Raises:
        FileExistsError: The file is there and `force` is False.
        OSError: The file cannot be written.
    """
    with _new_twin(path, mode) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":
                # A file that is open cannot be renamed there.
                file.close()
            if force or not _link(temporary, path):
                if not force and os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give a file its name where nothing has it; False where the file system has no links.

    Raises:
        FileExistsError: Something has the name.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):
        return False
    return True


def _new_twin(path: Path, mode: int) -> IO[bytes]:
    """A new file beside another one, locked as long as it is open."""
    while True:
        temporary = path.with_name(f"{_twin_begin(path)}{uuid.uuid4().hex}.tmp")
        file = open(temporary, "x+b", opener=lambda name, flags: os.open(name, flags, mode))
        hold(file.fileno())
        # Before it was locked it may have been taken for abandoned.
        if _is_at(file.fileno(), temporary):
            return file
        file.close()


def twins_of(path: Path) -> Iterator[Path]:
    """The temporary files of `replacing` for a file, as far as their names tell."""
    begin = _twin_begin(path)
    for name in os.listdir(path.parent):
        if name.startswith(begin) and re.fullmatch(r"[0-9a-f]{32}\.tmp", name[len(begin) :]):
            yield path.with_name(name)


def _twin_begin(path: Path) -> str:
    # Cut where it must be: file systems bound the length of a name to 255 bytes.
    fits = len(os.fsencode(path.name)) + len(f"..{uuid.UUID(int=0).hex}.tmp") <= 255
    return f".{path.name if fits else path.name[:40]}."


def hold(descriptor: int) -> None:
    """Lock an open file until it is closed, where there are locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def share(descriptor: int) -> bool:
    """Lock an open file together with whoever reads it, until it is closed and no longer mapped.

    Returns:
        False where somebody holds it alone; True also where there are no locks.
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def remove_unused(paths: Sequence[Path]) -> bool:
    """Remove files that are of use together, unless somebody has one of them open.

    Those who do hold a lock (see `share`); where there are no locks, what was changed within a day
    stays, and Windows keeps what is open. Whatever is there of them goes, the first one last.

    Returns:
        Whether they are gone.
    """
    with ExitStack() as stack:
        try:
            if os.name != "nt":
                for path in paths:
                    _hold_unused(path, stack)
            # Whoever begins with the first finds all of them, or the first one locked.
            for path in reversed(paths):
                path.unlink(missing_ok=True)
        except OSError:
            return False
    return True


def _hold_unused(path: Path, stack: ExitStack) -> None:
    """Lock a file that is about to be removed; raises OSError where it is not to be."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    stack.callback(os.close, descriptor)
    if not _lock(descriptor, path, None) and time.time() - path.stat().st_mtime < _GRACE_SECONDS:
        raise HeldError(errno.EBUSY, "somebody may have it open", str(path))


def _acquire(path: Path, waiting_for: str | None) -> tuple[int | None, bool]:
    if fcntl is None:
        return None, False
    while True:
        descriptor = _open(path)
        try:
            has_locks = _lock(descriptor, path, waiting_for)
            if not has_locks or _is_at(descriptor, path):
                return descriptor, has_locks
        except BaseException:
            os.close(descriptor)
            raise
        # The last holder has removed it: what is locked is nobody's lock file any more.
        os.close(descriptor)


def _release(path: Path, descriptor: int | None) -> None:
    if descriptor is None:
        return
    try:
        with suppress(OSError):
            _remove_lock_file(path, descriptor)
        # Not by closing alone: processes forked meanwhile share the lock.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    # Locks of network file systems want a file that is open for writing.
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_RDWR, 0o666)
    except PermissionError:
        # Of another user, who may hold it; or the folder cannot be written to.
        with suppress(FileNotFoundError):
            return os.open(path, (flags & ~os.O_CREAT) | os.O_RDONLY)
        raise


def _lock(descriptor: int, path: Path, waiting_for: str | None) -> bool:
    """Lock an open file; False where there are no locks."""
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError) as error:
            if waiting_for is None:
                raise HeldError(error.errno, "another process holds the lock", str(path)) from error
        except OSError:
            return False
        if time.monotonic() - started > _SILENT_SECONDS:
            break
        time.sleep(_PAUSE_SECONDS)
    logger.warning("waiting for another process that %s", waiting_for)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=True))
    except FileNotFoundError:
        return False


def _remove_lock_file(path: Path, descriptor: int) -> None:
    # A file with content is no lock file of ours, whatever it is called.
    if not path.is_dir() and os.fstat(descriptor).st_size == 0 and _is_at(descriptor, path):
        path.unlink()


def _remove_if_abandoned(path: Path) -> None:
    if fcntl is None:
        _remove_if_old(path)
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not _lock(descriptor, path, None):
            _remove_if_old(path)
        elif _is_at(descriptor, path):
            path.unlink()
    finally:
        os.close(descriptor)


def _remove_if_old(path: Path) -> None:
    if time.time() - path.lstat().st_mtime > _GRACE_SECONDS:
        path.unlink()
