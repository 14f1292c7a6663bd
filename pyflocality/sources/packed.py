"""Packed sets: a folder with one memory-mapped array of bytes, labels and a manifest.

| file | what it holds |
|---|---|
| `images.npy` | all images, uint8 [N, C, H, W] |
| `labels.npy` | the classes, int64 [N]; only if there are any |
| `manifest.json` | shape, names of the classes, where the images are from, checksums |
| `packing.jsonl` | only while the set is being packed: what is finished |

The manifest is written last. It carries a CRC-32 of every block of images, which
`pyflocality.packing.verify` compares, and one of a sample of the whole file, header included,
which opening a set compares: see `pyflocality.sources.cache`. Manifest and journal carry
checksums of themselves.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality._support.json import (
    COUNT,
    COUNTS,
    POSITIVE,
    TEXT,
    TEXTS,
    check_fields,
    shape,
    unsealed,
)
from pyflocality._support.paths import regular_file
from pyflocality.sources.arrays import convert
from pyflocality.sources.base import Loaded, Request, refuse_split
from pyflocality.sources.npy import map_recorded

IMAGES, LABELS, MANIFEST, JOURNAL = "images.npy", "labels.npy", "manifest.json", "packing.jsonl"
FORMAT, VERSION = "pyflocality-packed-set", 1

_FIELDS = {
    "key": COUNT,
    "name": TEXT,
    "shape": shape(4),
    "label_names": TEXTS.or_none(),
    "labels_crc32": COUNT.or_none(),
    "bytes": COUNT,
    "checksum": COUNT,
    "images_per_block": POSITIVE,
    "blocks_crc32": COUNTS,
}
_BEGUN_FIELDS = {"key": COUNT, "shape": shape(4), "images_per_block": POSITIVE}


def is_packed(path: Path) -> bool:
    """Whether a folder holds a packed set, finished or not."""
    return (path / JOURNAL).is_file() or _looks_like_manifest(path / MANIFEST)


def _looks_like_manifest(path: Path) -> bool:
    if not path.is_file():
        return False
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
        manifest = unsealed(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or no manifest: {error}") from error
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: has version {manifest.get('version')!r} of the format; this release reads "
            f"version {VERSION}"
        )
    try:
        check_fields(manifest, _FIELDS)
    except ValueError as error:
        raise ValueError(f"{path}: not a manifest: {error}") from error
    return manifest


def read_begun(line: str) -> dict[str, Any]:
    """What the first line of a journal says of the set that was begun.

    Raises:
        ValueError: It is damaged.
    """
    begun = unsealed(line)
    check_fields(begun, _BEGUN_FIELDS)
    return begun


def load_packed(folder: Path, request: Request) -> Loaded:
    """Map a packed set into memory."""
    refuse_split(request.split, str(folder))
    manifest = read_manifest(folder)
    path = folder / IMAGES
    regular_file(path)
    try:
        with open(path, "rb") as file:
            images = map_recorded(file, manifest, "uint8", by_name=True)
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
        fingerprint,
    )
    return convert(loaded, request)


def _read_labels(folder: Path, manifest: dict[str, Any]) -> np.ndarray | None:
    if manifest["labels_crc32"] is None:
        return None
    path = folder / LABELS
    regular_file(path)
    try:
        content = path.read_bytes()
        if zlib.crc32(content) != manifest["labels_crc32"]:
            raise ValueError("its contents do not match their checksum")
        labels = np.load(io.BytesIO(content), allow_pickle=False)
        if labels.dtype != np.int64 or list(labels.shape) != manifest["shape"][:1]:
            raise ValueError(
                f"has {labels.dtype} {list(labels.shape)}, expected int64 {manifest['shape'][:1]}"
            )
        return labels
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
