"""Files of calibrations: JSON objects that tell their format, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pyflocality._support.checks import check_flag
from pyflocality._support.json import parsed_object
from pyflocality._support.locks import remove_abandoned, replacing, twins_of
from pyflocality._support.paths import check_result, checked_path


def write_object(path: str | os.PathLike[str], content: Mapping[str, Any], force: bool) -> None:
    """Write an object to a file.

    Raises:
        FileExistsError: The file is there and `force` is False; it is a pipe or a device.
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: The folder of `path` does not exist.
        OSError: The file cannot be written.
    """
    path, force = checked_path(path, "path"), check_flag(force, "force")
    # A link that leads nowhere is there, too; a link is replaced, not what it leads to.
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path} is already there; pass force=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder to save {path.name} in")
    check_result(path)
    remove_abandoned(twins_of(path))
    with replacing(path, 0o666, force=force) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_object(path: str | os.PathLike[str], what: str, version: int) -> dict[str, Any]:
    """The object in a file of a format, "pyflocality" and what it is, and of a version.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The system does not let it be read, or takes no such name.
        ValueError: It holds something else.
    """
    path = checked_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        content = parsed_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} does not hold a {what} saved by pyflocality: {error}") from error
    if content.get("format") != f"pyflocality {what}":
        raise ValueError(f"{path} does not hold a {what} saved by pyflocality")
    if content.get("version") != version:
        raise ValueError(
            f"{path} has version {content.get('version')} of the format; this release reads "
            f"version {version}"
        )
    return content
