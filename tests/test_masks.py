"""The PCA-locality rule: values, limits, the cache of masks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from truth import random_images

import pyflocality as pf
from pyflocality import masks
from pyflocality.weights import QueryWeights


@pytest.fixture(scope="module")
def moments() -> pf.Moments:
    images = random_images(torch.Generator().manual_seed(4), 400, (3, 5, 5), torch.uint8)
    return pf.Moments.from_data(images)


def published_rule(moments, sigma, alpha, threshold) -> np.ndarray:
    """Output value in the row, written out from the paper's description."""
    values, vectors = np.linalg.eigh(moments.covariance.numpy())
    values = values.clip(0)
    projector = vectors @ np.diag(alpha**2 * values / (sigma**2 + alpha**2 * values)) @ vectors.T
    normalised = np.empty_like(projector)
    for n, row in enumerate(projector):
        normalised[n] = row / (row[n] if abs(row[n]) >= 1e-6 else 1)
    if threshold == 0:
        return normalised.T
    return (np.abs(normalised) >= threshold * np.abs(normalised).max()).T


@pytest.mark.parametrize("sigma", [0.01, 0.3, 3.0, 50.0])
@pytest.mark.parametrize("threshold", [0, 0.005, 0.05, 0.5])
def test_rule(sigma, threshold, moments):
    found = masks.pca_locality_weights(moments, sigma, 0.8, threshold)
    expected = published_rule(moments, sigma, 0.8, threshold)
    np.testing.assert_allclose(found.dense(torch.float64).numpy(), expected, rtol=0, atol=1e-9)
    assert found.is_mask == (threshold > 0)
    assert found.density == pytest.approx((expected != 0).mean())


def test_values_that_never_vary_have_no_weights():
    images = random_images(torch.Generator().manual_seed(5), 50, (1, 4, 4), torch.uint8)
    images[:, 0, 0, 0] = 17
    weights = masks.pca_locality_weights(pf.Moments.from_data(images), 0.3, 1.0, 0.05)
    dense = weights.dense(torch.bool)
    assert not dense[0].any() and not dense[:, 0].any() and dense[1:].any(1).all()


def test_fewer_images_than_values_leave_the_null_space_alone():
    images = random_images(torch.Generator().manual_seed(6), 9, (1, 5, 5), torch.uint8)
    moments = pf.Moments.from_data(images)
    projector = masks.pca_locality_weights(moments, 0.0, 1.0, 0).dense(torch.float64)
    vectors = moments.eigh().vectors[:, :8]
    span = vectors @ vectors.T
    expected = (span / span.diagonal()[:, None]).T
    torch.testing.assert_close(projector, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": -1.0}, "`sigma`"),
        ({"sigma": float("nan")}, "`sigma`"),
        ({"alpha": 0.0}, "`alpha`"),
        ({"threshold": 1.0}, "`threshold`"),
        ({"threshold": -0.1}, "`threshold`"),
    ],
)
def test_wrong_arguments(arguments, message, moments):
    with pytest.raises(ValueError, match=message):
        masks.pca_locality_weights(moments, **({"sigma": 0.3} | arguments))


@pytest.mark.parametrize("shape", [(0,), (), (2, 2)])
def test_eigenvalues_are_a_row(shape):
    with pytest.raises(ValueError, match=r"`eigenvalues` must have shape \[D\]"):
        masks.wiener_gain(torch.ones(shape), 0.5, 0.9)


@pytest.fixture
def large() -> pf.Moments:
    images = random_images(torch.Generator().manual_seed(7), 60, (1, 32, 33), torch.uint8)
    return pf.Moments.from_data(images)


def test_large_masks_are_kept_as_files(large, monkeypatch):
    first = masks.cached_pca_locality_weights(large, 0.3, 1.0, 0.05)
    other = masks.cached_pca_locality_weights(large, 0.3, 1.0, 0.1)
    assert not np.array_equal(first.bits, other.bits)
    folder = Path(os.environ["PYFLOCALITY_CACHE_DIR"]) / "masks"
    assert len(list(folder.iterdir())) == 2
    # Neither the covariance nor eigenvectors are looked at again.
    monkeypatch.setattr(pf.Moments, "covariance", property(lambda _: pytest.fail("built again")))
    monkeypatch.setattr(pf.Moments, "eigh", lambda *_, **__: pytest.fail("built again"))
    again = masks.cached_pca_locality_weights(large, 0.3, 1.0, 0.05)
    assert np.array_equal(first.bits, again.bits) and again.density == first.density


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:50] + b"\xff" + b[51:], lambda b: b""]
)
def test_a_damaged_file_is_made_anew(damage, large):
    first = masks.cached_pca_locality_weights(large, 0.3, 1.0, 0.05)
    (path,) = (Path(os.environ["PYFLOCALITY_CACHE_DIR"]) / "masks").iterdir()
    content = path.read_bytes()
    damaged = damage(content)
    assert damaged != content
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="damaged"):
        again = masks.cached_pca_locality_weights(large, 0.3, 1.0, 0.05)
    assert np.array_equal(first.bits, again.bits)
    assert path.read_bytes() == content


def test_an_unwritable_cache_warns(large, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(blocked))
    with pytest.warns(UserWarning, match=f"nothing is cached: {blocked} is no folder"):
        masks.cached_pca_locality_weights(large, 0.3, 1.0, 0.05)


def test_small_and_signed_weights_are_not_kept(moments, large):
    masks.cached_pca_locality_weights(moments, 0.3, 1.0, 0.05)
    masks.cached_pca_locality_weights(large, 0.3, 1.0, 0)
    assert not (Path(os.environ["PYFLOCALITY_CACHE_DIR"]) / "masks").exists()


def test_the_key_of_moments_is_that_of_the_images():
    images = random_images(torch.Generator().manual_seed(8), 30, (1, 4, 4), torch.uint8)
    key = pf.Moments.from_data(images).content_key()
    assert pf.Moments.from_data(images.flip(0)).content_key() == key
    images[0, 0, 0, 0] ^= 1
    assert pf.Moments.from_data(images).content_key() != key


WRONG_WEIGHTS = {
    "list": ([[1.0]], TypeError, "`weights` must be a bool or float tensor"),
    "integers": (
        torch.ones(2, 2, dtype=torch.int64),
        TypeError,
        "`weights` must be a bool or float",
    ),
    "vector": (torch.ones(4), ValueError, "`weights` must have shape"),
    "empty": (torch.ones(0, 4), ValueError, "`weights` must have shape"),
    "nan": (torch.full((2, 2), float("nan")), ValueError, "`weights` holds NaN"),
    "negative": (-torch.ones(2, 2), ValueError, "`weights` holds negative"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights(case):
    weights, error, message = WRONG_WEIGHTS[case]
    with pytest.raises(error, match=message):
        QueryWeights(weights)


def test_weights_of_the_wrong_size():
    x = torch.zeros(1, 1, 3, 3)
    with pytest.raises(ValueError, match=r"`weights` must have shape \[9, 9\]"):
        pf.ops.masked_posterior_mean(x, x, torch.ones(9, 8), 0.5)


def test_bits_and_back(rng):
    mask = torch.rand(7, 13, generator=rng) < 0.5
    weights = QueryWeights(mask)
    assert torch.equal(weights.dense(torch.bool), mask)
    assert torch.equal(QueryWeights.from_bits(weights.bits, 13).dense(torch.bool), mask)
    assert weights.nbytes == 14
