"""Posterior mean over the patches of all images at all positions, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.tangents import centre_of
from pyflocality.reference.two_passes import Piece, two_passes
from pyflocality.reference.window_posterior import box_sum


class _View(NamedTuple):
    """Training images against queries that are displaced from the patches.

    Attributes:
        distance: Distances [B, n, H W] of the queries; infinite where there is no patch.
        values: Training values, [n, C, H, W].
        shift: Displacement (down, right) from patch to query.
    """

    distance: Tensor
    values: Tensor
    shift: tuple[int, int]

    def at_query(self, planes: Tensor) -> Tensor:
        """What lies at the patches, [..., H, W], moved to their queries."""
        return planes.roll(self.shift, (-2, -1))

    def at_patch(self, planes: Tensor) -> Tensor:
        """What lies at the queries, [..., H, W], moved to their patches."""
        down, right = self.shift
        return planes.roll((-down, -right), (-2, -1))


def scan(problem: PosteriorProblem, window: int, circular: bool) -> PosteriorState:
    """Scan of all patches with a query per pixel, Q = H W, that answers its C values.

    One displacement between query and patch at a time: the window sums of the squared
    differences between the displaced noisy image and the training images are the distances of
    all pairs at that displacement.
    """
    channels, height, width = problem.x.shape[1:]
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init(len(problem.x), height * width, channels, problem.x)
    for view in _views(problem, window, circular, 3 * channels):
        flat = view.at_query(view.values).flatten(2)

        def weigh(weights: Tensor, flat: Tensor = flat) -> Tensor:
            return torch.stack([(weights * flat[:, c]).sum(1) for c in range(channels)], dim=-1)

        state = posterior.update(state, view.distance, scale, weigh)
        del view, flat, weigh
    return state


def jvp(problem: PosteriorProblem, tangents: Tensor, window: int, circular: bool) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    centre, directions = centre_of(problem), tangents.transpose(0, 1)
    batch, channels, height, width = centre.shape
    count, queries = len(tangents), height * width
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init_tangents(batch, queries, channels, count, problem.x)
    for view in _views(problem, window, circular, 9 * channels + 4 * count + 6):
        answers = view.at_query(view.values).flatten(2)

        def terms(b: int, view: _View = view, answers: Tensor = answers) -> tuple[Tensor, Tensor]:
            centred = view.values - view.at_patch(centre[b])
            planes = torch.einsum("kchw,nchw->knhw", view.at_patch(directions[b]), centred)
            return view.at_query(box_sum(planes, window)).flatten(2), answers

        state = posterior.update_tangents(state, view.distance, scale, channels, terms)
        del view, answers, terms
    return state


def vjp(problem: PosteriorProblem, cotangents: Tensor, window: int, circular: bool) -> Tensor:
    """Vector-Jacobian products along cotangents [K, B, C, H, W], of the same shape."""
    centre = centre_of(problem)
    channels, height, width = centre.shape[1:]

    def pieces() -> Iterator[Piece]:
        for view in _views(problem, window, circular, 6 * channels + 6):

            def centred(b: int, view: _View) -> Tensor:
                return view.values - view.at_patch(centre[b])

            def inner(b: int, g: Tensor, view: _View = view) -> Tensor:
                return view.at_query((view.at_patch(g) * centred(b, view)).sum(1)).flatten(1)

            def apply(b: int, coefficients: Tensor, view: _View = view) -> Tensor:
                planes = view.at_patch(coefficients.reshape(1, -1, height, width))
                return view.at_query(
                    (box_sum(planes, window)[0][:, None] * centred(b, view)).sum(0)
                )

            yield Piece(view.distance, inner, apply)
            del view, inner, apply

    return two_passes(problem, cotangents, height * width, pieces, problem.image_shape).derivatives


def _views(
    problem: PosteriorProblem, window: int, circular: bool, planes_per_image: int
) -> Iterator[_View]:
    """All images at all displacements, as many images at a time as the budget allows.

    The caller makes so many planes of H W numbers of an image.
    """
    x, batch = problem.x, len(problem.x)
    channels, height, width = x.shape[1:]
    planes = batch * (3 * channels + 6) + planes_per_image
    chunk = problem.images_at_a_time(planes * height * width * x.element_size())
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]
    for values in problem.chunks(chunk):
        for down, right, allowed in displacements(height, width, window, circular):
            displaced = x.roll((-down, -right), (-2, -1))
            squares = (displaced[:, None] - alpha * values).square().sum(2)
            at_patch = torch.where(allowed.to(x.device), box_sum(squares, window), torch.inf)
            distance = at_patch.roll((down, right), (-2, -1)).flatten(2)
            del squares, at_patch
            yield _View(distance, values, (down, right))
            del distance
        del values


def displacements(
    height: int, width: int, window: int, circular: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Displacements (down, right) from patch to query, and where patches may be: bool [H, W]."""
    for down, rows in _axis(height, window, circular):
        for right, columns in _axis(width, window, circular):
            yield down, right, rows[:, None] & columns


def _axis(length: int, window: int, circular: bool) -> Iterator[tuple[int, Tensor]]:
    place, half = torch.arange(length), window // 2
    for shift in range(length) if circular else range(-length + 1, length):
        first, last = half, length - half
        if shift == 0 and not circular:
            first, last = 0, length
        elif not circular:
            # The window lies inside around the query, too.
            first, last = max(first, first - shift), min(last, last - shift)
        if first < last:
            yield shift, (place >= first) & (place < last)
