"""Value images: what posteriors answer beside the training images or in their place.

Keys need not be values: the weights of a posterior come of the training images, what it averages
may be any numbers that belong to them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyflocality._support.checks import check_finite, check_tensor, describe
from pyflocality.storage.reader import Reader


def check_values(values: object, images: Tensor, copies: int) -> Tensor:
    """Finite value images, float32 [N, R, C, H, W], of a set that has so many copies."""
    expected = "a torch.float32 tensor [N, R, C, H, W]"
    tensor = check_tensor(values, "values", expected)
    if tensor.dtype != torch.float32:
        raise TypeError(f"`values` must be {expected}, got {describe(values)}")
    if tensor.device != images.device:
        raise ValueError(
            f"`values` must be on {images.device} like the training set, got {describe(values)}"
        )
    wanted = (len(images) * copies, *images.shape[1:])
    if tensor.ndim != 5 or (len(tensor), *tensor.shape[2:]) != wanted or tensor.shape[1] == 0:
        count, *shape = map(str, wanted)
        raise ValueError(
            f"`values` must have shape [{', '.join([count, 'R', *shape])}], with R value images "
            f"for each image that is searched, copies included, got {describe(values)}"
        )
    return Reader(tensor).checked(check_finite, tensor, "values")


def value_blocks(
    values: Tensor, count: int, size: int, memory_budget: int | str | None
) -> Iterator[Tensor]:
    """Value images of the blocks that a reader of the `count` images answers, `size` at a time."""
    # Its blocks are those of one copy each.
    for copy in values.split(count):
        yield from Reader(copy, None, memory_budget).blocks(size)
