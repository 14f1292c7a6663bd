"""What masks are made of, when, and where they are kept."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from truth import random_images

import pyflocality as pf

SHAPE = (1, 32, 33)
VALUES = 1056


def images(count: int) -> torch.Tensor:
    return random_images(torch.Generator().manual_seed(3), count, SHAPE, torch.uint8)


def entries() -> list[Path]:
    folder = Path(os.environ["PYFLOCALITY_CACHE_DIR"], "masks")
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*images are too few for PCA locality")
        yield


@pytest.mark.parametrize(("count", "way"), [(40, "gram"), (1200, "cholesky")])
def test_a_set_alone_takes_the_cheapest_way(count, way, monkeypatch):
    data = pf.TrainingSet(images(count))
    moments = pf.Moments.from_data(data)
    denoiser = pf.PCALocalityDenoiser(data, 0.05)
    assert denoiser.way == way
    alone = denoiser.weights_at(0.4, 0.9)
    assert type(denoiser.moments) is (pf.Basis if way == "gram" else pf.Moments)
    for given, told in ((moments, "cholesky"), (moments.basis(), "components")):
        other = pf.PCALocalityDenoiser(data, 0.05, moments=given)
        assert other.way == told
        assert torch.equal(other.weights_at(0.4, 0.9).dense(torch.bool), alone.dense(torch.bool))
    # Masks of other contents or ways are no one's.
    assert len(entries()) == 3


@pytest.mark.parametrize("count", [40, 1200])
def test_nothing_is_computed_where_all_masks_are_cached(count, monkeypatch):
    data = pf.TrainingSet(images(count))
    x = torch.zeros(1, *SHAPE)
    expected = [pf.PCALocalityDenoiser(data, 0.05)(x, sigma) for sigma in (0.2, 2.0)]

    def fail(*_: object, **__: object) -> None:
        pytest.fail("computed again")

    monkeypatch.setattr(pf.Basis, "from_data", fail)
    monkeypatch.setattr(pf.Moments, "from_data", fail)
    again = pf.PCALocalityDenoiser(pf.TrainingSet(images(count)), 0.05)
    assert all(torch.equal(again(x, s), e) for s, e in zip((0.2, 2.0), expected, strict=True))


def test_warnings_are_those_of_masks_that_were_made():
    """Values that vary in few images have no input: told also where the masks are cached."""
    few = images(900)
    few[:, 0, :2] = 0
    few[0, 0, 0, :5] = 255
    data, x = pf.TrainingSet(few), torch.zeros(1, *SHAPE)
    told = []
    for _ in range(2):
        with pytest.warns(UserWarning) as found:
            pf.PCALocalityDenoiser(data, 0.9)(x, 0.05)
        told.append(sorted(str(warning.message) for warning in found))
    assert told[0] == told[1]


@pytest.mark.parametrize("cached", [True, False])
def test_masks_beyond_the_budget_are_read_or_made_by_tiles(cached, monkeypatch, tmp_path):
    data, x = pf.TrainingSet(images(40)), torch.zeros(2, *SHAPE)
    whole = pf.PCALocalityDenoiser(data, 0.05, moments=pf.Basis.from_data(data))
    expected = whole(x, 0.4)
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "other"))
    if not cached:
        monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "1KB")
        warnings.filterwarnings("ignore", message="nothing is cached|.*limit")
    # Bits take 139,392 bytes.
    basis = pf.Basis.from_data(data)
    small = pf.PCALocalityDenoiser(data, 0.05, moments=basis, memory_budget=2**17)
    weights = small.weights_at(0.4)
    assert weights.is_held == cached
    assert len(entries()) == (1 if cached else 0)
    assert torch.equal(small(x, 0.4), expected)
    assert weights.density == pytest.approx(whole.weights_at(0.4).density)


def test_signed_weights_beyond_a_budget_are_refused_with_the_least():
    data = pf.TrainingSet(images(40))
    basis = pf.Basis.from_data(data)
    denoiser = pf.PCALocalityDenoiser(data, 0, moments=basis, memory_budget="9MB")
    denoiser(torch.zeros(1, *SHAPE), 0.4)
    large = pf.TrainingSet(torch.zeros(3, 3, 30, 30, dtype=torch.uint8))
    few = pf.PCALocalityDenoiser(large, 0, moments=pf.Basis.from_data(large), memory_budget="9MB")
    with pytest.raises(ValueError, match=r"at least 63MB for the signed weights of 2700 values"):
        few(torch.zeros(1, 3, 30, 30), 0.4)


def test_nothing_is_shown_where_progress_is_not_asked_for(capfd):
    data = pf.TrainingSet(images(1200))
    pf.PCALocalityDenoiser(data, 0.05).weights_at(0.4)
    assert capfd.readouterr().err == ""
