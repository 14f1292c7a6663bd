"""Posterior operations against float64 truth: global, window and masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mean_problems import ALPHA, SHAPE, SIGMA, D
from torch import Tensor
from truth import filtered_posterior_mean, values_of, window_weights

import pyflocality as pf
from pyflocality.ops import (
    global_posterior_mean,
    masked_posterior_mean,
    window_posterior_mean,
)

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
