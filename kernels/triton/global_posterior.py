r"""Global posterior on an NVIDIA GPU: two passes over the stored bytes (`_global_products`).

With tangents the products :math:`c_i = \sum_d u[d] \, v_i[d]` are made as the distances are, of
integers: c counts from x / alpha, cut to the range of images, before anything is rounded. With
all distances at hand, the second pass sums the images by the weights :math:`p_i` and by
:math:`p_i (c_i - \mathrm E[c])`, whose sum over the images is zero: no digits cancel from a
covariance, however little noise there is. Value images are summed as the images are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyflocality.kernels.stored import StoredProblem
from pyflocality.kernels.triton._global_products import (
    CENTRE,
    CONFIGS,
    QUERIES,
    Config,
    coefficient_sums,
    distances_of,
    filled,
    fixed_point,
    splits_of,
    squared_norms,
    weighted_sums,
)
from pyflocality.kernels.triton._launch import generation, on_device_of
from pyflocality.kernels.triton._merge import empty_state, merge_partials
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import (
    PosteriorState,
    finite_factor,
    init,
    merge_tangents,
    tangent_values,
)
from pyflocality.posterior.tangents import centre_of
from pyflocality.storage.reader import BYTES_PER_UNIT, values_to_bytes


def scan(problem: PosteriorProblem, *, config: Config | None = None) -> PosteriorState:
    """Scan with one query per batch element, as the reference: float32 queries, uint8 images.

    The kernels have the shapes shipped for the device unless `config` tells others.
    """
    config = config or CONFIGS[generation(problem.x.device)]
    stored, count, dim = StoredProblem(problem), len(problem.images), problem.images[0].numel()
    # Distances to all images and one more sum per split, for some groups of queries at a time.
    splits, split = splits_of(count, dim, config)
    parts = stored.parts(4 * count + 4 * (splits + 2) * problem.answered * dim, QUERIES)
    states = [_scan(part, split, config) for _, part in parts]
    minimum, total, weighted = (torch.cat(sums).double() for sums in zip(*states, strict=True))
    minimum, total, weighted = minimum[:, None], total[:, None], weighted[:, None]
    if problem.answers_image:
        weighted[..., :dim] += CENTRE * total[..., None]
    return PosteriorState(stored.distances(minimum), total, stored.values(weighted, total))


def _scan(stored: StoredProblem, split: int, config: Config) -> PosteriorState:
    """State of some queries in bytes: minimum [B], total [B], weighted u - 128, values [B, A D]."""
    noisy, factor = filled(stored.exact.flatten(1) - CENTRE), filled(stored.factor, 1.0)
    queries, problem = fixed_point(noisy), stored.problem
    widths = [noisy.shape[1]] if problem.answers_image else []
    if problem.values is not None:
        widths.append(problem.values[0].numel())
    states = [empty_state(len(noisy), width, noisy.device) for width in widths]
    with on_device_of(noisy):
        for images, norms, answered in _blocks(stored):
            distances = distances_of(images, norms, queries, config)
            for place, values in enumerate(answered):
                partials = weighted_sums(values, distances, factor, split, config)
                states[place] = merge_partials(states[place], partials, factor)
    (minimum, total, _), weighted = states[0], [state.weighted for state in states]
    whole = (minimum, total, weighted[0] if len(weighted) == 1 else torch.cat(weighted, 1))
    return PosteriorState(*(sums[: len(stored.noisy)] for sums in whole))


def _blocks(stored: StoredProblem) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Images [n, D], their squared norms [n], and what is answered: images, values [n, R D]."""
    norms, first = squared_norms(stored.problem.images), 0
    for images, values in stored.pairs():
        answered = [images] if stored.problem.answers_image else []
        if values is not None:
            answered.append(values.flatten(1))
        yield images, norms[first : first + len(images)], answered
        first += len(images)


