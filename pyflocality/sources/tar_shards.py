"""Tar archives of images, the shards of webdataset.

A shard holds samples: files with the same path up to the first dot of their name belong to one;
a dot with a whole number behind it belongs to the name (`cat.0.jpg`, `cat.1.jpg`). The image is
the file with an image suffix, the class the whole number in the file ending in `.cls`. Where
there is no such file, folders and `dataset.json` tell splits and classes as in a zip archive: see
`pyflocality.sources.selection`. Shards are read in the order of their names and must not be
compressed, so that an image can be read without those before it. In a folder of shards a word
such as `train` or `val` in the name of each is its split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyflocality._support.read_at import read_at
from pyflocality._support.text import printable
from pyflocality.sources import dataset_json
from pyflocality.sources.archive_names import resolve_links
from pyflocality.sources.base import Request
from pyflocality.sources.images import ImageFiles
from pyflocality.sources.left_out import LeftOut
from pyflocality.sources.selection import (
    COMPRESSED_TARS,
    SUFFIXES,
    is_hidden,
    is_image,
    is_of_system,
    is_wanted,
    labels_of,
    select,
)
from pyflocality.sources.splits import choose_split, part_words
from pyflocality.sources.tar_index import Extent, TarIndex, index_tar
from pyflocality.sources.trees import Tree
from pyflocality.storage.mapped import identity_of

# Shards that are open at one time; systems allow for about 1,000 files.
_MAX_OPEN = 16
_MAX_CLASS_BYTES = 100
# The name of a sample: up to the first dot, but for numbers that have a dot behind them, too.
_KEY = re.compile(r"[^.]*(?:\.[0-9]+(?=\.))*")


class _Member(NamedTuple):
    """A file of a shard: number of the shard, name inside of it and where it lies."""

    shard: int
    name: str
    extent: Extent


def find_shards(path: Path) -> list[Path]:
    """The shards that a path means: itself, or the .tar files of a folder; none if it is neither.

    Raises:
        ValueError: The path, or one that lies beside shards, is a compressed archive.
    """
    candidates = [path] if path.is_file() else sorted(path.iterdir())
    shards = [candidate for candidate in candidates if _is_shard(candidate)]
    # Beside images it is what they were unpacked from.
    for candidate in candidates if shards or path.is_file() else ():
        if candidate.name.lower().endswith(COMPRESSED_TARS):
            raise ValueError(
                f"{printable(str(candidate))}: compressed tar archives are not read: decompress "
                "them"
            )
    return shards


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == ".tar" and not path.name.startswith(".") and not path.is_dir()


@contextmanager
def open_files(path: Path, request: Request) -> Iterator[ImageFiles]:
    """The images of one shard or of a folder of shards, still encoded.

    Raises:
        ValueError: A shard is damaged, or what belongs together cannot be told.

    Warns:
        UserWarning: There is more than what is taken.
    """
    where, left_out = printable(str(path)), LeftOut(str(path))
    shards, split = find_shards(path), request.split
    if path.is_dir():
        _note_others(path, shards, left_out)
        shards, split = _choose_shards(shards, split, where)
    indexes = [index_tar(shard) for shard in shards]
    members = {
        f"{shard.name}/{name}": _Member(number, name, extent)
        for number, (shard, index) in enumerate(zip(shards, indexes, strict=True))
        for name, extent in _wanted(shard, index).items()
    }
    with _opened(shards, indexes) as read:
        classes = _classes(where, members, read)
        images, labels, label_names = _labelled(where, members, read, split, classes)
        for shard, index in zip(shards, indexes, strict=True):
            _note_left(shard, index, members, left_out)
        left_out.warn()
        status = [(shard.name, *i.identity[2:]) for shard, i in zip(shards, indexes, strict=True)]
        yield ImageFiles(
            list(images),
            lambda name: read(images[name]),
            lambda name: f"{where}: {printable(name)}",
            sum(member.extent.size for member in images.values()),
            path.resolve().name,
            labels,
            label_names,
            {"tar": str(path.resolve()), "shards": status},
        )


def _note_others(folder: Path, shards: list[Path], left_out: LeftOut) -> None:
    """Note what lies beside shards; raises if it is images in another form."""
    stems = {shard.stem for shard in shards}
    for other in sorted(folder.iterdir()):
        # Tools leave a table beside each shard, of the same name.
        table = other.suffix.lower() == ".parquet" and other.stem not in stems
        if table or (is_image(other.name) and not other.is_dir()):
            raise ValueError(
                f"{printable(str(folder))}: holds tar archives and other images, in "
                f"'{printable(other.name)}': which of them are meant cannot be told"
            )
        if not _is_shard(other) and not is_of_system(other.name):
            left_out.add(other.name, "beside the tar archives")


def _choose_shards(
    shards: list[Path], split: str | None, where: str
) -> tuple[list[Path], str | None]:
    """The shards of one split, where their names tell it, and the split still to be found."""
    splits = [part_words(shard.stem) for shard in shards]
    named = sorted(set().union(*splits))
    if not named or (len(named) == 1 and split != named[0] and all(splits)):
        return shards, split
    for shard, words in zip(shards, splits, strict=True):
        if len(words) != 1:
            raise ValueError(
                f"{where}: cannot tell which split '{printable(shard.name)}' belongs to; others "
                f"are named {', '.join(named)}"
            )
    chosen = choose_split(split, named, where)
    return [s for s, words in zip(shards, splits, strict=True) if chosen in words], None


@contextmanager
def _opened(shards: list[Path], indexes: list[TarIndex]) -> Iterator[Callable[[_Member], bytes]]:
    """Reads members from any thread, with few of the shards open at a time."""
    opened = lru_cache(_MAX_OPEN)(lambda number: _OpenShard(shards[number], indexes[number]))
    try:
        # Whoever reads holds the shard, so that it stays open when others take its place.
        yield lambda member: opened(member.shard).read(member.extent)
    finally:
        opened.cache_clear()


class _OpenShard:
    """An open shard, closed with its last reader."""

    def __init__(self, path: Path, index: TarIndex) -> None:
        self._file = open(path, "rb", buffering=0)
        if identity_of(os.fstat(self._file.fileno())) != index.identity:
            raise ValueError(f"{printable(str(path))}: changed while it was read")

    def read(self, extent: Extent) -> bytes:
        content = read_at(self._file.fileno(), extent.size, extent.start)
        if len(content) != extent.size:
            raise ValueError(f"has {len(content)} of {extent.size} bytes: the archive was cut")
        return content

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _is_class(name: str) -> bool:
    return name.lower().endswith(".cls") and not is_hidden(name)


def _wanted(shard: Path, index: TarIndex) -> dict[str, Extent]:
    """Images, classes and descriptions of a shard, those behind links too, in their order."""
    where = printable(str(shard))

    def is_read(name: str) -> bool:
        return is_wanted(name) or _is_class(name)

    for name, kind in index.others.items():
        if is_read(name):
            raise ValueError(f"{where}: '{printable(name)}' is {kind}, expected a file")
    targets = resolve_links(where, index.files, index.links, is_read)
    return {name: index.files[targets.get(name, name)] for name in index.names if is_read(name)}


def _classes(
    where: str, members: Mapping[str, _Member], read: Callable[[_Member], bytes]
) -> dict[str, int]:
    """The class of each sample that has one."""
    classes: dict[str, int] = {}
    for name, member in members.items():
        if not _is_class(name):
            continue
        if _key(name) in classes:
            raise ValueError(f"{where}: sample '{printable(_key(name))}' has two .cls files")
        text = b"" if member.extent.size > _MAX_CLASS_BYTES else read(member)
        if not re.fullmatch(rb"\s*[+-]?[0-9]{1,20}\s*", text) or abs(int(text)) >= 2**63:
            shown = text[:40] if text else f"{member.extent.size} bytes"
            raise ValueError(
                f"{where}: {printable(name)} holds {shown!r}, expected the number of a class"
            )
        classes[_key(name)] = int(text)
    return classes


def _labelled(
    where: str,
    members: Mapping[str, _Member],
    read: Callable[[_Member], bytes],
    split: str | None,
    classes: Mapping[str, int],
) -> tuple[dict[str, _Member], np.ndarray | None, tuple[str, ...] | None]:
    """The images of a split, their classes and the names of the classes."""
    inner = {member.name: member for name, member in members.items() if not _is_class(name)}

    def read_inner(name: str, limit: int | None = None) -> bytes:
        same = [member for member in members.values() if member.name == name]
        if len(same) > 1:
            raise ValueError(f"there are {len(same)} of it")
        if limit is not None and same[0].extent.size > limit:
            raise ValueError(f"has {same[0].extent.size} bytes, expected {limit} at the most")
        return read(same[0])

    sizes = {name: (member.extent.size, 0) for name, member in inner.items()}
    tree = Tree(where, ": ", sizes, read_inner, (), [])
    selection = select(tree, split)
    chosen = set(selection.names)
    images = {name: member for name, member in members.items() if member.name in chosen}
    first: dict[str, str] = {}
    for name in images:
        if first.setdefault(_key(name), name) != name:
            raise ValueError(
                f"{where}: one sample has several images, '{printable(first[_key(name)])}' and "
                f"'{printable(name)}': files with the same name up to its first dot belong together"
            )
    if classes:
        missing = [key for key in map(_key, images) if key not in classes]
        if missing:
            raise ValueError(
                f"{where}: {printable(missing[0])} has no .cls file, but other samples have one"
            )
        return images, np.array([classes[_key(name)] for name in images], np.int64), None
    labels, label_names = labels_of(tree, selection)
    if labels is not None:
        label_of = dict(zip(selection.names, labels.tolist(), strict=True))
        labels = np.array([label_of[member.name] for member in images.values()], np.int64)
    return images, labels, label_names


def _note_left(
    shard: Path, index: TarIndex, members: Mapping[str, _Member], left_out: LeftOut
) -> None:
    """Note the members of a shard that belong to no image."""
    samples = {_key(name) for name in index.names if is_image(name)}
    for name in index.names:
        if is_of_system(name):
            continue
        if os.path.splitext(name)[1].lower() in SUFFIXES:
            if f"{shard.name}/{name}" not in members:
                left_out.add(f"{shard.name}/{name}", "hidden")
        elif _key(name) not in samples and name.rsplit("/", 1)[-1] != dataset_json.NAME:
            left_out.add(f"{shard.name}/{name}", "belonging to no image")


def _key(name: str) -> str:
    """What the files of a sample have in common."""
    folder, slash, base = name.rpartition("/")
    match = _KEY.match(base)
    return f"{folder}{slash}{match[0] if match else base}"
