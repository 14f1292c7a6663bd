"""Posterior mean over a square window around each pixel, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
from torch import Tensor

from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.tangents import centre_of
from pyflocality.reference.two_passes import Piece, two_passes


def scan(problem: PosteriorProblem, window: int) -> PosteriorState:
    """Scan of all images with a query per pixel, Q = H W, that answers its C values."""
    channels, height, width = problem.images.shape[1:]
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init(len(problem.x), height * width, channels, problem.x)
    # One chunk holds its values.
    for values, distance in _distances(problem, window, 2 * channels):

        def weigh(weights: Tensor, values: Tensor = values) -> Tensor:
            flat = values.flatten(2)
            return torch.stack([(weights * flat[:, c]).sum(1) for c in range(channels)], dim=-1)

        state = posterior.update(state, distance, scale, weigh)
        del values, distance, weigh
    return state


def jvp(problem: PosteriorProblem, tangents: Tensor, window: int) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    centre = centre_of(problem)
    directions = tangents.transpose(0, 1)
    channels, height, width = centre.shape[1:]
    count, queries = len(tangents), height * width
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init_tangents(len(centre), queries, channels, count, problem.x)
    # And the centred values, planes of every tangent, and temporaries.
    for values, distance in _distances(problem, window, 8 * channels + 4 * count + 6):

        def terms(b: int, values: Tensor = values) -> tuple[Tensor, Tensor]:
            planes = torch.einsum("kchw,nchw->knhw", directions[b], values - centre[b])
            return box_sum(planes, window).flatten(2), values.flatten(2)

        state = posterior.update_tangents(state, distance, scale, channels, terms)
        del values, distance, terms
    return state


def vjp(problem: PosteriorProblem, cotangents: Tensor, window: int) -> Tensor:
    """Vector-Jacobian products along cotangents [K, B, C, H, W], of the same shape."""
    x, centre = problem.x, centre_of(problem)
    channels, height, width = x.shape[1:]
    planes = len(x) * (2 * channels + 4) + 5 * channels + 6
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]

    def pieces() -> Iterator[Piece]:
        for values in problem.chunks(chunk):
            difference = x[:, None] - alpha * values
            distance = box_sum(difference.square().sum(2), window).flatten(2)
            del difference

            def inner(b: int, g: Tensor, values: Tensor = values) -> Tensor:
                return (g * (values - centre[b])).sum(1).flatten(1)

            def apply(b: int, coefficients: Tensor, values: Tensor = values) -> Tensor:
                planes = box_sum(coefficients.reshape(1, -1, height, width), window)[0]
                return (planes[:, None] * (values - centre[b])).sum(0)

            yield Piece(distance, inner, apply)
            del values, distance, inner, apply

    return two_passes(problem, cotangents, height * width, pieces).derivatives


def _distances(
    problem: PosteriorProblem, window: int, planes_per_image: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in chunks, [n, C, H, W], and their distances [B, n, H W]."""
    x, (channels, height, width) = problem.x, problem.images.shape[1:]
    # And differences and their squares, and four planes per query.
    planes = len(x) * (2 * channels + 4) + planes_per_image
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]
    for values in problem.chunks(chunk):
        difference = x[:, None] - alpha * values
        distance = box_sum(difference.square().sum(2), window).flatten(2)
        del difference
        yield values, distance
        del values, distance


def box_sum(planes: Tensor, window: int) -> Tensor:
    """Sums over the window x window neighbourhoods of pixels, cut at the border: [B, n, H, W]."""
    half = window // 2
    rows = F.avg_pool2d(planes, (window, 1), 1, (half, 0), divisor_override=1)
    return F.avg_pool2d(rows, (1, window), 1, (0, half), divisor_override=1)
