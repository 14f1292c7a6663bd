"""Masked posterior kernels against float64: every path, odd sizes, every noise level."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from truth import filtered_posterior_mean, random_images

import pyflocality as pf
from pyflocality.kernels.triton import _masked_products, _masked_softmax
from pyflocality.kernels.triton._centred_images import centred_images
from pyflocality.kernels.triton._masked_plan import CONFIGS, FEW_CONFIGS
from pyflocality.kernels.triton.masked_posterior import scan
from pyflocality.posterior.problem import PosteriorProblem, posterior_problem
from pyflocality.posterior.state import finalize, log_sum_exp, merge
from pyflocality.reference.masked_posterior import scan as reference_state
from pyflocality.weights import QueryWeights

# Splits of two blocks, so that small sets have several.
SMALL = dataclasses.replace(CONFIGS[90], split_blocks=2)
PRODUCTS = ("pack_queries_kernel", "core_sums_kernel", "squared_norms_kernel")
SCAN = "masked_scan_kernel"


@functools.lru_cache
def band_masks(shape: tuple[int, int, int]) -> QueryWeights:
    """Masks that differ a little between neighbours, with an empty, a full and a dense one."""
    generator = torch.Generator().manual_seed(3)
    channels, height, width = shape
    rows, columns = np.divmod(np.arange(height * width), width)
    near = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns) <= 4
    masks = torch.from_numpy(np.tile(near, (channels, channels)))
    masks[:, [0, 5]] = True
    masks ^= torch.rand(masks.shape, generator=generator) < 0.03
    masks[:, [3]] = True
    masks[0] = False
    masks[len(masks) // 2] = True
    masks[-2:] = torch.rand(2, masks.shape[1], generator=generator) < 0.9
    return QueryWeights(masks)


def noisy_batch(images, batch, sigma, alpha, generator):
    chosen = torch.randint(len(images), (batch,), generator=generator)
    values = images[chosen].double() / 127.5 - 1
    return (alpha * values + sigma * torch.randn(values.shape, generator=generator)).float()


def problem_on(device, x, images, sigma, alpha=1.0, **options) -> PosteriorProblem:
    levels = [v.to(device) if isinstance(v, torch.Tensor) else v for v in (sigma, alpha)]
    return posterior_problem(x.to(device), images.to(device), *levels, **options)


def answer(device, x, images, weights, sigma, alpha=1.0, *, config=SMALL, **options):
    problem = problem_on(device, x, images, sigma, alpha, **options)
    state = scan(problem, weights, config=config)
    return finalize(state).reshape(x.shape).double().cpu()


def exact_answer(x, images, weights, sigma, alpha=1.0):
    state = reference_state(posterior_problem(x.double(), images, sigma, alpha), weights)
    return finalize(state).reshape(x.shape)


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 6, 6), (2, 1, 9), (3, 9, 10)])
@pytest.mark.parametrize("count", [1, 127, 300])
def test_sizes_that_are_no_multiples_of_a_block(device, rng, shape, count):
    images = random_images(rng, count, shape, torch.uint8)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    found = answer(device, x, images, band_masks(shape), 0.4, 0.9)
    exact = exact_answer(x, images, band_masks(shape), 0.4, 0.9)
    # float32 rounding of logits of order 100.
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_every_kernel_with_cores_of_cores_and_several_splits(device, rng, launches):
    launches.watch(_masked_products, *PRODUCTS)
    launches.watch(_masked_softmax, SCAN)
    shape, weights = (3, 9, 10), band_masks((3, 9, 10))
    images = random_images(rng, 600, shape, torch.uint8)
    x = noisy_batch(images, 9, 0.4, 0.9, rng)
    found = answer(device, x, images, weights, 0.4, 0.9)
    truth = filtered_posterior_mean(
        x,
        images,
        weights.dense(torch.float64).numpy(),
        [np.array([d]) for d in range(270)],
        np.full(9, 0.4),
        np.full(9, 0.9),
    )
    assert np.abs(found.numpy() - truth).max() < 1e-5

    ((grid, options),) = launches.of(SCAN)
    # 3 x 3 tiles of 4 x 4 pixels in 3 channels, two groups of noisy images, three splits.
    assert grid == (27, 2, 3) and options["HAS_PARENTS"] and options["HALVES"] == 2
    # Cores of 9 tiles a channel, and of these over the channels.
    levels = launches.of("core_sums_kernel")
    assert [grid for grid, _ in levels] == [(1, 2, 5), (3, 2, 5)]
    assert [options["HAS_PARENTS"] for _, options in levels] == [False, True]
    assert len(launches.of("squared_norms_kernel")) == len(launches.of("pack_queries_kernel")) == 3


@pytest.mark.parametrize("sigma", [0.01, 0.08, 0.3, 2.0, 80.0, 1e3, 1e9])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.006])
def test_every_noise_level(device, rng, sigma, alpha):
    images = random_images(rng, 300, (1, 7, 5), torch.uint8)
    x = noisy_batch(images, 2, sigma, alpha, rng)
    weights = band_masks((1, 7, 5))
    exact = exact_answer(x, images, weights, sigma, alpha)
    found = answer(device, x, images, weights, sigma, alpha)
    # Expanded distances lose digits where sigma is small against the images.
    atol = 1e-5 if sigma / alpha > 0.05 else 3e-4
    torch.testing.assert_close(found, exact, rtol=0, atol=atol)
    automatic = answer(device, x, images, weights, sigma, alpha, precision="auto")
    torch.testing.assert_close(automatic, exact, rtol=0, atol=1e-3)


def test_levels_and_precision_of_every_image_alone(device, rng, launches):
    launches.watch(_masked_softmax, SCAN)
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    sigma, alpha = torch.linspace(0.05, 3.0, 11), torch.linspace(1.0, 0.4, 11)
    x = torch.cat([noisy_batch(images, 1, float(s), 1.0, rng) for s in sigma])
    weights = band_masks((3, 6, 6))
    found = answer(device, x, images, weights, sigma, alpha, precision="auto")
    exact = exact_answer(x, images, weights, sigma, alpha)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)
    assert sorted(o["HALVES"] for _, o in launches.of(SCAN)) == [1, 2]
    for b in (0, 4, 10):
        alone = answer(device, x[b : b + 1], images, weights, sigma[b], alpha[b], precision="auto")
        assert torch.equal(alone[0], found[b])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["exact", "auto"])
def test_few_images_have_shapes_of_their_own_and_the_same_bits(device, rng, launches, precision):
    """One noisy image cost what eight did."""
    launches.watch(_masked_products, *PRODUCTS)
    launches.watch(_masked_softmax, SCAN)
    images = random_images(rng, 1100, (3, 6, 6), torch.uint8)
    # All of them take two halves.
    x, sigma = noisy_batch(images, 9, 0.1, 1.0, rng), torch.linspace(0.05, 0.1, 9)
    options = {"precision": precision, "config": None}
    found = answer(device, x, images, band_masks((3, 6, 6)), sigma, **options)
    for count, batch in ((1, 4), (2, 4), (4, 4), (5, 8)):
        launches.calls.clear()
        some = answer(device, x[:count], images, band_masks((3, 6, 6)), sigma[:count], **options)
        assert torch.equal(some, found[:count])
        for name in ("pack_queries_kernel", "core_sums_kernel", SCAN):
            assert {options["BATCH"] for _, options in launches.of(name)} == {batch}
        ((grid, options_of),) = launches.of(SCAN)
        # 3 tiles in 3 channels; splits of 1,024 images.
        assert grid == (9, 1, 2) and options_of["num_warps"] == batch


def test_both_shapes_of_a_generation_sum_alike():
    """The bits of a result depend on these, and a query may come in either."""
    for arch, few in FEW_CONFIGS.items():
        for name in ("block_n", "block_d", "split_blocks", "norms"):
            assert getattr(few, name) == getattr(CONFIGS[arch], name)
        # Rows of a warp, and so the images that a thread sums.
        assert few.batch / few.scan.num_warps == CONFIGS[arch].batch / CONFIGS[arch].scan.num_warps


@pytest.mark.parametrize(("sigma", "parts"), [(0.05, 2), (2.0, 1)])
def test_auto_takes_half_of_the_products_at_much_noise(device, rng, launches, sigma, parts):
    launches.watch(_masked_products, "pack_queries_kernel")
    launches.watch(_masked_softmax, SCAN)
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    x = noisy_batch(images, 2, sigma, 1.0, rng)
    weights = band_masks((3, 6, 6))
    found, parts_of = {}, {}
    for precision in (None, "exact", "auto"):
        launches.calls.clear()
        options = {} if precision is None else {"precision": precision}
        found[precision] = answer(device, x, images, weights, sigma, **options)
        parts_of[precision] = {options["HALVES"] for _, _, options in launches.calls}
    assert parts_of == {None: {2}, "exact": {2}, "auto": {parts}}
    assert torch.equal(found[None], found["exact"])
    assert torch.equal(found["auto"], found["exact"]) == (parts == 2)
    exact = exact_answer(x, images, weights, sigma)
    assert (found["exact"] - exact).abs().max() < (3e-4 if sigma == 0.05 else 1e-5)
    assert (found["auto"] - exact).abs().max() < 1e-3


def test_no_noise_gives_the_nearest_image_and_ties_share(device, rng):
    images = random_images(rng, 60, (1, 4, 5), torch.uint8)
    twins = torch.cat([images[:1], images[:1], images[1:]])
    x = twins[:1].float() / 127.5 - 1
    for sigma in (0.0, 1e-30):
        found = answer(device, x, twins, band_masks((1, 4, 5)), sigma)
        exact = exact_answer(x, twins, band_masks((1, 4, 5)), sigma)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_masks_without_inputs_give_the_mean(device, rng):
    images = random_images(rng, 200, (1, 4, 5), torch.uint8)
    x = noisy_batch(images, 2, 0.3, 1.0, rng)
    weights = QueryWeights(torch.zeros(20, 20, dtype=torch.bool))
    mean = (images.double() / 127.5 - 1).mean(0).expand(2, 1, 4, 5)
    for sigma in (0.0, 0.3, 1e6):
        found = answer(device, x, images, weights, sigma, precision="auto")
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("softness", [0.5, 2.0])
def test_soft_masks(softness, device, rng):
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    images[..., 1:] = images[..., :-1] // 2 + images[..., 1:] // 2
    moments = pf.Moments.from_data(images)
    weights = pf.masks.pca_locality_weights(moments, 0.4, 0.9, 0.05, softness)
    assert not weights.is_mask
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    found = answer(device, x, images, weights, 0.4, 0.9)
    exact = exact_answer(x, images, weights, 0.4, 0.9)
    # Weights of two float16 halves, 22 bits, where sums of squares over 2 sigma^2 are some hundred.
    torch.testing.assert_close(found, exact, rtol=0, atol=3e-5)


def test_weights_that_are_no_masks(device, rng, launches):
    launches.watch(_masked_products, *PRODUCTS)
    launches.watch(_masked_softmax, SCAN)
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    values = torch.rand(108, 108, generator=rng) * torch.logspace(-6, 6, 108)[:, None]
    values[7], values[:, 3] = 0.0, 0.0
    values[9:40] = 1 / 3
    found = answer(device, x, images, QueryWeights(values), 0.4, 0.9)
    exact = exact_answer(x, images, QueryWeights(values), 0.4, 0.9)
    # Distances with weights of 1e6 are rounded accordingly; there is one nearest image there.
    torch.testing.assert_close(found, exact, rtol=0, atol=3e-5)
    ((_, options),) = launches.of("pack_queries_kernel")
    assert options["WEIGHT_HALVES"] == 2
    signed = torch.randn(108, 108, generator=rng) / 30
    found = answer(device, x, images, QueryWeights(signed, signed=True), 0.4, 0.9)
    exact = exact_answer(x, images, QueryWeights(signed, signed=True), 0.4, 0.9)
    torch.testing.assert_close(found, exact, rtol=0, atol=3e-5)


def test_memory_budget_and_chunks_change_no_bits(device, rng, launches):
    shape, weights = (1, 7, 5), band_masks((1, 7, 5))
    images = random_images(rng, 900, shape, torch.uint8)
    x = noisy_batch(images, 17, 0.4, 0.9, rng)
    roomy = answer(device, x, images, weights, 0.4, 0.9)
    assert centred_images(images).cached_whole is not None
    launches.watch(_masked_softmax, SCAN)
    # Too little for the copy of the images, for the norms, and for all groups at once.
    tight = answer(device, x, images.clone(), weights, 0.4, 0.9, memory_budget=50_000)
    assert torch.equal(tight, roomy)
    assert len(launches.of(SCAN)) == 12
    chunked = answer(device, x, images.clone(), weights, 0.4, 0.9, chunk_size=300)
    torch.testing.assert_close(chunked, roomy, rtol=0, atol=1e-6)


def test_images_made_in_inference_mode(device, rng):
    """Nothing counts their changes, so nothing derived from them is kept."""
    shape, weights = (1, 4, 5), band_masks((1, 4, 5))
    plain = random_images(rng, 100, shape, torch.uint8)
    x = noisy_batch(plain, 1, 0.4, 1.0, rng)
    with torch.inference_mode():
        images = plain.to(device).clone()
        for stored in (plain, 255 - plain):
            images.copy_(stored)
            found = answer(device, x, images, weights, 0.4)
            exact = exact_answer(x, stored, weights, 0.4)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_images_changed_in_place_are_noticed(device, rng):
    shape, weights = (1, 4, 5), band_masks((1, 4, 5))
    images = random_images(rng, 100, shape, torch.uint8).to(device)
    x = noisy_batch(images.cpu(), 1, 0.4, 1.0, rng)
    before = answer(device, x, images, weights, 0.4)
    images.copy_(255 - images)
    after = answer(device, x, images, weights, 0.4)
    torch.testing.assert_close(
        after, exact_answer(x, images.cpu(), weights, 0.4), rtol=0, atol=1e-5
    )
    assert not torch.allclose(before, after)


def test_state_is_that_of_the_reference_and_merges(device, rng):
    shape, weights = (3, 6, 6), band_masks((3, 6, 6))
    images = random_images(rng, 500, shape, torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    exact = reference_state(posterior_problem(x.double(), images, 0.5, 0.8), weights)
    halves = [
        scan(problem_on(device, x, part, 0.5, 0.8), weights, config=SMALL)
        for part in (images[:200], images[200:])
    ]
    scale = posterior_problem(x, images, 0.5, 0.8).scale.to(device)
    state = merge(*halves, scale)
    torch.testing.assert_close(state.minimum.cpu(), exact.minimum, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        log_sum_exp(state, scale).cpu(), log_sum_exp(exact, scale.cpu()), rtol=1e-5, atol=1e-3
    )
    torch.testing.assert_close(finalize(state).cpu(), finalize(exact), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries(device, rng, dtype):
    images = random_images(rng, 200, (1, 7, 5), torch.uint8)
    x = noisy_batch(images, 2, 0.5, 1.0, rng).to(dtype)
    found = answer(device, x, images, band_masks((1, 7, 5)), 0.5)
    exact = exact_answer(x, images, band_masks((1, 7, 5)), 0.5)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_unknown_precision_is_refused(device, rng):
    images = random_images(rng, 20, (1, 4, 5), torch.uint8)
    with pytest.raises(ValueError, match="`precision` must be one of 'exact', 'auto'"):
        answer(device, images.float(), images, band_masks((1, 4, 5)), 0.5, precision="half")
