"""Tar archives of images, the shards of webdataset.

A shard holds samples: files with the same path up to the first dot of their name belong to one.
The image is the file with an image suffix, the class the whole number in the file ending in
`.cls`. Shards are read in the order of their names and must not be compressed, so that an image
can be read without those before it.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyflocality.sources.base import Request, refuse_split
from pyflocality.sources.folder import SUFFIXES
from pyflocality.sources.images import ImageFiles, LabelledFiles


class _Member(NamedTuple):
    """Where a file lies: number of the shard, position and size in bytes."""

    shard: int
    start: int
    size: int


def find_shards(path: Path) -> list[Path]:
    """The shards that a path means: itself, or the .tar files of a folder; none if it is neither.

    Raises:
        ValueError: There are compressed archives.
    """
    candidates = [path] if path.is_file() else sorted(path.iterdir())
    for candidate in candidates:
        if candidate.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise ValueError(f"{candidate}: compressed tar archives are not read: decompress them")
    return [candidate for candidate in candidates if candidate.suffix.lower() == ".tar"]


@contextmanager
def open_files(path: Path, request: Request) -> Iterator[LabelledFiles]:
    """The images of one shard or of a folder of shards, still encoded."""
    refuse_split(request.split, str(path))
    shards = find_shards(path)
    images: dict[str, _Member] = {}
    classes: dict[str, int] = {}
    for number, shard in enumerate(shards):
        _index(number, shard, images, classes)
    if not images:
        raise ValueError(f"{path}: the tar archives hold no images ({', '.join(sorted(SUFFIXES))})")
    keys = [_key(name) for name in images]
    missing = [key for key in keys if key not in classes]
    if classes and missing:
        raise ValueError(f"{path}: {missing[0]} has no .cls file, but other samples have one")
    labels = np.array([classes[key] for key in keys], np.int64) if classes else None
    status = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    descriptors: list[int] = []
    try:
        descriptors.extend(os.open(shard, os.O_RDONLY) for shard in shards)

        def read(name: str) -> bytes:
            member = images[name]
            return os.pread(descriptors[member.shard], member.size, member.start)

        total_bytes = sum(member.size for member in images.values())
        files = ImageFiles(list(images), read, lambda name: f"{path}: {name}", total_bytes)
        fingerprint = {"tar": str(path.resolve()), "shards": status}
        yield LabelledFiles(files, path.resolve().name, labels, None, fingerprint)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _index(number: int, shard: Path, images: dict[str, _Member], classes: dict[str, int]) -> None:
    """Note the images and classes of one shard, by names that begin with the shard's."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                name = f"{shard.name}/{info.name}"
                suffix = os.path.splitext(info.name)[1].lower()
                if not info.isfile():
                    continue
                if suffix in SUFFIXES:
                    images[name] = _Member(number, info.offset_data, info.size)
                elif suffix == ".cls":
                    content = archive.extractfile(info)
                    text = b"" if content is None else content.read()
                    classes[_key(name)] = _class_of(info.name, text)
            _check_whole(shard, archive.offset)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"{shard}: not a readable tar archive: {error}") from error


def _class_of(name: str, text: bytes) -> int:
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or abs(number) >= 2**63:
        raise ValueError(f"{name} holds {text[:40]!r}, expected the number of a class")
    return number


def _check_whole(shard: Path, end: int) -> None:
    # tarfile takes an archive that ends inside a file for one without that file's successors.
    if shard.stat().st_size < end:
        raise ValueError(f"has {shard.stat().st_size} bytes, expected {end} at least")


def _key(name: str) -> str:
    """What the files of a sample have in common."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"
