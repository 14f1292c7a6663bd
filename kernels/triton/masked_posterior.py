"""Masked posterior scan on an NVIDIA GPU: tensor-core products with the softmax in the epilogue.

Distances are expanded: sum w (z - u)^2 = A - 2 sum w z u + sum w u^2 with the noisy image z in
the units of the bytes u. The term A is the same for all images; the last one is the same for all
noisy images; the middle one is a product of matrices, whose image side is exact in float16.
`_mask_plan` says how neighbouring outputs share work, `_masked_products` holds the kernels, and
`_masked_scan` cuts the scan up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflocality._support.precision import TOLERANCE
from pyflocality.kernels.stored import StoredProblem
from pyflocality.kernels.triton._centred_images import centred_images
from pyflocality.kernels.triton._launch import generation
from pyflocality.kernels.triton._mask_plan import mask_plan
from pyflocality.kernels.triton._masked_scan import (
    CONFIGS,
    Config,
    MaskedScan,
    centred_noisy,
    config_for,
    sums_over_weights,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.weights import QueryWeights


def masked_posterior_state(
    problem: PosteriorProblem,
    weights: QueryWeights,
    *,
    config: Config | None = None,
) -> PosteriorState:
    """Scan with a query per output value, as the reference of this name.

    Args:
        problem: float32 queries against uint8 images. Precision "exact" splits every query in
            two float16 halves, which is as accurate as float32. "auto" takes one half where
            `rounding_error` stays below 1e-3, which is so at high noise, where masks are dense
            and the time goes. It decides for each noisy image alone, from its noise level.
        weights: Masks, or real weights (each kept as two float16 halves, 22 bits).
        config: Shapes of the kernels; None takes those shipped for the device and the batch.
    """
    x = problem.x.detach()
    arch = generation(x.device)
    block_d = (config or CONFIGS[arch]).block_d
    plan = mask_plan(weights, tuple(problem.images.shape[1:]), block_d, x.device)
    images = centred_images(problem.images)
    exact = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if problem.precision == "auto":
        exact = rounding_error(problem, images.variance, plan.strongest) > TOLERANCE
    sums = [
        torch.empty(len(x), weights.shape[0], *more, dtype=torch.float64, device=x.device)
        for more in ((), (), (1,))
    ]
    for parts, chosen in ((1, ~exact), (2, exact)):
        rows = chosen.nonzero().flatten()
        if len(rows):
            shapes = config or config_for(len(rows), arch)
            found = MaskedScan(problem, rows, images, plan, shapes, parts).run()
            for whole, part in zip(sums, found, strict=True):
                whole[rows] = part.double()
    # What the scan leaves out: the common term, and the centre of the images.
    minimum, total, weighted = sums
    centre = images.centre.double()
    stored = StoredProblem(problem)
    minimum = stored.distances(minimum)
    minimum += sums_over_weights(plan, centred_noisy(problem, centre).square())
    weighted += total[..., None] * centre[:, None]
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
