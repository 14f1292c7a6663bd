"""Scans of some outputs at a time, where the masks of all of them are large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflocality.posterior.state import PosteriorState


def output_bands(image_shape: Sequence[int], bytes_each: int, limit: int) -> list[Tensor]:
    """The outputs of an image (C, H, W) in bands of whole rows of pixels, int64 [n] each.

    Neighbours stay together: their masks are alike.

    Args:
        image_shape: Channels, height and width.
        bytes_each: What is held for each output.
        limit: What may be held for a band; where a row takes more, bands are rows.
    """
    channels, height, width = image_shape
    rows = max(1, limit // (bytes_each * channels * width))
    # As many bands, as even as they can be.
    rows = -(-height // -(-height // rows))
    places = torch.arange(channels * height * width).view(channels, height, width)
    return [band.flatten() for band in places.split(rows, dim=1)]


def joined(states: Sequence[tuple[slice | Tensor, PosteriorState]]) -> PosteriorState:
    """The state of all queries from those of some each, of which it is told which they are.

    Args:
        states: Queries, int64 [n], and their state; one of all queries has a slice.
    """
    queries, state = states[0]
    if len(states) == 1 and isinstance(queries, slice):
        return state
    order = torch.cat([some for some, _ in states if isinstance(some, Tensor)]).argsort()
    parts = zip(*(state for _, state in states), strict=True)
    return PosteriorState(*(torch.cat(part, 1)[:, order] for part in parts))
