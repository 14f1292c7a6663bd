"""MNIST's idx format: 8-bit images and their labels, gzipped or not.

A file starts with two zero bytes, 8 for unsigned bytes, the number of dimensions, then each
dimension as a big-endian 32-bit number; the values follow.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from pathlib import Path

import numpy as np

from pyflocality._support.paths import regular_file
from pyflocality.sources.arrays import convert
from pyflocality.sources.base import Loaded, Request, refuse_split
from pyflocality.sources.splits import choose_split
from pyflocality.storage.mapped import remember

_Opened = io.BufferedReader | gzip.GzipFile
_IMAGE_FILE = re.compile(r"(.*?)-?images[-.]idx3-ubyte(\.gz)?")
# What DEFLATE can make of a byte at the most.
_MAX_RATIO = 1032
_PIECE = 2**24
_PREFIXES = {"train": "train", "t10k": "test", "test": "test"}


def is_idx_file(path: Path) -> bool:
    """Whether a file is named like an idx file."""
    return re.search(r"[-.]idx\d-ubyte(\.gz)?$", path.name) is not None


def find_splits(folder: Path) -> dict[str, Path]:
    """The image files of MNIST in a folder, by split; empty for any other folder."""
    result: dict[str, Path] = {}
    # Reversed, so that a plain file takes precedence over its gzipped copy: only it is mapped.
    for path in sorted(folder.iterdir(), reverse=True):
        match = _IMAGE_FILE.fullmatch(path.name)
        if match is not None and match[1] in _PREFIXES:
            result[_PREFIXES[match[1]]] = path
    return result


def load_idx_folder(folder: Path, request: Request) -> Loaded:
    """Load one split of a folder that holds MNIST's files."""
    splits = find_splits(folder)
    path = splits[choose_split(request.split, sorted(splits), str(folder))]
    return _load(path, f"{folder.resolve().name}/{path.name}", request)


def load_idx_file(path: Path, request: Request) -> Loaded:
    """Load an idx file of images, and the labels that lie beside it."""
    refuse_split(request.split, str(path))
    return _load(path, path.name, request)


def _load(path: Path, name: str, request: Request) -> Loaded:
    images = _read(path, 3)
    labels_path = _labels_path(path)
    labels = None
    if labels_path is not None:
        labels = np.array(_read(labels_path, 1), np.int64)
        if len(labels) != len(images):
            raise ValueError(
                f"{labels_path}: expected {len(images)} labels, one for each image of "
                f"{path.name}, got {len(labels)}"
            )
    return convert(Loaded(images, name, labels), request)


def _labels_path(path: Path) -> Path | None:
    plain = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for name in (plain, f"{plain}.gz"):
        candidate = path.with_name(name)
        # What is there and cannot be read must not count as absent.
        if os.path.lexists(candidate) and candidate != path:
            return candidate
    return None


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Values of an idx file, mapped into memory unless they are gzipped."""
    size = regular_file(path).st_size
    zipped = path.suffix == ".gz"
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            shape = _read_header(file, path, dimensions)
            values = int(np.prod(shape, dtype=object))
            if not zipped and size != start + values:
                raise _wrong_size(path, shape, start + values, f"it has {size}")
            if zipped and start + values > _MAX_RATIO * size:
                raise _wrong_size(path, shape, start + values, f"{size} bytes cannot expand to it")
            if zipped or dimensions == 1 or values == 0:
                return _read_values(file, path, shape, start)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    images = np.memmap(path, np.uint8, "c", start, shape)
    remember(images)
    return images


def _read_header(file: _Opened, path: Path, dimensions: int) -> tuple[int, ...]:
    """The shape that the values behind the header have."""
    start = 4 + 4 * dimensions
    content = file.read(start)
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(
            f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions: it starts "
            f"with {content[:4].hex(' ') or 'nothing'}"
        )
    return tuple(int(length) for length in np.frombuffer(content, ">u4", dimensions, 4))


def _read_values(file: _Opened, path: Path, shape: tuple[int, ...], start: int) -> np.ndarray:
    """Exactly the values that the header announces, and the end of the file behind them."""
    values = np.empty(shape, np.uint8)
    rest, filled = values.reshape(-1).data, 0
    while filled < len(rest) and (count := file.readinto(rest[filled : filled + _PIECE])):
        filled += count
    # Reading the end also compares the checksum of a gzipped file.
    more = len(file.read(1))
    if filled < len(rest) or more:
        has = f"it has {start + filled + more}" + " at least" * more
        raise _wrong_size(path, shape, start + len(rest), has)
    return values


def _wrong_size(path: Path, shape: tuple[int, ...], expected: int, has: str) -> ValueError:
    return ValueError(
        f"{path}: its header announces {'x'.join(map(str, shape))} values, {expected} bytes in "
        f"all, but {has}"
    )
