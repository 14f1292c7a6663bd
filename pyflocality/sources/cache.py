"""Decoded images on disk, mapped into memory.

A set that takes long to decode is written once as `<key>.npy` beside `<key>.json`, which holds
the version, the size of the array file, a checksum of it, dtype and shape, the labels and a
checksum of itself. The key is a hash of what identifies the source and of the conversion asked
for, so a changed source gets another key. Both files are written under temporary names and
renamed; the JSON file comes last, so a run that is cut short leaves nothing that a later one would
trust. One process decodes while others that want the same set wait for it.

The checksum of the array file covers every byte up to 256 MiB and, beyond, 4,096 blocks of
64 KiB spread evenly from the first to the last: damage of a small set is always found, and
opening a set of any size costs a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality._support.caller import caller_level
from pyflocality._support.json import (
    COUNT,
    TEXT,
    TEXTS,
    WHOLE_NUMBERS,
    check_fields,
    sealed,
    shape,
    unsealed,
)
from pyflocality._support.locks import locked, remove_abandoned, replacing
from pyflocality._support.progress import progress_bar
from pyflocality.sources.base import DecodeJob, Loaded, Request
from pyflocality.sources.npy import checksum, map_recorded
from pyflocality.storage.cache import (
    cache_folder,
    make_folder,
    mark_used,
    open_entry,
    remove_leftovers,
    tell_unwritable,
)
from pyflocality.storage.limit import make_room

VERSION = 2
_FIELDS = {
    "source": TEXT,
    "dtype": TEXT,
    "shape": shape(4),
    "bytes": COUNT,
    "checksum": COUNT,
    "labels": WHOLE_NUMBERS.or_none(),
    "label_names": TEXTS.or_none(),
}
# Sets below both bounds decode in about a second, or less: they are never cached.
MIN_IMAGES = 1000
MIN_SOURCE_BYTES = 32 * 2**20


# Images that tell how long a set takes to decode, for each processor, and seconds for them.
_SAMPLE_IMAGES, _SAMPLE_SECONDS = 128, 2.0

_decodes: ContextVar[bool] = ContextVar("decodes", default=True)


class UndecodedError(Exception):
    """A set that would have to be decoded.

    Attributes:
        shape: Shape of the images, [N, C, H, W].
        dtype: Their dtype.
        source: What is known of the set, without the images.
        seconds: How long decoding takes, about.
        spent: How long it took to know that, in seconds.
    """

    def __init__(self, job: DecodeJob, source: Loaded) -> None:
        super().__init__(f"{source.name} is not decoded")
        self.shape, self.dtype, self.source = job.shape, job.dtype, source
        start = time.perf_counter()
        self.seconds = _sampled_seconds(job)
        self.spent = time.perf_counter() - start


@contextmanager
def nothing_decoded() -> Iterator[None]:
    """Inside the block sets that would have to be decoded raise `UndecodedError`."""
    token = _decodes.set(False)
    try:
        yield
    finally:
        _decodes.reset(token)


def cache_key(fingerprint: dict[str, Any], request: Request) -> str:
    """Hash of a source and of the conversion asked for."""
    wanted = [VERSION, fingerprint, request.resolution, request.channels, request.split]
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]


def find(loaded: Loaded, request: Request) -> Loaded | None:
    """The decoded set in the cache, or None; the images of `loaded` are not looked at.

    A damaged entry is reported by a warning and taken for absent.
    """
    place = _place(loaded, request)
    if place is None:
        return None
    try:
        result = _read(loaded, place)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        what = "cannot be used" if isinstance(error, OSError) else "are damaged"
        warnings.warn(
            f"{place}.json: the cached images {what} ({error}); decoding again",
            stacklevel=caller_level(),
        )
        return None
    # Of a process that was killed when all was done.
    remove_abandoned([_lock_of(place)])
    return result


def run_job(job: DecodeJob, source: Loaded, request: Request) -> Loaded:
    """Decode a set: into the cache if its source has a fingerprint, else into memory.

    Where the cache cannot be written, or its limit leaves no room, a warning says so and the images
    stay in memory.

    Raises:
        UndecodedError: Inside `nothing_decoded`.
    """
    if not _decodes.get():
        raise UndecodedError(job, source)
    place = _place(source, request)
    if place is not None:
        try:
            result = _cached(job, source, request, place)
        except OSError as error:
            # Where there are no locks somebody else may have been faster.
            result = _cached_meanwhile(source, place)
            if result is None:
                tell_unwritable(place.parent, error)
        if result is not None:
            return result
    images = np.empty(job.shape, job.dtype)
    with closing(job.images()) as decoded:
        for index, image in enumerate(_shown(decoded, job, source, request)):
            images[index] = image
    return Loaded(images, source.name, source.labels, source.label_names)


def _sampled_seconds(job: DecodeJob) -> float:
    """How long a job takes, from its first images."""
    wanted = min(job.shape[0], _SAMPLE_IMAGES * min(8, os.cpu_count() or 1))
    start, done, spent = time.perf_counter(), 0, 0.0
    with closing(job.images()) as decoded:
        for done, _ in enumerate(decoded, 1):
            spent = time.perf_counter() - start
            if done == wanted or spent > _SAMPLE_SECONDS:
                break
    return spent * job.shape[0] / max(1, done)


def _shown(
    decoded: Iterator[np.ndarray], job: DecodeJob, source: Loaded, request: Request
) -> Iterator[np.ndarray]:
    return progress_bar(
        decoded,
        description=f"decoding {source.name}",
        total=job.shape[0],
        enabled=request.progress,
    )


def _place(source: Loaded, request: Request) -> Path | None:
    """Where the two files of a set lie, without their suffixes; None if it is not cached."""
    if source.fingerprint is None:
        return None
    folder = cache_folder(chosen=request.cache_dir)
    return None if folder is None else folder / cache_key(source.fingerprint, request)


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _read(source: Loaded, place: Path) -> Loaded:
    """The entry of a source.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be trusted, or read.
        ValueError: It is damaged.
    """
    with open_entry(place.with_suffix(".json")) as file:
        mark_used(file)
        entry = unsealed(file.read())
    if entry.get("version") != VERSION:
        raise ValueError(f"version {entry.get('version')!r}, expected {VERSION}")
    check_fields(entry, _FIELDS)
    try:
        # Whoever replaces the files from here on leaves those that are open as they are.
        with open_entry(place.with_suffix(".npy")) as file:
            images = map_recorded(file, entry, entry["dtype"], by_name=False)
    except (FileNotFoundError, ValueError) as error:
        told = "is missing" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"{place.name}.npy {told}") from error
    labels = None if entry["labels"] is None else np.array(entry["labels"], np.int64)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels of {len(images)} images")
    names = None if entry["label_names"] is None else tuple(entry["label_names"])
    return Loaded(images, source.name, labels, names)


def _cached(job: DecodeJob, source: Loaded, request: Request, place: Path) -> Loaded | None:
    """Decode a set into the cache, or find what somebody else decodes meanwhile.

    None where the limit of the cache leaves no room for it.
    """
    make_folder(place.parent)
    with locked(_lock_of(place), waiting_for=f"decodes {source.name}"):
        # Also of those that this one has waited for.
        remove_leftovers(place.parent)
        result = _cached_meanwhile(source, place)
        if result is None and make_room(place.parent, math.prod(job.shape) * job.dtype.itemsize):
            _write(job, source, request, place)
            result = _read(source, place)
    return result


def _cached_meanwhile(source: Loaded, place: Path) -> Loaded | None:
    try:
        return _read(source, place)
    except (OSError, ValueError):
        return None


def _write(job: DecodeJob, source: Loaded, request: Request, place: Path) -> None:
    # The entry is written when the array is in its place.
    with replacing(place.with_suffix(".json")) as entry_file:
        with replacing(place.with_suffix(".npy")) as file:
            header = {"descr": job.dtype.str, "fortran_order": False, "shape": job.shape}
            np.lib.format.write_array_header_1_0(file, header)
            # Plain writes, not a map: a full disk is then an error and not a bus error.
            with closing(job.images()) as decoded:
                for image in _shown(decoded, job, source, request):
                    file.write(np.ascontiguousarray(image).data)
            file.flush()
            entry = {
                "version": VERSION,
                "source": source.name,
                "dtype": job.dtype.str,
                "shape": job.shape,
                "bytes": file.tell(),
                "checksum": checksum(file),
                "labels": None if source.labels is None else source.labels.tolist(),
                "label_names": source.label_names,
            }
        entry_file.write(sealed(entry).encode())
