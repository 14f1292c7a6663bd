"""The files below a folder, or inside a zip archive, whatever they hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pyflocality._support.paths import regular_file
from pyflocality._support.text import printable
from pyflocality.sources.archive_names import link_target, resolve_links, tidied
from pyflocality.sources.zip_directory import open_zip


class ReadFile(Protocol):
    """Reads one file, of `limit` bytes at the most where that is given."""

    def __call__(self, name: str, limit: int | None = None) -> bytes:
        """The content of a file; ValueError if it is damaged or too large."""


@dataclass(frozen=True)
class Tree:
    """The files below a folder, or inside an archive.

    Attributes:
        where: Path of the folder or archive, fit for messages.
        separator: What stands between it and a file's name in messages.
        files: For each wanted name relative to it, the size in bytes and a mark of the content.
        read: Reads one file.
        fingerprint: What identifies the tree beyond its files.
        others: Names of the files that are not among `files`.
    """

    where: str
    separator: str
    files: dict[str, tuple[int, int]]
    read: ReadFile
    fingerprint: tuple[Any, ...]
    others: list[str]

    def path(self, name: str) -> str:
        """How messages name one of the files."""
        return f"{self.where}{self.separator}{printable(name)}"


@contextmanager
def folder_tree(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Tree]:
    """The files below a folder; those whose names are `wanted` may be read.

    Raises:
        ValueError: The folder or a wanted file cannot be read, or is no file at all.
    """
    where = printable(str(folder))
    try:
        written = [
            Path(directory, name).relative_to(folder).as_posix()
            for directory, names in _directories(folder)
            for name in names
        ]
    except OSError as error:
        path = printable(str(error.filename))
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    # Backslashes are left where an archive of Windows was unpacked by a tool that knows none.
    names, _ = tidied(where, written)
    paths = {name: folder / raw for name, raw in zip(names, written, strict=True)}
    files: dict[str, tuple[int, int]] = {}
    for name in filter(wanted, names):
        status = regular_file(paths[name])
        files[name] = status.st_size, status.st_mtime_ns
    others = [name for name in names if name not in files]

    def read(name: str, limit: int | None = None) -> bytes:
        if limit is not None and files[name][0] > limit:
            raise ValueError(f"has {files[name][0]} bytes, expected {limit} at the most")
        return paths[name].read_bytes()

    # Copies that keep the times of their files differ in the folder's place at least.
    yield Tree(where, os.sep, files, read, (str(folder.resolve()),), others)


def _directories(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each directory below a folder once, also through links, with the names of its files."""
    visited: set[tuple[int, int]] = set()
    starts = [str(folder)]
    while starts:
        # Links come after everything that needs none, so that a directory keeps its own name.
        links: list[str] = []
        for start in starts:
            for directory, subdirectories, names in os.walk(start, onerror=_reraise):
                status = os.stat(directory)
                identity = (status.st_dev, status.st_ino)
                if identity in visited:
                    subdirectories.clear()
                    continue
                visited.add(identity)
                paths = (os.path.join(directory, name) for name in subdirectories)
                links.extend(path for path in paths if os.path.islink(path))
                yield directory, names
        starts = sorted(links)


def _reraise(error: OSError) -> None:
    raise error


@contextmanager
def zip_tree(path: Path, wanted: Callable[[str], bool]) -> Iterator[Tree]:
    """The files inside a zip archive, with those that links inside of it lead to.

    Those whose names are `wanted` may be read.

    Raises:
        ValueError: The archive is damaged, or it cannot be told what it holds.
    """
    with open_zip(path) as archive:
        where = printable(str(path))
        links = {name: link_target(name, text) for name, text in archive.links.items()}
        members = {name: name for name in filter(wanted, archive.files)}
        members |= resolve_links(where, archive.files, links, wanted)
        others = [name for name in [*archive.files, *links] if name not in members]
        archive.check_entries(name for name in others if name in archive.files)
        entries = {name: archive.files[target] for name, target in members.items()}
        files = {name: (entry.file_size, entry.CRC) for name, entry in entries.items()}

        def read(name: str, limit: int | None = None) -> bytes:
            return archive.read(members[name], limit)

        yield Tree(where, ": ", files, read, (path.stat().st_size,), others)
