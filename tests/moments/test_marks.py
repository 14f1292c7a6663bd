"""Tiles in single precision: their bounds hold, and their bits are those of double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from truth import random_images

import pyflocality as pf
from pyflocality.moments import marks
from pyflocality.moments.mask_tiles import masks_of
from pyflocality.moments.projector import (
    Projector,
    projector_by_cholesky,
    projector_of_components,
)

SHAPE = (3, 14, 14)
VALUES = 588
LEVELS = [0.01, 0.1, 1.0, 5.0, 80.0]
# Terms that single precision adds at once, fewer than there are.
PIECE = 50


@pytest.fixture
def moments(rng) -> pf.Moments:
    coarse = torch.rand(900, 3, 5, 5, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(14, 14), mode="bilinear")
    rough = torch.rand(900, *SHAPE, generator=rng)
    images = (255 * (0.9 * smooth + 0.1 * rough)).byte()
    # Values that hardly vary beside others.
    images[:, 0, 0, :5] = (images[:, 0, 0, :5] > 250).byte()
    return pf.Moments.from_data(images)


def projectors(moments: pf.Moments, ratio: float) -> dict[str, Projector]:
    found = {"components": projector_of_components(*moments.eigh(), ratio, 0.02)}
    factored = projector_by_cholesky(moments.covariance, ratio, 0.02)
    return found if factored is None else found | {"cholesky": factored}


@needs_cpu
@pytest.mark.parametrize("ratio", LEVELS)
def test_single_precision_is_off_by_no_more_than_its_bound(ratio, moments, monkeypatch):
    monkeypatch.setattr("pyflocality.moments.projector.PIECE", PIECE)
    monkeypatch.setattr(marks, "PIECE", PIECE)
    for name, projector in projectors(moments, ratio).items():
        found = marks.Marks(projector, 0.02)
        slack, factor = found.slack.double(), found._factor
        rows = torch.arange(VALUES)
        # Blocks without an entry of the identity.
        for block in (slice(0, 200), slice(200, VALUES)):
            others = rows[(rows < block.start) | (rows >= block.stop)]
            exact = projector.block(others, block)
            single = projector.single_product(factor, others, block).double()
            single *= -1.0 if projector.complement else 1.0
            off = (single - exact).abs() / (slack[others, None] * slack[block])
            # Not double precision, which is off by 1e-8 of that.
            assert 1e-7 < off.max() <= 1.0, name


@needs_cpu
@pytest.mark.parametrize("ratio", LEVELS)
def test_bits_are_those_of_double_precision(ratio, moments, monkeypatch):
    for projector in projectors(moments, ratio).values():
        found = masks_of(projector, 0.02, name="masks")
        with monkeypatch.context() as patch:
            patch.setattr(marks, "machine_reason", lambda backend: "not here")
            assert not marks.Marks(projector, 0.02).is_single
            expected = masks_of(projector, 0.02, name="masks")
        differs = np.unpackbits(found.weights.bits ^ expected.weights.bits).sum()
        assert differs <= expected.near
        assert found.near == expected.near


@needs_cpu
def test_single_precision_decides(moments, monkeypatch):
    formed = []
    for name in ("block", "single_product"):
        form = getattr(Projector, name)
        # Its name, and what it answers.
        monkeypatch.setattr(
            Projector,
            name,
            lambda *given, name=name, form=form: formed.append(name) or form(*given),
        )
    for ratio in LEVELS[1:4]:
        projector = projector_of_components(*moments.eigh(), ratio, 0.02)
        assert marks.Marks(projector, 0.02).is_single
        formed.clear()
        masks_of(projector, 0.02, name="masks")
        assert formed.count("single_product") >= 3
        if not projector.complement:
            assert formed.count("block") <= 2


def test_where_single_precision_is_not_asked(moments, monkeypatch):
    projector = projector_of_components(*moments.eigh(), 1.0, 0.02)
    # Errors beyond what is compared.
    assert not marks.Marks(projector, 1e-6).is_single
    # Rows in several pieces.
    columns = projector.factor.T.contiguous().T
    scattered = Projector(columns, projector.coefficients, projector.diagonal)
    assert not marks.Marks(scattered, 0.02).is_single
    before = torch.get_float32_matmul_precision()
    try:
        # Products of fewer digits.
        torch.set_float32_matmul_precision("medium")
        assert not marks.Marks(projector, 0.02).is_single
    finally:
        torch.set_float32_matmul_precision(before)


@needs_cpu
def test_a_tile_that_leaves_much_open_is_formed_in_double_precision(rng):
    """All entries but those on the diagonal are equal, and so is the cutoff."""
    count, terms = 40, 800
    factor = torch.full((count, terms), 0.1, dtype=torch.float64)
    ones = torch.ones(terms, dtype=torch.float64)
    projector = Projector(factor, ones, factor.square().sum(1))
    tile = marks.Marks(projector, 1.0).tile(slice(0, 16), slice(16, 40))
    assert tile.is_single
    entry = float(projector.block(slice(0, 1), slice(16, 17)))
    reached = tile.reached(torch.full((count,), entry, dtype=torch.float64))
    assert not tile.is_single
    assert reached.near == 16 * 24
    exact = projector.block(slice(0, 16), slice(16, 40)) >= entry
    assert np.array_equal(reached.bits, np.packbits(exact.numpy(), axis=1))


@needs_cpu
def test_sets_of_noise(rng):
    """Few entries are far from others, and cutoffs are among them."""
    moments = pf.Moments.from_data(random_images(rng, 700, SHAPE, torch.uint8))
    projector = projector_of_components(*moments.eigh(), 1.0, 0.05)
    found = masks_of(projector, 0.05, name="masks").weights.dense(torch.bool)
    exact = projector.block(slice(0, VALUES), slice(0, VALUES)).abs()
    relative = exact / projector.divisors()[:, None]
    expected = (relative >= 0.05 * relative.max()).T
    assert torch.equal(found, expected)
