"""Masked posteriors: soft weights, and where they are the global posterior."""

from __future__ import annotations

import numpy as np
import torch
from mean_problems import ALPHA, SIGMA, D
from truth import filtered_posterior_mean

from pyflocality.ops import (
    global_posterior_mean,
    masked_posterior_mean,
)


def test_full_mask_is_the_global_posterior(problem):
    x, images = problem()
    full = torch.ones(D, D, dtype=torch.bool)
    torch.testing.assert_close(
        masked_posterior_mean(x, images, full, SIGMA, ALPHA),
        global_posterior_mean(x, images, SIGMA, ALPHA),
        rtol=0,
        atol=1e-10,
    )


def test_soft_weights_equal_truth(problem, rng):
    x, images = problem()
    weights = torch.rand(D, D, generator=rng, dtype=torch.float64)
    found = masked_posterior_mean(x, images, weights, SIGMA, ALPHA, dtype=torch.float64)
    answers = [np.array([m]) for m in range(D)]
    expected = filtered_posterior_mean(
        x, images, weights.numpy(), answers, SIGMA.double().numpy(), ALPHA.double().numpy()
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11)
