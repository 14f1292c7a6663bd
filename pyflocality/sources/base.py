"""What a source is asked for and what it hands back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality._checks import check_count, describe
from pyflocality._paths import checked_path


@dataclass(frozen=True)
class Request:
    """The arguments of `TrainingSet.load`, checked.

    Attributes:
        resolution: Height and width to bring every image to, or None to keep its size.
        channels: 1, 3, or None to keep what the source has.
        split: Name of the part wanted of a source that has parts, or None.
        cache_dir: Folder of decoded sets, or None for the default one.
        progress: Whether to show a progress bar.
    """

    resolution: tuple[int, int] | None = None
    channels: int | None = None
    split: str | None = None
    cache_dir: Path | None = None
    progress: bool = True

    @classmethod
    def checked(
        cls,
        resolution: int | Sequence[int] | None,
        channels: int | None,
        split: str | None,
        cache_dir: str | os.PathLike[str] | None,
        progress: bool,
    ) -> Request:
        """Arguments in canonical form; raises ValueError or TypeError naming the faulty one."""
        if channels is not None:
            check_count(channels, "channels")
            if channels not in (1, 3):
                raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB), got {channels}")
        if split is not None and not isinstance(split, str):
            raise TypeError(f"`split` must be a name such as 'train', got {describe(split)}")
        folder = None if cache_dir is None else checked_path(cache_dir, "cache_dir")
        return cls(_checked_resolution(resolution), channels, split, folder, bool(progress))


def _checked_resolution(resolution: object) -> tuple[int, int] | None:
    if resolution is None:
        return None
    if not isinstance(resolution, Sequence):
        size = check_count(resolution, "resolution")
        return size, size
    if isinstance(resolution, str) or len(resolution) != 2:
        raise ValueError(
            f"`resolution` must be a whole number or (height, width), got {describe(resolution)}"
        )
    return check_count(resolution[0], "resolution"), check_count(resolution[1], "resolution")


def refuse_split(split: str | None, where: str) -> None:
    """Raise if a part is asked of a source that has none."""
    if split is not None:
        raise ValueError(f"`split` must be left out: {where} has no parts, got {split!r}")


def choose_split(split: str | None, available: Sequence[str], where: str) -> str:
    """The part that is asked for: without a request "train", or the only part there is."""
    if split is None and (len(available) == 1 or "train" in available):
        return "train" if "train" in available else available[0]
    if split not in available:
        listed = ", ".join(repr(name) for name in available)
        raise ValueError(f"`split` must be one of {listed} for {where}, got {split!r}")
    return split


@dataclass(frozen=True)
class MappedImages:
    """How to open memory-mapped images again, in another process for example.

    Attributes:
        path: The file.
        file_size: Its size in bytes; another size means another file.
        dtype: NumPy's name of the dtype stored.
        shape: Shape stored.
        offset: Bytes in front of the values.
        fortran: Whether the values are stored in Fortran order.
        channels_last: Whether the shape stored is [N, H, W, C].
        start: First image of the set.
        stop: One past its last image; None for all.
    """

    path: str
    file_size: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    fortran: bool
    channels_last: bool
    start: int = 0
    stop: int | None = None

    @classmethod
    def of(cls, array: np.memmap, *, channels_last: bool = False) -> MappedImages:
        """Describe an array that maps a whole file."""
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        path, size = os.path.abspath(array.filename), os.path.getsize(array.filename)
        return cls(path, size, array.dtype.str, array.shape, array.offset, fortran, channels_last)

    def open(self) -> np.ndarray:
        """Map the images: [N, C, H, W] or [N, H, W], copied only where they are written to.

        Raises:
            ValueError: The file is missing or has changed its size.
        """
        size = os.path.getsize(self.path) if os.path.isfile(self.path) else None
        if size != self.file_size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"{self.path}: the file of a memory-mapped training set {found}, expected "
                f"{self.file_size} bytes: load the set again"
            )
        order = "F" if self.fortran else "C"
        array = np.memmap(self.path, self.dtype, "c", self.offset, self.shape, order)
        array = array[self.start : self.stop]
        return array.transpose(0, 3, 1, 2) if self.channels_last else array

    def part(self, start: int, stop: int) -> MappedImages:
        """The images start..stop-1 of these."""
        return replace(self, start=self.start + start, stop=self.start + stop)


@dataclass(frozen=True)
class Loaded:
    """What a source holds.

    Attributes:
        images: [N, C, H, W] or [N, H, W], an array or a torch.Tensor.
        name: Name of the set.
        labels: Class of each image [N], if known.
        label_names: Name of each class, if known.
        mapped: How to map the images again, if they are memory-mapped.
        fingerprint: What identifies the content of the source, cheaply, for the cache; None
            for a source that is not worth caching.
    """

    images: Any
    name: str
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] | None = None
    mapped: MappedImages | None = None
    fingerprint: dict[str, Any] | None = None


@dataclass(frozen=True)
class DecodeJob:
    """Images still to be decoded or converted.

    Attributes:
        shape: Shape of the result, [N, C, H, W].
        dtype: Its dtype.
        images: Yields the N images [C, H, W] in order; called anew for each attempt.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    images: Callable[[], Iterator[np.ndarray]]
