"""Equivariant posterior on tensor cores: every path against the float64 reference, and its code."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from triton_gates import compile_ahead
from truth import random_images

from pyflocality.kernels.limits import LONGEST_RUN, patch_limits
from pyflocality.kernels.triton import equivariant_posterior as kernels
from pyflocality.kernels.triton._launch import Launch
from pyflocality.kernels.triton._patches import Geometry
from pyflocality.kernels.triton.equivariant_posterior import (
    EquivariantConfig,
    default_config,
    query_halves,
    scan,
)
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import PosteriorProblem, posterior_problem
from pyflocality.posterior.state import PosteriorState, finalize, log_sum_exp
from pyflocality.reference import equivariant_posterior as reference

RESIDENT = EquivariantConfig(32, 16, True, Launch(4, 2))
STREAMED = EquivariantConfig(32, 16, False, Launch(4, 2))
EPS = 1.2e-7


def problem_of(
    rng: torch.Generator,
    shape: tuple[int, int, int],
    sigma: float | torch.Tensor,
    alpha: float,
    *,
    count: int = 9,
    batch: int = 2,
    device: torch.device | str = "cpu",
    **options: str,
) -> PosteriorProblem:
    images = random_images(rng, count, shape, torch.uint8)
    chosen = torch.randint(count, (batch,), generator=rng)
    noise = torch.randn(batch, *shape, generator=rng)
    levels = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1)
    x = alpha * (images[chosen].float() / 127.5 - 1) + levels * noise
    if isinstance(sigma, torch.Tensor):
        sigma = sigma.to(device)
    return posterior_problem(x.to(device), images.to(device), sigma, alpha, **options)


def truth_of(problem: PosteriorProblem, window: int, circular: bool, dtype: torch.dtype):
    cpu = PosteriorProblem(
        problem.x.cpu().to(dtype), problem.images.cpu(), problem.alpha.cpu(), problem.scale.cpu()
    )
    return reference.scan(cpu, window, circular)


def assert_like_float32(
    state: PosteriorState, problem: PosteriorProblem, window: int, circular: bool
) -> None:
    """Answers and densities within twice the error of the reference in float32, and rounding."""
    exact = truth_of(problem, window, circular, torch.float64)
    plain = truth_of(problem, window, circular, torch.float32)
    state = PosteriorState(*(tensor.cpu() for tensor in state))
    scale = problem.scale.cpu().clamp(max=2.0**100)
    terms = window**2 * problem.x.shape[1]
    spread = 1 + float((problem.x.abs().amax().cpu() ** 2 * scale).max())
    for result in (finalize, lambda found: log_sum_exp(found, scale)):
        if result is not finalize and torch.isinf(problem.scale).any():
            continue
        error = (result(state).double() - result(exact)).abs().max()
        budget = 2 * (result(plain).double() - result(exact)).abs().max()
        assert error <= budget + 4 * EPS * terms * spread


@pytest.mark.parametrize("config", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("shape", "window", "circular"),
    [
        ((3, 6, 5), 3, True),
        ((1, 7, 6), 5, True),
        ((3, 9, 8), 7, True),
        ((2, 5, 4), 1, True),
        ((3, 7, 6), 3, False),
        ((1, 6, 7), 5, False),
        ((3, 4, 3), 7, False),
    ],
)
def test_borders_windows_and_channels(shape, window, circular, config, rng, device):
    problem = problem_of(rng, shape, 0.3, 0.9, device=device)
    state = scan(problem, window, circular, halves=2, config=config)
    assert_like_float32(state, problem, window, circular)


@pytest.mark.parametrize(("side", "circular"), [(11, True), (6, False)])
@pytest.mark.parametrize("window", [9, 11])
def test_windows_longer_than_resident_ones(window, side, circular, rng, device):
    problem = problem_of(rng, (1, side, side), 0.5, 1.0, count=3, batch=1, device=device)
    state = scan(problem, window, circular, halves=2, config=STREAMED)
    assert_like_float32(state, problem, window, circular)


def test_many_channels(rng, device):
    problem = problem_of(rng, (17, 4, 4), 0.5, 1.0, count=3, batch=1, device=device)
    state = scan(problem, 3, True, halves=2, config=STREAMED)
    assert_like_float32(state, problem, 3, True)


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 0.05, 2.0, 80.0, 1e4])
@pytest.mark.parametrize("alpha", [1.0, 0.02])
def test_noise_levels(sigma, alpha, rng, device):
    problem = problem_of(rng, (3, 6, 5), sigma, alpha, device=device)
    state = scan(problem, 3, True, halves=2, config=RESIDENT)
    assert_like_float32(state, problem, 3, True)


def test_shipped_configuration_in_several_blocks(rng, device):
    """More than one tile of queries and of patches; a last block that is not full."""
    problem = problem_of(rng, (3, 9, 9), 0.4, 0.9, count=7, batch=3, device=device)
    config = default_config(3, Geometry((3, 9, 9), 3, 0).run, 2, 90)
    queries, keys = 3 * 81, 7 * 49
    assert queries > config.block_queries and keys > 2 * config.block_keys
    assert keys % config.block_keys and queries % config.block_queries
    state = scan(problem, 3, True, halves=2)
    assert_like_float32(state, problem, 3, True)


def test_one_part_where_auto_permits_it_holds_its_budget(rng, device, launches):
    """Where one float16 part is chosen, the answer moves by less than 1e-3."""
    launches.watch(kernels, "scan_kernel")
    sizes = {"count": 20, "batch": 3, "device": device}
    problem = problem_of(rng, (3, 6, 6), 0.9, 0.44, **sizes)
    assert query_halves(problem, 3) == [1, 1, 1]
    assert_like_float32(scan(problem, 3, True, config=RESIDENT), problem, 3, True)
    assert {options["HALVES"] for _, _, options in launches.calls} == {2}
    launches.calls.clear()
    problem = replace(problem, precision="auto")
    state = scan(problem, 3, True, config=RESIDENT)
    assert {options["HALVES"] for _, _, options in launches.calls} == {1}
    exact = truth_of(problem, 3, True, torch.float64)
    error = (finalize(state).cpu().double() - finalize(exact)).abs().max()
    assert 1e-6 < error < 1e-3


def test_halves_follow_the_noise(rng):
    sigma = torch.tensor([0.0, 0.01, 0.1, 3.0, 80.0])
    problem = problem_of(rng, (3, 8, 8), sigma, 1.0, batch=5)
    assert query_halves(problem, 5) == [2, 2, 2, 1, 1]


@pytest.mark.slow
def test_bits_do_not_depend_on_the_batch(rng, device):
    """An image alone, and among others with other noise levels and halves."""
    sigma = torch.tensor([0.02, 1.5, 0.3, 2.0, 0.02])
    problem = problem_of(rng, (3, 7, 6), sigma, 0.9, batch=5, device=device, precision="auto")
    halves = query_halves(problem, 3)
    assert set(halves) == {1, 2}
    for circular in (True, False):
        together = scan(problem, 3, circular, config=RESIDENT)
        for b in range(5):
            own = {name: getattr(problem, name)[b : b + 1] for name in ("x", "alpha", "scale")}
            alone = replace(problem, **own)
            state = scan(alone, 3, circular, config=RESIDENT)
            for one, many in zip(state, together, strict=True):
                assert torch.equal(one[0], many[b])


def test_chunks_of_images_and_of_queries(rng, device):
    problem = problem_of(rng, (3, 6, 5), 0.3, 0.9, batch=3, device=device)
    for options in ({"chunk_size": 4}, {"memory_budget": 1}):
        parts = PosteriorProblem(problem.x, problem.images, problem.alpha, problem.scale, **options)
        state = scan(parts, 3, True, halves=2, config=RESIDENT)
        assert_like_float32(state, problem, 3, True)


def test_blocks_that_weigh_nothing_are_passed_over(rng, device, monkeypatch):
    """Far patches before and after the near one: a nearest image without a trace of others."""
    images = torch.zeros(40, 1, 5, 5, dtype=torch.uint8)
    images[20] = random_images(rng, 1, (1, 5, 5), torch.uint8)[0] // 2 + 128
    x = images[20:21].float() / 127.5 - 1
    problem = posterior_problem(x.to(device), images.to(device), 1e-3, 1.0)
    monkeypatch.setattr(kernels, "_PROGRAMS_PER_IMAGE", 1)
    state = scan(problem, 5, True, halves=2, config=RESIDENT)
    centre = finalize(state)[0, 12, 0].item()
    assert centre == pytest.approx(x[0, 0, 2, 2].item(), abs=1e-6)


@pytest.mark.parametrize("height", [1, 2, 3])
def test_no_interior_and_one_image(height, rng, device):
    problem = problem_of(rng, (1, height, 4), 0.5, 1.0, count=1, batch=2, device=device)
    state = scan(problem, 3, False, halves=2, config=RESIDENT)
    assert_like_float32(state, problem, 3, False)


def test_offsets_beyond_32_bits(device):
    """A second image beyond 2^31 values, and its norms: 32-bit offsets would read elsewhere."""
    stride, norm_stride, block = 2**30, 2**29, 16
    # Pages that nobody touches take no memory on the CPU.
    keys = torch.from_numpy(np.zeros(2 * stride + 64, dtype=np.float16)).to(device)
    norms = torch.from_numpy(np.zeros(4 * norm_stride + 64, dtype=np.float16)).to(device)
    keys[0], keys[2 * stride] = 10.0, 3.0
    norms[0], norms[4 * norm_stride] = 100.0, 9.0
    query = torch.zeros(1, 1, block, 1, 16, dtype=torch.float16, device=device)
    query[..., 0] = 1.0
    norm_query = torch.zeros(block, 16, dtype=torch.float16, device=device)
    norm_query[:, 0] = -1.0
    best = torch.empty(block, device=device)
    sums = torch.empty(block, 16, device=device)
    kernels.scan_kernel[(1, 1, 1)](
        query,
        norm_query,
        torch.full((block,), 1e6, device=device),
        keys,
        norms,
        torch.zeros(1, 2, dtype=torch.int32, device=device),
        best,
        sums,
        block,
        2,
        1,
        1,
        stride,
        1,
        norm_stride,
        1,
        1,
        WINDOW=1,
        RUN=16,
        CHANNELS=2,
        ANSWERS=16,
        HALVES=1,
        RESIDENT=True,
        BLOCK_Q=block,
        BLOCK_KEYS=block,
        num_warps=4,
        num_stages=1,
    )
    # Scores 10 - 100 and 3 - 9: the second image's value, once.
    assert torch.equal(best.cpu(), torch.full((block,), -6.0))
    assert torch.equal(sums[:, 0].cpu() / sums[:, 2].cpu(), torch.full((block,), 3.0))


def test_limits():
    def reason(window, channels, **facts):
        shape = (channels, 64, 64)
        known = {"images_dtype": torch.uint8, "window": window, "image_shape": shape}
        return patch_limits(Call(torch.device("cpu"), facts=known | facts))

    assert reason(7, 3) is None
    assert reason(31, 3) is None
    assert "up to 32 pixels" in reason(33, 3)
    assert reason(63, 1) is None
    assert "uint8" in reason(7, 3, images_dtype=torch.float32)
    for window, channels in itertools.product((1, 7, 31), (1, 2, 3, 4)):
        geometry = Geometry((channels, 64, 64), window, 0)
        assert (reason(window, channels) is None) == (geometry.run <= LONGEST_RUN)


SCAN = {
    **dict.fromkeys(["query_ptr", "norm_query_ptr", "keys_ptr", "norm_ptr"], "*fp16"),
    **dict.fromkeys(["factor_ptr", "best_ptr", "sums_ptr"], "*fp32"),
    "origin_ptr": "*i32",
    **dict.fromkeys(
        [
            *("num_rows", "num_keys", "keys_per_image", "keys_per_row", "image_stride"),
            *("row_stride", "norm_image_stride", "norm_row_stride", "steps"),
        ],
        "i32",
    ),
}


# Every configuration of the table, by window: resident for two programs with prefetch, without,
# for one program, and streamed with runs of each length.
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("channels", "window", "halves"),
    [(3, 3, 2), (3, 5, 1), (3, 5, 2), (3, 7, 1), (3, 7, 2), (1, 7, 2), (3, 15, 2), (3, 31, 2)],
)
def test_compiled_code(channels, window, halves, arch):
    geometry = Geometry((channels, 64, 64), window, 0)
    config = default_config(window, geometry.run, halves, arch)
    code = compile_ahead(
        kernels.scan_kernel,
        SCAN,
        {
            "WINDOW": window,
            "RUN": geometry.run,
            "CHANNELS": geometry.channels,
            "ANSWERS": 16,
            "HALVES": halves,
            "RESIDENT": config.resident,
            "BLOCK_Q": config.block_queries,
            "BLOCK_KEYS": config.block_keys,
        },
        arch=arch,
        num_warps=config.launch.num_warps,
        num_stages=config.launch.num_stages,
        maxnreg=config.launch.maxnreg,
        divisible=["num_rows"],
    )
    code.assert_fits(wgmma=True)
    if config.launch.num_stages > 1:
        assert code.has_async_copies, str(code)
    if config.launch.maxnreg:
        assert code.shared_bytes <= 113 * 1024, str(code)
