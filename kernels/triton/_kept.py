"""What launchers keep from one call to the next: tensors derived from a set or from weights."""

from __future__ import annotations

import torch
from torch import Tensor


class Kept:
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
        if stream is not None:
            stream.wait_event(self._written)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return self._tensors


def version_of(images: Tensor) -> int | None:
    """Version of a tensor, which changes with its values; None where nothing counts it.

    Tensors made in torch's inference mode have none: what is derived from them cannot be kept.
    """
    return None if images.is_inference() else images._version


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
