"""Decoded images on disk, mapped into memory.

A set that takes long to decode is written once as `<key>.npy` beside `<key>.json`, which holds
the version, the size of the array file, a checksum of it, the labels and a checksum of itself.
The key is a hash of what identifies the source and of the conversion asked for, so a changed
source gets another key. Both files are written under temporary names and renamed; the JSON file
comes last, so a run that is cut short leaves nothing that a later one would trust.

The checksum of the array file covers every byte up to 256 MiB and, beyond, 4,096 blocks of
64 KiB spread evenly from the first to the last: damage of a small set is always found, and
opening a set of any size costs a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyflocality._cache import default_cache_dir
from pyflocality._progress import progress_bar
from pyflocality.sources.base import DecodeJob, Loaded, MappedImages, Request

VERSION = 1
# Sets below both bounds decode in about a second, or less: they are never cached.
MIN_IMAGES = 1000
MIN_SOURCE_BYTES = 32 * 2**20

_BLOCK = 64 * 2**10
_MAX_BLOCKS = 4096


def cache_key(fingerprint: dict[str, Any], request: Request) -> str:
    """Hash of a source and of the conversion asked for."""
    wanted = [VERSION, fingerprint, request.resolution, request.channels, request.split]
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]


def find(loaded: Loaded, request: Request) -> Loaded | None:
    """The decoded set in the cache, or None.

    Args:
        loaded: The source, with its fingerprint; its images are not looked at.
        request: The conversion asked for.

    A damaged entry is reported by a warning and taken for absent.
    """
    if loaded.fingerprint is None:
        return None
    try:
        array_path, entry_path = _paths(loaded.fingerprint, request)
        if not entry_path.is_file():
            return None
    except (OSError, RuntimeError):
        return None
    try:
        entry = _read_entry(entry_path)
        if entry["bytes"] != array_path.stat().st_size or entry["checksum"] != checksum(array_path):
            raise ValueError(f"{array_path.name} is not the file that was written")
        images = np.lib.format.open_memmap(array_path, mode="c")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{entry_path}: the cached images are damaged ({error}); decoding again", stacklevel=6
        )
        return None
    labels = None if entry["labels"] is None else np.array(entry["labels"], np.int64)
    names = None if entry["label_names"] is None else tuple(entry["label_names"])
    return Loaded(images, loaded.name, labels, names, MappedImages.of(images))


def run_job(job: DecodeJob, source: Loaded, request: Request) -> Loaded:
    """Decode a set: into the cache if its source has a fingerprint, else into memory.

    Where the cache cannot be written, a warning says so and the images stay in memory.
    """
    if source.fingerprint is not None:
        try:
            return _write(job, source, request)
        except (OSError, RuntimeError) as error:
            warnings.warn(
                f"the decoded images of {source.name} cannot be cached ({error}); they stay in "
                "memory. Name a writable folder with cache_dir= or PYFLOCALITY_CACHE_DIR",
                stacklevel=6,
            )
    images = np.empty(job.shape, job.dtype)
    with closing(job.images()) as decoded:
        for index, image in enumerate(_shown(decoded, job, source, request)):
            images[index] = image
    return Loaded(images, source.name, source.labels, source.label_names)


def checksum(path: Path) -> int:
    """CRC-32 of a file's blocks: all of them, or 4,096 spread evenly over a large file."""
    total = -(-path.stat().st_size // _BLOCK)
    count = min(total, _MAX_BLOCKS)
    crc = 0
    with open(path, "rb") as file:
        for index in range(count):
            file.seek(_BLOCK * (index * (total - 1) // max(count - 1, 1)))
            crc = zlib.crc32(file.read(_BLOCK), crc)
    return crc


def _shown(
    decoded: Iterator[np.ndarray], job: DecodeJob, source: Loaded, request: Request
) -> Iterator[np.ndarray]:
    return progress_bar(
        decoded,
        description=f"decoding {source.name}",
        total=job.shape[0],
        enabled=request.progress,
    )


def _paths(fingerprint: dict[str, Any], request: Request) -> tuple[Path, Path]:
    folder = default_cache_dir() if request.cache_dir is None else request.cache_dir
    key = cache_key(fingerprint, request)
    return folder / f"{key}.npy", folder / f"{key}.json"


def _write(job: DecodeJob, source: Loaded, request: Request) -> Loaded:
    array_path, entry_path = _paths(source.fingerprint or {}, request)
    array_path.parent.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    try:
        with (
            _temporary(array_path, written) as file,
            closing(job.images()) as decoded,
        ):
            header = {"descr": job.dtype.str, "fortran_order": False, "shape": job.shape}
            np.lib.format.write_array_header_1_0(file, header)
            # Plain writes, not a map: a full disk is then an error and not a bus error.
            for image in _shown(decoded, job, source, request):
                file.write(np.ascontiguousarray(image))
        entry = {
            "version": VERSION,
            "source": source.name,
            "shape": job.shape,
            "bytes": os.path.getsize(written[0]),
            "checksum": checksum(Path(written[0])),
            "labels": None if source.labels is None else source.labels.tolist(),
            "label_names": source.label_names,
        }
        with _temporary(entry_path, written) as file:
            file.write(json.dumps(entry | {"self": _entry_checksum(entry)}).encode())
        os.replace(written[0], array_path)
        os.replace(written[1], entry_path)
    finally:
        for leftover in written:
            Path(leftover).unlink(missing_ok=True)
    images = np.lib.format.open_memmap(array_path, mode="c")
    mapped = MappedImages.of(images)
    return Loaded(images, source.name, source.labels, source.label_names, mapped)


def _temporary(path: Path, written: list[str]) -> IO[bytes]:
    file: IO[bytes] = tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False
    )
    written.append(file.name)
    return file


def _entry_checksum(entry: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def _read_entry(path: Path) -> dict[str, Any]:
    entry = json.loads(path.read_text(encoding="utf-8"))
    if entry["version"] != VERSION:
        raise ValueError(f"version {entry['version']}, expected {VERSION}")
    if entry.pop("self") != _entry_checksum(entry):
        raise ValueError(f"{path.name} is not the file that was written")
    return entry
