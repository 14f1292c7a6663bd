"""Gaussian mixtures around the images: against the formula of dense matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from torch import Tensor
from truth import random_images

import pyflocality as pf
from pyflocality.backends import trace_blocks

SHAPE, VALUES = (2, 5, 5), 50
TAU = 1.3
LEVELS = [(1.0, 0.05), (0.8, 0.3), (0.1, 3.0), (1e-3, 1e3)]


def training_set(count: int = 120) -> pf.TrainingSet:
    generator = torch.Generator().manual_seed(count)
    return pf.TrainingSet(random_images(generator, count, SHAPE, torch.uint8))


@pytest.fixture(scope="module")
def data() -> pf.TrainingSet:
    return training_set()


def noisy(data: pf.TrainingSet, alpha: float, sigma: float, batch: int = 3) -> Tensor:
    noise = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    # Values that float32 holds, so that both precisions see the same problem.
    return (alpha * data.values(1, 1 + batch).double() + sigma * noise).float().double()


def directions(batch: int = 3) -> Tensor:
    return torch.randn(2, batch, *SHAPE, generator=torch.Generator().manual_seed(3)).double()


def moments_of(data: pf.TrainingSet) -> tuple[Tensor, Tensor, Tensor]:
    values = data.values(dtype=torch.float64).flatten(1)
    centred = values - values.mean(0)
    return values, values.mean(0), centred.T @ centred / max(1, len(values) - 1)


def truth(
    x: Tensor, data: pf.TrainingSet, alpha: float, sigma: float, gamma: float, tau: float = TAU
) -> tuple[Tensor, Tensor]:
    """Posterior means, and the log of the sum that normalises the posterior."""
    values, mean, covariance = moments_of(data)
    means = mean + math.sqrt(1 - gamma) * (values - mean)
    noise = alpha**2 * gamma * covariance + sigma**2 * torch.eye(VALUES).double()
    apart = x.flatten(1)[:, None] - alpha * means
    inner = apart @ torch.linalg.inv(noise)
    logits = -0.5 / tau * (apart * inner).sum(-1)
    each = means + alpha * gamma * inner @ covariance
    mixed = (logits.softmax(1)[..., None] * each).sum(1)
    return mixed.reshape(x.shape), logits.logsumexp(1)


@pytest.mark.parametrize("count", [120, 20, 2])
@pytest.mark.parametrize("gamma", [0.01, 0.3, 0.95])
def test_answers_are_those_of_the_formula(gamma, count):
    """Of more and of fewer images than values."""
    data = training_set(count)
    denoiser = pf.GaussianMixtureDenoiser(data, gamma, TAU, moments=pf.Basis.from_data(data))
    for alpha, sigma in LEVELS:
        x = noisy(data, alpha, sigma, 1)
        means, sums = truth(x, data, alpha, sigma, gamma)
        # The inverse of the dense matrix loses the digits of its condition, up to 1e4 here.
        torch.testing.assert_close(denoiser(x, sigma, alpha), means, rtol=0, atol=1e-11)
        found = denoiser.log_sum_exp(x, sigma, alpha)
        torch.testing.assert_close(found, sums[:, None], rtol=1e-11, atol=1e-10)
        cooler = denoiser.log_sum_exp(x, sigma, alpha, temperature=0.5)
        sums = truth(x, data, alpha, sigma, gamma, 0.5)[1]
        torch.testing.assert_close(cooler, sums[:, None], rtol=1e-11, atol=1e-10)
        single = denoiser(x.float(), sigma, alpha)
        assert single.dtype == torch.float32
        # As the optimal denoiser: float32 differences, squared, in units of the noise.
        torch.testing.assert_close(single.double(), means, rtol=0, atol=2e-6)


@pytest.mark.parametrize("gamma", [0.01, 0.3, 0.95])
def test_derivatives_are_those_of_the_formula(gamma, data):
    denoiser = pf.GaussianMixtureDenoiser(data, gamma, TAU)
    u = directions(1)
    for alpha, sigma in LEVELS:
        x = noisy(data, alpha, sigma, 1)

        def exact(z: Tensor, alpha: float = alpha, sigma: float = sigma) -> Tensor:
            return truth(z[None], data, alpha, sigma, gamma)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(exact, x[0]).reshape(VALUES, VALUES)
        scale = float(jacobian.abs().max())
        along = (u.flatten(2) @ jacobian.T).reshape(u.shape)
        close = {"rtol": 0, "atol": 1e-9 * max(1.0, scale)}
        means, products = denoiser.jvp(x, u, sigma, alpha)
        torch.testing.assert_close(means, denoiser(x, sigma, alpha), rtol=0, atol=1e-12)
        torch.testing.assert_close(products, along, **close)
        # It is symmetric.
        against = (u.flatten(2) @ jacobian).reshape(u.shape)
        torch.testing.assert_close(denoiser.vjp(x, u, sigma, alpha), against, **close)
        single = denoiser.jvp(x.float(), u.float(), sigma, alpha)[1].double()
        torch.testing.assert_close(single, along, rtol=0, atol=3e-5 * max(1.0, scale))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_it_is_the_optimal_denoiser_without_covariance(backend, data):
    optimal = pf.OptimalDenoiser(data, TAU, backend=backend)
    sigma, alpha = torch.tensor([0.1, 0.4, 2.0]), torch.tensor([1.0, 0.9, 0.5])
    for gamma in (0, lambda alpha, sigma: 0.0, [(1.0, 0.0)]):
        denoiser = pf.GaussianMixtureDenoiser(data, gamma, TAU, backend=backend)
        for dtype in (torch.float16, torch.float32):
            x, u = noisy(data, 0.8, 0.3).to(dtype), directions().to(dtype)
            with pf.trace_backends() as calls:
                assert torch.equal(denoiser(x, sigma, alpha), optimal(x, sigma, alpha))
            assert calls == [("global_posterior", backend)] * 2
            for found, expected in zip(
                denoiser.jvp(x, u, sigma, alpha), optimal.jvp(x, u, sigma, alpha), strict=True
            ):
                assert torch.equal(found, expected)
            assert torch.equal(denoiser.vjp(x, u, sigma, alpha), optimal.vjp(x, u, sigma, alpha))
            sums = denoiser.log_sum_exp(x, sigma, alpha)
            assert torch.equal(sums, optimal.log_sum_exp(x, sigma, alpha))


def test_it_is_the_wiener_filter_with_all_of_the_covariance(data):
    denoiser, wiener = pf.GaussianMixtureDenoiser(data, 1.0), pf.WienerDenoiser(data)
    u = directions()
    with pf.trace_backends() as calls:
        for alpha, sigma in LEVELS:
            x = noisy(data, alpha, sigma)
            close = {"rtol": 0, "atol": 1e-13}
            torch.testing.assert_close(denoiser(x, sigma, alpha), wiener(x, sigma, alpha), **close)
            torch.testing.assert_close(
                denoiser.jvp(x, u, sigma, alpha)[1], wiener.jvp(x, u, sigma, alpha)[1], **close
            )
            sums = truth(x, data, alpha, sigma, 1.0, 1.0)[1]
            found = denoiser.log_sum_exp(x, sigma, alpha)[:, 0]
            torch.testing.assert_close(found, sums, rtol=1e-11, atol=1e-10)
    # One Gaussian is compared with nothing; its density is asked of the set.
    assert {operation for operation, _ in calls} == {"global_posterior"}
    assert len(calls) == len(LEVELS)


def test_without_noise_it_keeps_what_the_images_span(data):
    few = training_set(20)
    for images in (data, few):
        x = noisy(images, 0.8, 0.3)
        found = pf.GaussianMixtureDenoiser(images, 0.3)(x, 0.0, 0.8)
        basis = pf.Basis.from_data(images)
        centred = x.flatten(1) / 0.8 - basis.mean.flatten()
        spanned = basis.mean.flatten() + centred @ basis.vectors @ basis.vectors.T
        torch.testing.assert_close(found.flatten(1), spanned, rtol=0, atol=1e-12)


def test_components_that_are_left_out_count_as_without_variance(data):
    basis = pf.Basis.from_data(data).leading(10)
    x = noisy(data, 0.8, 0.3)
    found = pf.GaussianMixtureDenoiser(data, 0.3, moments=basis)(x, 0.3, 0.8)
    values, mean, _ = moments_of(data)
    covariance = (basis.vectors * basis.values) @ basis.vectors.T
    means = mean + math.sqrt(0.7) * (values - mean)
    noise = 0.64 * 0.3 * covariance + 0.09 * torch.eye(VALUES).double()
    apart = x.flatten(1)[:, None] - 0.8 * means
    inner = apart @ torch.linalg.inv(noise)
    weights = (-0.5 * (apart * inner).sum(-1)).softmax(1)[..., None]
    expected = (weights * (means + 0.8 * 0.3 * inner @ covariance)).sum(1)
    torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-12)


def test_a_batch_of_levels_shares_its_passes(data):
    """One for each ratio of noise and signal, and one for all levels without covariance."""
    sigma = torch.tensor([0.2, 0.1, 0.5, 1.0, 3.0, 5.0])
    alpha = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    table = [(0.2, 0.3), (0.5, 0.0), (1.0, 0.0), (3.0, 0.5), (5.0, 1.0)]
    denoiser = pf.GaussianMixtureDenoiser(data, table, backend="reference")
    assert [denoiser.gamma_at(0.4 * s, 0.4) for s in (0.2, 1.0, 4.0)] == [0.3, 0.0, 1.0]
    x = noisy(data, 0.8, 0.3, 6)
    together = denoiser(x, sigma, alpha)
    with trace_blocks() as blocks:
        again = denoiser(x, sigma, alpha)
    assert sum(block.count for block in blocks) == 3 * len(data)
    assert torch.equal(again, together)
    for b in range(6):
        alone = denoiser(x[b : b + 1], float(sigma[b]), float(alpha[b]))
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-12)


def test_large_whitened_images_are_made_once_for_all_denoisers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "cache"))
    # As the default budget does of 400,000 such images.
    small = {"memory_budget": "1MB"}
    generator = torch.Generator().manual_seed(1)
    images = random_images(generator, 300, (1, 32, 32), torch.uint8)
    np.save(tmp_path / "set.npy", images.numpy())
    data = pf.TrainingSet.load(tmp_path / "set.npy")
    basis = pf.Basis.from_data(data)
    x = 0.8 * data.values(0, 2) + 0.3 * torch.randn(2, 1, 32, 32, generator=generator)
    first = pf.GaussianMixtureDenoiser(data, 0.3, moments=basis, **small)(x, 0.3, 0.8)
    assert len(list((tmp_path / "cache" / "linear").iterdir())) == 1
    second = pf.GaussianMixtureDenoiser(data, 0.3, moments=basis, backend="reference", **small)
    with trace_blocks() as blocks:
        found = second(x, 0.6, 1.6)
    # Those alone are read that are compared.
    assert sum(block.count for block in blocks) == 300
    exact = pf.GaussianMixtureDenoiser(data, 0.3, moments=basis, dtype=torch.float64)
    for single in (first, second(x, 0.3, 0.8)):
        torch.testing.assert_close(single, exact(x, 0.3, 0.8), rtol=0, atol=2e-6)
    assert found.shape == x.shape


def test_the_mixture_has_the_moments_of_the_set(data):
    """Much noise tells nothing: the mean is the answer, and the derivative the covariance."""
    _, mean, covariance = moments_of(data)
    sigma = 1e4
    for gamma in (0.0, 0.4, 1.0):
        denoiser = pf.GaussianMixtureDenoiser(data, gamma)
        x, u = sigma * directions(1)[0], directions(1)
        means, products = denoiser.jvp(x, u, sigma)
        torch.testing.assert_close(means.flatten(), mean, rtol=0, atol=2e-2)
        # In N of N - 1 parts for the means of the Gaussians.
        share = gamma + (1 - gamma) * (len(data) - 1) / len(data)
        expected = share * u.flatten(2) @ covariance / sigma**2
        scale = float(expected.abs().max())
        torch.testing.assert_close(products.flatten(2), expected, rtol=0, atol=1e-2 * scale)


def test_wrong_arguments_are_refused_before_work(data, monkeypatch):
    monkeypatch.setattr(pf.Basis, "from_data", lambda *a, **k: pytest.fail("work was begun"))
    for gamma, error, message in (
        (1.5, ValueError, r"`gamma` must be in \[0, 1\], got 1.5"),
        ("much", TypeError, "`gamma` must be one value, a function"),
        ([(1.0, -0.1)], ValueError, r"`gamma` must be in \[0, 1\]"),
        ([], ValueError, "`gamma` must be a table of at least one pair"),
    ):
        with pytest.raises(error, match=message):
            pf.GaussianMixtureDenoiser(data, gamma)
    for options, error, message in (
        ({"moments": data}, TypeError, "`moments` must be Moments or a Basis"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
        ({"progress": 1}, TypeError, "`progress`"),
        ({"backend": "gpu"}, ValueError, "`backend`"),
    ):
        with pytest.raises(error, match=message):
            pf.GaussianMixtureDenoiser(data, 0.3, **options)
    other = pf.Moments.from_data(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`moments` must be of images of shape"):
        pf.GaussianMixtureDenoiser(data, 0.3, moments=other)


def test_few_images_are_told():
    with pytest.warns(UserWarning, match="20 images are too few for the covariance of a Gaussian"):
        pf.GaussianMixtureDenoiser(training_set(20), 0.3)
