"""Names of the members of archives, in one spelling for zip and tar alike.

Tools write a name in many ways: with `/`, `./`, a drive or `../` in front, with doubled slashes,
with backslashes on Windows, with accents as letters of their own on macOS. Here folders are
separated by single slashes, nothing leads out of the archive, and text is composed (Unicode's
NFC). Upper and lower case stay two things, as they are on the systems that tell them apart.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

from pyflocality._support.text import printable

# Names without any of these are as they should be.
_ODD = re.compile(r"[^ -~]|\\|//|^/|/$|(?:^|/)\.{1,2}(?:/|$)|^$")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_LINKS = 40


def tidied(
    where: str, written: Sequence[str], windows: Sequence[bool] = ()
) -> tuple[list[str], bool]:
    """Names in the spelling of this module, and whether a backslash separates folders in them.

    It does in an archive that was made on Windows, and where no name has a slash; else it is part
    of a name.

    Args:
        where: The archive or folder, for messages.
        written: Names of its files, as written.
        windows: For each whether the archive says that it was added on Windows.

    Raises:
        ValueError: It cannot be told what a backslash is, a name is unsafe, or two are one.
    """
    first = next((name for name in written if "\\" in name), None)
    backslash = first is not None and any(windows)
    if first is not None and not any("/" in name.removeprefix("./") for name in written):
        backslash = True
    elif first is not None and backslash and not all(windows):
        raise ValueError(
            f"{where}: cannot tell whether the backslash in '{printable(first)}' separates "
            "folders: only some of the members were added on Windows; archive the files again"
        )
    names = [tidy_name(where, name, backslash) for name in written]
    seen: dict[str, str] = {}
    for name, spelling in zip(names, written, strict=True):
        if name in seen:
            spellings = "" if seen[name] == spelling else f", once as {ascii(spelling)}"
            raise ValueError(
                f"{where}: holds '{printable(name)}' twice{spellings}: which of them counts cannot "
                "be told"
            )
        seen[name] = spelling
    return names, backslash


def tidy_name(where: str, name: str, backslash: bool) -> str:
    """One name in the spelling of this module; `backslash` tells whether one separates folders.

    Raises:
        ValueError: It is empty, has a NUL, or steps back (`..`) behind its beginning.
    """
    if not _ODD.search(name):
        return name
    parts = re.split(r"[/\\]" if backslash else "/", name)
    if backslash and _DRIVE.fullmatch(parts[0]):
        del parts[0]
    parts = [part for part in parts if part not in ("", ".")]
    while parts and parts[0] == "..":
        del parts[0]
    if not parts or ".." in parts or "\0" in name:
        raise ValueError(
            f"{where}: has a member of the name '{printable(name)}', damaged or unsafe"
        )
    return unicodedata.normalize("NFC", "/".join(parts))


def link_target(name: str, target: str) -> str | None:
    """The member that a link means, by its tidied name and what it holds; None if it is outside."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    outside = path.startswith(("/", "../")) or path in ("..", ".")
    return None if outside else unicodedata.normalize("NFC", path)


def resolve_links(
    where: str,
    files: Mapping[str, object],
    links: Mapping[str, str | None],
    wanted: Callable[[str], bool],
) -> dict[str, str]:
    """The file behind each wanted link, of which `links` tell what they mean, None for outside.

    Raises:
        ValueError: A wanted link leads to no file of the archive, or a link leads to a folder
            of it, whose files would count under two names.
    """
    result: dict[str, str] = {}
    names = [*files, *links] if links else []
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    for link in links:
        target: str | None = link
        for _ in range(_MAX_LINKS):
            if target is None or target not in links:
                break
            target = links[target]
        if wanted(link):
            if target not in files:
                meant = links[link]
                shown = "something outside" if meant is None else f"'{printable(meant)}'"
                raise ValueError(
                    f"{where}: '{printable(link)}' is a link to {shown}, which is no file of the "
                    "archive: archive the files that links lead to"
                )
            result[link] = str(target)
        elif target in folders:
            raise ValueError(
                f"{where}: '{printable(link)}' is a link to the folder '{printable(str(target))}': "
                "archive the files that links lead to"
            )
    return result
