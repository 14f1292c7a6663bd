"""Native spread of weights over masks against the float64 reference: filtered posteriors, vjp."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS
from native_cpu import needs_cpu
from torch import Tensor
from truth import noisy_batch, random_images

import pyflocality as pf
from pyflocality.backends.selection import BackendUnavailableError
from pyflocality.kernels.cpu import filtered_posterior, masked_posterior
from pyflocality.ops import filtered_posterior_mean, masked_posterior_vjp
from pyflocality.ops.filtered_posterior import check_pair
from pyflocality.posterior.problem import posterior_problem
from pyflocality.weights import QueryWeights

pytestmark = needs_cpu

SHAPES = [(1, 7, 5), (3, 4, 4), (2, 1, 9), (1, 1, 1)]


def masks(queries: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Masks alike where neighbouring queries follow one another, with a full and a dense one."""
    values = shape[0] * shape[1] * shape[2]
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(values) * queries / values
    near = (torch.arange(queries)[:, None] - place).abs() <= max(2, queries // 6)
    near ^= torch.rand(queries, values, generator=generator) < 0.05
    near[queries // 2] = True
    near[-1] = torch.rand(values, generator=generator) < 0.9
    return near


def counts(shape: tuple[int, int, int]) -> list[int]:
    """Queries: one, some, one for each pixel, and for each value."""
    pixels = shape[1] * shape[2]
    return sorted({1, 11, pixels, pixels * shape[0]})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 49, 1700])
@pytest.mark.parametrize("sigma", [0.2, 1.5])
def test_filtered_means(isa, dtype, shape, count, sigma, rng):
    images = random_images(rng, count, shape, dtype)
    x = noisy_batch(images, 3, sigma, 0.9, rng)
    problem = posterior_problem(x.float(), images, sigma, 0.9)
    values = images[0].numel()
    for queries in counts(shape):
        # Some values may be answered by no query: they are left to one more.
        pair = check_pair(masks(queries, shape, 1), masks(queries, shape, 2), values)
        exact = filtered_posterior_mean(x, images, *pair, sigma, 0.9, backend="reference")
        found = filtered_posterior.scan(problem, *pair, instruction_set=isa)
        torch.testing.assert_close(found.reshape(x.shape), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 49, 1700])
@pytest.mark.parametrize("sigma", [0.2, 1.5])
def test_transposed_derivatives(isa, dtype, shape, count, sigma, rng):
    images = random_images(rng, count, shape, dtype)
    x = noisy_batch(images, 3, sigma, 0.9, rng)
    weights = QueryWeights(masks(images[0].numel(), shape, 3))
    cotangents = torch.randn(2, *x.shape, generator=rng, dtype=torch.float64)
    exact = masked_posterior_vjp(x, cotangents, images, weights, sigma, 0.9, backend="reference")
    problem = posterior_problem(x.float(), images, sigma, 0.9)
    found = masked_posterior.vjp(problem, cotangents.float(), weights, instruction_set=isa)
    # The factor alpha / sigma^2, up to 22, times products of two values, over the masks.
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * 0.9 / sigma**2 * 20)


LEVELS = [(0.0, 1.0), (1e-3, 1.0), (0.05, 1.0), (0.3, 0.3), (2.0, 1.0), (80.0, 1.0), (1e3, 0.2)]


@pytest.mark.parametrize(("sigma", "alpha"), LEVELS)
def test_flexible_patch_sets_at_every_noise_level(sigma, alpha, rng):
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    x = noisy_batch(images, 3, max(sigma, 1e-3), alpha, rng)
    patches = masks(36, (1, 6, 6), 4).reshape(6, 6, 6, 6)
    exact = pf.PatchSetDenoiser(pf.TrainingSet(images), masks=patches, backend="reference")
    denoiser = pf.PatchSetDenoiser(pf.TrainingSet(images), masks=patches)
    with pf.trace_backends() as calls:
        found = denoiser(x.float(), sigma, alpha)
    assert calls == [("filtered_posterior", "cpu")]
    torch.testing.assert_close(found.double(), exact(x, sigma, alpha), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("sigma", "alpha"), LEVELS[2:])
def test_derivatives_at_every_noise_level(sigma, alpha, rng):
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    x = noisy_batch(images, 2, sigma, alpha, rng)
    weights = QueryWeights(masks(108, (3, 6, 6), 5))
    cotangents = torch.randn(1, *x.shape, generator=rng, dtype=torch.float64)
    exact = masked_posterior_vjp(x, cotangents, images, weights, sigma, alpha)
    found = masked_posterior_vjp(
        x.float(), cotangents.float(), images, weights, sigma, alpha, backend="cpu", chunk_size=77
    )
    assert (found.double() - exact).abs().max() <= 1e-3 * exact.abs().max() + 1e-9
    none = masked_posterior_vjp(x.float(), cotangents[:0].float(), images, weights, sigma, alpha)
    assert none.shape == (0, *x.shape)


def test_threads_batches_and_budgets_give_the_same_bits(rng):
    images = random_images(rng, 4000, (3, 5, 6), torch.uint8)
    x = noisy_batch(images, 4, 0.5, 0.8, rng).float()
    sigma = torch.tensor([0.1, 0.3, 0.6, 2.0])
    cotangents = torch.randn(2, *x.shape, generator=rng)
    pair, weights = [masks(30, (3, 5, 6), seed) for seed in (6, 7)], masks(90, (3, 5, 6), 8)

    def run(part: slice, **options: object) -> tuple[Tensor, Tensor]:
        level = sigma[part], 0.8
        return (
            filtered_posterior_mean(x[part], images, *pair, *level, backend="cpu", **options),
            masked_posterior_vjp(
                x[part], cotangents[:, part], images, weights, *level, backend="cpu", **options
            ),
        )

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(slice(None))
        for threads, options in ((3, {}), (7, {"memory_budget": 1})):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, run(slice(None), **options), expected))
        for b in range(4):
            mean, derivative = run(slice(b, b + 1))
            assert torch.equal(mean[0], expected[0][b])
            assert torch.equal(derivative[:, 0], expected[1][:, b])
    finally:
        torch.set_num_threads(before)


def test_copies_are_searched(rng):
    images = random_images(rng, 200, (3, 5, 6), torch.uint8)
    x = noisy_batch(images.flip(-1), 2, 0.4, 0.9, rng).float()
    pair = [masks(30, (3, 5, 6), seed) for seed in (6, 7)]
    both = torch.cat([images, images.flip(-1)])
    exact = filtered_posterior_mean(x.double(), both, *pair, 0.4, 0.9)
    augmentation = pf.TrainingSet(images).augmented(flip=True).augmentation
    found = filtered_posterior_mean(
        x, images, *pair, 0.4, 0.9, augmentation=augmentation, backend="cpu"
    )
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_soft_weights_are_left_to_the_reference(rng):
    images = random_images(rng, 20, (1, 4, 5), torch.uint8)
    x = noisy_batch(images, 1, 0.5, 1.0, rng).float()
    hard, soft = masks(20, (1, 4, 5), 9), torch.rand(20, 20, generator=rng)
    for pair in ((hard, soft), (soft, hard)):
        with pytest.raises(BackendUnavailableError, match="serves masks"):
            filtered_posterior_mean(x, images, *pair, 0.5, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="serves masks"):
        masked_posterior_vjp(x, x[None], images, soft, 0.5, backend="cpu")
