"""Masks of large images in bands of outputs: the answers of all at once, held or made when used."""

from __future__ import annotations

import pytest
import torch
from test_masked_jvp_kernel import answer as jvp_answer
from test_masked_jvp_kernel import assert_like_float32, directions_like
from test_masked_kernel import answer, band_masks, exact_answer, noisy_batch
from truth import random_images

from pyflocality.kernels.triton import _masked_levels
from pyflocality.moments.mask_tiles import MadeMasks
from pyflocality.weights import QueryWeights

SHAPE = (3, 9, 10)
# Bytes of the masks of a row of pixels: 30 outputs of 270 inputs.
ROW = 30 * 34
SIGMA, ALPHA = torch.tensor([0.4, 1.0, 3.0]), 0.9


@pytest.fixture(params=[4 * ROW, 1])
def bands(request, monkeypatch) -> int:
    """How many bands there are: of several rows each, or of one."""
    monkeypatch.setattr(_masked_levels, "_BAND_BYTES", request.param)
    return {4 * ROW: 3, 1: 9}[request.param]


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """Outputs that levels were built of."""
    sizes: list[int] = []
    build = _masked_levels.levels_of

    def watched(weights, grid, block_d):
        sizes.append(len(weights))
        return build(weights, grid, block_d)

    monkeypatch.setattr(_masked_levels, "levels_of", watched)
    return sizes


def made(held: QueryWeights) -> MadeMasks:
    return MadeMasks(held.shape, lambda outputs: held.bits[outputs.numpy()])


def test_scans(device, rng, bands, built):
    images = random_images(rng, 130, SHAPE, torch.uint8)
    x = noisy_batch(images, 3, 0.4, ALPHA, rng)
    weights = band_masks(SHAPE)
    found = answer(device, x, images, weights, SIGMA, ALPHA)
    assert len(built) == bands and sum(built) == 270
    exact = exact_answer(x, images, weights, SIGMA, ALPHA)
    # float32 rounding of logits of order 100.
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    assert torch.equal(found, answer(device, x, images, made(weights), SIGMA, ALPHA))


def test_tangents(device, rng, bands, built):
    images = random_images(rng, 130, SHAPE, torch.uint8)
    x = noisy_batch(images, 3, 0.4, ALPHA, rng)
    directions = directions_like(x, 3, rng)
    weights = band_masks(SHAPE)
    found = jvp_answer(device, x, directions, images, weights, SIGMA, ALPHA)
    assert len(built) == bands
    # float32 rounding of logits of order 100, as of means.
    assert_like_float32(found, x, directions, images, weights, SIGMA, ALPHA, slack=1e-5)
    again = jvp_answer(device, x, directions, images, made(weights), SIGMA, ALPHA)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_weights_that_are_no_masks(device, rng, monkeypatch, built):
    soft = QueryWeights(band_masks(SHAPE).dense(torch.float32) * torch.rand(270, generator=rng))
    images = random_images(rng, 130, SHAPE, torch.uint8)
    x = noisy_batch(images, 2, 0.4, ALPHA, rng)
    # Numbers take more than bits: rows of 30 outputs of 270 inputs.
    monkeypatch.setattr(_masked_levels, "_BAND_BYTES", 3 * 4 * 30 * 270)
    found = answer(device, x, images, soft, 0.4, ALPHA)
    assert built == [90, 90, 90]
    exact = exact_answer(x, images, soft, 0.4, ALPHA)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_levels_of_one_band_are_kept(device, rng, built):
    images = random_images(rng, 20, SHAPE, torch.uint8)
    x = noisy_batch(images, 2, 0.4, ALPHA, rng)
    weights = QueryWeights(band_masks(SHAPE).dense(torch.bool))
    first = answer(device, x, images, weights, 0.4)
    assert torch.equal(first, answer(device, x, images, weights, 0.4)) and built == [270]
