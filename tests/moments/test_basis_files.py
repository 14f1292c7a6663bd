"""Files of components: the same bits, damage, and those beside a file of moments."""

from __future__ import annotations

import warnings

import pytest
import torch
from moment_images import assert_same_bits, byte_images, float_images

from pyflocality.moments import Basis, Moments, eigen
from pyflocality.moments.basis import basis_key, save_beside
from pyflocality.moments.files import basis_file
from pyflocality.moments.mask_source import MaskSource

TENSORS = ("mean", "values", "vectors", "variance")


def assert_same_basis(left: Basis, right: Basis) -> None:
    for name in ("count", "image_shape", "rank", "method", "error", "key"):
        assert getattr(left, name) == getattr(right, name)
    for name in TENSORS:
        assert torch.equal(getattr(left, name), getattr(right, name))


BASES = {
    "thin": lambda: Basis.from_data(byte_images(20)),
    "full": lambda: Basis.from_data(byte_images(99)),
    "floats": lambda: Basis.from_data(float_images(20)),
    "leading": lambda: Basis.from_data(byte_images(20), components=3),
    "of moments": lambda: Moments.from_data(byte_images(20)).basis(),
    "one image": lambda: Basis.from_data(byte_images(1)),
}


@pytest.mark.parametrize("name", BASES)
def test_saved_components_are_the_same_bits(name, tmp_path):
    basis = BASES[name]()
    basis.save(tmp_path / "b.safetensors")
    assert_same_basis(Basis.load(tmp_path / "b.safetensors"), basis)
    basis.save(tmp_path / "again.safetensors")
    written = [(tmp_path / name).read_bytes() for name in ("b.safetensors", "again.safetensors")]
    assert written[0] == written[1]


def test_mistakes_are_named(tmp_path):
    path, basis = tmp_path / "b.safetensors", Basis.from_data(byte_images(20))
    basis.save(path)
    with pytest.raises(FileExistsError, match=r"b\.safetensors exists: pass force=True"):
        basis.save(path)
    basis.save(path, force=True)
    with pytest.raises(ValueError, match=r"b\.safetensors does not hold moments saved"):
        Moments.load(path)
    Moments.from_data(byte_images(20)).save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors does not hold basis saved"):
        Basis.load(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere is not a file"):
        Basis.load(tmp_path / "nowhere")
    content = path.read_bytes()
    for damaged in (
        content[:-50],
        content[:-8] + bytes(8),
        content.replace(b'\\"rank\\": 19', b'\\"rank\\": 18'),
        content.replace(b'\\"error\\": 0.0', b'\\"error\\": -1.'),
        content.replace(b'\\"count\\": 20', b'\\"count\\": 21'),
    ):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.safetensors is damaged"):
            Basis.load(path)
    path.write_bytes(content.replace(b'"version":"1"', b'"version":"7"'))
    with pytest.raises(ValueError, match="has version 7 of the format; this release reads"):
        Basis.load(path)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A file of moments with components beside it, where no eigenvectors may be computed."""
    path, images = tmp_path / "m.safetensors", byte_images(20)
    Moments.from_data(images).save(path)
    save_beside(Basis.from_data(images), path, basis_file(path))

    def refused(*given: object, **options: object) -> None:
        raise AssertionError("eigenvectors were computed")

    monkeypatch.setattr(eigen.torch.linalg, "eigh", refused)
    return path


def test_components_beside_moments_are_read(beside):
    images = byte_images(20)
    assert basis_file(beside).name == "m.basis.safetensors"
    moments = Moments.load(beside)
    # The key of the set's own components, known before they are read.
    assert basis_key(moments) == Basis.load(basis_file(beside)).key
    basis = moments.basis()
    assert basis.method == "gram" and basis.rank == 19
    assert moments.basis() is basis
    assert_same_bits(moments, Moments.from_data(images))
    assert moments.to("cpu").basis() is basis
    moments.update(byte_images(3, seed=1))
    assert moments.stored_basis is None
    with pytest.raises(AssertionError, match="eigenvectors were computed"):
        moments.basis()


def test_masks_are_made_of_components_beside_moments(beside):
    """Whatever would be cheaper of moments alone: nothing is decomposed for them."""
    moments = Moments.load(beside)
    source = MaskSource(moments)
    assert source.way == "components" and MaskSource(Moments.from_data(byte_images(20))).way != (
        "components"
    )
    basis = Basis.load(basis_file(beside))
    for threshold in (0.0, 0.02, 0.3):
        found, expected = (
            one.masks(0.8, 0.5, threshold).weights.dense(torch.float64)
            for one in (source, MaskSource(basis))
        )
        assert torch.equal(found, expected) and found.any()


def test_components_of_other_moments_are_not_taken(beside):
    Moments.from_data(byte_images(20, seed=1)).save(beside, force=True)
    with pytest.warns(UserWarning, match=r"m\.basis\.safetensors is of other moments than"):
        moments = Moments.load(beside)
    with pytest.raises(AssertionError, match="eigenvectors were computed"):
        moments.basis()
    basis_file(beside).write_bytes(b"something else")
    with pytest.warns(UserWarning, match=r"anew: .*m\.basis\.safetensors is damaged or not a"):
        Moments.load(beside)
    basis_file(beside).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Moments.load(beside)


def test_components_that_change_meanwhile_are_refused(beside):
    moments = Moments.load(beside)
    other = Basis.load(basis_file(beside)).leading(3)
    save_beside(other, beside, basis_file(beside))
    with pytest.raises(ValueError, match=r"m\.basis\.safetensors has been changed since"):
        moments.basis()
