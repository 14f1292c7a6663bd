"""NumPy files, and the conversion of sources that hold arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pyflocality.sources import cache
from pyflocality.sources.base import DecodeJob, Loaded, MappedImages, Request, refuse_split
from pyflocality.sources.pixels import convert_array

_IMAGE_KEYS = ("images", "x", "arr_0")
_LABEL_KEYS = ("labels", "y")


def load_npy(path: Path, request: Request) -> Loaded:
    """Map a .npy file of images [N, H, W], [N, C, H, W] or [N, H, W, C] into memory."""
    refuse_split(request.split, str(path))
    try:
        array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file: {error}") from error
    status = path.stat()
    fingerprint = None
    if array.ndim > 0 and len(array) >= cache.MIN_IMAGES:
        fingerprint = {"npy": str(path.resolve()), "stat": [status.st_size, status.st_mtime_ns]}
    channels_last = is_channels_last(array)
    mapped = None
    if array.dtype.isnative:
        mapped = MappedImages.of(array, channels_last=channels_last)
    images = array.transpose(0, 3, 1, 2) if channels_last else array
    return convert(Loaded(images, path.name, mapped=mapped, fingerprint=fingerprint), request)


def load_npz(path: Path, request: Request) -> Loaded:
    """Load an .npz file: images under `images`, `x` or `arr_0`, labels under `labels` or `y`."""
    refuse_split(request.split, str(path))
    try:
        with np.load(path, allow_pickle=False) as archive:
            image_key = next((key for key in _IMAGE_KEYS if key in archive), None)
            label_key = next((key for key in _LABEL_KEYS if key in archive), None)
            keys = ", ".join(archive.files) or "nothing"
            images = None if image_key is None else archive[image_key]
            labels = None if label_key is None else archive[label_key]
    # A damaged archive fails in zipfile, in zlib or in NumPy's reader of headers.
    except Exception as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
    if images is None:
        raise ValueError(f"{path}: holds no `images`, `x` or `arr_0`, only {keys}")
    if is_channels_last(images):
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return convert(Loaded(images, path.name, labels), request)


def is_channels_last(array: np.ndarray) -> bool:
    """Whether a shape can only be [N, H, W, C] with one or three channels."""
    return array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3)


def convert(loaded: Loaded, request: Request) -> Loaded:
    """Bring the images of an array source to the size and channels asked for.

    Raises:
        ValueError: The images are neither grey nor RGB and `channels` is given.
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

    def converted() -> Iterator[np.ndarray]:
        return (convert_array(image, resolution, channels) for image in images)

    job = DecodeJob((count, channels, *resolution), images.dtype, converted)
    return cache.run_job(job, loaded, request)
