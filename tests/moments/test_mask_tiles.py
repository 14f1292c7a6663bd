"""Masks made tile by tile, by every way of making the projector, against the rule as a whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from truth import random_images

import pyflocality as pf
from pyflocality.moments.eigen import Eigen
from pyflocality.moments.marks import NEAR
from pyflocality.moments.mask_tiles import (
    TILE,
    masks_by_tiles,
    masks_of,
    signed_weights_of,
)
from pyflocality.moments.projector import (
    Projector,
    projector_by_cholesky,
    projector_of_components,
)

SHAPE = (3, 14, 14)
VALUES = math.prod(SHAPE)


def natural(generator: torch.Generator, count: int) -> Tensor:
    """Images whose neighbours are alike, [n, 3, 14, 14]."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(14, 14), mode="bilinear")
    rough = torch.rand(count, *SHAPE, generator=generator)
    return (255 * (0.8 * smooth + 0.2 * rough)).byte()


def bordered(generator: torch.Generator, count: int) -> Tensor:
    """Images with values that never vary, and some that vary in one image alone."""
    images = natural(generator, count)
    images[:, :, :3] = 0
    images[:, :, :, -2:] = 255
    images[0, :, 1, :4] = 9
    return images


SETS = {
    "fewer images than values": lambda g: natural(g, 60),
    "as many": lambda g: natural(g, VALUES),
    "more": lambda g: natural(g, 1500),
    "noise": lambda g: random_images(g, 900, SHAPE, torch.uint8),
    "borders": lambda g: bordered(g, 1200),
    "few with borders": lambda g: bordered(g, 90),
    "duplicates": lambda g: natural(g, 40).repeat(30, 1, 1, 1),
    "two images": lambda g: natural(g, 2),
    "one image": lambda g: natural(g, 1),
    "the same image": lambda g: natural(g, 1).repeat(7, 1, 1, 1),
    "constant images": lambda g: torch.arange(256).byte()[:, None, None, None].expand(-1, *SHAPE),
}
LEVELS = [(0.01, 1.0), (0.1, 0.9), (0.7, 0.7), (5.0, 1.0), (80.0, 1.0)]


THRESHOLDS = [0.005, 0.05, 0.5]


def plain_rule(components: Eigen, ratio: float) -> Tensor:
    """Magnitudes that the threshold is compared with, output in the row: the rule as published."""
    values, vectors = components
    gains = torch.where(values > 0, values / (values + ratio**2), 0.0)
    projector = (vectors * gains) @ vectors.T
    diagonal = projector.diagonal().clone()
    return (projector / torch.where(diagonal.abs() < 1e-6, 1.0, diagonal)[:, None]).abs().T


def thin_components(images: Tensor) -> Eigen:
    """Components with variance of images fewer than their values, [r] and [D, r]."""
    centred = images.flatten(1).double()
    centred = (centred - centred.mean(0)) / 127.5
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    values = singular.square() / max(1, len(images) - 1)
    kept = values > VALUES * torch.finfo(torch.float64).eps * values[0]
    return Eigen(values[kept], right[kept].T)


@pytest.mark.parametrize("name", SETS)
def test_every_way_gives_the_masks_of_the_rule(name, rng):
    images = SETS[name](rng)
    moments = pf.Moments.from_data(images)
    components = moments.eigh()
    positive = components.values > 0
    ways = {"full": Eigen(components.values[positive], components.vectors[:, positive])}
    if len(images) <= VALUES:
        ways["thin"] = thin_components(images)
    for sigma, alpha in LEVELS:
        ratio = sigma / alpha
        magnitude = plain_rule(components, ratio)
        for threshold in THRESHOLDS:
            cutoff = threshold * magnitude.max()
            near = (magnitude - cutoff).abs() <= NEAR * cutoff
            projectors = {
                way: projector_of_components(*found, ratio, threshold)
                for way, found in ways.items()
            }
            factored = projector_by_cholesky(moments.covariance, ratio, threshold)
            if factored is not None:
                projectors["cholesky"] = factored
            for way, projector in projectors.items():
                counted = masks_of(projector, threshold, name="masks")
                by_tiles = masks_by_tiles(projector, threshold, name="masks")
                for weights in (counted.weights, by_tiles):
                    differs = weights.dense(torch.bool) != (magnitude >= cutoff)
                    place = f"{way} at {sigma}, {alpha}, {threshold}"
                    assert not (differs & ~near).any(), place
                    assert counted.near >= differs.sum(), place


