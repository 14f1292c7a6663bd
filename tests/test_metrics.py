"""Metrics against float64 closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyflocality import metrics


@pytest.fixture
def pair(rng):
    """Two batches of images [3, 2, 4, 5]."""
    return torch.rand(2, 3, 2, 4, 5, generator=rng, dtype=torch.float64) * 2 - 1


def test_mse_is_the_mean_over_each_image(pair):
    a, b = pair
    expected = ((a.numpy() - b.numpy()) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(metrics.mse(a, b).numpy(), expected, rtol=1e-14)


def test_mse_keeps_small_differences_of_float32_images():
    """The sum is taken in float64: 10,000 equal squares do not drift."""
    a = torch.full((1, 1, 100, 100), 0.1)
    b = torch.zeros_like(a)
    expected = float(np.float32(0.1)) ** 2
    assert metrics.mse(a, b).item() == pytest.approx(expected, rel=1e-13)
    assert metrics.mse(a, b).dtype == torch.float64


def test_psnr_of_known_error():
    a = torch.zeros(2, 1, 2, 2)
    b = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    b[0] = 0.2
    b[0, 0, 0, 0] = -0.2
    values = metrics.psnr(a.double(), b)
    assert values[0].item() == pytest.approx(20.0, rel=1e-12)
    assert values[1].item() == math.inf
    assert metrics.psnr(a.double(), b, data_range=1.0)[0].item() == pytest.approx(
        20.0 - 20 * math.log10(2), rel=1e-12
    )


def test_r2_is_the_published_definition(pair):
    u, y = pair
    expected = [
        1 - ((p - t) ** 2).sum() / (t.size * np.var(t, ddof=1))
        for p, t in zip(u.numpy(), y.numpy(), strict=True)
    ]
    np.testing.assert_allclose(metrics.r2(u, y).numpy(), expected, rtol=1e-13)


def test_r2_is_not_symmetric(pair):
    u, y = pair
    assert not torch.allclose(metrics.r2(u, y), metrics.r2(y * 0.5, u))


def test_r2_limits(pair):
    """1 for a perfect prediction, 1 / D for the target's mean, -inf or NaN for a flat target."""
    _, y = pair
    assert torch.equal(metrics.r2(y, y), torch.ones(3, dtype=torch.float64))
    mean = y.mean(dim=(1, 2, 3), keepdim=True).expand_as(y)
    torch.testing.assert_close(metrics.r2(mean, y), torch.full((3,), 1 / 40, dtype=torch.float64))
    flat = torch.full((1, 1, 30, 30), 0.1)
    assert metrics.r2(flat + 0.5, flat).item() == -math.inf
    assert math.isnan(metrics.r2(flat, flat).item())


@pytest.mark.parametrize("metric", [metrics.mse, metrics.psnr, metrics.r2])
@pytest.mark.parametrize(
    ("second", "error", "words"),
    [
        (torch.zeros(3, 2, 4, 4), ValueError, "shape"),
        (torch.zeros(2, 4, 5), ValueError, "shape"),
        (torch.zeros(3, 2, 4, 5, dtype=torch.uint8), TypeError, "floating-point"),
        (torch.full((3, 2, 4, 5), math.nan), ValueError, "NaN"),
        (np.zeros((3, 2, 4, 5)), TypeError, "torch.Tensor"),
    ],
)
def test_wrong_images(metric, second, error, words, pair):
    first = pair[0]
    for arguments in ((first, second), (second, first)):
        with pytest.raises(error, match=words):
            metric(*arguments)


def test_the_message_names_the_argument(pair):
    with pytest.raises(ValueError, match="`target`"):
        metrics.r2(pair[0], pair[1][:2])
    with pytest.raises(ValueError, match="`b`"):
        metrics.mse(pair[0], pair[1][:2])
    with pytest.raises(ValueError, match="`data_range`"):
        metrics.psnr(pair[0], pair[1], data_range=0.0)
    with pytest.raises(ValueError, match="`a`"):
        metrics.mse(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="`target`.*two"):
        metrics.r2(torch.zeros(4, 1), torch.zeros(4, 1))


@pytest.mark.parametrize("data_range", [1e308, 1e-300])
def test_ranges_whose_square_is_no_number(data_range):
    found = metrics.psnr(torch.zeros(1, 4), torch.ones(1, 4), data_range)
    assert found.item() == pytest.approx(20.0 * math.log10(data_range))
    assert metrics.psnr(torch.ones(1, 4), torch.ones(1, 4), data_range).item() == math.inf


def test_gradient_energy():
    image = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]]])
    assert metrics.gradient_energy(image).tolist() == [(9 + 4) / 2 + (1 + 0) / 2]
    # Channels count alike; without neighbours in a direction there is nothing to differ.
    assert metrics.gradient_energy(image.expand(2, 3, 2, 2)).tolist() == [7.0, 7.0]
    assert metrics.gradient_energy(torch.tensor([[[[1.0, 3.0, 3.0]]]])).tolist() == [2.0]
    assert metrics.gradient_energy(torch.ones(1, 1, 1, 1)).tolist() == [0.0]
    with pytest.raises(ValueError, match="`images`.*C, H, W"):
        metrics.gradient_energy(torch.zeros(2, 5))
