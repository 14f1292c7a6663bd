"""The CUDA kernels on a GPU, against the float64 reference; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import random_images

from pyflocality._backends import machine_reason
from pyflocality._problem import posterior_problem, training_values
from pyflocality._tangents import jacobian_factor
from pyflocality.reference import window_posterior as reference
from pyflocality.reference.state import finalize, finalize_jvp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine_reason("cuda") is not None, reason=str(machine_reason("cuda"))),
]

# float32 rounding of a squared distance of some hundred terms, relative.
EPS = 1.2e-7

SIZES = [
    ((3, 32, 32), 5000, 8, 7, torch.uint8),
    ((3, 32, 32), 1003, 3, 15, torch.uint8),
    ((3, 32, 32), 1003, 3, 63, torch.float32),
    ((1, 28, 28), 3001, 5, 3, torch.uint8),
    ((5, 31, 33), 257, 2, 5, torch.uint8),
    ((3, 64, 64), 301, 2, 17, torch.float32),
    ((2, 67, 130), 65, 2, 9, torch.uint8),
    ((3, 256, 256), 33, 1, 51, torch.uint8),
    ((1, 256, 256), 9, 1, 511, torch.uint8),
    ((1, 1, 1), 1, 1, 1, torch.uint8),
]


def noisy_problem(shape, count, batch, dtype, rng, **options):
    images = random_images(rng, count, shape, dtype).cuda()
    sigma, alpha = torch.linspace(0.3, 0.9, batch).cuda(), torch.linspace(0.95, 0.4, batch).cuda()
    chosen = torch.randint(count, (batch,), generator=rng).cuda()
    noise = torch.randn(batch, *shape, generator=rng).cuda()
    levels = (level[:, None, None, None] for level in (alpha, sigma))
    x = next(levels) * training_values(images[chosen], torch.float32) + next(levels) * noise
    return posterior_problem(x, images, sigma, alpha, **options), sigma, alpha


def plain_mean(x: Tensor, images: Tensor, window: int, sigma, alpha) -> Tensor:
    state = reference.window_posterior_state(posterior_problem(x, images, sigma, alpha), window)
    return finalize(state).transpose(1, 2).reshape(x.shape)


def mean_of(problem, window: int) -> Tensor:
    from pyflocality.cuda.window_posterior import window_posterior_state

    state = window_posterior_state(problem, window)
    return finalize(state).transpose(1, 2).reshape(problem.x.shape)


def jvp_of(problem, directions: Tensor, window: int) -> tuple[Tensor, Tensor]:
    from pyflocality.cuda.window_posterior import window_posterior_jvp_state

    state = window_posterior_jvp_state(problem, directions, window)
    mean, jv = finalize_jvp(state, problem.x.shape[1], jacobian_factor(problem))
    mean, jv = mean.transpose(-1, -2), jv.transpose(-1, -2)
    return mean.reshape(problem.x.shape), jv.reshape(directions.shape)


def assert_within_budget(found: Tensor, exact: Tensor, plain: Tensor, terms: int) -> None:
    budget = 2 * (plain.double() - exact).abs().max() + 4 * EPS * terms * max(1, exact.abs().max())
    assert torch.isfinite(found).all()
    assert (found.double() - exact).abs().max() <= budget


@pytest.mark.parametrize(("shape", "count", "batch", "window", "dtype"), SIZES)
def test_window_posterior(shape, count, batch, window, dtype, rng):
    problem, sigma, alpha = noisy_problem(shape, count, batch, dtype, rng)
    exact = plain_mean(problem.x.double(), problem.images, window, sigma, alpha)
    plain = plain_mean(problem.x, problem.images, window, sigma, alpha)
    terms = shape[0] * min(window, shape[1]) * min(window, shape[2])
    found = mean_of(problem, window)
    assert_within_budget(found, exact, plain, terms)
    assert torch.equal(mean_of(problem, window), found)


def test_an_image_has_the_same_bits_in_every_batch(rng):
    problem, sigma, alpha = noisy_problem((3, 32, 32), 1003, 5, torch.uint8, rng)
    together = mean_of(problem, 7)
    for b in (0, 4):
        alone = posterior_problem(problem.x[b : b + 1], problem.images, sigma[b], alpha[b])
        assert torch.equal(mean_of(alone, 7)[0], together[b])


@pytest.mark.parametrize("tangents", [1, 2, 5])
def test_jvp(tangents, rng):
    problem, sigma, alpha = noisy_problem((3, 32, 32), 1003, 2, torch.uint8, rng)
    directions = torch.randn(tangents, *problem.x.shape, generator=rng).cuda()
    _, found = jvp_of(problem, directions, 7)
    for k in range(tangents):
        exact, plain = (
            torch.func.jvp(
                lambda z: plain_mean(z, problem.images, 7, sigma, alpha),
                (problem.x.to(dtype),),
                (directions[k].to(dtype),),
            )[1]
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_budget(found[k], exact, plain, 147)


def test_vjp_and_rows(rng):
    from pyflocality.cuda.window_adjoint import window_posterior_vjp
    from pyflocality.cuda.window_rows import window_posterior_rows

    problem, sigma, alpha = noisy_problem((3, 32, 32), 1003, 2, torch.uint8, rng)
    pulls = [
        torch.func.vjp(
            lambda z: plain_mean(z, problem.images, 7, sigma, alpha), problem.x.to(dtype)
        )[1]
        for dtype in (torch.float64, torch.float32)
    ]
    cotangent = torch.randn(problem.x.shape, generator=rng).cuda()
    exact, plain = pulls[0](cotangent.double())[0], pulls[1](cotangent)[0]
    assert_within_budget(window_posterior_vjp(problem, cotangent[None], 7)[0], exact, plain, 147)
    one = torch.zeros_like(problem.x)
    one[:, 1, 5, 31] = 1
    exact, plain = pulls[0](one.double())[0], pulls[1](one)[0]
    rows = window_posterior_rows(problem, [(1, 5, 31)], 7)
    assert_within_budget(rows[:, 0], exact, plain, 147)


@pytest.mark.parametrize("window", [3, 6])
def test_patch_set(window, rng):
    from pyflocality.cuda.window_adjoint import patch_set_mean

    problem, sigma, alpha = noisy_problem((3, 12, 15), 501, 2, torch.uint8, rng)
    values = training_values(problem.images, torch.float64)
    total, count = torch.zeros_like(problem.x, dtype=torch.float64), torch.zeros(12, 15).cuda()
    for top in range(12 - window + 1):
        for left in range(15 - window + 1):
            place = (..., slice(top, top + window), slice(left, left + window))
            for b in range(2):
                gap = problem.x[b][place].double() - alpha[b].double() * values[place]
                logits = -gap.square().flatten(1).sum(1) / (2 * sigma[b].double() ** 2)
                weights = torch.softmax(logits, 0)
                total[b][place] += torch.einsum("n,nchw->chw", weights, values[place])
            count[place] += 1
    found = patch_set_mean(problem, window)
    torch.testing.assert_close(found.double(), total / count, rtol=0, atol=5e-6)


def test_other_streams_and_cupy_arrays(rng):
    cupy = pytest.importorskip("cupy")
    from pyflocality.cuda.window_posterior import window_posterior_state

    problem, sigma, alpha = noisy_problem((3, 32, 32), 1003, 2, torch.uint8, rng)
    expected = mean_of(problem, 7)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = mean_of(problem, 7)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(again, expected)
    arrays = [cupy.from_dlpack(tensor) for tensor in (problem.x, problem.images)]
    from pyflocality.cuda.arrays import as_tensor

    shared = posterior_problem(as_tensor(arrays[0], "x"), as_tensor(arrays[1], "i"), sigma, alpha)
    assert shared.images.data_ptr() == problem.images.data_ptr()
    assert torch.equal(
        window_posterior_state(shared, 7).total, window_posterior_state(problem, 7).total
    )