def test_the_cholesky_way_is_taken_where_noise_is_above_rounding_and_refused_below(rng):
    moments = pf.Moments.from_data(natural(rng, 1500))
    taken = {
        sigma: projector_by_cholesky(moments.covariance, sigma, 0.02) is not None
        for sigma in (0.0, 1e-5, 1e-2, 1.0, 80.0)
    }
    assert taken == {0.0: False, 1e-5: False, 1e-2: True, 1.0: True, 80.0: True}


def test_little_noise_is_taken_from_what_the_components_lose(rng):
    values, vectors = pf.Moments.from_data(natural(rng, 1500)).eigh()
    little = projector_of_components(values, vectors, 1e-5, 0.05)
    much = projector_of_components(values, vectors, 5.0, 0.05)
    assert little.complement and not much.complement
    assert little.factor.shape[1] < VALUES


def test_components_are_left_out_below_the_stated_error(rng):
    vectors = torch.linalg.qr(torch.randn(VALUES, VALUES, generator=rng, dtype=torch.float64))[0]
    values = torch.logspace(2, -30, VALUES, dtype=torch.float64)
    projector = projector_of_components(values, vectors, 1.0, 0.02)
    exact = (vectors * (values / (values + 1.0))) @ vectors.T
    assert projector.factor.shape[1] < VALUES / 2
    whole = slice(0, VALUES)
    error = (projector.block(whole, whole) - exact).abs()
    # What is left out, and the rounding errors of the two products.
    limit = 1e-9 * 0.02 * projector.divisors().min() + VALUES * 2.3e-16
    assert error.max() <= limit
    torch.testing.assert_close(projector.diagonal, exact.diagonal(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("way", ["components", "cholesky"])
def test_blocks_are_those_of_the_whole(way, rng):
    moments = pf.Moments.from_data(natural(rng, 700))
    if way == "cholesky":
        projector = projector_by_cholesky(moments.covariance, 0.3, 0.02)
    else:
        projector = projector_of_components(*moments.eigh(), 0.3, 0.02)
    covariance = moments.covariance
    exact = covariance @ torch.linalg.inv(covariance + 0.09 * torch.eye(VALUES).double())
    for rows, columns in (((0, 100), (0, 100)), ((3, 40), (20, 300)), ((400, 500), (7, 9))):
        found = projector.block(slice(*rows), slice(*columns))
        expected = exact[slice(*rows), slice(*columns)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    chosen = torch.tensor([500, 2, 77])
    expected = exact[chosen, 30:90]
    torch.testing.assert_close(projector.block(chosen, slice(30, 90)), expected, rtol=0, atol=1e-12)


def test_signed_weights_are_those_of_the_rule(rng):
    moments = pf.Moments.from_data(natural(rng, 700))
    projector = projector_of_components(*moments.eigh(), 0.3, 0.0)
    weights = signed_weights_of(projector).dense(torch.float64)
    torch.testing.assert_close(weights.abs(), plain_rule(moments.eigh(), 0.3), rtol=0, atol=1e-11)
    assert (weights < 0).any() and VALUES > TILE


def test_tiles_that_came_before_the_largest_entry_are_made_again(rng):
    """A largest entry in the last tile that is taken changes the bits of all before it."""
    values = 700
    factor = torch.eye(values, dtype=torch.float64) * 0.3
    # The largest entry is off the diagonal, and apart from all others.
    factor[690, 690], factor[690, 0] = 0.0, 2.0
    factor += 0.01 * torch.randn(values, values, generator=rng, dtype=torch.float64)
    exact = factor @ factor.T
    projector = Projector(factor, torch.ones(values, dtype=torch.float64), exact.diagonal())
    magnitude = (exact / exact.diagonal()[:, None]).abs().T
    assert magnitude.argmax() // values >= TILE > magnitude.argmax() % values
    expected = magnitude >= 0.02 * magnitude.max()
    for made in (
        masks_of(projector, 0.02, name="masks").weights,
        masks_by_tiles(projector, 0.02, name="masks"),
    ):
        assert torch.equal(made.dense(torch.bool), expected)
