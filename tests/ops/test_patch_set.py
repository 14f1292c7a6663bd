"""Patch sets of square windows: reference and native kernel against float64 truth."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from torch import Tensor
from truth import noisy_batch, random_images, softmax, values_of

import pyflocality as pf
from pyflocality.backends import BackendUnavailableError
from pyflocality.ops.patch_set import patch_set_mean
from pyflocality.ops.window_posterior import window_posterior_vjp


def truth(
    x: Tensor, images: Tensor, window: int, sigma: float, alpha: float, temperature: float = 1.0
) -> np.ndarray:
    """Window by window."""
    values, noisy = values_of(images), x.double().numpy()
    blend, number = np.zeros_like(noisy), np.zeros(noisy.shape[2:])
    height, width = noisy.shape[2:]
    for y in range(height - window + 1):
        for left in range(width - window + 1):
            patch = (..., slice(y, y + window), slice(left, left + window))
            number[patch] += 1
            for b in range(len(noisy)):
                gap = noisy[b][patch] - alpha * values[patch]
                distance = (gap**2).sum((1, 2, 3))
                share = softmax(-distance / (2 * sigma**2 * temperature))
                blend[b][patch] += np.tensordot(share, values[patch], 1)
    return blend / number


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(3, 5, 6), (1, 7, 5)])
def test_reference_is_the_formula(window, shape, rng):
    images = random_images(rng, 40, shape, torch.uint8)
    x = noisy_batch(images, 2, 0.4, 0.9, rng)
    found = patch_set_mean(x, images, window, 0.4, 0.9, temperature=1.3)
    exact = truth(x, images, window, 0.4, 0.9, 1.3)
    np.testing.assert_allclose(found.numpy(), exact, atol=1e-12)
    for chunk_size in (1, 7):
        parts = patch_set_mean(x, images, window, 0.4, 0.9, temperature=1.3, chunk_size=chunk_size)
        np.testing.assert_allclose(parts.numpy(), exact, atol=1e-12)


def test_derivatives_are_torchs(rng):
    images = random_images(rng, 20, (2, 4, 5), torch.uint8)
    x = noisy_batch(images, 1, 0.5, 0.9, rng)
    assert torch.autograd.gradcheck(
        lambda z: patch_set_mean(z, images, 2, 0.5, 0.9), x.requires_grad_()
    )


@needs_cpu
@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-3, 0.05, 0.3, 2.0, 80.0, 1e3])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_every_noise_level(sigma, alpha, rng):
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    x = noisy_batch(images, 3, max(sigma, 1e-3), alpha, rng)
    exact = patch_set_mean(x, images, 3, sigma, alpha, backend="reference")
    found = patch_set_mean(x.float(), images, 3, sigma, alpha, backend="cpu")
    # float32 logits of about as many as there are values, and of their squares at small noise.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


@needs_cpu
def test_levels_per_image(rng):
    images = random_images(rng, 900, (3, 5, 6), torch.uint8)
    x = noisy_batch(images, 5, 0.5, 0.8, rng).float()
    sigma, alpha = torch.linspace(0.1, 2.0, 5), torch.linspace(0.3, 1.0, 5)
    together = patch_set_mean(x, images, 3, sigma, alpha, backend="cpu")
    narrow = patch_set_mean(x, images, 3, sigma, alpha, backend="cpu", memory_budget=1)
    assert torch.equal(narrow, together)
    for b in range(5):
        level = float(sigma[b]), float(alpha[b])
        alone = patch_set_mean(x[b : b + 1], images, 3, *level, backend="cpu")
        assert torch.equal(alone[0], together[b])


@needs_cpu
def test_thread_counts_give_the_same_bits(rng):
    images = random_images(rng, 4000, (3, 5, 6), torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng).float()
    cotangents = torch.randn(2, *x.shape, generator=rng)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(
                (
                    patch_set_mean(x, images, 4, 0.5, 0.8, backend="cpu"),
                    window_posterior_vjp(x, cotangents, images, 3, 0.5, 0.8, backend="cpu"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@needs_cpu
@pytest.mark.parametrize("chunk_size", [1, 100, 699])
def test_chunks_are_merged(chunk_size, rng):
    images = random_images(rng, 700, (3, 4, 5), torch.uint8)
    x = noisy_batch(images, 2, 0.5, 0.8, rng).float()
    whole = patch_set_mean(x, images, 3, 0.5, 0.8, backend="cpu")
    parts = patch_set_mean(x, images, 3, 0.5, 0.8, backend="cpu", chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@needs_cpu
def test_what_the_kernel_does_not_serve(rng):
    images = random_images(rng, 20, (1, 4, 5), torch.uint8)
    x = noisy_batch(images, 1, 0.5, 1.0, rng).float()
    with pytest.raises(BackendUnavailableError, match="computes in float32"):
        patch_set_mean(x.double(), images, 3, 0.5, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="no derivative"):
        patch_set_mean(x.clone().requires_grad_(), images, 3, 0.5, backend="cpu")
    with pf.trace_backends() as calls:
        pf.PatchSetDenoiser(pf.TrainingSet(images), 3)(x, 0.5)
    assert calls == [("patch_set", "cpu")]


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (0, ValueError, "`window` must be at least 1, got 0"),
        (5, ValueError, "`window` must be at most 4, to fit inside the image, got 5"),
        (2.0, TypeError, "`window` must be a whole number"),
    ],
)
def test_wrong_windows_are_refused(window, error, message, rng):
    images = random_images(rng, 20, (1, 4, 5), torch.uint8)
    with pytest.raises(error, match=message):
        patch_set_mean(torch.zeros(1, 1, 4, 5), images, window, 0.5)


@needs_cpu
def test_ctrl_c_ends_a_pass(rng, ctrl_c):
    images = random_images(rng, 2000, (3, 16, 16), torch.uint8).repeat(40, 1, 1, 1)
    x = noisy_batch(images, 64, 0.5, 1.0, rng).float()
    ctrl_c(0.3)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            patch_set_mean(x, images, 7, 0.5, backend="cpu")
    assert time.perf_counter() - started < 60


def test_masks_hold_the_share_that_is_asked_for(rng):
    maps = torch.rand(4, 3, 4, 3, generator=rng)
    maps[2, 1] = 0
    for share in (0.1, 0.5, 0.93, 1):
        masks = pf.masks_from_maps(maps, share)
        for y in range(4):
            for x in range(3):
                values = maps[y, x].double().flatten().numpy()
                largest = np.argsort(-values, kind="stable")
                count = next(
                    n for n in range(13) if values[largest[:n]].sum() >= share * values.sum() - 1e-9
                )
                expected = np.zeros(12, bool)
                expected[largest[:count]] = True
                assert (masks[y, x].flatten().numpy() == expected).all()
    assert masks[2, 1].sum() == 0 and masks[0, 0].all()


MAPS = torch.ones(2, 3, 2, 3)


@pytest.mark.parametrize(
    ("maps", "share", "error", "message"),
    [
        (MAPS.int(), 0.5, TypeError, "`maps` must have a floating-point dtype"),
        (MAPS[0], 0.5, ValueError, "`maps` must have shape"),
        (MAPS[:, :2], 0.5, ValueError, "`maps` must have shape"),
        (-MAPS, 0.5, ValueError, "`maps` holds"),
        (MAPS * torch.inf, 0.5, ValueError, "`maps` holds"),
        (MAPS, 0, ValueError, "`share`"),
        (MAPS, 1.01, ValueError, "`share` must be in"),
        (MAPS, float("nan"), ValueError, "`share`"),
        (MAPS, "half", TypeError, "`share` must be a number"),
    ],
)
def test_wrong_maps_are_refused(maps, share, error, message):
    with pytest.raises(error, match=message):
        pf.masks_from_maps(maps, share)
