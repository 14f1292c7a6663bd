"""The CUDA kernels on a GPU, against the float64 reference; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import random_images

from pyflocality import ops, trace_backends
from pyflocality.backends.selection import machine_reason
from pyflocality.posterior.problem import posterior_problem
from pyflocality.storage.reader import training_values

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


@pytest.fixture(autouse=True)
def _by_cuda():
    """What was asked of the backend ran on it."""
    with trace_backends() as calls:
        yield
    assert "cuda" in {backend for _, backend in calls}


def noisy_batch(shape, count, batch, dtype, rng):
    """Noisy images, training images, and levels that differ within the batch."""
    images = random_images(rng, count, shape, dtype).cuda()
    sigma, alpha = torch.linspace(0.3, 0.9, batch).cuda(), torch.linspace(0.95, 0.4, batch).cuda()
    chosen = torch.randint(count, (batch,), generator=rng).cuda()
    noise = torch.randn(batch, *shape, generator=rng).cuda()
    levels = (level[:, None, None, None] for level in (alpha, sigma))
    x = next(levels) * training_values(images[chosen], torch.float32) + next(levels) * noise
    return x, images, (sigma, alpha)


def plain_mean(x: Tensor, images: Tensor, window: int, levels) -> Tensor:
    return ops.window_posterior_mean(x, images, window, *levels, backend="reference")


def mean_of(x: Tensor, images: Tensor, window: int, levels) -> Tensor:
    return ops.window_posterior_mean(x, images, window, *levels, backend="cuda")


def assert_within_budget(found: Tensor, exact: Tensor, plain: Tensor, terms: int) -> None:
    budget = 2 * (plain.double() - exact).abs().max() + 4 * EPS * terms * max(1, exact.abs().max())
    assert torch.isfinite(found).all()
    assert (found.double() - exact).abs().max() <= budget


@pytest.mark.parametrize(("shape", "count", "batch", "window", "dtype"), SIZES)
def test_window_posterior(shape, count, batch, window, dtype, rng):
    x, images, levels = noisy_batch(shape, count, batch, dtype, rng)
    exact = plain_mean(x.double(), images, window, levels)
    plain = plain_mean(x, images, window, levels)
    terms = shape[0] * min(window, shape[1]) * min(window, shape[2])
    found = mean_of(x, images, window, levels)
    assert_within_budget(found, exact, plain, terms)
    assert torch.equal(mean_of(x, images, window, levels), found)


def test_an_image_has_the_same_bits_in_every_batch(rng):
    x, images, levels = noisy_batch((3, 32, 32), 1003, 5, torch.uint8, rng)
    together = mean_of(x, images, 7, levels)
    for b in (0, 4):
        alone = mean_of(x[b : b + 1], images, 7, [level[b] for level in levels])
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("tangents", [1, 2, 5])
def test_jvp(tangents, rng):
    x, images, levels = noisy_batch((3, 32, 32), 1003, 2, torch.uint8, rng)
    directions = torch.randn(tangents, *x.shape, generator=rng).cuda()
    _, found = ops.window_posterior_jvp(x, directions, images, 7, *levels, backend="cuda")
    for k in range(tangents):
        exact, plain = (
            torch.func.jvp(
                lambda z: plain_mean(z, images, 7, levels),
                (x.to(dtype),),
                (directions[k].to(dtype),),
            )[1]
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_budget(found[k], exact, plain, 147)


def test_vjp_and_rows(rng):
    from pyflocality.kernels.cuda._window_rows import window_posterior_rows

    x, images, levels = noisy_batch((3, 32, 32), 1003, 2, torch.uint8, rng)
    pulls = [
        torch.func.vjp(lambda z: plain_mean(z, images, 7, levels), x.to(dtype))[1]
        for dtype in (torch.float64, torch.float32)
    ]
    cotangent = torch.randn(x.shape, generator=rng).cuda()
    exact, plain = pulls[0](cotangent.double())[0], pulls[1](cotangent)[0]
    found = ops.window_posterior_vjp(x, cotangent[None], images, 7, *levels, backend="cuda")
    assert_within_budget(found[0], exact, plain, 147)
    one = torch.zeros_like(x)
    one[:, 1, 5, 31] = 1
    exact, plain = pulls[0](one.double())[0], pulls[1](one)[0]
    rows = window_posterior_rows(posterior_problem(x, images, *levels), [(1, 5, 31)], 7)
    assert_within_budget(rows[:, 0], exact, plain, 147)


@pytest.mark.parametrize("window", [3, 6])
def test_patch_set(window, rng):
    x, images, (sigma, alpha) = noisy_batch((3, 12, 15), 501, 2, torch.uint8, rng)
    values = training_values(images, torch.float64)
    total, count = torch.zeros_like(x, dtype=torch.float64), torch.zeros(12, 15).cuda()
    for top in range(12 - window + 1):
        for left in range(15 - window + 1):
            place = (..., slice(top, top + window), slice(left, left + window))
            for b in range(2):
                gap = x[b][place].double() - alpha[b].double() * values[place]
                logits = -gap.square().flatten(1).sum(1) / (2 * sigma[b].double() ** 2)
                weights = torch.softmax(logits, 0)
                total[b][place] += torch.einsum("n,nchw->chw", weights, values[place])
            count[place] += 1
    found = ops.patch_set_mean(x, images, window, sigma, alpha, backend="cuda")
    torch.testing.assert_close(found.double(), total / count, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sigma", [0.3, 0.01, 0.0])
@pytest.mark.parametrize("shape", [(4, 64, 64), (3, 96, 96)])
def test_a_pass_over_whole_images_finds_what_a_scan_of_tiles_found(shape, sigma, rng):
    images = random_images(rng, 65, shape, torch.uint8).cuda()
    x = (
        training_values(images[:2], torch.float32)
        + 0.5 * torch.randn(2, *shape, generator=rng).cuda()
    )
    exact, plain = (
        ops.patch_set_mean(z, images, 9, sigma, backend="reference") for z in (x.double(), x)
    )
    found = ops.patch_set_mean(x, images, 9, sigma, backend="cuda")
    assert_within_budget(found, exact, plain, 1)


def test_splits_of_many_images(rng):
    """As many images as make splits longer than their least length, as on large sets."""
    x, images, levels = noisy_batch((3, 8, 8), 20_000, 2, torch.uint8, rng)
    exact, plain = (plain_mean(z, images, 3, levels) for z in (x.double(), x))
    assert_within_budget(mean_of(x, images, 3, levels), exact, plain, 27)


def test_other_streams_and_cupy_arrays(rng):
    cupy = pytest.importorskip("cupy")
    from pyflocality.cuda.arrays import as_tensor, window_posterior_mean

    x, images, levels = noisy_batch((3, 32, 32), 1003, 2, torch.uint8, rng)
    expected = mean_of(x, images, 7, levels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = mean_of(x, images, 7, levels)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(again, expected)
    arrays = [cupy.from_dlpack(tensor) for tensor in (x, images)]
    assert as_tensor(arrays[1], "images").data_ptr() == images.data_ptr()
    found = window_posterior_mean(*arrays, 7, *levels)
    assert isinstance(found, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(found), expected)
