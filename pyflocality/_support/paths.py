"""Paths as users write them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pyflocality._support.text import printable

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def checked_path(value: object, name: str) -> Path:
    """A path that was given, with `~` and `~user` expanded as a shell does it.

    Where no such home folder is known the path is refused, as a folder named `~` would be made
    else; what is there under a name such as `~backup` is found, though.

    Raises:
        TypeError: `value` is neither a str nor an os.PathLike of one.
        ValueError: It is empty, has a character that no path can hold, or begins with a `~` that
            stands for no home folder.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a path (str or os.PathLike), got {_shown(value)}")
    # pathlib would take it for the working directory.
    if not text:
        raise ValueError(f"`{name}` must be a path, got an empty one")
    if "\0" in text:
        raise ValueError(f"`{name}` must be a path without NUL characters, got {_shown(text)}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(
            f"`{name}` must be a path that this system can encode, got {_shown(text)}"
        ) from None
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not _is_a_name(expanded):
        raise ValueError(
            f"`{name}` must be a path, and the ~ of {_shown(text)} stands for no known home "
            "folder: write the whole path, or ./ in front of a name that begins so"
        )
    return Path(expanded)


def regular_file(path: Path) -> os.stat_result:
    """Status of a file that may be opened, itself or at the end of a link.

    To open a pipe would wait for whoever writes into it, and a device has no end.

    Raises:
        ValueError: It is no plain file, or there is none.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{printable(str(path))}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"{printable(str(path))}: is {kind}, expected a file")
    return status


def check_result(path: Path) -> None:
    """Refuse the name of a file to be written where something is that cannot be replaced by one.

    A link to a file is replaced. `/dev/null` is for everybody, though, and so is `/dev/stdout`: a
    link to what a process has open.

    Raises:
        IsADirectoryError: A folder is there.
        FileExistsError: A pipe, a socket or a device is there, itself or at the end of a link.
    """
    try:
        mode = path.stat().st_mode
        opened = path.is_symlink() and os.readlink(path).startswith("/proc/")
    except OSError:
        # Nothing is there, or whoever writes is told why that cannot be.
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    if opened or not stat.S_ISREG(mode):
        kind = "what a process has open" if opened else _KINDS.get(stat.S_IFMT(mode), "no file")
        raise FileExistsError(f"{path} is {kind}, expected the name of a file")


def no_link(path: str, flags: int) -> int:
    """An opener, as `open` takes it, that refuses links: somebody may have put one there."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _is_a_name(path: str) -> bool:
    """Whether a path that begins with `~` and something is meant as it is: that is there."""
    first = Path(path).parts[0]
    return first != "~" and os.path.lexists(first)


def _shown(value: object) -> str:
    try:
        text = ascii(value)
    except Exception:
        # A repr of somebody else's.
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"a {type(value).__name__} ({text[:60]}...)"
