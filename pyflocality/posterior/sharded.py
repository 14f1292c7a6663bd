"""The images of a sharded set, as one rank has them.

`pyflocality.distributed.shard` gives every rank a part of the set, whose images are
`ShardedImages`: a tensor that tells its shape and place and refuses all else. The posterior
operations know it: they scan the images of their own rank and join what the ranks found. Code that
would take one rank's images for the whole set fails, with a message, instead of answering wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyflocality.posterior.ranks import Ranks


class ShardedImages(Tensor):
    """The images of one rank, which answer what they look like and nothing else.

    Attributes:
        ranks: The ranks that hold the set together.
        own: The same images as an ordinary tensor. It is one object for as long as these are: what
            kernels derive from images they find again by the tensor.
    """

    ranks: Ranks
    own: Tensor

    @staticmethod
    def of(images: Tensor, ranks: Ranks) -> ShardedImages:
        """Images [n, C, H, W] as those of one rank, sharing their memory."""
        result = images.as_subclass(ShardedImages)
        result.ranks, result.own = ranks, images
        return result

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an untyped keyword
        """Shape and part."""
        part = f"part {self.ranks.rank + 1} of {self.ranks.count}"
        return f"ShardedImages({tuple(self.shape)}, {self.dtype}, {part})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Let through what describes the images or moves them, and refuse the rest."""
        if func is Tensor.to:
            return ShardedImages.of(plain(args[0]).to(*args[1:], **(kwargs or {})), args[0].ranks)
        if func not in _DESCRIBING:
            _refuse(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


# Getters of attributes, and methods.
_DESCRIBING = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "is_meta",
        "is_cuda",
        "nbytes",
        "itemsize",
        "layout",
        "is_nested",
        "is_quantized",
    )
) | {
    Tensor.__len__,
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
    Tensor.is_neg,
}


def _refuse(func: Callable[..., Any]) -> NoReturn:
    name = getattr(func, "__name__", str(func))
    raise NotImplementedError(
        f"the images of a sharded set are split over ranks, this one holds a part: {name}() would "
        "take it for the whole set. Posterior operations, the denoisers made of them and `Moments` "
        "join the ranks; do anything else with the whole set, before pyflocality.distributed.shard"
    )


def plain(images: Tensor) -> Tensor:
    """The images of this rank alone, where they are those of a sharded set."""
    return images.own if isinstance(images, ShardedImages) else images


def ranks_of(images: Tensor) -> Ranks | None:
    """The ranks that hold the set together, or None for an ordinary one."""
    return images.ranks if isinstance(images, ShardedImages) else None
