"""Leading components from random numbers: how good they are, and the bound on what they leave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from moment_images import SHAPE, byte_images, float_images
from test_basis import images_of_spectrum

import pyflocality as pf
from pyflocality.backends import trace_blocks
from pyflocality.moments import Basis, Moments
from pyflocality.moments.basis import basis_key


def decays(power: float) -> torch.Tensor:
    values = 0.5 * torch.arange(1, 101, dtype=torch.float64) ** -power
    return images_of_spectrum(values, 150, 200)


SETS = {
    "steep": lambda: decays(2.0),
    "photographs": lambda: decays(1.0),
    "flat": lambda: decays(0.0),
    "bytes": lambda: byte_images(200),
    "few": lambda: byte_images(9),
    "floats": lambda: float_images(40),
    "one": lambda: byte_images(1),
    "constant": lambda: byte_images(1).repeat(9, 1, 1, 1),
    "constant floats": lambda: torch.full((9, *SHAPE), -0.1, dtype=torch.float64),
}


@pytest.mark.parametrize("components", [1, 7, 25])
@pytest.mark.parametrize("name", SETS)
def test_the_error_is_bounded(name, components):
    images = SETS[name]()
    basis = Basis.from_data(images, method="randomized", components=components)
    covariance = Moments.from_data(images).covariance
    truth = torch.linalg.eigvalsh(covariance).flip(0)
    rank = min(components, int((truth > 1e-14 * truth[0] + 1e-30).sum()))
    assert basis.method == "randomized"
    assert basis.rank == rank
    identity = basis.vectors.T @ basis.vectors
    assert ((identity - torch.eye(rank)).abs() <= 1e-12).all()
    left = covariance - (basis.vectors * basis.values) @ basis.vectors.T
    norm = float(torch.linalg.matrix_norm(left, 2))
    assert norm <= basis.error + 1e-14 * float(truth[0]) + 1e-30
    # Nothing of this rank leaves less than the next eigenvalue, and the bound is no excuse.
    following = float(truth[rank]) if rank < len(truth) else 0.0
    assert norm >= following * (1 - 1e-12)
    assert basis.error <= 10.0 * math.sqrt(2 / math.pi) * 25 * following + 1e-12
    assert (basis.values <= truth[:rank] * (1 + 1e-12) + 1e-30).all()
    variance = covariance.diagonal()
    if images.dtype == torch.uint8:
        assert torch.equal(basis.variance, variance)
        assert torch.equal(basis.mean, Moments.from_data(images).mean)
    else:
        assert torch.allclose(basis.variance, variance, rtol=1e-11, atol=1e-30)


def test_steep_spectra_are_found_nearly_exactly():
    values = 0.5 * 10.0 ** -torch.linspace(0, 6, 40, dtype=torch.float64)
    images = images_of_spectrum(values, 90, 120)
    basis = Basis.from_data(images, method="randomized", components=12)
    assert torch.allclose(basis.values, values[:12], rtol=1e-9)
    assert basis.error <= 3 * float(values[12])


def test_it_is_always_the_same_and_read_in_a_few_passes(tmp_path):
    images = byte_images(200)
    np.save(tmp_path / "images.npy", images.numpy())
    data = pf.TrainingSet.load(tmp_path / "images.npy", layout="NCHW")
    data.content_key()
    torch.manual_seed(1)
    with trace_blocks() as blocks:
        basis = Basis.from_data(data, method="randomized", components=5)
    # Mean, three products and the last one.
    assert sum(block.count for block in blocks) == 5 * 200
    torch.manual_seed(2)
    again = Basis.from_data(data, method="randomized", components=5)
    assert torch.equal(basis.vectors, again.vectors)
    assert basis.content_key() == basis_key(data, "randomized", 5)
    assert basis.content_key() != basis_key(data, "randomized", 6)
    flipped = Basis.from_data(data.augmented(flip=True), method="randomized", components=5)
    assert flipped.count == 400


def test_the_budget_says_how_many_components_there_are():
    images = torch.randint(0, 256, (60, 3, 64, 64), dtype=torch.uint8)
    whole = Basis.from_data(images, method="randomized")
    assert whole.rank == 59
    some = Basis.from_data(images, method="randomized", memory_budget="40MB")
    assert 1 <= some.rank < 59 and some.error > 0
    with pytest.raises(ValueError, match=r"must be at least \d+MB for components of 60 images"):
        Basis.from_data(images, method="randomized", memory_budget="20MB", components=40)


def test_refusals_name_the_way_that_is_left():
    images = torch.zeros(3000, 3, 40, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match="method='randomized' with few `components`"):
        Basis.from_data(images, memory_budget="100MB")