def jvp(
    problem: PosteriorProblem, tangents: Tensor, *, config: Config | None = None
) -> PosteriorState:
    """The same scan with K tangents [K, B, C, H, W], as the reference."""
    config = config or CONFIGS[generation(problem.x.device)]
    directions = tangents.detach().double().flatten(2).transpose(0, 1)
    stored, count, dim = StoredProblem(problem), len(problem.images), directions.shape[2]
    width = problem.answered * dim
    if len(directions) == 0:
        return init(0, 1, tangent_values(width, len(tangents)), problem.x.double())
    # Distances, products and coefficients, one more of them in double precision, and the sums of
    # every split, for one noisy image.
    splits, _ = splits_of(count, dim, config)
    per_image = (1 + len(tangents)) * (40 * count + 4 * (splits + 4) * width)
    states = [_jvp(part, directions[rows], config) for rows, part in stored.parts(per_image)]
    return PosteriorState(*(torch.cat(sums) for sums in zip(*states, strict=True)))


def _jvp(stored: StoredProblem, directions: Tensor, config: Config) -> PosteriorState:
    """State of some noisy images: [b, 1], [b, 1] and [b, 1, V + K + K V] for V = A D, float64."""
    noisy = stored.exact.flatten(1) - CENTRE
    centre = values_to_bytes(centre_of(stored.problem).double().flatten(1)) - CENTRE
    scale = finite_factor(stored.problem.scale, torch.float64)
    queries = fixed_point(filled(noisy))
    # A squared distance is norm + common - 2 quantum product: c - c of the centre is that, too.
    digits, quantum, _ = fixed_point(filled(directions.flatten(0, 1)))
    offsets = filled((directions * centre[:, None]).sum(2).flatten())
    inner_queries = (digits, -0.5 * quantum, -offsets)
    state: PosteriorState | None = None
    with on_device_of(noisy):
        for images, norms, answered in _blocks(stored):
            distance = distances_of(images, norms, queries, config)[: len(noisy)]
            inner = distances_of(images, torch.zeros_like(norms), inner_queries, config)
            inner = inner[: directions.shape[:2].numel()].unflatten(0, directions.shape[:2])
            sums = _jvp_sums(stored, answered, distance, inner, config)
            width = sum(values.shape[1] for values in answered)
            state = sums if state is None else merge_tangents(state, sums, scale, width)
    assert state is not None
    return state


def _jvp_sums(
    stored: StoredProblem, answered: list[Tensor], distance: Tensor, inner: Tensor, config: Config
) -> PosteriorState:
    """State of some images, of which `_blocks` tells what is answered.

    It is made of distances in bytes [b, n] and of products with the tangents [b, K, n].
    """
    # One noisy image at a time, so that the bits do not depend on the batch.
    rows = [_coefficients(*row) for row in zip(distance, inner, stored.factor, strict=True)]
    minimum, total, mean, coefficients = (torch.stack(some) for some in zip(*rows, strict=True))
    # The coefficients add up to 0 but for their rounding: this counts the values from their mean.
    left = coefficients[:, 1:].sum(2, dtype=torch.float64)[..., None]
    means, crosses = [], []
    for values in answered:
        sums = coefficient_sums(values, coefficients.flatten(0, 1), config)
        sums = sums.unflatten(0, coefficients.shape[:2])
        cross, unit = sums[:, 1:] - left * (sums[:, 0] / total[:, None])[:, None], BYTES_PER_UNIT
        if values.dtype == torch.uint8:
            means.append(stored.without_values.values(sums[:, 0] + CENTRE * total[:, None], total))
            unit *= BYTES_PER_UNIT
        else:
            means.append(sums[:, 0])
        crosses.append(cross / unit)
    inner = mean * total[:, None] / BYTES_PER_UNIT
    weighted = torch.cat([*means, inner, torch.cat(crosses, 2).flatten(1)], 1)
    minimum = stored.distances(minimum.double()[:, None])
    return PosteriorState(minimum, total[:, None], weighted[:, None])


def _coefficients(distance: Tensor, inner: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """What a noisy image multiplies the training images by.

    Args:
        distance: Distances [n].
        inner: Products c [K, n].
        factor: Factor of a distance in the power of two.

    Returns:
        Smallest distance; sum of the weights and means of c [K], float64; the weights and, for
        every tangent, the weights times c less its mean, float32 [1 + K, n].
    """
    minimum = distance.amin()
    weight = torch.exp2((minimum - distance) * factor)
    total = weight.sum(dtype=torch.float64)
    mean = (weight * inner.double()).sum(1) / total
    spread = (weight * (inner - mean[:, None])).float()
    return minimum, total, mean, torch.cat([weight[None], spread])
