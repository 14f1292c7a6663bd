"""Posterior mean over a square window around each pixel, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
from torch import Tensor

from pyflocality._problem import PosteriorProblem
from pyflocality._tangents import centre_of
from pyflocality.reference import state as posterior
from pyflocality.reference.state import PosteriorState
from pyflocality.reference.two_passes import Piece, two_passes


def window_posterior_state(problem: PosteriorProblem, window: int) -> PosteriorState:
    """Scan of all images with a query per pixel, Q = H W, that answers its C values."""
    channels = problem.images.shape[1]

    def weigh(weights: Tensor, values: Tensor) -> Tensor:
        flat = values.flatten(2)
        return torch.stack([(weights * flat[:, c]).sum(1) for c in range(channels)], dim=-1)

    # One chunk holds its values.
    return _scan(problem, window, channels, 2 * channels, weigh)


def window_posterior_jvp_state(
    problem: PosteriorProblem, tangents: Tensor, window: int
) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    centre = centre_of(problem)
    directions = tangents.transpose(0, 1)
    channels, height, width = centre.shape[1:]
    sums = posterior.tangent_values(channels, len(tangents))

    def weigh(weights: Tensor, values: Tensor) -> Tensor:
        rows = []
        for w, origin, u in zip(weights, centre, directions, strict=True):
            centred = values - origin
            inner = box_sum(torch.einsum("kchw,nchw->knhw", u, centred), window)
            factors = [w, *(w * inner.flatten(2))]
            rows.append(posterior.tangent_sums(factors, centred.flatten(2)))
        return torch.stack(rows) if rows else values.new_zeros(0, height * width, sums)

    # And the centred values, four planes for every tangent, and temporaries.
    planes = 5 * channels + 4 * len(tangents) + 4
    state = _scan(problem, window, sums, planes, weigh)
    return posterior.uncentred(state, centre.flatten(2).transpose(1, 2))


def window_posterior_vjp(problem: PosteriorProblem, cotangents: Tensor, window: int) -> Tensor:
    """Transposed derivatives along cotangents [K, B, C, H, W], of the same shape."""
    x, centre = problem.x, centre_of(problem)
    channels, height, width = x.shape[1:]
    planes = len(x) * (2 * channels + 4) + 5 * channels + 6
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]

    def pieces() -> Iterator[Piece]:
        for values in problem.chunks(chunk):
            difference = x[:, None] - alpha * values

            def spread(b: int, coefficients: Tensor, values: Tensor = values) -> Tensor:
                planes = box_sum(coefficients.reshape(1, -1, height, width), window)[0]
                return (planes[:, None] * (values - centre[b])).sum(0)

            yield Piece(
                box_sum(difference.square().sum(2), window).flatten(2),
                lambda b, g, values=values: (g * (values - centre[b])).sum(1).flatten(1),
                spread,
            )

    return two_passes(problem, cotangents, height * width, pieces).derivatives


def _scan(
    problem: PosteriorProblem,
    window: int,
    sums: int,
    planes_per_image: int,
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> PosteriorState:
    """Scan whose weighted sums weigh(weights [B, n, Q], values [n, C, H, W]) are [B, Q, sums]."""
    x, batch = problem.x, len(problem.x)
    channels, height, width = problem.images.shape[1:]
    # And differences and their squares, and four planes per query.
    planes = batch * (2 * channels + 4) + planes_per_image
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, height * width, sums, x)
    for values in problem.chunks(chunk):
        difference = x[:, None] - alpha * values
        distance = box_sum(difference.square().sum(2), window).flatten(2)
        state = posterior.update(state, distance, scale, partial(weigh, values=values))
    return state


def box_sum(planes: Tensor, window: int) -> Tensor:
    """Sum over the window x window neighbourhood of every pixel, cut at the border.

    Args:
        planes: Values, [B, n, H, W].
        window: Odd side of the neighbourhood.

    Returns:
        Sums, [B, n, H, W].
    """
    half = window // 2
    rows = F.avg_pool2d(planes, (window, 1), 1, (half, 0), divisor_override=1)
    return F.avg_pool2d(rows, (1, window), 1, (0, half), divisor_override=1)
