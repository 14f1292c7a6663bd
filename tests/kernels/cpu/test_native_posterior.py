"""Native CPU scans against the float64 reference: every instruction set, size and noise level."""

from __future__ import annotations

import functools
import importlib
import time

import numpy as np
import pytest
import torch
from instruction_sets import ISAS
from torch import Tensor
from truth import random_images

import pyflocality as pf
from pyflocality.backends.selection import OPERATIONS, BackendUnavailableError, machine_reason
from pyflocality.kernels.cpu import masked_posterior
from pyflocality.ops import (
    global_posterior_mean,
    masked_posterior_mean,
    window_posterior_mean,
)
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize, log_sum_exp
from pyflocality.weights import QueryWeights

pytestmark = pytest.mark.skipif(
    machine_reason("cpu") is not None, reason=str(machine_reason("cpu"))
)

OPS = ("global", "window", "masked")
# float32 rounding of a squared distance of some hundred terms, relative.
EPS = 1.2e-7


@functools.lru_cache
def band_masks(shape: tuple[int, int, int]) -> QueryWeights:
    """Masks that differ a little between neighbours, with an empty, a full and a dense one."""
    generator = torch.Generator().manual_seed(3)
    channels, height, width = shape
    rows, columns = np.divmod(np.arange(height * width), width)
    near = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns) <= 2
    masks = torch.from_numpy(np.tile(near, (channels, channels)))
    masks ^= torch.rand(masks.shape, generator=generator) < 0.05
    masks[0] = False
    masks[len(masks) // 2] = True
    masks[-2:] = torch.rand(2, masks.shape[1], generator=generator) < 0.9
    return QueryWeights(masks)


def run(
    op: str, x: Tensor, images: Tensor, sigma: object, alpha: object, **options: object
) -> Tensor:
    shape = tuple(images.shape[1:])
    if op == "global":
        return global_posterior_mean(x, images, sigma, alpha, **options)
    if op == "window":
        return window_posterior_mean(x, images, 3, sigma, alpha, **options)
    return masked_posterior_mean(x, images, band_masks(shape), sigma, alpha, **options)


def noisy_batch(
    images: Tensor, batch: int, sigma: float, alpha: float, generator: torch.Generator
) -> Tensor:
    chosen = torch.randint(len(images), (batch,), generator=generator)
    values = pf.TrainingSet(images[chosen]).values(dtype=torch.float64)
    noise = torch.randn(values.shape, generator=generator)
    return (alpha * values + sigma * noise).float()


def assert_within_budget(found: Tensor, op: str, x, images, sigma, alpha, **options) -> None:
    """Twice the error of the float32 reference, and what rounding the logits may cost."""
    exact = run(op, x.double(), images, sigma, alpha, backend="reference", **options)
    plain = run(op, x, images, sigma, alpha, backend="reference", **options)
    budget = 2 * (plain.double() - exact).abs().max()
    # A logit is a distance times 1 / (2 sigma^2), about half the number of values where the
    # image fits, and an answer moves by at most that error times the range of the data.
    logit = x[0].numel() * (1 + 1 / max(float(np.min(sigma)) / float(np.max(alpha)), 0.1))
    assert (found.double() - exact).abs().max() <= budget + 4 * EPS * logit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 6, 6), (2, 1, 9)])
@pytest.mark.parametrize("count", [1, 2, 47, 49, 301, 2000])
def test_every_instruction_set_and_size(isa, op, dtype, shape, count, rng):
    images = random_images(rng, count, shape, dtype)
    sigma, alpha = 0.4, 0.9
    x = noisy_batch(images, 11, sigma, alpha, rng)
    state_of = importlib.import_module(f"pyflocality.kernels.cpu.{op}_posterior").scan
    arguments = {"global": (), "window": (3,)}.get(op) or (
        () if op == "global" else (band_masks(shape),)
    )
    problem = posterior_problem(x, images, sigma, alpha)
    state = state_of(problem, *arguments, instruction_set=isa)
    answer = finalize(state)
    if op == "window":
        answer = answer.transpose(1, 2)
    assert_within_budget(answer.reshape(x.shape), op, x, images, sigma, alpha)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.3, 2.0, 80.0, 1e3])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_every_noise_level(op, sigma, alpha, rng):
    images = random_images(rng, 500, (3, 6, 6), torch.uint8)
    x = noisy_batch(images, 3, sigma, alpha, rng)
    found = run(op, x, images, sigma, alpha, backend="cpu")
    assert_within_budget(found, op, x, images, sigma, alpha)


