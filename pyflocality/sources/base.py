"""What a source is asked for and what it hands back."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality._support.checks import check_count, check_flag, check_size, describe
from pyflocality._support.paths import checked_path
from pyflocality._support.text import printable
from pyflocality.sources.layout import check_layout


@dataclass(frozen=True)
class Request:
    """The arguments of `TrainingSet.load`, checked.

    Attributes:
        resolution: Height and width to bring every image to, or None to keep its size.
        channels: 1, 3, or None to keep what the source has.
        split: Name of the part wanted of a source that has parts, or None.
        cache_dir: Folder of decoded sets, or None for the default one.
        progress: Whether to show a progress bar.
        layout: How the axes of arrays are to be read, or None.
        image_column: The column of images of a table, or None for the only one.
        label_column: The column of classes of a table, or None for the only one.
    """

    resolution: tuple[int, int] | None = None
    channels: int | None = None
    split: str | None = None
    cache_dir: Path | None = None
    progress: bool = True
    layout: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    @classmethod
    def checked(
        cls,
        resolution: int | Sequence[int] | None,
        channels: int | None,
        split: str | None,
        cache_dir: str | os.PathLike[str] | None,
        progress: bool,
        layout: str | None = None,
    ) -> Request:
        """Arguments in canonical form; raises ValueError or TypeError naming the faulty one."""
        if channels is not None:
            check_count(channels, "channels")
            if channels not in (1, 3):
                raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB), got {channels}")
        if split is not None and not isinstance(split, str):
            raise TypeError(f"`split` must be a name such as 'train', got {describe(split)}")
        folder = None if cache_dir is None else checked_path(cache_dir, "cache_dir")
        progress = check_flag(progress, "progress")
        size = _checked_resolution(resolution)
        return cls(size, channels, split, folder, progress, check_layout(layout))

    def with_columns(self, image_column: str | None, label_column: str | None) -> Request:
        """This request, with the columns of a table that are asked for, checked."""
        for name, column in (("image_column", image_column), ("label_column", label_column)):
            if column is not None and not isinstance(column, str):
                raise TypeError(f"`{name}` must be the name of a column, got {describe(column)}")
        return replace(self, image_column=image_column, label_column=label_column)


def _checked_resolution(resolution: object) -> tuple[int, int] | None:
    if resolution is None:
        return None
    if not isinstance(resolution, Sequence):
        size = check_size(resolution, "resolution")
        return size, size
    if isinstance(resolution, str) or len(resolution) != 2:
        raise ValueError(
            f"`resolution` must be a whole number or (height, width), got {describe(resolution)}"
        )
    return check_size(resolution[0], "resolution"), check_size(resolution[1], "resolution")


def refuse_split(split: str | None, where: str) -> None:
    """Raise if a part is asked of a source that has none."""
    if split is not None:
        raise ValueError(f"`split` must be left out: {where} has no parts, got {split!r}")


@dataclass(frozen=True)
class Loaded:
    """What a source holds.

    Attributes:
        images: [N, C, H, W] or [N, H, W], an array or a torch.Tensor.
        name: Name of the set, made fit for messages.
        labels: Class of each image [N], if known.
        label_names: Name of each class, if known.
        fingerprint: What identifies the content of the source, cheaply, for the cache; None
            for a source that is not worth caching.
    """

    images: Any
    name: str
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] | None = None
    fingerprint: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))


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
    images: Callable[[], Generator[np.ndarray, None, None]]
