"""Packed sets: a folder with one memory-mapped array of bytes, labels and a manifest.

| file | what it holds |
|---|---|
| `images.npy` | all images, uint8 [N, C, H, W] |
| `labels.npy` | the classes, int64 [N]; only if there are any |
| `manifest.json` | shape, names of the classes, where the images are from, checksums |
| `packing.jsonl` | only while the set is being packed: what is finished |

The manifest is written last. It carries a CRC-32 of every block of images, which
`pyflocality.packing.verify` compares, and one of a sample of the whole file, which opening a set
compares: see `pyflocality.sources.cache`.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality.sources import cache
from pyflocality.sources.arrays import convert
from pyflocality.sources.base import Loaded, MappedImages, Request, refuse_split

IMAGES, LABELS, MANIFEST, JOURNAL = "images.npy", "labels.npy", "manifest.json", "packing.jsonl"
FORMAT, VERSION = "pyflocality-packed-set", 1


def is_packed(path: Path) -> bool:
    """Whether a folder holds a packed set, finished or not."""
    return (path / JOURNAL).is_file() or _looks_like_manifest(path / MANIFEST)


def _looks_like_manifest(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return FORMAT.encode() in file.read(100)
    except OSError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed set.

    Raises:
        ValueError: It is missing, damaged or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: the set is not packed to its end: run `pyflocality pack` again"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        own = manifest.pop("self")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable manifest: {error!r}") from error
    if own != checksum_of(manifest):
        raise ValueError(f"{path}: damaged: its contents do not match their checksum")
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{path}: has version {manifest['version']} of the format; this release reads "
            f"version {VERSION}"
        )
    return manifest


def checksum_of(entry: dict[str, Any]) -> int:
    """CRC-32 of a manifest without its own checksum."""
    return zlib.crc32(json.dumps(entry).encode())


def load_packed(folder: Path, request: Request) -> Loaded:
    """Map a packed set into memory."""
    refuse_split(request.split, str(folder))
    manifest = read_manifest(folder)
    path = folder / IMAGES
    try:
        size = path.stat().st_size
        if size != manifest["bytes"]:
            raise ValueError(f"has {size} bytes, expected {manifest['bytes']}")
        if cache.checksum(path) != manifest["checksum"]:
            raise ValueError("its contents do not match their checksum")
        images = np.lib.format.open_memmap(path, mode="c")
        if list(images.shape) != manifest["shape"]:
            raise ValueError(f"has shape {list(images.shape)}, expected {manifest['shape']}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    labels = _read_labels(folder, manifest)
    names = manifest["label_names"]
    fingerprint = {"packed": str(folder.resolve()), "checksum": manifest["checksum"]}
    loaded = Loaded(
        images,
        folder.resolve().name,
        labels,
        None if names is None else tuple(names),
        MappedImages.of(images),
        fingerprint,
    )
    return convert(loaded, request)


def _read_labels(folder: Path, manifest: dict[str, Any]) -> np.ndarray | None:
    if manifest["labels_crc32"] is None:
        return None
    path = folder / LABELS
    try:
        content = path.read_bytes()
        if zlib.crc32(content) != manifest["labels_crc32"]:
            raise ValueError("its contents do not match their checksum")
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
