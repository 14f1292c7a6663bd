"""What launchers cache from one call to the next: tensors derived from a set or from weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Cached:
    """Tensors made in one call and used in later ones, which may run on other CUDA streams.

    A stream that uses them first waits until they are written, and until it is done their memory
    goes to nobody else.

    Args:
        tensors: The tensors, all on one device, written by what its current stream has been given.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        stream = _current_stream(tensors[0].device)
        self._written = None if stream is None else stream.record_event()

    def here(self) -> tuple[Tensor, ...]:
        """The tensors, for use on the current stream."""
        stream = _current_stream(self._tensors[0].device)
        if stream is not None and self._written is not None:
            stream.wait_event(self._written)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return self._tensors


def cached_with(cache: WeakTensorKeyDictionary, images: Tensor, make: Callable[[Tensor], T]) -> T:
    """What `make` makes of images, cached until they change or are gone.

    Args:
        cache: Results by the images they were made of.
        images: The images.
        make: Takes the images as a view, which does not keep alive the tensor that the cache
            watches.
    """
    # Tensors made in torch's inference mode have no version: nothing counts their changes.
    if images.is_inference():
        return make(images.detach())
    state = (images._version, images.shape)
    if images not in cache or cache[images][0] != state:
        cache[images] = (state, make(images.detach()))
    return cache[images][1]


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
