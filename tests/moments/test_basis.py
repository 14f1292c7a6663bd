"""Principal components, the thin way and the full one, against those of a covariance."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from moment_images import SHAPE, byte_images, float_images

import pyflocality as pf
from pyflocality.backends import trace_backends, trace_blocks
from pyflocality.moments import Basis, Moments, eigen, gram
from pyflocality.moments.basis import basis_bytes, basis_key

EPS = np.finfo(np.float64).eps
D = 30


def images_of_spectrum(values: torch.Tensor, n: int, d: int = 60) -> torch.Tensor:
    """Float images whose covariance has the given eigenvalues: [n, 1, 1, d], r < n."""
    generator = torch.Generator().manual_seed(0)
    r = len(values)
    noise = torch.randn(n, r + 1, generator=generator, dtype=torch.float64)
    noise[:, 0] = 1.0
    left = torch.linalg.qr(noise)[0][:, 1:]
    right = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0]
    return ((left * ((n - 1) * values).sqrt()) @ right.T).reshape(n, 1, 1, d)


def duplicates() -> torch.Tensor:
    return byte_images(5).repeat_interleave(4, 0)


def two_groups() -> torch.Tensor:
    """Images that are constant but for one step of one value."""
    images = torch.full((20, *SHAPE), 200, dtype=torch.uint8)
    images[7, 1, 2, 3] = 201
    return images


SETS = {
    "bytes": lambda: byte_images(20),
    "as many as values": lambda: byte_images(D),
    "two": lambda: byte_images(2),
    "one": lambda: byte_images(1),
    "one of floats": lambda: float_images(1),
    "constant": lambda: byte_images(1).repeat(9, 1, 1, 1),
    "constant floats": lambda: torch.full((9, *SHAPE), -0.1, dtype=torch.float64),
    "duplicates": duplicates,
    "one step of one value": two_groups,
    "floats": lambda: float_images(20),
    "singles": lambda: float_images(20).float(),
    "decay to 1e-13": lambda: images_of_spectrum(0.1 * 10.0 ** -torch.linspace(0, 13, 27), 40),
    "cliff": lambda: images_of_spectrum(torch.tensor([0.1] * 5 + [1e-12] * 10).double(), 40),
    "equal": lambda: images_of_spectrum(torch.full((12,), 0.01).double(), 40),
}
RANKS = {"two": 1, "one": 0, "one of floats": 0, "constant": 0, "constant floats": 0}
RANKS |= {"duplicates": 4, "one step of one value": 1, "bytes": 19, "floats": 19, "equal": 12}


@pytest.mark.parametrize("method", ["gram", "covariance"])
@pytest.mark.parametrize("name", SETS)
def test_components_make_the_covariance(name, method):
    """Eigenvalues, eigenvectors and products, with the errors of a backward stable solver."""
    images = SETS[name]()
    basis, moments = Basis.from_data(images, method=method), Moments.from_data(images)
    covariance, (values, _) = moments.covariance, moments.eigh()
    size, largest = images[0].numel(), float(values[0])
    # A few roundings of the largest for each value of an image; and those of the mean, squared.
    bound = 4 * size * EPS * largest + size * EPS**2
    assert basis.method == method
    assert basis.count == len(images)
    assert basis.error == 0.0
    assert basis.vectors.shape == (size, basis.rank)
    # Sums of equal floats leave rounding errors in moments.
    if name in RANKS and (name, method) != ("constant floats", "covariance"):
        assert basis.rank == RANKS[name]
    assert (basis.values > size * EPS * largest).all()
    assert (basis.values.diff() <= 0).all()
    assert ((basis.values - values[: basis.rank]).abs() <= bound).all()
    identity = basis.vectors.T @ basis.vectors
    assert ((identity - torch.eye(basis.rank)).abs() <= 1e-13).all()
    made = (basis.vectors * basis.values) @ basis.vectors.T
    assert torch.linalg.matrix_norm(made - covariance, 2) <= bound
    residual = covariance @ basis.vectors - basis.vectors * basis.values
    assert (residual.norm(dim=0) <= bound).all()
    variance = covariance.diagonal()
    if images.dtype == torch.uint8:
        assert torch.equal(basis.mean, moments.mean)
        assert torch.equal(basis.variance, variance)
    else:
        assert torch.allclose(basis.mean, moments.mean, rtol=0, atol=8 * EPS)
        assert torch.allclose(basis.variance, variance, rtol=1e-13, atol=1e-30)


def test_small_variances_keep_their_digits():
    """The thin way is relative to each variance; the covariance to the largest."""
    values = 0.1 * 10.0 ** -torch.linspace(0, 12, 25, dtype=torch.float64)
    basis = Basis.from_data(images_of_spectrum(values, 40), method="gram")
    assert basis.rank == 25
    # The images themselves are rounded: by eps of their size, which is that of the largest.
    allowed = 1e-9 * values + 4 * EPS * (values * values[0]).sqrt()
    assert ((basis.values - values).abs() <= allowed).all()


def test_fewer_images_than_values_take_the_thin_way():
    for count, method in ((D - 1, "gram"), (D, "gram"), (D + 1, "covariance")):
        basis = Basis.from_data(byte_images(count))
        assert basis.method == method
        assert basis.rank == min(count - 1, D)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_products_of_bytes_are_the_same_bits_in_any_bands(monkeypatch, backend):
    images = byte_images(25)
    reader = gram.Reader(images)
    whole = gram.gram_of(reader, progress=False)
    monkeypatch.setattr(gram, "BAND_BYTES", 25 * 7)
    monkeypatch.setattr(gram, "BLOCK_BYTES", 8 * 25 * 3)
    with pf.use_backend(backend), trace_backends() as backends:
        banded = gram.gram_of(reader, progress=False)
    assert set(backends) == {("covariance", backend)}
    assert len(backends) == 5
    assert all(torch.equal(*pair) for pair in zip(whole, banded, strict=True))
    centred = images.double().flatten(1) / 127.5 - 1
    centred = centred - centred.mean(0)
    error = (banded.matrix - centred @ centred.T / 24).abs().max()
    assert error <= 8 * EPS * banded.matrix.diagonal().max()
    parts = Basis.from_data(images)
    assert (parts.vectors.T @ parts.vectors - torch.eye(24)).abs().max() <= 1e-13


def test_copies_count_as_images():
    images = byte_images(6)
    data = pf.TrainingSet(images, layout="NCHW").augmented(flip=True)
    copies = torch.cat([images, images.flip(3)])
    basis, expected = Basis.from_data(data), Basis.from_data(copies)
    assert basis.count == expected.count == 12
    assert torch.equal(basis.mean, expected.mean)
    assert torch.equal(basis.variance, expected.variance)
    assert torch.equal(basis.values, expected.values)
    assert torch.equal(basis.vectors, expected.vectors)
    assert basis.content_key() != expected.content_key()


def test_mapped_images_are_read_in_blocks(tmp_path, monkeypatch):
    images = byte_images(25)
    np.save(tmp_path / "images.npy", images.numpy())
    data = pf.TrainingSet.load(tmp_path / "images.npy", layout="NCHW")
    expected = Basis.from_data(images)
    # Known from now on.
    data.content_key()
    monkeypatch.setattr(gram, "BAND_BYTES", 25 * 16)
    with trace_blocks() as blocks:
        basis = Basis.from_data(data)
    # Two bands, once for the products and once for the components.
    assert sum(block.count for block in blocks) == 4 * 25
    assert torch.allclose(basis.values, expected.values, rtol=1e-13, atol=0)
    assert basis.content_key() == expected.content_key()


@pytest.mark.parametrize("method", ["gram", "covariance"])
def test_leading_components_tell_what_they_leave_out(method):
    images = byte_images(20)
    whole = Basis.from_data(images, method=method)
    part = Basis.from_data(images, method=method, components=5)
    assert part.rank == 5
    assert torch.equal(part.values, whole.values[:5])
    assert torch.equal(part.vectors, whole.vectors[:, :5])
    assert torch.equal(part.variance, whole.variance)
    left = Moments.from_data(images).covariance - (part.vectors * part.values) @ part.vectors.T
    # What is left out has the next eigenvalue as its norm.
    assert abs(torch.linalg.matrix_norm(left, 2) - part.error) <= 1e-13
    assert part.error == whole.values[5]
    assert part.leading(9) is part
    assert Basis.from_data(images, method=method, components=20).rank == 19


def test_key_is_known_without_components():
    images = byte_images(20)
    data = pf.TrainingSet(images, layout="NCHW")
    keys = set()
    for method in ("gram", "covariance"):
        for components in (None, 5):
            basis = Basis.from_data(data, method=method, components=components)
            assert basis.content_key() == basis_key(data, method, components) == basis_key(basis)
            keys.add(basis.content_key())
    moments = Moments.from_data(images)
    assert moments.basis().content_key() == basis_key(moments)
    keys.add(basis_key(moments))
    keys.add(basis_key(pf.TrainingSet(images.flip(0), layout="NCHW")))
    assert len(keys) == 6
    assert basis_key(data) == basis_key(data, "gram")


def test_moments_give_their_components():
    moments = Moments.from_data(byte_images(20))
    basis, (values, vectors) = moments.basis(), moments.eigh()
    assert basis.method == "covariance"
    assert torch.equal(basis.values, values[:19]) and (values[19:] == 0).all()
    assert torch.equal(basis.vectors, vectors[:, :19])
    assert basis.vectors.data_ptr() == vectors.data_ptr()
    few = moments.blended(Moments.from_data(byte_images(99, seed=1)), 0.5).basis()
    assert few.rank == D


def test_budget_that_is_given_holds():
    images = torch.zeros(3000, 3, 40, 40, dtype=torch.uint8)
    least = -(-basis_bytes(3000, 4800, "gram") // 2**20)
    with pytest.raises(ValueError, match=f"`memory_budget` must be at least {least}MB"):
        Basis.from_data(images, memory_budget="100MB")
    least = -(-basis_bytes(3000, 4800, "covariance") // 2**20)
    with pytest.raises(ValueError, match=f"`memory_budget` must be at least {least}MB"):
        Basis.from_data(images, memory_budget="100MB", method="covariance")


def test_mistakes_are_named():
    images = byte_images(4)
    with pytest.raises(TypeError, match="`data` must be a TrainingSet or a torch.Tensor, got 3"):
        Basis.from_data(3)
    with pytest.raises(ValueError, match="`method` must be"):
        Basis.from_data(images, method="svd")
    with pytest.raises(ValueError, match="`components` must be"):
        Basis.from_data(images, components=0)
    with pytest.raises(TypeError, match="`progress` must be"):
        Basis.from_data(images, progress=1)


def test_repr_and_place():
    basis = Basis.from_data(byte_images(4))
    assert repr(basis) == "Basis(count=4, image_shape=(2, 3, 5), rank=3, 'gram')"
    assert basis.to("cpu") is basis


def test_matrices_beyond_a_budget_that_is_given_are_refused(monkeypatch):
    moments = Moments.from_data(torch.zeros(2, 3, 24, 24, dtype=torch.uint8))
    least = {"covariance": 8 * 1728**2, "eigenvectors": 32 * 1728**2}
    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", "17MB")
    message = f"must be at least {-(-least['covariance'] // 2**20)}MB for the covariance of 1728"
    with pytest.raises(ValueError, match=message):
        moments.covariance  # noqa: B018
    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", "24MB")
    assert not moments.covariance.any()
    message = f"at least {-(-least['eigenvectors'] // 2**20)}MB for eigenvectors of the covariance"
    with pytest.raises(ValueError, match=message):
        moments.eigh()
    # Without the covariance.
    assert not moments.variance.any()


def test_matrices_beyond_the_memory_there_is_are_refused(monkeypatch):
    monkeypatch.setattr(eigen, "check_memory", functools.partial(refuse_beyond, 20 * 2**20))
    moments = Moments.from_data(torch.zeros(2, 3, 24, 24, dtype=torch.uint8))
    with pytest.raises(MemoryError, match="the covariance of 1728 values takes"):
        moments.covariance  # noqa: B018
    images = torch.zeros(1800, 3, 24, 24, dtype=torch.uint8)
    with pytest.raises(MemoryError, match="components of 1800 images of 1728 values by method="):
        Basis.from_data(images)


def refuse_beyond(there: int, needed: int, what: str, instead: str) -> None:
    if needed > there:
        raise MemoryError(f"{what} takes {needed} bytes: {instead}")
