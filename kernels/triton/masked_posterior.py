r"""Masked posterior on an NVIDIA GPU: tensor-core products with the softmax in the epilogue.

Distances are expanded: sum w (z - u)^2 = A - 2 sum w z u + sum w u^2 with the noisy image z in
the units of the bytes u. The term A is the same for all images; the last one is the same for all
noisy images; the middle one is a product of matrices, whose image side is exact in float16.
`_masked_levels` says how neighbouring outputs share work, `_masked_products` and
`_masked_softmax` hold the kernels, `_masked_plan` cuts a scan up and `_masked_scan` runs it.

A tangent u needs the products :math:`c_i = \sum_d w[d] \, u[d] \, v_i[d]`, which are those of the
distances with u in the place of the noisy image. So tangents are further queries: a program's 8
queries are one noisy image with up to 7 tangents, or two with up to 3, or four with one, and only
the epilogue knows: it takes the weights from the first query of each noisy image, and sums c and
c v with them for the others. Values and c are counted from x / alpha, cut to the range of images:
where noise is small all but the digits of their differences would cancel from a covariance.

Value images take part in the epilogue alone: the weights of a block of images are multiplied with
the block's values, float32 numbers that are transposed a slice of the images at a time. There is
no such centre for them, so that derivatives of what they answer are the reference's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflocality._support.precision import TOLERANCE
from pyflocality.kernels.stored import StoredProblem
from pyflocality.kernels.triton._centred_images import CentredImages, centred_images
from pyflocality.kernels.triton._launch import generation
from pyflocality.kernels.triton._masked_levels import MaskLevels, banded_levels
from pyflocality.kernels.triton._masked_plan import CONFIGS, JVP_CONFIGS, Config, config_for
from pyflocality.kernels.triton._masked_scan import (
    MaskedScan,
    TangentScan,
    centred_noisy,
    sums_over_weights,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import (
    PosteriorState,
    about_means,
    init,
    tangent_values,
    uncentred,
)
from pyflocality.posterior.tangents import centre_of
from pyflocality.posterior.tiles import joined
from pyflocality.weights import QueryWeights

# Queries that a noisy image with its tangents takes up, by how many are left; 8 with more. Four
# tangents are cheaper as three and one.
SLOTS, LARGEST_SLOTS = (2, 2, 4, 4, 4), 8


def scan(
    problem: PosteriorProblem, weights: QueryWeights, *, config: Config | None = None
) -> PosteriorState:
    """Scan with a query per output value, as the reference.

    Args:
        problem: float32 queries against uint8 images. Precision "exact" splits every query in
            two float16 halves, which is as accurate as float32. "auto" takes one half where
            `rounding_error` stays below 1e-3, which is so at high noise, where masks are dense
            and the time goes. It decides for each noisy image alone, from its noise level. Value
            images, which may be of any size, are answered "exact" either way.
        weights: Masks, or real weights (each kept as two float16 halves, 22 bits).
        config: Shapes of the kernels; None takes those shipped for the device and the batch.
    """
    device = problem.x.device
    arch, images = generation(device), centred_images(problem.images)
    block_d = (config or CONFIGS[arch]).block_d
    bands = banded_levels(weights, problem.image_shape, block_d, device)
    return joined(
        [(outputs, _scan(problem, images, levels, outputs, config)) for outputs, levels in bands]
    )


def _scan(
    problem: PosteriorProblem,
    images: CentredImages,
    levels: MaskLevels,
    outputs: slice | Tensor,
    config: Config | None,
) -> PosteriorState:
    """The state of some outputs."""
    stored, device = StoredProblem(problem), problem.x.device
    exact = torch.ones(len(problem.x), dtype=torch.bool, device=device)
    if problem.precision == "auto" and problem.values is None:
        exact = rounding_error(problem, images.variance, levels.strongest) > TOLERANCE
    result = init(len(exact), len(levels.weights), problem.answered, exact.double())
    for halves, chosen in ((1, ~exact), (2, exact)):
        rows = chosen.nonzero().flatten()
        if len(rows):
            values = 0 if problem.values is None else problem.values.shape[1]
            shapes = config or config_for(len(rows), generation(device), values)
            state = MaskedScan(stored.part(rows), images, levels, shapes, halves).run()
            for whole, some in zip(result, state, strict=True):
                whole[rows] = some.double()
    # What the scan leaves out: the common term, and the centre of the images.
    minimum, total, weighted = result
    centre = images.centre.double()
    minimum = stored.distances(minimum)
    minimum += sums_over_weights(levels, centred_noisy(problem, centre).square())
    if problem.answers_image:
        weighted[..., 0] += total * centre[outputs]
    return PosteriorState(minimum, total, stored.values(weighted, total))


def rounding_error(problem: PosteriorProblem, variance: float, strongest: float) -> Tensor:
    r"""About how far rounding x to float16 can move an answer, float64 [B].

    Rounding x by :math:`\delta` moves the difference of two logits by
    :math:`\alpha \sum_d w_d \delta_d (v_i - v_j)_d / (\sigma^2 \tau)`, of the order
    :math:`\alpha \, \delta \, |w (v_i - v_j)| / (\sigma^2 \tau)`, and an answer by at most half of
    that where two images tie. With :math:`\delta = 2^{-12}` of the size of x and the images as
    far apart as two random ones this was 1.1 to 6 times the largest error seen on CIFAR-10, for
    windows from 5x5 to the whole image and noise levels from 0.01 to 1.
    """
    size = (problem.alpha.square() * variance + 0.5 / problem.scale).sqrt()
    apart = math.sqrt(2.0 * variance * strongest)
    error = 0.5 * problem.alpha * (2.0**-12 * size) * apart * 2.0 * problem.scale
    return torch.where(torch.isfinite(problem.scale), error, torch.inf)


def jvp(
    problem: PosteriorProblem,
    tangents: Tensor,
    weights: QueryWeights,
    *,
    config: Config | None = None,
) -> PosteriorState:
    """Scan with a query per output value and K tangents, as the reference.

    Args:
        problem: float32 queries against uint8 images.
        tangents: Directions, [K, B, C, H, W].
        weights: Masks, or real weights (each kept as two float16 halves, 22 bits).
        config: Shapes of the kernels; None takes those shipped for the device.
    """
    device = problem.x.device
    if len(problem.x) == 0:
        return init(0, weights.shape[0], tangent_values(1, len(tangents)), problem.x.double())
    config = config or JVP_CONFIGS[generation(device)]
    images = centred_images(problem.images)
    bands = banded_levels(weights, problem.image_shape, config.block_d, device)
    return joined(
        [
            (outputs, _scan_tangents(problem, tangents, images, levels, outputs, config))
            for outputs, levels in bands
        ]
    )


def _scan_tangents(
    problem: PosteriorProblem,
    tangents: Tensor,
    images: CentredImages,
    levels: MaskLevels,
    outputs: slice | Tensor,
    config: Config,
) -> PosteriorState:
    """The state of some outputs, with tangents."""
    stored = StoredProblem(problem)
    directions = tangents.detach().double().flatten(2).transpose(0, 1)
    scans = []
    for first, last, slots in tangent_groups(len(tangents)):
        some = directions.new_zeros(len(directions), slots - 1, directions.shape[2])
        some[:, : last - first] = directions[:, first:last]
        scans.append(TangentScan(stored, some, images, levels, config).sums_of(last - first))
    minimum, total, means = scans[0][:3]
    # Each group has a total of its own, rounded in its own way.
    inner, cross = ([sums[k] * (total / sums[1])[..., None] for sums in scans] for k in (3, 4))
    minimum = stored.distances(minimum)
    minimum += sums_over_weights(levels, centred_noisy(problem, images.centre).square())
    state = PosteriorState(minimum, total, torch.cat([means, *inner, *cross], -1))
    centre = centre_of(problem).flatten(1)[:, outputs, None]
    return uncentred(about_means(state, 1), centre)


def tangent_groups(count: int) -> list[tuple[int, int, int]]:
    """Which tangents are scanned together: first, last, and slots of a noisy image then.

    K tangents take at most 4/3 (1 + K) slots together; without any the noisy image takes two.
    """
    groups: list[tuple[int, int, int]] = []
    first = 0
    while first < count or not groups:
        left = count - first
        slots = SLOTS[left] if left < len(SLOTS) else LARGEST_SLOTS
        last = min(count, first + slots - 1)
        groups.append((first, last, slots))
        first = last
    return groups
