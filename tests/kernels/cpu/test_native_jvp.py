"""Native Jacobian-vector products against the float64 reference: every instruction set and size."""

from __future__ import annotations

import importlib
import time

import pytest
import torch
from instruction_sets import ISAS
from native_cpu import needs_cpu
from posterior_calls import OPS, SHAPE, assert_within_budget, extra, jvp, problem, reference_case
from truth import random_images

from pyflocality.ops import (
    window_posterior_jvp,
)
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize_jvp
from pyflocality.posterior.tangents import jacobian_factor


@needs_cpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 6, 6), (2, 1, 9)])
@pytest.mark.parametrize(
    ("count", "tangents"), [(1, 1), (2, 9), (47, 0), (49, 3), (301, 8), (1600, 1)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_size(isa, op, stored, shape, count, tangents):
    sigma, alpha = 0.4, 0.9
    given, exact, plain = reference_case(op, stored, shape, count, tangents, sigma, alpha)
    x, directions, images = given
    given = posterior_problem(x.float(), images, sigma, alpha)
    scan = importlib.import_module(f"pyflocality.kernels.cpu.{op}_posterior").jvp
    state = scan(given, directions.float(), *extra(op, shape), instruction_set=isa)
    values = {"global": x[0].numel(), "window": shape[0], "masked": 1}[op]
    found = finalize_jvp(state, values, jacobian_factor(given))
    if op == "window":
        found = tuple(part.transpose(-1, -2) for part in found)
    found = found[0].reshape(x.shape), found[1].reshape(directions.shape)
    assert_within_budget(found, exact, plain, directions, sigma, alpha)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.3, 2.0, 80.0, 1e3])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_every_noise_level(op, sigma, alpha):
    given, exact, plain = reference_case(op, torch.uint8, SHAPE, 200, 3, sigma, alpha)
    x, directions, images = given
    found = jvp(op, x.float(), directions.float(), images, sigma, alpha, backend="cpu")
    assert_within_budget(found, exact, plain, directions, sigma, alpha)


@needs_cpu
@pytest.mark.parametrize("window", [1, 5, 7, 17])
@pytest.mark.parametrize("shape", [(3, 9, 6), (1, 4, 9)])
def test_every_window(window, shape, rng):
    x, directions, images = problem(rng, 100, 2, 2, shape=shape, sigma=0.5, alpha=1.0)
    found = window_posterior_jvp(x.float(), directions.float(), images, window, 0.5, backend="cpu")
    exact = window_posterior_jvp(x, directions, images, window, 0.5)
    for one, true in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=0, atol=2e-5)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_thread_counts_give_the_same_bits(op, rng):
    x, directions, images = problem(rng, 3000, 2, 3, shape=(3, 5, 3), sigma=0.5, alpha=0.8)
    x, directions = x.float(), directions.float()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(jvp(op, x, directions, images, 0.5, 0.8, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_bits_depend_neither_on_the_batch_nor_on_other_tangents(op, rng):
    sigma = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)
    x, directions, images = problem(rng, 900, 7, 9, shape=(3, 5, 3), sigma=sigma, alpha=0.8)
    x, directions = x.float(), directions.float()
    found, derivative = jvp(op, x, directions, images, sigma, 0.8, backend="cpu")
    for b in (0, 3, 6):
        alone = jvp(
            op,
            x[b : b + 1],
            directions[:, b : b + 1],
            images,
            float(sigma[b]),
            0.8,
            backend="cpu",
        )
        assert torch.equal(alone[0][0], found[b])
        assert torch.equal(alone[1][:, 0], derivative[:, b])
    for chosen in (slice(8, 9), slice(2, 5), slice(1, 9)):
        some = jvp(op, x, directions[chosen], images, sigma, 0.8, backend="cpu")
        assert torch.equal(some[0], found)
        assert torch.equal(some[1], derivative[chosen])
    narrow = jvp(op, x, directions, images, sigma, 0.8, backend="cpu", memory_budget=1)
    assert torch.equal(narrow[0], found)
    assert torch.equal(narrow[1], derivative)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_ctrl_c_ends_a_scan(op, rng, ctrl_c):
    images = random_images(rng, 500, (3, 8, 8), torch.uint8).repeat(60, 1, 1, 1)
    x = torch.rand(16, 3, 8, 8, generator=rng)
    tangents = torch.randn(16, 16, 3, 8, 8, generator=rng)
    ctrl_c(0.3)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            jvp(op, x, tangents, images, 1.0, backend="cpu")
    assert time.perf_counter() - started < 60
