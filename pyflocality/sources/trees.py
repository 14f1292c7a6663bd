"""The files below a folder, or inside a zip archive, whatever they hold."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tree:
    """The files below a folder, or inside an archive.

    Attributes:
        where: Path of the folder or archive, for messages.
        separator: What stands between it and a file's name in messages.
        files: For each wanted name relative to it, the size in bytes and a mark of the content.
        read: Reads one file.
        fingerprint: What identifies the tree beyond its files.
        others: Names of the files that are not among `files`.
    """

    where: str
    separator: str
    files: dict[str, tuple[int, int]]
    read: Callable[[str], bytes]
    fingerprint: tuple[Any, ...]
    others: list[str]

    def path(self, name: str) -> str:
        """How messages name one of the files."""
        return f"{self.where}{self.separator}{name}"


@contextmanager
def folder_tree(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Tree]:
    """The files below a folder; `wanted` tells by a name whether a file may be read."""
    files: dict[str, tuple[int, int]] = {}
    others: list[str] = []
    try:
        for directory, names in _directories(folder):
            for name in names:
                path = Path(directory, name)
                relative = path.relative_to(folder).as_posix()
                if not wanted(relative):
                    others.append(relative)
                    continue
                status = path.stat()
                files[relative] = (status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from error
    # Copies that keep the times of their files differ in the folder's place at least.
    place = (str(folder.resolve()),)
    yield Tree(str(folder), os.sep, files, lambda name: (folder / name).read_bytes(), place, others)


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
    """The files inside a zip archive; `wanted` tells by a name whether a file may be read."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable zip archive: {error}") from error
    with archive:
        infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        members = {name: info for name, info in infos.items() if wanted(name)}
        yield Tree(
            str(path),
            ": ",
            {name: (info.file_size, info.CRC) for name, info in members.items()},
            lambda name: archive.read(members[name]),
            (path.stat().st_size,),
            [name for name in infos if not wanted(name)],
        )
