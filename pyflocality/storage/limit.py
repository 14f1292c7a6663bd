"""How large the cache folder may grow, and what is removed to keep it so.

An entry is a file of ours, or two of one name with the suffixes .json and .npy, in the cache folder
or in a folder of it. What was used longest ago goes first: every use sets the time of change of a
file, not that of the array of a set, by which its changes are known. Files that a process has open
are locked by it (`pyflocality.storage.cache.open_entry`) and stay; Windows itself keeps such files.
Files of others stay, whatever their names: ours have names of 32 hexadecimal digits and begin as
ours do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pyflocality._support.budget import parsed_bytes
from pyflocality._support.caller import warn_once
from pyflocality._support.locks import remove_unused
from pyflocality._support.paths import no_link
from pyflocality._support.text import bytes_told
from pyflocality.storage.cache import cache_folder

DEFAULT = "20GB"
BLOB_MAGIC = b"pyflocality blob"
_NAME = re.compile(r"([0-9a-f]{32})\.[a-z]+")
_FOLDER = re.compile(r"[a-z]+")
# How our files begin, by suffix; all others are blobs.
_BEGINNINGS = {".json": b'{"version": ', ".npy": b"\x93NUMPY"}


@dataclass(frozen=True)
class Entry:
    """Files that are of use together.

    Attributes:
        files: Where they are, in order of their names.
        size: Bytes of all of them.
        used: When they were used last, in nanoseconds.
    """

    files: tuple[Path, ...]
    size: int
    used: int


def cache_limit_bytes() -> int:
    """Bytes that the cache may hold: `PYFLOCALITY_CACHE_LIMIT`, else 20 GB; 0 keeps nothing.

    Raises:
        ValueError: The variable cannot be read.
    """
    given = os.environ.get("PYFLOCALITY_CACHE_LIMIT") or DEFAULT
    return parsed_bytes(given, "the environment variable PYFLOCALITY_CACHE_LIMIT", minimum=0)


class CacheUse(TypedDict):
    """Where the cache is, bytes and entries that it holds, bytes by kind, and its limit."""

    folder: str | None
    bytes: int
    entries: int
    kinds: dict[str, int]
    limit: int


def cache_use() -> CacheUse:
    """How much of the cache is used; images are decoded sets, other kinds have their folder's name.

    Raises:
        ValueError: The limit cannot be read.
    """
    folder, limit = cache_folder(), cache_limit_bytes()
    entries = [] if folder is None else entries_of(folder)
    kinds: dict[str, int] = {}
    for entry in entries:
        place = entry.files[0].parent
        kind = "images" if place == folder else place.name
        kinds[kind] = kinds.get(kind, 0) + entry.size
    return {
        "folder": None if folder is None else str(folder),
        "bytes": sum(kinds.values()),
        "entries": len(entries),
        "kinds": dict(sorted(kinds.items())),
        "limit": limit,
    }


def told_use(use: CacheUse) -> str:
    """How much of the cache is used, in a line."""
    if use["folder"] is None:
        return "no folder can be used"
    kinds = ", ".join(f"{kind} {bytes_told(size)}" for kind, size in use["kinds"].items())
    return (
        f"{use['folder']}: {bytes_told(use['bytes'])} in {use['entries']} entries"
        f"{kinds and f' ({kinds})'}, at most {bytes_told(use['limit'])}"
    )


def entries_of(folder: Path) -> list[Entry]:
    """Our entries in a cache folder, those that were used longest ago first."""
    grouped: dict[tuple[Path, str], list[tuple[Path, os.stat_result]]] = {}
    for path, status in _our_files(folder):
        grouped.setdefault((path.parent, path.stem), []).append((path, status))
    entries = [
        Entry(
            tuple(sorted(path for path, _ in files)),
            sum(status.st_size for _, status in files),
            max(status.st_mtime_ns for _, status in files),
        )
        for files in grouped.values()
    ]
    return sorted(entries, key=lambda entry: (entry.used, entry.files))


def make_room(folder: Path, size: int) -> bool:
    """Whether so many bytes more are within the limit, once what was used longest ago is gone.

    What running processes use stays. Where that leaves too little room one warning says so.

    Args:
        folder: The cache folder, which need not be there.
        size: Bytes that are about to be written.
    """
    try:
        limit = cache_limit_bytes()
    except ValueError as error:
        warn_once(f"nothing is cached: {error}")
        return False
    entries = entries_of(folder)
    held = sum(entry.size for entry in entries)
    for entry in entries if size <= limit else []:
        if held + size <= limit:
            break
        if remove_unused(entry.files):
            held -= entry.size
    if held + size <= limit:
        return True
    # Whoever wants no cache need not be told.
    if limit > 0:
        others = "" if size > limit else f", and running processes use {bytes_told(held)} of it"
        warn_once(
            f"{folder}: {bytes_told(size)} are not cached, the limit is "
            f"{bytes_told(limit)}{others}: give more by PYFLOCALITY_CACHE_LIMIT"
        )
    return False


def remove_all(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """Remove our entries; those that are gone, and those that running processes use."""
    entries = entries_of(folder)
    gone = [entry for entry in entries if remove_unused(entry.files)]
    return gone, [entry for entry in entries if entry not in gone]


def _our_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of our entries, in a cache folder and the folders in it."""
    for place in (folder, *_folders_in(folder)):
        for item in _items(place):
            path = Path(item.path)
            try:
                if _NAME.fullmatch(item.name) and item.is_file(follow_symlinks=False):
                    if _begins_as_ours(path):
                        yield path, path.stat()
            except OSError:
                # Gone by now, or not ours to look into.
                continue


def _folders_in(folder: Path) -> Iterator[Path]:
    for item in _items(folder):
        if _FOLDER.fullmatch(item.name) and item.is_dir(follow_symlinks=False):
            yield Path(item.path)


def _items(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except OSError:
        return []


def _begins_as_ours(path: Path) -> bool:
    beginning = _BEGINNINGS.get(path.suffix, BLOB_MAGIC)
    with open(path, "rb", opener=no_link) as file:
        return file.read(len(beginning)) == beginning
