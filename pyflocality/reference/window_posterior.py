"""Posterior mean over a square window around each pixel, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
from torch import Tensor

from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.tangents import answer_centre_of, centre_of
from pyflocality.reference.two_passes import Piece, two_passes


def scan(problem: PosteriorProblem, window: int) -> PosteriorState:
    """Scan of all images with a query per pixel, Q = H W, that answers its A C values."""
    channels, height, width = problem.images.shape[1:]
    count = problem.answered * channels
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init(len(problem.x), height * width, count, problem.x)
    # One chunk holds its values.
    for images, values, distance in _distances(problem, window, 2 * channels):

        def weigh(weights: Tensor, values: Tensor = values) -> Tensor:
            return torch.stack([(weights * values[:, k]).sum(1) for k in range(count)], dim=-1)

        state = posterior.update(state, distance, scale, weigh)
        del images, values, distance, weigh
    return state


def jvp(problem: PosteriorProblem, tangents: Tensor, window: int) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    centre = centre_of(problem)
    directions = tangents.transpose(0, 1)
    channels, height, width = centre.shape[1:]
    count, queries, answered = len(tangents), height * width, problem.answered * channels
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init_tangents(len(centre), queries, answered, count, problem.x)
    planes = 4 * channels + 4 * answered + 4 * count + 6
    # And the centred values, planes of every tangent, and temporaries.
    for images, values, distance in _distances(problem, window, planes):

        def terms(
            b: int, images: Tensor = images, values: Tensor = values
        ) -> tuple[Tensor, Tensor]:
            planes = torch.einsum("kchw,nchw->knhw", directions[b], images - centre[b])
            return box_sum(planes, window).flatten(2), values

        state = posterior.update_tangents(state, distance, scale, answered, terms)
        del images, values, distance, terms
    return state


def vjp(problem: PosteriorProblem, cotangents: Tensor, window: int) -> Tensor:
    """Vector-Jacobian products [K, B, C, H, W] along cotangents of what is answered."""
    x, centre, answer_centre = problem.x, centre_of(problem), answer_centre_of(problem)
    channels, height, width = x.shape[1:]
    planes = len(x) * (2 * channels + 4) + (3 + 2 * problem.answered) * channels + 6
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]

    def pieces() -> Iterator[Piece]:
        for images, values in problem.pairs(chunk):
            difference = x[:, None] - alpha * images
            distance = box_sum(difference.square().sum(2), window).flatten(2)
            del difference

            def inner(b: int, g: Tensor, values: Tensor = values) -> Tensor:
                products = g.reshape(answer_centre.shape[1:]) * (values - answer_centre[b])
                return products.flatten(1, 2).sum(1).flatten(1)

            def apply(b: int, coefficients: Tensor, images: Tensor = images) -> Tensor:
                planes = box_sum(coefficients.reshape(1, -1, height, width), window)[0]
                return (planes[:, None] * (images - centre[b])).sum(0)

            yield Piece(distance, inner, apply)
            del images, values, distance, inner, apply

    return two_passes(problem, cotangents, height * width, pieces, problem.image_shape).derivatives


def _distances(
    problem: PosteriorProblem, window: int, planes_per_image: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The images in chunks, [n, C, H, W], their answers [n, A C, H W], distances [B, n, H W]."""
    x, (channels, height, width) = problem.x, problem.images.shape[1:]
    # And differences and their squares, and four planes per query.
    planes = len(x) * (2 * channels + 4) + planes_per_image
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]
    for images, values in problem.pairs(chunk):
        difference = x[:, None] - alpha * images
        distance = box_sum(difference.square().sum(2), window).flatten(2)
        del difference
        yield images, values.flatten(1, 2).flatten(2), distance
        del images, values, distance


def box_sum(planes: Tensor, window: int) -> Tensor:
    """Sums over the window x window neighbourhoods of pixels, cut at the border: [B, n, H, W]."""
    half = window // 2
    rows = F.avg_pool2d(planes, (window, 1), 1, (half, 0), divisor_override=1)
    return F.avg_pool2d(rows, (1, window), 1, (0, half), divisor_override=1)
