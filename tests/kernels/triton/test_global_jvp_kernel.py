"""Global posterior with tangents against float64: every path, odd sizes, every noise level."""

from __future__ import annotations

import pytest
import torch
from test_global_kernel import VIEWS, noisy_batch
from triton_gates import compile_ahead
from truth import random_images

from pyflocality.kernels.triton import _global_products as kernels
from pyflocality.kernels.triton._global_products import CONFIGS, QUERIES
from pyflocality.kernels.triton.global_posterior import jvp, scan
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize, finalize_jvp, log_sum_exp, merge_tangents
from pyflocality.posterior.tangents import jacobian_factor
from pyflocality.reference.global_posterior import jvp as reference_state

SHAPE = (3, 6, 7)
VALUES = 126


def directions_like(x, tangents, rng):
    return torch.randn(tangents, *x.shape, generator=rng)


def problem_on(device, x, images, sigma, alpha=1.0, **options):
    levels = [v.to(device) if isinstance(v, torch.Tensor) else v for v in (sigma, alpha)]
    return posterior_problem(x.to(device), images.to(device), *levels, **options)


def answer(device, x, directions, images, sigma, alpha=1.0, **options):
    problem = problem_on(device, x, images, sigma, alpha, **options)
    state = jvp(problem, directions.to(device))
    found = finalize_jvp(state, images[0].numel(), jacobian_factor(problem))
    return tuple(part.cpu() for part in found)


def truth(x, directions, images, sigma, alpha=1.0):
    problem = posterior_problem(x.double(), images, sigma, alpha)
    state = reference_state(problem, directions.double())
    return finalize_jvp(state, images[0].numel(), jacobian_factor(problem))


def assert_close(found, exact, atol=2e-5):
    """Errors reach 5.5e-6 where products are rounded towards zero, as tensor cores do."""
    for mine, true in zip(found, exact, strict=True):
        assert mine.shape == true.shape
        torch.testing.assert_close(mine, true, rtol=0, atol=atol)


