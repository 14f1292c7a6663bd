"""MNIST's idx format: 8-bit images and their labels, gzipped or not.

A file starts with two zero bytes, 8 for unsigned bytes, the number of dimensions, then each
dimension as a big-endian 32-bit number; the values follow.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from pyflocality.sources.arrays import convert
from pyflocality.sources.base import Loaded, MappedImages, Request, choose_split, refuse_split

_IMAGE_FILE = re.compile(r"(.*?)-?images[-.]idx3-ubyte(\.gz)?")
_PREFIXES = {"train": "train", "t10k": "test", "test": "test"}


def is_idx_file(path: Path) -> bool:
    """Whether a file is named like an idx file."""
    return re.search(r"[-.]idx\d-ubyte(\.gz)?$", path.name) is not None


def find_splits(folder: Path) -> dict[str, Path]:
    """The image files of MNIST in a folder, by split; empty for any other folder."""
    found: dict[str, Path] = {}
    # Reversed, so that a plain file takes precedence over its gzipped copy: only it is mapped.
    for path in sorted(folder.iterdir(), reverse=True):
        match = _IMAGE_FILE.fullmatch(path.name)
        if match is not None and match[1] in _PREFIXES:
            found[_PREFIXES[match[1]]] = path
    return found


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
    mapped = MappedImages.of(images) if isinstance(images, np.memmap) else None
    return convert(Loaded(images, name, labels, mapped=mapped), request)


def _labels_path(path: Path) -> Path | None:
    plain = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for name in (plain, f"{plain}.gz"):
        candidate = path.with_name(name)
        if candidate.is_file() and candidate != path:
            return candidate
    return None


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Values of an idx file, mapped into memory unless they are gzipped."""
    zipped = path.suffix == ".gz"
    try:
        if zipped:
            with gzip.open(path) as file:
                content = file.read()
            size = len(content)
        else:
            with open(path, "rb") as file:
                content = file.read(4 + 4 * dimensions)
            size = path.stat().st_size
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(
            f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions: it starts "
            f"with {content[:4].hex(' ') or 'nothing'}"
        )
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", dimensions, 4))
    expected = start + int(np.prod(shape, dtype=object))
    if size != expected:
        raise ValueError(
            f"{path}: its header announces {'x'.join(map(str, shape))} values, {expected} bytes "
            f"in all, but it has {size}"
        )
    if zipped or dimensions == 1 or 0 in shape:
        content = content if zipped else path.read_bytes()
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return np.memmap(path, np.uint8, "c", start, shape)
