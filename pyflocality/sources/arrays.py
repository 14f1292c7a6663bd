"""NumPy files, and the conversion of sources that hold arrays."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pyflocality._support.text import printable
from pyflocality.sources import cache
from pyflocality.sources.base import DecodeJob, Loaded, Request, refuse_split
from pyflocality.sources.layout import find_layout
from pyflocality.sources.left_out import LeftOut
from pyflocality.sources.npy import map_array
from pyflocality.sources.pixels import convert_array
from pyflocality.sources.validation import as_image_tensor, check_values, checked_shape
from pyflocality.sources.zip_directory import check_zip
from pyflocality.storage.mapped import remember
from pyflocality.storage.reader import Reader

_IMAGE_KEYS = ("images", "x", "X", "data", "image", "imgs", "samples", "arr_0")
_LABEL_KEYS = ("labels", "y", "label", "targets", "target")
# Images that are read and then converted.
_CONVERTED_AT_A_TIME = 64


def load_npy(path: Path, request: Request) -> Loaded:
    """Map a .npy file of images [N, H, W], [N, C, H, W] or [N, H, W, C] into memory."""
    refuse_split(request.split, str(path))
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            array = map_array(file)
            remember(array, file.fileno())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable .npy file: {error}") from error
    layout = _layout_of(array, path, request)
    fingerprint = None
    if len(array) >= cache.MIN_IMAGES:
        stat = [status.st_size, status.st_mtime_ns]
        fingerprint = {"npy": str(path.resolve()), "stat": stat, "layout": layout}
    images = array.transpose(0, 3, 1, 2) if layout == "NHWC" else array
    return convert(Loaded(images, path.name, fingerprint=fingerprint), request)


def load_npz(path: Path, request: Request) -> Loaded:
    """Load an .npz file: images under `images`, `x` or `arr_0`, labels under `labels` or `y`.

    Other usual names are found, too, and `arr_1` where it can be labels. What else the file holds
    is told by a warning; two arrays that may both be meant are refused.
    """
    refuse_split(request.split, str(path))
    left_out = LeftOut(str(path))
    check_zip(path, ".npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = archive.files
            image_key = _key_of(keys, _IMAGE_KEYS, "images")
            images = None if image_key is None else archive[image_key]
            label_key = _key_of(keys, _LABEL_KEYS, "labels")
            labels = None if label_key is None else archive[label_key]
            if images is not None and label_key is None and "arr_1" in keys:
                second = archive["arr_1"]
                if second.ndim == 1 and second.dtype.kind in "iu" and len(second) == len(images):
                    label_key, labels = "arr_1", second
    except _TwoArraysError as error:
        raise ValueError(f"{path}: {error}") from None
    # A damaged archive fails in zipfile, in zlib or in NumPy's reader of headers.
    except Exception as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
    if images is None:
        shown = printable(", ".join(keys)) or "nothing"
        raise ValueError(f"{path}: holds no `images`, `x` or `arr_0`, only {shown:.200}")
    for key in keys:
        if key not in (image_key, label_key):
            left_out.add(key, "neither images nor labels by its name")
    left_out.warn()
    if _layout_of(images, path, request) == "NHWC":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return convert(Loaded(images, path.name, labels), request)


class _TwoArraysError(Exception):
    """Two arrays of a file could be what is looked for."""


def _key_of(keys: list[str], wanted: Sequence[str], what: str) -> str | None:
    """The one of the usual names that is there, or None."""
    result = [key for key in wanted if key in keys]
    if len(result) > 1:
        listed = " and ".join(f"`{key}`" for key in result)
        raise _TwoArraysError(f"holds {listed}, each of which may be the {what}: keep one of them")
    return result[0] if result else None


def _layout_of(array: np.ndarray, path: Path, request: Request) -> str | None:
    """How the axes of a file's images are to be read; None for an array without any images."""
    if 0 in array.shape:
        return None
    try:
        return find_layout(array.shape, request.layout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def convert(loaded: Loaded, request: Request) -> Loaded:
    """Bring the images of an array source to the size and channels asked for.

    Raises:
        TypeError: The images are of a wrong dtype.
        ValueError: They leave [-1, 1], or are neither grey nor RGB and `channels` is given.
    """
    images = loaded.images
    if images.ndim not in (3, 4) or 0 in images.shape:
        return loaded
    if images.ndim == 3:
        images = images[:, None]
    count, has, *size = images.shape
    channels, resolution = request.channels or has, request.resolution or tuple(size)
    if (channels, resolution) == (has, tuple(size)):
        return loaded
    if channels != has and has not in (1, 3):
        raise ValueError(
            f"`channels` must be left out: the images of {loaded.name} have {has} channels, "
            "neither 1 (grey) nor 3 (RGB)"
        )
    cached = cache.find(loaded, request)
    if cached is not None:
        return replace(cached, labels=loaded.labels, label_names=loaded.label_names)
    try:
        # The values as they are stored: resampling would hide what is wrong with them.
        stored = checked_shape(as_image_tensor(images), "NCHW")
        check_values(stored, loaded.name, warn=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{loaded.name}: {error}") from error

    def converted() -> Generator[np.ndarray, None, None]:
        for block in Reader(stored).blocks(_CONVERTED_AT_A_TIME):
            for image in block.numpy():
                yield convert_array(image, resolution, channels)

    dtype = images.dtype.newbyteorder("=")
    job = DecodeJob((count, channels, *resolution), dtype, converted)
    return cache.run_job(job, loaded, request)