@pytest.mark.parametrize("window", [1, 3, 5, 7, 13, 17])
@pytest.mark.parametrize("shape", [(3, 9, 6), (1, 4, 9)])
def test_every_window(window, shape, rng):
    images = random_images(rng, 100, shape, torch.uint8)
    x = noisy_batch(images, 2, 0.5, 1.0, rng)
    found = window_posterior_mean(x, images, window, 0.5, backend="cpu")
    exact = window_posterior_mean(x.double(), images, window, 0.5)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_thread_counts_give_the_same_bits(op, rng):
    images = random_images(rng, 5000, (3, 5, 6), torch.uint8)
    x = noisy_batch(images, 3, 0.5, 0.8, rng)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(op, x, images, 0.5, 0.8, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("op", OPS)
def test_an_image_has_the_same_bits_in_every_batch(op, rng):
    images = random_images(rng, 900, (3, 5, 6), torch.uint8)
    x = noisy_batch(images, 15, 0.5, 0.8, rng)
    sigma = torch.linspace(0.1, 2.0, 15)
    together = run(op, x, images, sigma, 0.8, backend="cpu")
    for b in (0, 7, 8, 12, 14):
        alone = run(op, x[b : b + 1], images, float(sigma[b]), 0.8, backend="cpu")
        assert torch.equal(alone[0], together[b])
    narrow = run(op, x, images, sigma, 0.8, backend="cpu", memory_budget=1)
    assert torch.equal(narrow, together)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunk_size", [1, 7, 256, 700])
def test_chunks_are_merged(op, chunk_size, rng):
    images = random_images(rng, 700, (3, 4, 5), torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    whole = run(op, x, images, 0.5, 0.8, backend="cpu")
    parts = run(op, x, images, 0.5, 0.8, backend="cpu", chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_images_that_are_not_contiguous(op, rng):
    images = random_images(rng, 100, (3, 4, 5), torch.uint8)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    assert not strided.is_contiguous()
    assert torch.equal(
        run(op, x, strided, 0.5, 0.8, backend="cpu"), run(op, x, images, 0.5, 0.8, backend="cpu")
    )


@pytest.mark.parametrize("op", OPS)
def test_ties_and_no_noise(op, rng):
    images = random_images(rng, 60, (1, 4, 5), torch.uint8)
    twins = torch.cat([images[:1], images[:1], images[1:]])
    x = pf.TrainingSet(images[:1]).values()
    for sigma in (0.0, 1e-30, 1e-3):
        found = run(op, x, twins, sigma, 1.0, backend="cpu")
        exact = run(op, x.double(), twins, sigma, 1.0, backend="reference")
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_state_is_that_of_the_reference(op, rng):
    images = random_images(rng, 300, (3, 4, 5), torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    extra = {"global": (), "window": (3,), "masked": (band_masks((3, 4, 5)),)}[op]
    problem = posterior_problem(x, images, 0.5, 0.8)
    exact_problem = posterior_problem(x.double(), images, 0.5, 0.8)
    reference = OPERATIONS[f"{op}_posterior"]["reference"].load()
    found = importlib.import_module(f"pyflocality.kernels.cpu.{op}_posterior").scan(problem, *extra)
    exact = reference(exact_problem, *extra)
    # Distances are of order 100 and summed in float32.
    torch.testing.assert_close(found.minimum.double(), exact.minimum, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        log_sum_exp(found, problem.scale), log_sum_exp(exact, problem.scale), rtol=1e-5, atol=1e-3
    )


def test_dense_masks_cost_their_complements(rng):
    masks = torch.rand(75, 75, generator=rng) > 0.02
    tree = masked_posterior.difference_tree(QueryWeights(masks), torch.Size((3, 5, 5)))
    # The full set once, and from it what each mask lacks.
    assert tree.terms <= 75 + int((~masks).sum())
    assert tree.nodes == 76


def test_alike_masks_cost_their_differences(rng):
    base = torch.rand(75, generator=rng) < 0.5
    masks = base.repeat(75, 1)
    masks[torch.arange(75), torch.arange(75)] ^= True
    tree = masked_posterior.difference_tree(QueryWeights(masks), torch.Size((3, 5, 5)))
    # One start, from the empty or by the full set, and two terms for every further mask.
    assert tree.fresh_starts == 1
    assert tree.terms <= 75 + int((~base).sum()) + 1 + 2 * 74


@pytest.mark.parametrize("op", OPS)
def test_float32_without_derivatives_is_all_it_serves(op, rng):
    images = random_images(rng, 20, (1, 4, 5), torch.uint8)
    x = noisy_batch(images, 1, 0.5, 1.0, rng)
    with pytest.raises(BackendUnavailableError, match="computes in float32"):
        run(op, x.double(), images, 0.5, 1.0, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="no derivative"):
        run(op, x.clone().requires_grad_(), images, 0.5, 1.0, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="reads uint8 or float32 images"):
        run(op, x, images.double() / 255, 0.5, 1.0, backend="cpu")
    with pf.trace_backends() as calls:
        run(op, x.double(), images, 0.5, 1.0)
        run(op, x.clone().requires_grad_(), images, 0.5, 1.0)
        run(op, x, images, 0.5, 1.0)
    assert [backend for _, backend in calls] == ["reference", "reference", "cpu"]


@pytest.mark.parametrize("op", OPS)
def test_forward_derivatives_are_not_dropped(op, rng):
    images = random_images(rng, 20, (1, 4, 5), torch.uint8)
    x = noisy_batch(images, 1, 0.5, 1.0, rng)
    direction = torch.randn(x.shape, generator=rng)
    _, found = torch.func.jvp(lambda z: run(op, z, images, 0.5, 1.0), (x,), (direction,))
    step = 1e-4 * direction.double()
    exact = [run(op, x.double() + s, images, 0.5, 1.0) for s in (step, -step)]
    slope = (exact[0] - exact[1]) / 2e-4
    torch.testing.assert_close(found.double(), slope, rtol=0, atol=1e-3)


def test_ctrl_c_ends_a_scan(rng, ctrl_c):
    images = random_images(rng, 2000, (3, 16, 16), torch.uint8).repeat(40, 1, 1, 1)
    x = noisy_batch(images, 64, 0.5, 1.0, rng)
    ctrl_c(0.3)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            window_posterior_mean(x, images, 7, 0.5, backend="cpu")
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("level", [80.0, 5.0, 1.5, 1.0, 0.2])
def test_large_masks_keep_their_digits(level, rng):
    shape = (3, 32, 32)
    images = random_images(rng, 200, shape, torch.uint8)
    place = torch.arange(32)
    near = (place[:, None] - place).abs() <= 12
    pixels = (near[:, None, :, None] & near[None, :, None, :]).reshape(1024, 1024)
    weights = QueryWeights(pixels.repeat(3, 3))
    x = noisy_batch(images, 2, level, 1.0, rng)
    found = masked_posterior_mean(x, images, weights, level, backend="cpu")
    exact = masked_posterior_mean(x.double(), images, weights, level, backend="reference")
    # A float32 sum of 1,900 terms of either sign, in any order, and logits of a few hundred.
    assert (found.double() - exact).abs().max() <= 1e-4
