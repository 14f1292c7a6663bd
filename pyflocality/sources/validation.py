"""Checks of what a training set is made from.

Each function returns its argument in canonical form, or raises ValueError or TypeError naming
the argument, what was expected and what came.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.caller import caller_level
from pyflocality._support.checks import check_sequence, check_tensor, describe, tensors
from pyflocality.sources.layout import find_layout
from pyflocality.storage.mapped import mapped_file, remember
from pyflocality.storage.reader import Reader

# Large sets are checked and hashed in pieces of this many bytes.
_BLOCK_BYTES = 64 * 2**20
# Rounding of a conversion to [-1, 1] in single precision stays below this.
_RANGE_SLACK = 1e-5
_POSITIONS = "a slice, whole numbers [n] or a mask of booleans [N]"


class _Alias:
    """An array whose memory is not marked read-only: nothing ever writes to the images.

    Torch warns of arrays that are, and a filter for that would be one of all threads.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The memory as NumPy describes it."""
        described = dict(self._array.__array_interface__)
        return described | {"data": (described["data"][0], False)}


def as_image_tensor(images: object) -> Tensor:
    """Images as a tensor, sharing their memory where that is possible."""
    if isinstance(images, Tensor):
        return check_tensor(images, "images").detach()
    if isinstance(images, np.ndarray):
        images = without_mask(images, "images")
        if images.dtype.newbyteorder("=") not in (np.uint8, np.float32, np.float64):
            _refuse_dtype(str(images.dtype), images.dtype.kind)
        if not images.dtype.isnative:
            images = images.astype(images.dtype.newbyteorder("="))
        if any(stride < 0 for stride in images.strides):
            images = np.ascontiguousarray(images)
        # Copied on writing, it may hold what somebody wrote and its file does not.
        if getattr(images, "mode", None) != "c":
            remember(images)
        return torch.from_numpy(images if images.flags.writeable else np.asarray(_Alias(images)))
    if hasattr(images, "__dlpack__"):
        try:
            return from_dlpack(images)
        # What other libraries raise for the arrays that they cannot hand over.
        except Exception as error:
            raise TypeError(
                f"`images` cannot be taken over by DLPack from {describe(images)}: {error}"
            ) from error
    raise TypeError(
        "`images` must be a NumPy array, a torch tensor or an object with __dlpack__, got "
        f"{describe(images)}"
        + ("; TrainingSet.load(...) reads files" if isinstance(images, (str, os.PathLike)) else "")
    )


def without_mask(array: np.ndarray, name: str) -> np.ndarray:
    """A plain array; one of which values are masked is refused, as they are no values."""
    if isinstance(array, np.ma.MaskedArray):
        masked = int(np.ma.getmaskarray(array).sum())
        if masked:
            raise ValueError(
                f"`{name}` is a masked array with {masked} masked values: fill them, "
                f"{name}.filled(value), or leave their rows out"
            )
        return np.asarray(array.data)
    return array


# What to do about arrays of other kinds, by NumPy's letters for them.
_CURES = {
    "b": "pass images.astype(np.uint8) * 255 (in torch, images.to(torch.uint8) * 255), where "
    "False is black and True is white",
    "i": "whole numbers 0..255 must be uint8",
    "u": "whole numbers 0..255 must be uint8",
    "f": "convert it to float32",
    "O": "images of one size make an array of numbers, np.stack(list_of_images)",
    "V": "a field of it may be what is meant, images['name']",
}


def _refuse_dtype(dtype: str, kind: str) -> NoReturn:
    cure = _CURES.get(kind)
    told = f"`images` must be uint8, float32 or float64, got {dtype:.100}"
    raise TypeError(told if cure is None else f"{told}: {cure}")


def checked_shape(images: Tensor, layout: str | None = None) -> Tensor:
    """Images of a known dtype as [N, C, H, W]; see `pyflocality.sources.layout` for their axes."""
    if images.dtype not in (torch.uint8, torch.float32, torch.float64):
        floats = "f" if images.is_floating_point() else "c" if images.is_complex() else "i"
        kind = "b" if images.dtype == torch.bool else floats
        _refuse_dtype(str(images.dtype).removeprefix("torch."), kind)
    if images.ndim in (3, 4) and images.numel() == 0:
        raise ValueError(f"`images` must hold at least one image, got {describe(images)}")
    axes = find_layout(images.shape, layout)
    if tensors.is_without_values(images):
        raise ValueError(f"`images` must hold values, got {describe(images)}")
    if axes == "NHWC" and layout is None:
        raise ValueError(
            f"`images` must have shape [N, C, H, W], got {describe(images)}, which looks like "
            "[N, H, W, C]: give layout='NHWC', or layout='NCHW' if it is not"
        )
    if axes == "NHWC":
        return images.permute(0, 3, 1, 2)
    return images[:, None] if axes == "NHW" else images


def blocks(images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pieces of a set that are small beside memory, with the number of their first image."""
    step = max(1, _BLOCK_BYTES // (images[0].numel() * images.element_size()))
    yield from zip(range(0, len(images), step), Reader(images).blocks(step), strict=True)


def check_values(images: Tensor, name: str, *, warn: bool = True) -> None:
    """Raise if images, uint8 or float, hold what no picture does.

    That is NaN, infinities and values outside of [-1, 1] in floats, nothing but 0 and 1 in bytes.
    Of floats that look like [0, 1] a warning tells, unless `warn` is False.
    """
    if images.dtype == torch.uint8:
        _check_levels(images)
        return
    lowest, highest = _range(images)
    if lowest < -1.0 - _RANGE_SLACK or highest > 1.0 + _RANGE_SLACK:
        cure = "rescale it"
        if lowest >= 0.0 and highest <= 255.0:
            cure = "if it is in [0, 255], pass uint8 or images / 127.5 - 1"
        raise ValueError(
            f"`images` must be in [-1, 1], got values from {lowest:g} to {highest:g}: {cure}"
        )
    if warn and lowest >= 0.0:
        warnings.warn(
            f"the float images of {name} lie in [{lowest:g}, {highest:g}], with nothing negative; "
            "[-1, 1] is expected: if their range is [0, 1], pass 2 * images - 1",
            stacklevel=caller_level(),
        )


def _range(images: Tensor) -> tuple[float, float]:
    """The least and the largest of finite values."""
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
    return lowest, highest


def _check_levels(images: Tensor) -> None:
    """Raise if the values of 8-bit images are 0 and 1: nearly black, where 255 is white."""
    highest = 0
    # Nearly all sets have a brighter value in their first image.
    for part in (images[:1], images):
        for _, block in blocks(part):
            highest = max(highest, int(block.max()))
            if highest > 1:
                return
    if highest == 1:
        raise ValueError(
            "`images` are uint8 with values of 0 and 1 alone, of which 255 is white and both are "
            "as good as black: pass images * 255 if they are black and white, "
            "images / np.float32(127.5) - 1 if they are not"
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
    array = _label_array(labels)
    if array.shape != (len(images),):
        raise ValueError(
            f"`labels` must have shape [{len(images)}], one for each image, got {list(array.shape)}"
        )
    if array.dtype.kind not in "iu":
        cure = ": labels.astype(np.int64) if they are" if array.dtype.kind == "f" else ""
        raise TypeError(f"`labels` must be whole numbers, got {str(array.dtype):.100}{cure}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"`labels` must be below 2**63, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64)).to(images.device)


def _label_array(labels: object) -> np.ndarray:
    if isinstance(labels, Tensor):
        check_tensor(labels, "labels")
        if labels.is_floating_point() or labels.is_complex():
            dtype = str(labels.dtype).removeprefix("torch.")
            raise TypeError(
                f"`labels` must be whole numbers, got {dtype}: labels.long() if they are"
            )
        return labels.detach().cpu().numpy()
    if isinstance(labels, np.ndarray):
        return without_mask(labels, "labels")
    try:
        array = np.asarray(labels)
    # Lists in lists of several lengths, numbers beyond all bounds.
    except (ValueError, OverflowError) as error:
        raise ValueError(f"`labels` must be a list of whole numbers: {error}") from error
    if array.dtype == object and array.ndim == 1:
        beyond = [label for label in array if isinstance(label, int) and abs(label) >= 2**63]
        if beyond:
            raise ValueError(f"`labels` must be below 2**63, got {str(beyond[0]):.40}")
    return array


def checked_names(label_names: Sequence[str], labels: Tensor | None) -> tuple[str, ...]:
    """Names of the classes, one for every label at least."""
    names = tuple(check_sequence(label_names, "label_names", "strings"))
    if not all(isinstance(name, str) for name in names):
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


def _as_array(values: object, name: str, expected: str) -> np.ndarray:
    """What NumPy makes of values."""
    if isinstance(values, Tensor):
        values = check_tensor(values, name).detach().cpu()
    try:
        return values.numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        # Rows of different lengths, or a dtype that NumPy has not.
        raise TypeError(f"`{name}` must be {expected}, got {describe(values)}") from error


def _as_range(indices: slice | range, count: int) -> range:
    """The positions of a slice, or those of a range that lies in the set."""
    if isinstance(indices, slice):
        try:
            return range(count)[indices]
        except (TypeError, ValueError) as error:
            raise TypeError(f"`indices` must be {_POSITIONS}, got {describe(indices)}") from error
    for position in (indices[0], indices[-1]) if indices else ():
        if not -count <= position < count:
            raise ValueError(f"`indices` must be in 0..{count - 1}, got {describe(position)}")
    return indices


def as_positions(indices: object, count: int) -> Tensor:
    """Positions in a set, checked, as int64 on the CPU."""
    if isinstance(indices, (slice, range)):
        row = _as_range(indices, count)
        array = np.arange(row.start, row.stop, row.step)
    else:
        array = _as_array(indices, "indices", _POSITIONS)
    if array.size == 0:
        raise ValueError("`indices` must select at least one image, got none")
    if array.dtype.kind not in "iub" or array.ndim != 1:
        raise TypeError(f"`indices` must be {_POSITIONS}, got {describe(indices)}")
    if array.dtype == np.bool_:
        if len(array) != count:
            raise ValueError(f"`indices` must be a mask of {count} booleans, got {len(array)}")
        array = array.nonzero()[0]
        if array.size == 0:
            raise ValueError("`indices` must select at least one image, the mask selects none")
    # Before a cast, in which those beyond 64 bits would become others.
    outside = array[(array < -count) | (array >= count)]
    array = array.astype(np.int64)
    if outside.size:
        raise ValueError(f"`indices` must be in 0..{count - 1}, got {outside[0]}")
    return torch.from_numpy(np.where(array < 0, array + count, array))