@pytest.mark.parametrize("tangents", [1, 3, 8])
@pytest.mark.parametrize(
    ("shape", "count"), [((1, 1, 1), 1), ((1, 7, 5), 31), (SHAPE, 700), ((3, 8, 6), 300)]
)
def test_sizes_that_are_no_multiples_of_a_block(device, rng, launches, shape, count, tangents):
    images = random_images(rng, count, shape, torch.uint8)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    directions = directions_like(x, tangents, rng)
    launches.watch(kernels, "coefficient_sums_kernel")
    launches.watch(kernels, "distances_kernel", "weighted_sums_kernel")
    assert_close(
        answer(device, x, directions, images, 0.4, 0.9), truth(x, directions, images, 0.4, 0.9)
    )
    values = images[0].numel()
    ((grid, _),) = launches.of("coefficient_sums_kernel")
    assert grid == (-(-values // 128), -(-3 * (1 + tangents) // QUERIES), -(-count // 256))
    # Distances, then the products of the tangents.
    rows = [grid[1] for grid, _ in launches.of("distances_kernel")]
    assert rows == [1, -(-3 * tangents // QUERIES)]
    assert launches.of("weighted_sums_kernel") == []


@pytest.mark.parametrize("sigma", [1e-3, 0.01, 0.1, 0.5, 2.0, 80.0, 1e4])
@pytest.mark.parametrize("alpha", [1.0, 0.05])
def test_every_noise_level(device, rng, sigma, alpha):
    images = random_images(rng, 300, SHAPE, torch.uint8)
    x = noisy_batch(images, 2, sigma, alpha, rng)
    directions = directions_like(x, 2, rng)
    assert_close(
        answer(device, x, directions, images, sigma, alpha),
        truth(x, directions, images, sigma, alpha),
    )


def test_nearly_equal_images_at_little_noise(device, rng):
    """Half of the digits of c and v cancel from their covariance, which is multiplied by 1e4."""
    base = torch.tensor([10, 240], dtype=torch.uint8).repeat(100)[:, None, None, None]
    images = base + torch.randint(0, 3, (200, *SHAPE), generator=rng, dtype=torch.uint8)
    x = images[:2].float() / 127.5 - 1
    directions = directions_like(x, 3, rng)
    found, exact = answer(device, x, directions, images, 0.03), truth(x, directions, images, 0.03)
    assert exact[1].abs().max() > 0.2
    # 1.3e-5 with products rounded towards zero.
    assert_close(found, exact, atol=5e-5)


def test_a_noise_level_for_every_image_ties_and_bits(device, rng):
    images = random_images(rng, 300, SHAPE, torch.uint8)
    twins = torch.cat([images, images[:7], images[:7]])
    sigma = torch.tensor([0.05, 0.3, 1.0, 30.0, 0.6])
    alpha = torch.tensor([1.0, 0.9, 0.7, 0.05, 0.8])
    levels = zip(sigma.tolist(), alpha.tolist(), strict=True)
    x = torch.cat([noisy_batch(twins[:7], 1, *level, rng) for level in levels])
    directions = directions_like(x, 5, rng)
    found = answer(device, x, directions, twins, sigma, alpha)
    assert_close(found, truth(x, directions, twins, sigma, alpha))
    tight = answer(device, x, directions, twins, sigma, alpha, memory_budget=1)
    for one, same in zip(found, tight, strict=True):
        assert torch.equal(one, same)
    one = slice(3, 4)
    alone = answer(device, x[one], directions[:, one], twins, sigma[one], alpha[one])
    assert torch.equal(alone[0], found[0][one])
    assert torch.equal(alone[1], found[1][:, one])


def test_chunks_and_shards_are_merged(device, rng):
    images = random_images(rng, 700, SHAPE, torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    directions = directions_like(x, 3, rng)
    found = answer(device, x, directions, images, 0.5, 0.8, chunk_size=300)
    assert_close(found, truth(x, directions, images, 0.5, 0.8))
    problem = posterior_problem(x.double(), images, 0.5, 0.8)
    exact = reference_state(problem, directions.double())
    halves = [
        jvp(problem_on(device, x, part, 0.5, 0.8), directions.to(device))
        for part in (images[:200], images[200:])
    ]
    scale = problem.scale.to(device)
    state = merge_tangents(*halves, scale, images[0].numel())
    torch.testing.assert_close(finalize(state).cpu(), finalize(exact), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        log_sum_exp(state, scale).cpu(), log_sum_exp(exact, problem.scale), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("chunk_size", [None, 33])
def test_views_whose_images_are_apart(device, rng, view, chunk_size):
    images = view(random_images(rng, 90, SHAPE, torch.uint8).to(device))
    stored = images.cpu().contiguous()
    x = noisy_batch(stored, 3, 0.5, 0.9, rng)
    directions = directions_like(x, 2, rng)
    found = answer(device, x, directions, images, 0.5, 0.9, chunk_size=chunk_size)
    assert_close(found, truth(x, directions, stored, 0.5, 0.9))


def test_views_are_copied_in_parts_that_fit_the_budget(device, rng, launches):
    """The whole view was copied at once, whatever the budget."""
    launches.watch(kernels, "distances_kernel")
    images = random_images(rng, 400, SHAPE, torch.uint8).to(device)[::2]
    stored = images.cpu().contiguous()
    x = noisy_batch(stored, 1, 0.5, 0.9, rng)
    directions = directions_like(x, 2, rng)
    budget = 4 * 130 * VALUES
    found = answer(device, x, directions, images, 0.5, 0.9, memory_budget=budget)
    # Distances, then products, of 130 images and of the other 70.
    assert [grid[0] for grid, _ in launches.of("distances_kernel")] == [3, 3, 2, 2]
    assert_close(found, truth(x, directions, stored, 0.5, 0.9))


@pytest.mark.parametrize("tangents", [0, 2])
def test_without_tangents_and_without_noisy_images(device, rng, tangents):
    images = random_images(rng, 60, SHAPE, torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng)
    problem = problem_on(device, x, images, 0.5, 0.8)
    state = jvp(problem, directions_like(x, tangents, rng).to(device))
    plain = finalize(scan(problem))
    torch.testing.assert_close(finalize(state)[..., :VALUES], plain, rtol=0, atol=1e-6)
    nobody = problem_on(device, x[:0], images, 0.5)
    state = jvp(nobody, directions_like(x[:0], tangents, rng).to(device))
    assert state.weighted.shape == (0, 1, VALUES + tangents + tangents * VALUES)


SUMS = {
    "images_ptr": "*u8",
    "coefficients_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "count": "i32",
    "dim": "i32",
    "split_images": "i32",
}


@pytest.mark.parametrize("stored", ["*u8", "*fp32"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_code(arch, aligned, stored):
    config = CONFIGS[arch]
    values = {
        "QUERIES": QUERIES,
        "BLOCK_N": config.sum_n,
        "BLOCK_D": config.sum_d if stored == "*u8" else config.value_d,
        "NUM_STAGES": CONFIGS[arch].weighted.num_stages,
    }
    code = compile_ahead(
        kernels.coefficient_sums_kernel,
        SUMS | {"images_ptr": stored},
        values,
        arch=arch,
        divisible=["dim"] if aligned else [],
        **vars(CONFIGS[arch].weighted),
    )
    code.assert_fits()
    # 16 rows are too few for a warpgroup.
    assert code.has_mma, str(code)
