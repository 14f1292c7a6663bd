"""Checks of what a training set is made from.

Each function returns its argument in canonical form, or raises ValueError or TypeError naming
the argument, what was expected and what came.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from pyflocality._budget import memory_budget_bytes
from pyflocality._checks import describe
from pyflocality._mapped import mapped_file, remember, streamed

# Large sets are checked and hashed in pieces of this many bytes.
_BLOCK_BYTES = 64 * 2**20
# Rounding of a conversion to [-1, 1] in single precision stays below this.
_RANGE_SLACK = 1e-5


def as_image_tensor(images: object) -> Tensor:
    """Images as a tensor, sharing their memory where that is possible."""
    if isinstance(images, Tensor):
        return images.detach()
    if isinstance(images, np.ndarray):
        if images.dtype.newbyteorder("=") not in (np.uint8, np.float32, np.float64):
            _refuse_dtype(str(images.dtype), images.dtype.kind in "iub")
        if not images.dtype.isnative:
            images = images.astype(images.dtype.newbyteorder("="))
        if any(stride < 0 for stride in images.strides):
            images = np.ascontiguousarray(images)
        with warnings.catch_warnings():
            # Read-only memory is fine: nothing ever writes to the images.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            # Copied on writing, it may hold what somebody wrote and its file does not.
            if getattr(images, "mode", None) != "c":
                remember(images)
            return torch.from_numpy(images)
    if hasattr(images, "__dlpack__"):
        return torch.from_dlpack(images)
    raise TypeError(
        "`images` must be a NumPy array, a torch tensor or an object with __dlpack__, got "
        f"{describe(images)}"
        + ("; TrainingSet.load(...) reads files" if isinstance(images, (str, os.PathLike)) else "")
    )


def _refuse_dtype(dtype: str, whole: bool) -> NoReturn:
    cure = "whole numbers 0..255 must be uint8" if whole else "convert it to float32"
    raise TypeError(f"`images` must be uint8, float32 or float64, got {dtype}: {cure}")


def checked_shape(images: Tensor) -> Tensor:
    """Images of a known dtype as [N, C, H, W]."""
    if images.dtype not in (torch.uint8, torch.float32, torch.float64):
        whole = not images.is_floating_point() and not images.is_complex()
        _refuse_dtype(str(images.dtype).removeprefix("torch."), whole)
    if images.ndim not in (3, 4):
        raise ValueError(
            f"`images` must have shape [N, C, H, W] or [N, H, W], got {describe(images)}"
        )
    if images.numel() == 0:
        raise ValueError(f"`images` must hold at least one image, got {describe(images)}")
    if images.is_meta:
        raise ValueError(f"`images` must hold values, got {describe(images)}")
    if images.ndim == 3:
        return images[:, None]
    if images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        raise ValueError(
            f"`images` must have shape [N, C, H, W], got {describe(images)}, which looks like "
            "[N, H, W, C]: permute it, images.permute(0, 3, 1, 2) in torch or "
            "images.transpose(0, 3, 1, 2) in NumPy"
        )
    return images


def blocks(images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pieces of a set that are small beside memory, with the number of their first image."""
    step = max(1, _BLOCK_BYTES // (images[0].numel() * images.element_size()))
    yield from zip(range(0, len(images), step), streamed(images, step), strict=True)


def check_range(images: Tensor, name: str) -> None:
    """Raise if float images hold NaN or leave [-1, 1]; warn if they look like [0, 1]."""
    lowest, highest = float("inf"), float("-inf")
    for start, block in blocks(images):
        low, high = (float(bound) for bound in torch.aminmax(block))
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = ~torch.isfinite(block).flatten(1).all(1)
            raise ValueError(
                f"`images` holds NaN or infinite values, first in image "
                f"{start + int(bad.nonzero()[0, 0])}"
            )
        lowest, highest = min(lowest, low), max(highest, high)
    if lowest < -1.0 - _RANGE_SLACK or highest > 1.0 + _RANGE_SLACK:
        cure = "rescale it"
        if lowest >= 0.0 and highest <= 255.0:
            cure = "if it is in [0, 255], pass uint8 or images / 127.5 - 1"
        raise ValueError(
            f"`images` must be in [-1, 1], got values from {lowest:g} to {highest:g}: {cure}"
        )
    if lowest >= 0.0:
        warnings.warn(
            f"the float images of {name} lie in [{lowest:g}, {highest:g}], with nothing negative; "
            "[-1, 1] is expected: if their range is [0, 1], pass 2 * images - 1",
            stacklevel=3,
        )


def check_copy(images: Tensor, count: int, name: str) -> None:
    """Refuse to copy more images of a mapped set than the memory budget allows for."""
    needed, budget = count * images[0].nbytes, memory_budget_bytes(None)
    if needed > budget and mapped_file(images) is not None:
        raise ValueError(
            f"the copy of {count} images scattered over the file of {name} would take "
            f"{needed / 2**30:.3g} GB, the memory budget is {budget / 2**30:.3g} GB; images in a "
            "row take none (`pyflocality pack --sort-by-label` brings those of a class together), "
            "or set PYFLOCALITY_MEMORY_BUDGET to allow for the copy"
        )


def as_labels(labels: object, images: Tensor) -> Tensor:
    """Labels as int64 [N] beside the images."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.shape != (len(images),):
        raise ValueError(
            f"`labels` must have shape [{len(images)}], one for each image, got {list(array.shape)}"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"`labels` must be whole numbers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64)).to(images.device)


def checked_names(label_names: Sequence[str], labels: Tensor | None) -> tuple[str, ...]:
    """Names of the classes, one for every label at least."""
    names = tuple(label_names)
    if isinstance(label_names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`label_names` must be strings, got {describe(label_names)}")
    if labels is None:
        raise ValueError("`label_names` needs `labels`, which are missing")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= len(names):
        raise ValueError(
            f"`labels` must be in 0..{len(names) - 1}, the range of `label_names`, got values "
            f"from {lowest} to {highest}"
        )
    return names


def as_positions(indices: object, count: int) -> Tensor:
    """Positions in a set, checked, as int64 on the CPU."""
    if isinstance(indices, (slice, range)):
        indices = range(count)[indices] if isinstance(indices, slice) else indices
        array = np.arange(indices.start, indices.stop, indices.step)
    else:
        array = indices.cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)
    if array.size == 0:
        raise ValueError("`indices` must select at least one image, got none")
    if array.dtype.kind not in "iub" or array.ndim != 1:
        raise TypeError(
            "`indices` must be a slice, whole numbers [n] or a mask of booleans [N], got "
            f"{describe(indices)}"
        )
    if array.dtype == np.bool_:
        if len(array) != count:
            raise ValueError(f"`indices` must be a mask of {count} booleans, got {len(array)}")
        array = array.nonzero()[0]
        if array.size == 0:
            raise ValueError("`indices` must select at least one image, the mask selects none")
    array = array.astype(np.int64)
    outside = array[(array < -count) | (array >= count)]
    if outside.size:
        raise ValueError(f"`indices` must be in 0..{count - 1}, got {outside[0]}")
    return torch.from_numpy(np.where(array < 0, array + count, array))
