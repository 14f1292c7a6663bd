"""Linear images of a set: against float64 formulas, in blocks, low rank, cached and streamed."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from peak_memory import PeakMemory
from torch import Tensor
from truth import random_images

import pyflocality as pf
from pyflocality.backends import trace_blocks
from pyflocality.moments import linear_images
from pyflocality.moments.linear_images import (
    LEFT_OUT,
    PASSED,
    LinearImages,
    Whitened,
    _Asked,
    _Filter,
)
from pyflocality.posterior.sharded import ShardedImages
from pyflocality.storage import blobs
from pyflocality.storage.mapped import mapped_file
from pyflocality.storage.reader import Reader

SMALL, LARGE = (3, 6, 5), (1, 32, 32)
LEVELS = [(1.0, 0.0), (1.0, 0.02), (0.8, 0.5), (0.1, 3.0), (1.0, 1e-200), (1e-3, 1e300)]
EPS = float(torch.finfo(torch.float32).eps)


def training_set(count: int, shape=SMALL, dtype=torch.uint8) -> pf.TrainingSet:
    generator = torch.Generator().manual_seed(count)
    return pf.TrainingSet(random_images(generator, count, shape, dtype))


def truth(data: pf.TrainingSet, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """alpha W (v - m) from the dense covariance, and what sums of D float32 terms may be off."""
    values = torch.cat(list(Reader.of(data).values(7, torch.float64))).flatten(1)
    centred = values - values.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / (len(values) - 1))
    eigenvalues = torch.where(eigenvalues > 1e-10 * eigenvalues[-1], eigenvalues, 0.0)
    ratio = sigma / alpha
    gains = eigenvalues / torch.where(eigenvalues > 0, eigenvalues + ratio * ratio, 1.0)
    filtering = (vectors * gains) @ vectors.T
    # Of either form of the product: one of D terms, or one of D and one of up to D.
    terms = centred.abs() @ filtering.abs()
    factors = (centred.abs() @ vectors.abs() * gains) @ vectors.abs().T
    rounding = (2 * data.num_values + 4) * EPS * terms.maximum(factors)
    shape = -1, *data.image_shape
    return (centred @ filtering).reshape(shape), rounding.reshape(shape)


@pytest.fixture
def cached(monkeypatch) -> Path:
    """The folder of linear images, of which those of any size are mapped."""
    monkeypatch.setattr(blobs, "MAPPED", 1)
    return Path(os.environ["PYFLOCALITY_CACHE_DIR"]) / "linear"


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(200, torch.uint8), (200, torch.float32), (200, torch.float64), (20, torch.uint8)],
)
def test_they_are_those_of_the_formula(count, dtype):
    data = training_set(count, dtype=dtype)
    before = data.images.clone()
    images = LinearImages(data, pf.Basis.from_data(data))
    for alpha, sigma in LEVELS:
        expected, rounding = truth(data, alpha, sigma)
        found = images.at(alpha, sigma)
        assert found.dtype == torch.float32 and found.shape == (count, *SMALL)
        # Without noise all depends on which variances are none: relative errors of the smallest.
        bound = rounding + LEFT_OUT + (1e-8 if sigma < 1e-100 else 0.0)
        assert ((found.double() - expected).abs() <= bound).all()
    assert torch.equal(data.images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "rank"), [(200, None), (20, None), (200, 10)])
def test_whitened_images_are_those_of_the_formula(count, rank, dtype):
    """Distances in them are those of noise with a share of the covariance, divided by sigma."""
    data = training_set(count)
    basis = pf.Basis.from_data(data)
    basis = basis if rank is None else basis.leading(rank)
    images = LinearImages(data, basis)
    centred = data.values(dtype=torch.float64).flatten(1) - basis.mean.flatten()
    covariance = (basis.vectors * basis.values) @ basis.vectors.T
    for alpha, sigma in [(1.0, 0.02), (0.8, 0.5), (0.1, 3.0), (1e-3, 1e3)]:
        for gamma in (0.01, 0.3, 0.99):
            found = images.at(alpha, sigma, Whitened(gamma), dtype)
            assert found.dtype == dtype and found.shape == (count, *SMALL)
            noise = alpha**2 * gamma * covariance + sigma**2 * torch.eye(data.num_values).double()
            values, vectors = torch.linalg.eigh(noise)
            whitening = sigma * (vectors * values.rsqrt()) @ vectors.T
            expected = (1 - gamma) ** 0.5 * (centred @ whitening).reshape(-1, *SMALL)
            # Rounded once; in float64 the solvers of both sides round, the more the less noise.
            tolerance = EPS if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(found.double(), expected, rtol=EPS, atol=tolerance)


def test_whitened_images_are_others_in_the_cache(cached):
    data = training_set(60, LARGE)
    images = LinearImages(data, pf.Basis.from_data(data))
    asked = [(Whitened(0.3), torch.float32), (Whitened(0.4), torch.float32)]
    asked += [(Whitened(0.3), torch.float64), (PASSED, torch.float32)]
    made = [images.at(0.8, 0.5, *which).clone() for which in asked]
    assert len(list(cached.iterdir())) == len(asked)
    with trace_blocks() as blocks:
        again = LinearImages(data, pf.Basis.from_data(data))
        blocks.clear()
        for which, before in zip(asked, made, strict=True):
            assert torch.equal(again.at(0.4, 0.25, *which), before)
    assert blocks == []
    torch.testing.assert_close(made[0].double(), made[2], rtol=EPS, atol=EPS)


def test_one_image_is_its_own_mean():
    data = training_set(1)
    assert torch.equal(
        LinearImages(data, pf.Basis.from_data(data)).at(1.0, 0.3), torch.zeros(1, *SMALL)
    )
    whitened = LinearImages(data, pf.Basis.from_data(data)).at(1.0, 0.0, Whitened(0.3))
    # What division by 127.5 rounds.
    assert whitened.abs().max() < 1e-15


@pytest.mark.parametrize(("flip", "shifts"), [(True, 0), (True, 1)])
def test_copies_follow_in_the_order_of_the_reader(flip, shifts):
    data = training_set(30).augmented(flip=flip, shifts=shifts)
    expected, rounding = truth(data, 0.8, 0.5)
    found = LinearImages(data, pf.Basis.from_data(data)).at(0.8, 0.5)
    assert len(found) == 30 * data.copies
    assert ((found.double() - expected).abs() <= rounding + LEFT_OUT).all()


def test_blocks_of_any_size_make_the_same(monkeypatch):
    data = training_set(50)
    basis = pf.Basis.from_data(data)
    whole = LinearImages(data, basis).at(0.8, 0.5)
    monkeypatch.setattr(linear_images, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(linear_images, "_FEWEST", 1)
    monkeypatch.setattr(linear_images, "_ROWS", 7)
    with trace_blocks() as blocks:
        single = LinearImages(data, basis).at(0.8, 0.5)
    assert [block.count for block in blocks] == [1] * 50
    _, rounding = truth(data, 0.8, 0.5)
    assert ((single - whole).abs() <= 2 * rounding).all()


@pytest.mark.parametrize("sigma", [0.5, 300.0, 1e3, 1e9])
def test_components_are_left_out_within_the_bound(sigma):
    data = training_set(200)
    basis = pf.Basis.from_data(data)
    size, mean = data.num_values, basis.mean.flatten()
    gains = basis.values / (basis.values + sigma**2)
    longest = (1 + mean.abs()).norm()
    filtering = _Filter(basis, _Asked(sigma, PASSED, torch.float32))
    kept = {0.5: size, 300.0: 44, 1e3: 15, 1e9: 0}[sigma]
    assert filtering.rank == kept == (gains * longest > LEFT_OUT).sum()
    assert filtering.is_matrix == (2 * kept >= size)
    assert filtering.operations == (2 * size**2 if filtering.is_matrix else 4 * kept * size)
    # The images of the corners that the components which are left out point to.
    worst = (torch.sign(basis.vectors.T) - mean).float()
    expected = (worst.double() @ basis.vectors * gains) @ basis.vectors.T
    rounding = 4 * size * EPS * gains[0] * longest
    off = (filtering(worst).double() - expected).abs().max()
    assert off <= rounding + (LEFT_OUT if kept < size else 0.0)


def test_what_a_shorter_basis_leaves_out_is_bounded_by_its_error():
    data = training_set(200)
    basis = pf.Basis.from_data(data).leading(10)
    longest = float((1 + basis.mean.abs()).norm())
    assert basis.error > 0
    for alpha, sigma in ((0.8, 0.5), (0.1, 3.0)):
        expected, rounding = truth(data, alpha, sigma)
        off = (LinearImages(data, basis).at(alpha, sigma).double() - expected).abs()
        bound = basis.error * longest / (basis.error + (sigma / alpha) ** 2)
        assert (off <= bound + rounding + LEFT_OUT).all()
        assert off.max() > 10 * rounding.max()


def test_large_ones_are_made_once_and_mapped(cached):
    data = training_set(60, LARGE)
    basis = pf.Basis.from_data(data)
    made = LinearImages(data, basis).at(0.8, 0.5)
    assert [path.suffix for path in cached.iterdir()] == [".images"]
    assert mapped_file(made) is not None
    with trace_blocks() as blocks:
        read = LinearImages(data, basis).at(0.4, 0.25)
    assert blocks == [] and torch.equal(read, made)
    # Other images, other components and other levels are others.
    others = [
        LinearImages(data.subset(range(59)), basis).at(0.8, 0.5),
        LinearImages(data, basis.leading(10)).at(0.8, 0.5),
        LinearImages(data.augmented(flip=True), basis).at(0.8, 0.5),
        LinearImages(data, basis).at(0.8, 0.6),
    ]
    assert len(list(cached.iterdir())) == 1 + len(others)


def test_uses_by_others_are_no_changes(cached):
    """Every use of a cached file sets its time of change, that of another process too."""
    data = training_set(60, LARGE)
    basis = pf.Basis.from_data(data)
    made = LinearImages(data, basis).at(0.8, 0.5)
    (path,) = cached.iterdir()
    before, expected = path.stat().st_mtime_ns, made.clone()
    again = LinearImages(data, basis).at(0.8, 0.5)
    assert path.stat().st_mtime_ns > before
    model = pf.PatchSetDenoiser(data, 3)
    x = torch.randn(2, *LARGE, generator=torch.Generator().manual_seed(1))
    told = [model(x, 0.5, 0.8)]
    for images in (made, again, pickle.loads(pickle.dumps(mapped_file(made).view(made))).open()):
        assert torch.equal(images, expected)
        options = {"values": images[:, None], "with_image": True}
        told.append(pf.ops.patch_set_mean(x, data.images, 3, 0.5, 0.8, **options)[:, 0])
        os.utime(path)
    assert all(torch.equal(one, told[0]) for one in told)
    # One of another size is another file.
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="was changed"):
        pf.ops.patch_set_mean(x, data.images, 3, 0.5, 0.8, values=made[:, None])


def test_small_ones_are_made_where_they_are_used():
    data = training_set(60, LARGE)
    found = LinearImages(data, pf.Basis.from_data(data)).at(0.8, 0.5)
    assert mapped_file(found) is None
    assert not (Path(os.environ["PYFLOCALITY_CACHE_DIR"]) / "linear").exists()


def test_open_files_are_half_of_the_cache_at_most(cached, monkeypatch):
    """Else a run of many levels would fill it with files that nobody may remove."""
    data = training_set(100)
    images = LinearImages(data, pf.Basis.from_data(data))
    size = images.nbytes()
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", str(5 * size))
    levels = [0.1 * level for level in range(1, 9)]
    first = [images.at(1.0, sigma) for sigma in levels[:2]]
    assert all(images.at(1.0, sigma) is one for sigma, one in zip(levels, first, strict=False))
    for sigma in levels:
        assert mapped_file(images.at(1.0, sigma)) is not None
    assert len(images._kept) == 2
    # What is still open of the first ones stays; nothing was refused for it.
    assert images.at(1.0, levels[-1]) is images.at(1.0, levels[-1])


def test_a_damaged_file_is_made_anew(cached):
    data = training_set(60, LARGE)
    basis = pf.Basis.from_data(data)
    before = LinearImages(data, basis).at(0.8, 0.5).clone()
    (path,) = cached.iterdir()
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and made anew"):
        assert torch.equal(LinearImages(data, basis).at(0.8, 0.5), before)


def test_those_beyond_the_budget_are_streamed_and_never_in_memory(cached):
    data = training_set(300_000, (1, 4, 4))
    basis = pf.Basis.from_data(data.subset(range(1000)))
    budget = 10 * 2**20
    images = LinearImages(data, basis, memory_budget=budget)
    # Of tensors that live at once: a block, what is made of it, and the filter.
    with PeakMemory() as memory:
        found = images.at(0.8, 0.5)
    assert memory.peak <= budget < images.nbytes()
    assert Reader(found, None, budget).from_file
    # Every budget makes the same bits.
    assert torch.equal(found, LinearImages(data, basis, memory_budget="1GB").at(0.8, 0.5))


def test_mapped_images_are_read_block_by_block(tmp_path, cached):
    source = training_set(2000, LARGE)
    np.save(tmp_path / "set.npy", source.images.numpy())
    data = pf.TrainingSet.load(tmp_path / "set.npy")
    basis = pf.Basis.from_data(source).leading(20)
    # Reads all of them.
    data.content_key()
    with trace_blocks() as blocks:
        found = LinearImages(data, basis, memory_budget=100_000).at(0.8, 0.5)
    assert len(blocks) == 6 and all(block.from_file for block in blocks)
    (cached / next(cached.iterdir())).unlink()
    assert torch.equal(found, LinearImages(source, basis).at(0.8, 0.5))


def test_without_a_cache_a_budget_that_is_given_must_hold_them(monkeypatch):
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "0")
    data = training_set(5000, LARGE)
    basis = pf.Basis.from_data(data.subset(range(20)))
    with pytest.raises(
        ValueError, match=r"`memory_budget` must be at least 20MB for the linear im"
    ):
        LinearImages(data, basis, memory_budget="1MB").at(0.8, 0.5)
    held = LinearImages(data, basis).at(0.8, 0.5)
    assert mapped_file(held) is None and held.nbytes == 4 * 5000 * 1024


def test_they_are_kept_while_they_fit_the_budget():
    data = training_set(100)
    images = LinearImages(data, pf.Basis.from_data(data), memory_budget=2 * 4 * 100 * 90)
    first = images.at(1.0, 0.3)
    assert images.at(0.5, 0.15) is first
    images.at(1.0, 0.4)
    assert images.at(1.0, 0.3) is first
    images.at(1.0, 0.5)
    images.at(1.0, 0.6)
    again = images.at(1.0, 0.3)
    assert again is not first and torch.equal(again, first)


def test_those_of_one_set_and_basis_are_shared():
    data = training_set(100)
    basis = pf.Basis.from_data(data)
    images = LinearImages.shared(data, basis)
    # Another object that shows the same images.
    same = data.to("cpu")
    assert LinearImages.shared(same, basis) is images
    others = [
        LinearImages.shared(data.subset(range(50)), basis),
        LinearImages.shared(data.augmented(flip=True), basis),
        LinearImages.shared(data, basis.leading(3)),
        LinearImages.shared(data, basis, memory_budget="1GB"),
        LinearImages.shared(data, basis, progress=True),
    ]
    assert len({id(one) for one in [images, *others]}) == 6
    # They live for as long as somebody has them.
    left = [weakref.ref(one) for one in others]
    del others
    gc.collect()
    assert all(one() is None for one in left) and images in linear_images._shared.values()


def test_copies_of_them_make_their_own():
    data = training_set(100)
    images = LinearImages(data, pf.Basis.from_data(data))
    found = images.at(1.0, 0.3)
    for twin in (copy.deepcopy(images), pickle.loads(pickle.dumps(images))):
        assert not twin._kept and torch.equal(twin.at(1.0, 0.3), found)


def test_a_rank_has_those_of_its_own_images(cached):
    data = training_set(60, LARGE)
    basis, part = pf.Basis.from_data(data), data.subset(range(10, 30))
    expected = LinearImages(part, basis).at(0.8, 0.5)
    part.images = ShardedImages.of(part.images, object())
    assert torch.equal(LinearImages(part, basis).at(0.8, 0.5), expected)


def test_progress_tells_how_large_and_how_long(capsys, monkeypatch):
    from pyflocality._support import progress

    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    data = training_set(60)
    LinearImages(data, pf.Basis.from_data(data), progress=True).at(0.8, 0.4)
    assert "linear images at sigma / alpha 0.5 (21.6 kB, about 1 s)" in capsys.readouterr().err
