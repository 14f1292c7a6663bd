"""Posterior operations against float64 truth: global, window and masked."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from truth import filtered_posterior_mean, random_images, values_of, window_weights

import pyflocality as pf
from pyflocality import BackendUnavailableError, ops
from pyflocality.ops import (
    global_posterior_mean,
    masked_posterior_mean,
    window_posterior_mean,
)
from pyflocality.reference import nearest

SHAPE = (3, 6, 5)
D = 90
SIGMA = torch.tensor([0.05, 0.4, 3.0])
ALPHA = torch.tensor([1.0, 0.8, 0.3])
OPS = ("global", "window", "masked")


def mask(generator: torch.Generator) -> Tensor:
    """Random masks, one of them empty and one full."""
    weights = torch.rand(D, D, generator=generator) < 0.2
    weights[7], weights[11] = False, True
    return weights


def run(
    op: str, x: Tensor, images: Tensor, sigma: object, alpha: object, **options: object
) -> Tensor:
    weights = mask(torch.Generator().manual_seed(5))
    if op == "global":
        return global_posterior_mean(x, images, sigma, alpha, **options)
    if op == "window":
        return window_posterior_mean(x, images, 3, sigma, alpha, **options)
    return masked_posterior_mean(x, images, weights, sigma, alpha, **options)


def truth(
    op: str, x: Tensor, images: Tensor, sigma: Tensor, alpha: Tensor, temperature: float = 1.0
) -> np.ndarray:
    if op == "global":
        weights, answers = np.ones((1, D)), [np.arange(D)]
    elif op == "window":
        weights, answers = window_weights(SHAPE, 3)
    else:
        weights = mask(torch.Generator().manual_seed(5)).double().numpy()
        answers = [np.array([m]) for m in range(D)]
    return filtered_posterior_mean(
        x, images, weights, answers, sigma.double().numpy(), alpha.double().numpy(), temperature
    )


@pytest.fixture
def problem(rng: torch.Generator) -> Callable[..., tuple[Tensor, Tensor]]:
    def make(
        dtype: torch.dtype = torch.uint8, count: int = 37, batch: int = 3
    ) -> tuple[Tensor, Tensor]:
        images = random_images(rng, count, SHAPE, dtype)
        clean = torch.from_numpy(values_of(images[:1])).expand(batch, -1, -1, -1)
        noise = torch.randn(batch, *SHAPE, generator=rng)
        x = ALPHA[:batch, None, None, None] * clean + SIGMA[:batch, None, None, None] * noise
        return x, images

    return make


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_float64_equals_truth(op, dtype, temperature, problem):
    x, images = problem(dtype)
    found = run(op, x, images, SIGMA, ALPHA, temperature=temperature, dtype=torch.float64)
    expected = truth(op, x, images, SIGMA, ALPHA, temperature)
    # Rounding of float64 through exponents of at most a few hundred.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_float32_is_close_to_truth(op, problem):
    x, images = problem()
    found = run(op, x.float(), images, SIGMA, ALPHA)
    assert found.dtype == torch.float32
    # Squared distances reach 1e2 with relative error 1e-6, times 1 / (2 sigma^2) = 200.
    np.testing.assert_allclose(
        found.numpy(), truth(op, x.float(), images, SIGMA, ALPHA), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("op", OPS)
def test_half_precision_input_computes_in_float32(op, problem):
    x, images = problem()
    half = x.half()
    found = run(op, half, images, SIGMA, ALPHA)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, run(op, half.float(), images, SIGMA, ALPHA).half())


@pytest.mark.parametrize("op", OPS)
def test_no_chunk_size_changes_the_result(op, problem):
    x, images = problem(count=301)
    results = [
        run(op, x.float(), images, SIGMA, ALPHA, chunk_size=size) for size in (1, 7, 256, 301)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_small_memory_budget_gives_the_same_result(op, problem):
    x, images = problem(count=301)
    wide = run(op, x.float(), images, SIGMA, ALPHA)
    narrow = run(op, x.float(), images, SIGMA, ALPHA, memory_budget=1)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_an_image_does_not_depend_on_its_batch(op, problem):
    x, images = problem()
    together = run(op, x, images, SIGMA, ALPHA, dtype=torch.float64)
    for b in range(3):
        alone = run(op, x[b : b + 1], images, float(SIGMA[b]), float(ALPHA[b]), dtype=torch.float64)
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_order_of_the_images_does_not_matter(op, problem, rng):
    x, images = problem()
    shuffled = images[torch.randperm(len(images), generator=rng)]
    torch.testing.assert_close(
        run(op, x, shuffled, SIGMA, ALPHA, dtype=torch.float64),
        run(op, x, images, SIGMA, ALPHA, dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-3])
def test_without_noise_the_nearest_image_comes_back(op, sigma, problem):
    _, images = problem()
    x = torch.from_numpy(values_of(images[4:5])).float()
    found = run(op, x, images, sigma, 1.0)
    expected = x.clone()
    if op == "masked":
        # The query without weights is uniform: it answers the plain mean.
        expected.view(-1)[7] = values_of(images).reshape(37, -1)[:, 7].mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sigma", [1e4, 1e30])
def test_much_noise_gives_the_mean(op, sigma, problem):
    x, images = problem()
    found = run(op, x, images, sigma, 1.0, dtype=torch.float64)
    mean = torch.from_numpy(values_of(images).mean(0)).expand_as(found)
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_ties_share_weight(op, problem):
    _, images = problem(torch.float64)
    pair = images[:2].clone()
    x = pair.mean(0, keepdim=True)
    found = run(op, x, pair, 0.0, 1.0)
    # The two are equally far in exact arithmetic; distances computed in floating point may
    # differ in the last bit, which sigma = 0 would see, so it is given a little noise.
    near = run(op, x, pair, 1e-3, 1.0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(near, x, rtol=0, atol=1e-8)
    twins = images[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(run(op, x, twins, 0.0, 1.0), images[:1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("op", OPS)
def test_one_image_is_always_returned(op, problem):
    x, images = problem(count=1)
    expected = torch.from_numpy(values_of(images)).expand_as(x)
    for sigma in (0.0, 0.3, 50.0):
        found = run(op, x, images, sigma, 0.7)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op, problem):
    _, images = problem()
    assert run(op, torch.zeros(0, *SHAPE), images, 0.5, 1.0).shape == (0, *SHAPE)


@pytest.mark.parametrize("op", OPS)
def test_non_contiguous_inputs(op, problem):
    x, images = problem()
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    doubled = images.repeat_interleave(2, 0)[::2]
    torch.testing.assert_close(
        run(op, strided, doubled, SIGMA, ALPHA), run(op, x, images, SIGMA, ALPHA)
    )


@pytest.mark.parametrize("op", OPS)
def test_reference_is_differentiable(op, problem):
    x, images = problem(count=9, batch=1)
    x = x.requires_grad_()
    torch.autograd.gradcheck(
        lambda z: run(op, z, images, 0.7, 0.9, chunk_size=4), (x,), eps=1e-6, atol=1e-6
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


def test_nearest_images_in_order(problem):
    x, images = problem(count=50)
    values = values_of(images).reshape(50, -1)
    noisy = x.double().numpy().reshape(3, -1)
    distance = ((noisy[:, None] - ALPHA.double().numpy()[:, None, None] * values) ** 2).sum(-1)
    for chunk_size in (None, 1, 7):
        found = pf.ops.nearest_images(x, images, ALPHA, k=4, chunk_size=chunk_size)
        order = np.argsort(distance, 1, kind="stable")[:, :4]
        np.testing.assert_array_equal(found.indices.numpy(), order)
        np.testing.assert_allclose(
            found.distances.numpy(), np.take_along_axis(distance, order, 1), rtol=1e-12
        )


def test_nearest_prefers_the_earlier_of_equals(problem):
    _, images = problem()
    twice = torch.cat([images, images])
    x = torch.from_numpy(values_of(images))
    for chunk_size in (None, 5):
        found = pf.ops.nearest_images(x, twice, k=2, chunk_size=chunk_size)
        np.testing.assert_array_equal(found.indices[:, 0].numpy(), np.arange(37))
        np.testing.assert_array_equal(found.indices[:, 1].numpy(), np.arange(37) + 37)


@pytest.mark.parametrize("alpha", [1.0, 0.01])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0])
def test_nearest_images_are_looked_at_where_they_may_be_the_nearest(
    rng, monkeypatch, spread, alpha
):
    """Bits of the search through all images, but for the time it takes."""
    middle = torch.rand(1, 3, 8, 8, generator=rng) - 0.5
    images = middle + spread * (torch.rand(500, 3, 8, 8, generator=rng) - 0.5)
    images[300:320] = images[:20]
    x = (
        alpha * images[:6]
        + torch.randn(6, 3, 8, 8, generator=rng) * torch.logspace(-6, 2, 6)[:, None, None, None]
    )
    looked_at = []
    keys = nearest.ExactQuery.keys

    def counted(self, stored):
        looked_at.append(len(stored))
        return keys(self, stored)

    monkeypatch.setattr(nearest.ExactQuery, "keys", counted)
    found = {c: pf.ops.nearest_images(x, images, alpha, k=3, chunk_size=c) for c in (None, 90)}
    if spread == 1.0:
        assert sum(looked_at) < 400
    everything = [torch.arange(500)] * 6
    monkeypatch.setattr(nearest, "_candidates", lambda *_: everything)
    looked_at.clear()
    expected = pf.ops.nearest_images(x, images, alpha, k=3)
    assert sum(looked_at) == 6 * 500
    for one in found.values():
        assert torch.equal(one.indices, expected.indices)
        assert torch.equal(one.distances, expected.distances)


def in_exact_order(x, images, alpha):
    """Positions by |x - alpha v|^2 in fractions; the earlier first among equals."""
    noisy, factor = [Fraction(u) for u in x.flatten().tolist()], Fraction(alpha)

    def distance(image):
        row = image.flatten().tolist()
        if image.dtype == torch.uint8:
            row = [Fraction(2 * u - 255, 255) for u in row]
        return sum((p - factor * Fraction(v)) ** 2 for p, v in zip(noisy, row, strict=True))

    distances = [distance(image) for image in images]
    return sorted(range(len(images)), key=distances.__getitem__)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.0, 1e-4, 1e-9])
def test_nearest_images_are_told_apart_exactly(rng, dtype, alpha):
    """Single precision saw no difference between distances at alpha 1e-4 and took any image."""
    images = torch.randint(0, 256, (60, 2, 4, 5), generator=rng, dtype=torch.uint8)
    images[50:] = images[:10]
    if dtype != torch.uint8:
        images = images.to(dtype) / 127.5 - 1
    noise = torch.randn(4, 2, 4, 5, generator=rng) * torch.tensor([1e-8, 1e-3, 1.0, 90.0]).reshape(
        4, 1, 1, 1
    )
    values = images.double() / 127.5 - 1 if dtype == torch.uint8 else images.double()
    # The last one lies half way between two images: a tie, or all but one.
    between = (values[20] + values[30]) / 2
    x = torch.cat([(alpha * values[:4] + noise), alpha * between[None]]).float()
    expected = [in_exact_order(row, images, alpha) for row in x]
    for k in (1, 7, 60):
        for chunk_size in (None, 7):
            found = pf.ops.nearest_images(x, images, alpha, k=k, chunk_size=chunk_size)
            assert found.indices.tolist() == [row[:k] for row in expected]
            exact = (x.double()[:, None] - alpha * values[found.indices]).square().flatten(2).sum(2)
            torch.testing.assert_close(found.distances, exact.float(), rtol=2e-7, atol=1e-30)
    model = pf.NearestDenoiser(pf.TrainingSet(images))
    chosen = torch.tensor([row[0] for row in expected])
    assert torch.equal(model(x, 0.1, alpha), model.data.values()[chosen])


def test_ties_of_all_images_are_ties():
    images = 255 * torch.randint(0, 2, (3000, 1, 5, 5), dtype=torch.uint8)
    found = pf.ops.nearest_images(torch.zeros(1, 1, 5, 5), images, 0.3, k=5)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(found.distances, torch.full((1, 5), 25 * 0.09))


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, "a"])
def test_wrong_chunk_sizes(chunk_size, problem):
    x, images = problem()
    with pytest.raises((ValueError, TypeError), match="`chunk_size` must be"):
        global_posterior_mean(x, images, 0.5, chunk_size=chunk_size)


@pytest.mark.parametrize("op", OPS)
def test_unknown_precisions(op, problem):
    x, images = problem()
    for precision in ("half", "Exact", None):
        with pytest.raises(ValueError, match="`precision` must be one of 'exact', 'auto', got"):
            run(op, x, images, 0.5, 0.9, precision=precision)


def test_numbers_of_numpy_are_numbers(problem):
    _, images = problem()
    data = pf.TrainingSet(images)
    assert pf.LocalDenoiser(data, np.int64(3)).window == 3
    assert pf.PCALocalityDenoiser(data, np.float32(0.5)).mask_threshold == 0.5


def test_more_neighbours_than_images_is_refused(problem):
    x, images = problem()
    with pytest.raises(ValueError, match=r"`k` must be at most the number of images 37, got 38"):
        pf.ops.nearest_images(x, images, k=38)


@pytest.mark.filterwarnings("error")
def test_images_that_are_differentiated_go_to_the_reference():
    """Kernels asked torch for the memory of parameters, which it refuses."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(9, 1, 4, 4, generator=generator, dtype=torch.float64)
    x, step = torch.rand(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    step = step[:1]

    def energy(values: torch.Tensor) -> torch.Tensor:
        return ops.global_posterior_mean(x, values, 0.5).square().sum()

    given = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(given), given)
    difference = (energy(images + 1e-5 * step) - energy(images - 1e-5 * step)) / 2e-5
    torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-6, atol=1e-9)
    # What kernels take but for that.
    single = images.float().requires_grad_()
    with pytest.raises(BackendUnavailableError, match="derivative"):
        ops.global_posterior_mean(x.float(), single, 0.5, backend="cpu")
    assert ops.global_posterior_mean(x.float(), single, 0.5).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(energy(given), energy(images), rtol=0, atol=0)
