"""Posterior means of all square windows inside an image, laid over one another, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
from torch import Tensor

from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem


def scan(problem: PosteriorProblem, window: int) -> Tensor:
    """Means of the windows that hold a value, over all these windows: [B, A C, H, W].

    Two scans of the images: the first finds every window's posterior, the second adds up the
    weights of every image over the windows that hold a pixel.
    """
    x = problem.x
    batch, channels, height, width = x.shape
    answered = problem.answered * channels
    # One chunk holds its values and, for the whole batch, differences, their squares and sums,
    # weights and their sums, and two temporaries of that size.
    planes = 2 * channels + batch * (2 * channels + 7)
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]
    scale = posterior.finite_factor(problem.scale, x.dtype)
    inside = (height - window + 1, width - window + 1)

    def distances(images: Tensor) -> Tensor:
        squares = (x[:, None] - alpha * images).square().sum(2)
        return sums_inside(squares, window).flatten(2)

    state = posterior.init(batch, inside[0] * inside[1], 0, x)
    for images in problem.chunks(chunk):
        state = posterior.update(state, distances(images), scale, posterior.no_values)
        del images
    state = problem.merged(state, scale)
    sums = x.new_zeros(batch, answered, height, width)
    for images, values in problem.pairs(chunk):
        weights = posterior.posterior_weights(distances(images), state, scale)
        share, flat = spread_inside(weights.unflatten(2, inside), window), values.flatten(1, 2)
        sums = sums + torch.stack([(share * flat[:, k]).sum(1) for k in range(answered)], dim=1)
        del images, values, weights, share, flat
    return problem.summed(sums) / windows_over((height, width), window, x)


def sums_inside(planes: Tensor, window: int) -> Tensor:
    """Sums over every window inside the image: [B, n, H, W] -> [B, n, H - k + 1, W - k + 1]."""
    rows = F.avg_pool2d(planes, (window, 1), 1, divisor_override=1)
    return F.avg_pool2d(rows, (1, window), 1, divisor_override=1)


def spread_inside(planes: Tensor, window: int) -> Tensor:
    """Sums over the windows that hold a pixel: [B, n, H - k + 1, W - k + 1] -> [B, n, H, W]."""
    return sums_inside(F.pad(planes, (window - 1,) * 4), window)


def windows_over(size: Sequence[int], window: int, like: Tensor) -> Tensor:
    """How many windows inside an image of that height and width hold each pixel, [H, W]."""
    height, width = size
    return _windows_over(height, window, like)[:, None] * _windows_over(width, window, like)


def _windows_over(length: int, window: int, like: Tensor) -> Tensor:
    # Made where it is used: a copy to a GPU would wait for it.
    place = torch.arange(length, dtype=like.dtype, device=like.device)
    first, last = (place - window + 1).clamp(min=0), place.clamp(max=length - window)
    return last - first + 1
