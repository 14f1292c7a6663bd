"""Window posteriors: every window, and where they are the global posterior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mean_problems import ALPHA, SHAPE, SIGMA
from truth import filtered_posterior_mean, window_weights

from pyflocality.ops import (
    global_posterior_mean,
    window_posterior_mean,
)


@pytest.mark.parametrize("window", [1, 3, 5, 11])
def test_every_window_equals_truth(window, problem):
    x, images = problem()
    found = window_posterior_mean(x, images, window, SIGMA, ALPHA, dtype=torch.float64)
    weights, answers = window_weights(SHAPE, window)
    expected = filtered_posterior_mean(
        x, images, weights, answers, SIGMA.double().numpy(), ALPHA.double().numpy()
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11)


def test_largest_window_is_the_global_posterior(problem):
    x, images = problem()
    torch.testing.assert_close(
        window_posterior_mean(x, images, 11, SIGMA, ALPHA),
        global_posterior_mean(x, images, SIGMA, ALPHA),
        rtol=0,
        atol=1e-10,
    )
