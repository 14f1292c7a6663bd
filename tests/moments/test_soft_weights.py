"""Soft weights of PCA locality: the rule, what masks are to them, their files and their limits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from truth import random_images

import pyflocality as pf
from pyflocality import masks
from pyflocality.moments.mask_source import MaskSource
from pyflocality.moments.mask_tiles import TILE


def moments_of(count: int, shape: tuple[int, int, int]) -> pf.Moments:
    images = random_images(torch.Generator().manual_seed(11), count, shape, torch.uint8)
    # Neighbours are alike, and a value never varies.
    images[:, :, :, 1:] = images[:, :, :, :-1] // 2 + images[:, :, :, 1:] // 2
    images[:, 0, 0, 0] = 9
    return pf.Moments.from_data(images)


@pytest.fixture(scope="module")
def moments() -> pf.Moments:
    return moments_of(400, (3, 5, 5))


@pytest.fixture(scope="module")
def large() -> pf.Moments:
    return moments_of(60, (1, 32, 33))


def entries() -> list[Path]:
    folder = Path(os.environ["PYFLOCALITY_CACHE_DIR"]) / "masks"
    return sorted(folder.iterdir()) if folder.exists() else []


def magnitudes(moments: pf.Moments, ratio: float) -> np.ndarray:
    """|P_dq| / P_dd with the output q in the row, from the whole projector."""
    covariance = moments.covariance.numpy()
    values, vectors = np.linalg.eigh(covariance)
    values = np.where(values > len(values) * 2.3e-16 * values.max(), values, 0.0)
    projector = (vectors * (values / (values + ratio**2))) @ vectors.T
    diagonal = projector.diagonal()
    return np.abs(projector / np.where(diagonal < 1e-6, 1.0, diagonal)[:, None]).T


@pytest.mark.parametrize("softness", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("size", ["one tile", "some tiles"])
def test_the_rule(size, sigma, softness, moments, large):
    given = moments if size == "one tile" else large
    magnitude = magnitudes(given, sigma / 0.8)
    assert (len(magnitude) > TILE) == (size == "some tiles")
    weights = masks.pca_locality_weights(given, sigma, 0.8, 0.05, softness)
    mask = masks.pca_locality_weights(given, sigma, 0.8, 0.05).dense(torch.bool)
    found = weights.dense(torch.float64)
    assert not weights.is_mask and weights.dense(torch.float32).dtype == torch.float32
    # What is kept is what the mask keeps, to the last entry.
    assert torch.equal(found > 0, mask) and mask.any() and not mask.all()
    expected = np.where(mask.numpy(), np.minimum(1.0, magnitude) ** softness, 0.0)
    # Rounding to float32, and components that are left out: 1e-9 of what is least kept.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert found.max() == 1.0 and (found[mask] < 1.0).any()


def test_softness_0_is_the_mask_itself(moments):
    mask = masks.pca_locality_weights(moments, 0.3, 0.8, 0.05)
    for softness in (0, 0.0, -0.0):
        found = masks.pca_locality_weights(moments, 0.3, 0.8, 0.05, softness)
        assert found.is_mask and np.array_equal(found.bits, mask.bits)


def test_little_softness_tends_to_the_mask(moments):
    mask = masks.pca_locality_weights(moments, 0.3, 0.8, 0.05).dense(torch.float32)
    little = masks.pca_locality_weights(moments, 0.3, 0.8, 0.05, 1e-9).dense(torch.float32)
    torch.testing.assert_close(little, mask, rtol=0, atol=1e-7)


@pytest.mark.parametrize("given", ["components", "moments"])
def test_weights_are_kept_as_files_by_their_softness(given, large, monkeypatch):
    source = large.basis() if given == "components" else large
    first = masks.cached_pca_locality_weights(source, 0.3, 1.0, 0.05, 0.5)
    other = masks.cached_pca_locality_weights(source, 0.3, 1.0, 0.05, 1.0)
    assert not torch.equal(first.dense(torch.float32), other.dense(torch.float32))
    # Of the mask, too, which both are made of.
    assert [path.suffix for path in entries()].count(".soft") == 2 and len(entries()) == 3
    monkeypatch.setattr(MaskSource, "projector", lambda *_: pytest.fail("built again"))
    again = masks.cached_pca_locality_weights(source, 0.3, 1.0, 0.05, 0.5)
    assert torch.equal(first.dense(torch.float32), again.dense(torch.float32))
    with pytest.raises(pytest.fail.Exception, match="built again"):
        masks.cached_pca_locality_weights(source, 0.3, 1.0, 0.05, 0.25)


def test_a_source_tells_whether_weights_are_kept(large):
    source = MaskSource(large)
    source.masks(1.0, 0.3, 0.05, 0.5)
    assert source.has_masks(1.0, 0.3, 0.05, 0.5) and source.has_masks(1.0, 0.3, 0.05)
    assert not source.has_masks(1.0, 0.3, 0.05, 0.25)


def test_weights_beyond_the_budget_are_refused_with_the_least(monkeypatch):
    shape = (1, 45, 46)
    images = random_images(torch.Generator().manual_seed(3), 20, shape, torch.uint8)
    data = pf.TrainingSet(images)
    denoiser = pf.PCALocalityDenoiser(data, 0.05, softness=0.5, memory_budget=2**20)
    with pytest.raises(
        ValueError, match=r"`memory_budget` must be at least 17MB for the soft weights of 2070"
    ):
        denoiser(torch.zeros(1, *shape), 0.3)
    # By the default budget, too.
    monkeypatch.setattr("pyflocality._support.budget._DEFAULT", "1MB")
    with pytest.raises(ValueError, match=r"17MB for the soft weights of 2070 values, got 1048576"):
        masks.pca_locality_weights(pf.Moments.from_data(data), 0.3, 1.0, 0.05, 0.5)


def test_signed_weights_are_not_soft(moments):
    with pytest.raises(ValueError, match="`softness` must be 0 at `threshold` 0"):
        masks.pca_locality_weights(moments, 0.3, 1.0, 0, 0.5)
    data = pf.TrainingSet(random_images(torch.Generator(), 9, (1, 4, 4), torch.uint8))
    with pytest.raises(ValueError, match="`softness` must be 0 at `mask_threshold` 0"):
        pf.PCALocalityDenoiser(data, 0, softness=0.5)
