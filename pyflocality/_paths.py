"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def checked_path(value: object, name: str) -> Path:
    """A path that was given, with `~` and `~user` expanded as a shell does it.

    `~user` of a user whom this machine does not know is the name of a file.

    Args:
        value: What was given.
        name: Name of the argument in error messages.

    Raises:
        TypeError: `value` is neither a str nor an os.PathLike of one.
        ValueError: It is empty, has a character that no path can hold, or begins with `~` where
            there is no home folder.
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
    if expanded == "~" or expanded.startswith(("~/", f"~{os.sep}")):
        raise ValueError(
            f"`{name}` begins with ~, and this user has no home folder (HOME is not set): write "
            f"the whole path, or ./{text} for a name that begins so; got {_shown(text)}"
        )
    return Path(expanded)


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"a {type(value).__name__} ({text[:60]}...)"
