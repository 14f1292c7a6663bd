"""Global posterior kernels against float64: every path, odd sizes, every noise level."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from truth import filtered_posterior_mean, random_images

from pyflocality.kernels.triton import _global_products as kernels
from pyflocality.kernels.triton._global_products import CONFIGS, fixed_point
from pyflocality.kernels.triton.global_posterior import scan
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize, log_sum_exp, merge
from pyflocality.reference.global_posterior import scan as reference_state

KERNELS = ("distances_kernel", "weighted_sums_kernel")


def noisy_batch(images, batch, sigma, alpha, generator):
    chosen = torch.randint(len(images), (batch,), generator=generator)
    values = images[chosen].double() / 127.5 - 1
    return (alpha * values + sigma * torch.randn(values.shape, generator=generator)).float()


def state_on(device, x, images, sigma, alpha=1.0, **options):
    levels = [v.to(device) if isinstance(v, torch.Tensor) else v for v in (sigma, alpha)]
    return scan(posterior_problem(x.to(device), images.to(device), *levels, **options))


def answer(device, x, images, sigma, alpha=1.0, **options):
    state = state_on(device, x, images, sigma, alpha, **options)
    return finalize(state).reshape(x.shape).cpu()


def exact_answer(x, images, sigma, alpha=1.0):
    state = reference_state(posterior_problem(x.double(), images, sigma, alpha))
    return finalize(state).reshape(x.shape)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (3, 9, 10), (3, 16, 12)])
@pytest.mark.parametrize("count", [1, 31, 700])
def test_sizes_that_are_no_multiples_of_a_block(device, rng, launches, shape, count):
    launches.watch(kernels, *KERNELS)
    images = random_images(rng, count, shape, torch.uint8)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    found = answer(device, x, images, 0.4, 0.9)
    values = images[0].numel()
    truth = filtered_posterior_mean(
        x, images, np.ones((1, values)), [np.arange(values)], np.full(3, 0.4), np.full(3, 0.9)
    )
    assert np.abs(found.numpy() - truth).max() < 2e-6
    ((grid, _),) = launches.of("weighted_sums_kernel")
    assert grid == (-(-values // 128), 1, -(-count // 256))
    ((grid, _),) = launches.of("distances_kernel")
    assert grid == (-(-count // 64), 1)


@pytest.mark.parametrize("sigma", [1e-3, 0.01, 0.1, 0.5, 2.0, 80.0, 1e3, 1e9])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.006])
def test_every_noise_level(device, rng, sigma, alpha):
    images = random_images(rng, 300, (3, 6, 7), torch.uint8)
    x = noisy_batch(images, 2, sigma, alpha, rng)
    found = answer(device, x, images, sigma, alpha)
    torch.testing.assert_close(found, exact_answer(x, images, sigma, alpha), rtol=0, atol=1e-5)


def test_near_ties_at_little_noise_are_told_apart(device, rng):
    """Squared norms of 5e6 bytes^2 agree but for 1: in float32 sums that is lost."""
    first = torch.randint(0, 256, (1, 3, 32, 32), generator=rng, dtype=torch.uint8)
    images = first.repeat(3, 1, 1, 1)
    images[1, 0, 0, 0] ^= 1
    images[2, 1, 4, 4] ^= 3
    sigma = 2e-3
    x = (images[1:2].double() / 127.5 - 1).float() + sigma * torch.randn(3, 32, 32, generator=rng)
    found = answer(device, x, images, sigma)
    torch.testing.assert_close(found, exact_answer(x, images, sigma), rtol=0, atol=2e-6)


def test_an_image_has_the_same_bits_in_every_batch_and_budget(device, rng, launches):
    images = random_images(rng, 900, (3, 5, 6), torch.uint8)
    sigma = torch.linspace(0.05, 3.0, 35)
    x = torch.cat([noisy_batch(images, 1, float(s), 1.0, rng) for s in sigma])
    together = answer(device, x, images, sigma)
    torch.testing.assert_close(together, exact_answer(x, images, sigma), rtol=0, atol=2e-6)
    for b in (0, 17, 34):
        assert torch.equal(answer(device, x[b : b + 1], images, sigma[b])[0], together[b])
    launches.watch(kernels, *KERNELS)
    assert torch.equal(answer(device, x, images, sigma, memory_budget=1), together)
    assert len(launches.of("distances_kernel")) == 3


def test_chunks_and_shards_are_merged(device, rng):
    images = random_images(rng, 700, (3, 5, 6), torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    exact = reference_state(posterior_problem(x.double(), images, 0.5, 0.8))
    for chunk_size in (100, 699):
        found = answer(device, x, images, 0.5, 0.8, chunk_size=chunk_size)
        torch.testing.assert_close(found, finalize(exact).reshape(x.shape), rtol=0, atol=2e-6)
    halves = [state_on(device, x, part, 0.5, 0.8) for part in (images[:200], images[200:])]
    scale = posterior_problem(x, images, 0.5, 0.8).scale.to(device)
    state = merge(*halves, scale)
    torch.testing.assert_close(state.minimum.cpu(), exact.minimum, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        log_sum_exp(state, scale).cpu(), log_sum_exp(exact, scale.cpu()), rtol=1e-6, atol=1e-5
    )


VIEWS = {
    "every other image": lambda images: images.repeat_interleave(2, 0)[::2],
    "one channel": lambda images: images[:, :1],
    "one image many times": lambda images: images[:1].expand(70, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("chunk_size", [None, 33])
def test_views_whose_images_are_apart(device, rng, view, chunk_size):
    images = view(random_images(rng, 90, (3, 5, 6), torch.uint8).to(device))
    assert not images.is_contiguous()
    stored = images.cpu().contiguous()
    x = noisy_batch(stored, 3, 0.5, 0.9, rng)
    found = answer(device, x, images, 0.5, 0.9, chunk_size=chunk_size)
    torch.testing.assert_close(found, exact_answer(x, stored, 0.5, 0.9), rtol=0, atol=2e-6)


def test_views_are_copied_in_parts_that_fit_the_budget(device, rng, launches):
    """The whole view was copied at once, whatever the budget."""
    launches.watch(kernels, *KERNELS)
    images = random_images(rng, 600, (1, 5, 6), torch.uint8).to(device)[::2]
    stored = images.cpu().contiguous()
    x = noisy_batch(stored, 3, 0.5, 0.9, rng)
    # A quarter of it takes 130 images of 30 bytes.
    found = answer(device, x, images, 0.5, 0.9, memory_budget=4 * 130 * 30)
    assert [grid[0] for grid, _ in launches.of("distances_kernel")] == [3, 3, 1]
    torch.testing.assert_close(found, exact_answer(x, stored, 0.5, 0.9), rtol=0, atol=2e-6)


def test_no_noise_gives_the_nearest_image_and_ties_share(device, rng):
    images = random_images(rng, 60, (1, 4, 5), torch.uint8)
    twins = torch.cat([images[:1], images[:1], images[1:]])
    for x in (twins[:1].float() / 127.5 - 1, torch.zeros(1, 1, 4, 5)):
        for sigma in (0.0, 1e-30):
            found = answer(device, x, twins, sigma)
            torch.testing.assert_close(found, exact_answer(x, twins, sigma), rtol=0, atol=1e-6)


def test_long_sums_are_split_before_an_int32_overflows(device, rng, monkeypatch):
    assert kernels.SEGMENT * 128 * 128 < 2**31
    monkeypatch.setattr(kernels, "SEGMENT", 256)
    images = random_images(rng, 100, (3, 15, 16), torch.uint8)
    x = noisy_batch(images, 2, 0.2, 1.0, rng)
    found = answer(device, x, images, 0.2)
    torch.testing.assert_close(found, exact_answer(x, images, 0.2), rtol=0, atol=2e-6)


def test_many_light_images_keep_their_share(device):
    """Images whose single weights half precision can hardly hold move the mean together."""
    images = torch.zeros(4001, 1, 1, 2, dtype=torch.uint8)
    images[0, ..., 0] = 128
    sigma = 0.2
    x = torch.tensor([128.0, 0.0]).reshape(1, 1, 1, 2) / 127.5 - 1
    # 4,000 images of this weight beside one of weight 1.
    assert np.exp(-((128 / 127.5) ** 2) / (2 * sigma**2)) < 2**-14
    found = answer(device, x, images, sigma)
    # Tensor cores round towards zero after every 16 products: 2.6e-6 over 4,000 equal weights.
    torch.testing.assert_close(found, exact_answer(x, images, sigma), rtol=0, atol=1e-5)


def test_fixed_point_is_within_half_a_unit(rng):
    noisy = torch.randn(5, 300, generator=rng, dtype=torch.float64) * 1e3
    noisy[3] = 0.0
    digits, quantum, common = fixed_point(noisy)
    powers = torch.tensor([65536.0, 256.0, 1.0], dtype=torch.float64)
    rounded = (digits.double() * powers[:, None]).sum(1) * quantum[:, None]
    assert ((rounded - noisy).abs() <= 0.5001 * quantum[:, None]).all()
    torch.testing.assert_close(common, rounded.square().sum(1), rtol=1e-14, atol=0)
    assert quantum[0] <= noisy[0].abs().max() / 2**22


def test_images_made_in_inference_mode(device, rng):
    """Nothing counts their changes, so nothing derived from them is kept."""
    plain = random_images(rng, 100, (1, 4, 5), torch.uint8)
    x = noisy_batch(plain, 1, 0.4, 1.0, rng)
    with torch.inference_mode():
        images = plain.to(device).clone()
        for stored in (plain, 255 - plain):
            images.copy_(stored)
            found = answer(device, x, images, 0.4)
            torch.testing.assert_close(found, exact_answer(x, stored, 0.4), rtol=0, atol=2e-6)


def test_images_changed_in_place_are_noticed(device, rng):
    images = random_images(rng, 100, (1, 4, 5), torch.uint8).to(device)
    x = noisy_batch(images.cpu(), 1, 0.4, 1.0, rng)
    answer(device, x, images, 0.4)
    images.copy_(images // 2)
    found = answer(device, x, images, 0.4)
    torch.testing.assert_close(found, exact_answer(x, images.cpu(), 0.4), rtol=0, atol=2e-6)


def test_configurations_share_their_shapes():
    """The bits of a result may depend on shapes, which are the same on every device."""
    names = ("sum_n", "sum_d")
    tables = [dataclasses.asdict(config) for config in CONFIGS.values()]
    assert len({tuple(table[name] for name in names) for table in tables}) == 1
