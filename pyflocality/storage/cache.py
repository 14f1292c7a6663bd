"""Files that save work: in which folder they lie, and how they are written and trusted.

Whatever is wrong with the folder, work goes on without it, and one warning tells why.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from pyflocality._support.caller import warn_once
from pyflocality._support.locks import remove_abandoned, share
from pyflocality._support.paths import checked_path

_CURE = "name a folder of your own with PYFLOCALITY_CACHE_DIR (or cache_dir=)"
# Temporary and lock files of entries, whose names are 32 hexadecimal digits.
_UNFINISHED = re.compile(r"\.?[0-9a-f]{32}.*\.(tmp|lock)")


def default_cache_dir() -> Path | None:
    """`PYFLOCALITY_CACHE_DIR`, else `pyflocality` in the user's cache folder; None if unknown."""
    own = os.environ.get("PYFLOCALITY_CACHE_DIR")
    if own:
        try:
            return checked_path(own, "PYFLOCALITY_CACHE_DIR").absolute()
        except ValueError as error:
            warn_once(f"nothing is cached: {error}")
            return None
    try:
        import platformdirs

        result = platformdirs.user_cache_path("pyflocality", appauthor=False)
    except (ImportError, RuntimeError) as error:
        warn_once(f"nothing is cached, no cache folder is known ({error}): {_CURE}")
        return None
    if not result.is_absolute():
        warn_once(f"nothing is cached, the user's cache folder would be {str(result)!r}: {_CURE}")
        return None
    return result


def cache_folder(*parts: str, chosen: Path | None = None) -> Path | None:
    """A folder for cached files, which need not be there yet; None if none can be trusted.

    Args:
        parts: Names of folders inside the cache folder.
        chosen: The cache folder; None is `default_cache_dir`.
    """
    folder = default_cache_dir() if chosen is None else chosen.absolute()
    if folder is None:
        return None
    for path in (folder, *(folder.joinpath(*parts[: n + 1]) for n in range(len(parts)))):
        why_not = _distrust(path)
        if why_not is not None:
            warn_once(f"nothing is cached: {path} {why_not}: {_CURE}")
            return None
    return folder.joinpath(*parts)


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter, with those above it that are missing.

    Raises:
        OSError: It cannot be made, or somebody else has made it meanwhile.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        why_not = _distrust(path)
        if why_not is not None:
            raise PermissionError(f"it {why_not}")


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that are gone have left in a folder of the cache."""
    names = [name for name in os.listdir(folder) if _UNFINISHED.fullmatch(name)]
    remove_abandoned(folder / name for name in names)


def open_entry(path: Path) -> IO[bytes]:
    """Open a cached file for reading; nobody removes it for as long as it is open, or mapped.

    Raises:
        FileNotFoundError: There is none, or it is being removed.
        OSError: It is a link, no plain file, or of somebody else.
    """
    # A pipe would be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = open(
        path, "rb", opener=lambda name, _: os.open(name, flags | getattr(os, "O_BINARY", 0))
    )
    try:
        status = os.fstat(file.fileno())
        why_not = _owner_distrust(status)
        if not stat.S_ISREG(status.st_mode):
            why_not = "is no plain file"
        if why_not is not None:
            raise PermissionError(f"{path.name} {why_not}")
        if not share(file.fileno()):
            raise FileNotFoundError(errno.ENOENT, "it is being removed", str(path))
    except BaseException:
        file.close()
        raise
    return file


def mark_used(file: IO[bytes]) -> None:
    """Note that an entry was used now, by the time of change of one of its files.

    Where it cannot be set the entry counts as used when it was written.
    """
    with suppress(OSError):
        os.utime(file.fileno() if os.utime in os.supports_fd else file.name)


def tell_unwritable(folder: Path, error: OSError) -> None:
    """Say once that a folder cannot be written to, on a full disk for example."""
    why = error.strerror or str(error)
    warn_once(f"nothing is cached: {folder} cannot be written to ({why}): {_CURE}")


def _distrust(folder: Path) -> str | None:
    """Why what lies in a folder may come from somebody else, or None; also where it is missing.

    Links are followed: they may lead to another disk.
    """
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return "is a link to nothing" if folder.is_symlink() else None
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return "is no folder"
    return _owner_distrust(status)


def _owner_distrust(status: os.stat_result) -> str | None:
    if not hasattr(os, "geteuid"):
        return None
    # Root may write anywhere.
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {status.st_uid})"
    # Also where a sticky bit protects our files: others can add theirs.
    if status.st_mode & stat.S_IWOTH:
        return "can be written to by everybody"
    return None
