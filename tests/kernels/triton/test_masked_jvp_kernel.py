"""Masked posterior with tangents against float64: every path, odd sizes, every noise level."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_masked_kernel import band_masks, noisy_batch, problem_on
from truth import random_images

from pyflocality.kernels.triton import _masked_products, _masked_softmax
from pyflocality.kernels.triton._centred_images import centred_images
from pyflocality.kernels.triton._masked_plan import JVP_CONFIGS
from pyflocality.kernels.triton.masked_posterior import jvp, scan, tangent_groups
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize, finalize_jvp, log_sum_exp, merge_tangents
from pyflocality.posterior.tangents import jacobian_factor
from pyflocality.reference.masked_posterior import jvp as reference_state
from pyflocality.weights import QueryWeights

# Splits of two blocks, so that small sets have several.
SMALL = dataclasses.replace(JVP_CONFIGS[90], split_blocks=2)
JVP_KERNEL = "masked_jvp_kernel"
ODD = (1, 7, 5)


def directions_like(x, tangents, rng):
    return torch.randn(tangents, *x.shape, generator=rng)


def answer(device, x, directions, images, weights, sigma, alpha=1.0, **options):
    problem = problem_on(device, x, images, sigma, alpha, **options)
    state = jvp(problem, directions.to(device), weights, config=SMALL)
    return tuple(part.cpu() for part in finalize_jvp(state, 1, jacobian_factor(problem)))


def truth(x, directions, images, weights, sigma, alpha=1.0, dtype=torch.float64):
    problem = posterior_problem(x.to(dtype), images, sigma, alpha)
    state = reference_state(problem, directions.to(dtype), weights)
    return finalize_jvp(state, 1, jacobian_factor(problem))


def assert_like_float32(found, x, directions, images, weights, sigma, alpha=1.0, slack=1e-6):
    """Means and products within twice the error of the reference in float32, and rounding."""
    exact = truth(x, directions, images, weights, sigma, alpha)
    plain = truth(x, directions, images, weights, sigma, alpha, torch.float32)
    for mine, true, single in zip(found, exact, plain, strict=True):
        assert mine.shape == true.shape
        budget = 2 * (single - true).abs().max() + slack * true.abs().max().clamp(min=1.0)
        assert (mine - true).abs().max() <= budget


@pytest.mark.parametrize("tangents", [1, 3, 8])
@pytest.mark.parametrize(("shape", "count"), [(ODD, 1), (ODD, 300), ((3, 6, 6), 127)])
def test_sizes_that_are_no_multiples_of_a_block(device, rng, shape, count, tangents):
    images = random_images(rng, count, shape, torch.uint8)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    directions = directions_like(x, tangents, rng)
    weights = band_masks(shape)
    found = answer(device, x, directions, images, weights, 0.4, 0.9)
    assert_like_float32(found, x, directions, images, weights, 0.4, 0.9)


def test_every_kernel_with_cores_and_several_splits(device, rng, launches):
    launches.watch(_masked_softmax, JVP_KERNEL)
    launches.watch(_masked_products, "core_sums_kernel")
    launches.watch(_masked_softmax, "masked_scan_kernel")
    shape, weights = (2, 8, 8), band_masks((2, 8, 8))
    images = random_images(rng, 300, shape, torch.uint8)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    directions = directions_like(x, 4, rng)
    found = answer(device, x, directions, images, weights, 0.4, 0.9)
    assert_like_float32(found, x, directions, images, weights, 0.4, 0.9)

    three, one = launches.of(JVP_KERNEL)
    # 8 tiles, groups of two noisy images with three tangents and of four with one, two splits.
    assert [three[0], one[0]] == [(8, 2, 2), (8, 1, 2)]
    assert [(o["IMAGES"], o["SLOTS"]) for _, o in (three, one)] == [(2, 4), (4, 2)]
    assert all(options["HAS_PARENTS"] and options["HALVES"] == 2 for _, options in (three, one))
    # Cores of the tiles of both channels, for each group of tangents.
    assert [grid[0] for grid, _ in launches.of("core_sums_kernel")] == [1, 1]
    assert launches.of("masked_scan_kernel") == []


@pytest.mark.parametrize("sigma", [0.01, 0.08, 0.3, 2.0, 80.0, 1e4])
@pytest.mark.parametrize("alpha", [1.0, 0.05])
def test_every_noise_level(device, rng, sigma, alpha):
    images = random_images(rng, 300, ODD, torch.uint8)
    x = noisy_batch(images, 2, sigma, alpha, rng)
    directions = directions_like(x, 2, rng)
    found = answer(device, x, directions, images, band_masks(ODD), sigma, alpha)
    # Expanded distances lose digits where sigma is small against the images; near-ties show it.
    # And the kernel sums products, which cancel, where the reference sums differences.
    slack = 1e-5 if sigma / alpha > 0.05 else 1e-3
    assert_like_float32(found, x, directions, images, band_masks(ODD), sigma, alpha, slack)


def test_nearly_equal_images_at_little_noise(device, rng):
    """All but the digits of differences would cancel, were values not counted from x."""
    base = torch.tensor([10, 240], dtype=torch.uint8).repeat(100)[:, None, None, None]
    images = base + torch.randint(0, 3, (200, *ODD), generator=rng, dtype=torch.uint8)
    x = images[:2].float() / 127.5 - 1
    directions = directions_like(x, 3, rng)
    found = answer(device, x, directions, images, band_masks(ODD), 0.05)
    exact = truth(x, directions, images, band_masks(ODD), 0.05)
    assert exact[1].abs().max() > 0.03
    # Counted from the mean image, products are wrong by 5e-4.
    torch.testing.assert_close(found[1], exact[1], rtol=0, atol=5e-5)


def test_a_noise_level_for_every_image_and_ties(device, rng):
    images = random_images(rng, 60, ODD, torch.uint8)
    twins = torch.cat([images, images[:7], images[:7]])
    sigma = torch.tensor([0.05, 0.3, 1.0, 30.0, 0.6])
    alpha = torch.tensor([1.0, 0.9, 0.7, 0.05, 0.8])
    x = torch.cat(
        [
            noisy_batch(twins[:7], 1, float(s), float(a), rng)
            for s, a in zip(sigma, alpha, strict=True)
        ]
    )
    directions = directions_like(x, 5, rng)
    found = answer(device, x, directions, twins, band_masks(ODD), sigma, alpha)
    assert_like_float32(found, x, directions, twins, band_masks(ODD), sigma, alpha)
    # Alone an image gets the same bits.
    for b in (0, 4):
        one = slice(b, b + 1)
        alone = answer(
            device, x[one], directions[:, one], twins, band_masks(ODD), sigma[one], alpha[one]
        )
        assert torch.equal(alone[0], found[0][one])
        assert torch.equal(alone[1], found[1][:, one])


def test_weights_that_are_no_masks(device, rng):
    images = random_images(rng, 200, ODD, torch.uint8)
    x = noisy_batch(images, 2, 0.4, 0.9, rng)
    values = torch.rand(35, 35, generator=rng) * torch.logspace(-3, 1, 35)[:, None]
    values[7], values[:, 3] = 0.0, 0.0
    weights, directions = QueryWeights(values), directions_like(x, 3, rng)
    found = answer(device, x, directions, images, weights, 0.4, 0.9)
    assert_like_float32(found, x, directions, images, weights, 0.4, 0.9)


def test_masks_without_inputs_do_not_answer_to_x(device, rng):
    images = random_images(rng, 40, ODD, torch.uint8)
    x = noisy_batch(images, 2, 0.3, 1.0, rng)
    weights = QueryWeights(torch.zeros(35, 35, dtype=torch.bool))
    mean, jv = answer(device, x, directions_like(x, 2, rng), images, weights, 0.3)
    expected = (images.double() / 127.5 - 1).mean(0).flatten()[:, None].expand(2, -1, -1)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
    assert torch.equal(jv, torch.zeros_like(jv))


def test_memory_budget_changes_no_bits(device, rng, launches):
    images = random_images(rng, 300, ODD, torch.uint8)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    directions = directions_like(x, 3, rng)
    roomy = answer(device, x, directions, images, band_masks(ODD), 0.4, 0.9)
    assert centred_images(images).cached_whole is not None
    launches.watch(_masked_softmax, JVP_KERNEL)
    tight = answer(
        device, x, directions, images.clone(), band_masks(ODD), 0.4, 0.9, memory_budget=50_000
    )
    assert len(launches.of(JVP_KERNEL)) == 4
    chunked = answer(
        device, x, directions, images.clone(), band_masks(ODD), 0.4, 0.9, chunk_size=200
    )
    for one, same, close in zip(roomy, tight, chunked, strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(close, one, rtol=0, atol=2e-5)


def test_state_is_that_of_the_reference_and_merges(device, rng):
    images = random_images(rng, 300, ODD, torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    directions, weights = directions_like(x, 8, rng), band_masks(ODD)
    problem = posterior_problem(x.double(), images, 0.5, 0.8)
    exact = reference_state(problem, directions.double(), weights)
    halves = [
        jvp(problem_on(device, x, part, 0.5, 0.8), directions.to(device), weights, config=SMALL)
        for part in (images[:100], images[100:])
    ]
    state = merge_tangents(*halves, problem.scale.to(device), 1)
    assert state.weighted.shape == exact.weighted.shape
    torch.testing.assert_close(state.minimum.cpu(), exact.minimum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        log_sum_exp(state, problem.scale.to(device)).cpu(),
        log_sum_exp(exact, problem.scale),
        rtol=1e-5,
        atol=1e-4,
    )
    torch.testing.assert_close(finalize(state).cpu(), finalize(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tangents", [0, 3])
def test_without_tangents_and_without_noisy_images(device, rng, tangents):
    images = random_images(rng, 60, ODD, torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    problem = problem_on(device, x, images, 0.5, 0.8)
    state = jvp(problem, directions_like(x, tangents, rng).to(device), band_masks(ODD))
    plain = scan(problem, band_masks(ODD))
    torch.testing.assert_close(
        finalize(state)[..., :1], finalize(plain), rtol=0, atol=1e-6, check_dtype=False
    )
    nobody = jvp(
        problem_on(device, x[:0], images, 0.5),
        directions_like(x[:0], tangents, rng),
        band_masks(ODD),
    )
    assert nobody.weighted.shape == (0, 35, 1 + 2 * tangents)


def test_groups_take_every_tangent_once():
    for count in range(40):
        groups = tangent_groups(count)
        assert [k for first, last, _ in groups for k in range(first, last)] == list(range(count))
        assert all(last - first < slots for first, last, slots in groups)
        assert count == 0 or sum(slots for *_, slots in groups) <= 4 / 3 * (1 + count)
