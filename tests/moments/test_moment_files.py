"""Files of moments: damage, other versions, killed writers."""

from __future__ import annotations

import fcntl
import os
import re

import pytest
import torch
from moment_images import SHAPE, assert_same_bits, byte_images, float_images

from pyflocality.moments import Moments
from pyflocality.moments import files as _moment_files


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_saved_moments_go_on_as_if_never_saved(make, tmp_path):
    path = tmp_path / "moments.safetensors"
    moments = Moments.from_data(make(20))
    moments.save(path)
    written = path.read_bytes()
    loaded = Moments.load(path)
    assert loaded.image_shape == SHAPE
    assert_same_bits(loaded, moments)
    more = make(13, seed=1)
    loaded.update(more)
    moments.update(more)
    assert_same_bits(loaded, moments)
    # Totals read from a mapped file must not write through to it.
    assert path.read_bytes() == written
    assert [file.name for file in tmp_path.iterdir()] == ["moments.safetensors"]


def test_save_does_not_replace_a_file_unasked(tmp_path):
    path = tmp_path / "moments.safetensors"
    path.write_text("precious")
    moments = Moments.from_data(byte_images(5))
    with pytest.raises(FileExistsError, match=r"moments\.safetensors.*force=True"):
        moments.save(path)
    assert path.read_text() == "precious"
    moments.save(path, force=True)
    assert_same_bits(Moments.load(path), moments)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder is a folder"):
        moments.save(tmp_path / "folder", force=True)


def test_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="disk full"):
        Moments.from_data(byte_images(5)).save(tmp_path / "moments.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    moments = Moments.from_data(byte_images(5))
    path = tmp_path / "moments.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match=r"moments\.safetensors cannot be written") as caught:
            moments.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def damage_truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_header_cut(content: bytes) -> bytes:
    return content[:40]


def damage_empty(content: bytes) -> bytes:
    return b""


def damage_bit(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[-100] ^= 4
    return bytes(changed)


def damage_count(content: bytes) -> bytes:
    assert content.count(b'\\"count\\": 20') == 1
    return content.replace(b'\\"count\\": 20', b'\\"count\\": 30')


def damage_dtype(content: bytes) -> bytes:
    """The bytes of the sums are what they were, and mean something else."""
    assert content.count(b'"dtype":"I64"') == 2
    return content.replace(b'"dtype":"I64"', b'"dtype":"F64"', 1)


def damage_shape(content: bytes) -> bytes:
    assert content.count(b'"shape":[30]') == 1
    return content.replace(b'"shape":[30]', b'"shape":[30,1]').replace(b"  ", b"", 1)


def damage_text(content: bytes) -> bytes:
    return b"not a safetensors file, but long enough to look like one" * 10


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated,
        damage_header_cut,
        damage_empty,
        damage_bit,
        damage_count,
        damage_dtype,
        damage_shape,
        damage_text,
    ],
)
def test_damaged_files_are_refused_by_name(damage, tmp_path):
    path = tmp_path / "moments.safetensors"
    Moments.from_data(byte_images(20)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"moments\.safetensors is damaged"):
        Moments.load(path)


@pytest.mark.parametrize(
    "header, said",
    [
        (
            '{"kind": "uint8", "count": 20, "image_shape": [[2]]}',
            "'image_shape' must be 3 positive",
        ),
        (
            '{"kind": "uint8", "count": 20.0, "image_shape": [2, 3, 5]}',
            "'count' must be a positive",
        ),
        ('{"kind": "int7", "count": 20, "image_shape": [2, 3, 5]}', "unknown kind, 'int7'"),
        ('{"kind": "blended", "count": 20, "image_shape": [2, 3, 5]}', "it holds the tensors"),
        ('{"kind": "uint8", "count": 20, "image_shape": [1, 3, 5]}', "it holds the tensors"),
        ('{"kind": "uint8", "count": 20}', "has no 'image_shape'"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds a JSON list"),
    ],
)
def test_headers_of_wrong_kinds_are_refused_by_name(header, said, tmp_path):
    """Under a checksum that is right."""
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    tensors = {
        name: torch.zeros([30] * n, dtype=torch.int64) for n, name in ((1, "total"), (2, "gram"))
    }
    metadata = {"format": "pyflocality-moments", "version": "1", "moments": header}
    save_file(tensors, path, metadata | {"sha256": _moment_files.checksum(header, tensors)})
    with pytest.raises(ValueError, match=r"other\.safetensors is damaged: .*" + re.escape(said)):
        Moments.load(path)


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_equal_moments_make_equal_files(make, tmp_path):
    contents = set()
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        Moments.from_data(make(20)).save(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_loaded_moments_do_not_change_with_their_file(tmp_path):
    path = tmp_path / "moments.safetensors"
    moments = Moments.from_data(byte_images(20))
    moments.save(path)
    loaded = Moments.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_bits(loaded, moments)


@pytest.mark.skipif(os.name == "nt", reason="mapped files cannot be cut short there")
def test_a_file_that_is_cut_short_while_it_is_loaded(tmp_path, monkeypatch):
    pytest.importorskip("pyflocality._C")
    import safetensors

    path, opened = tmp_path / "moments.safetensors", safetensors.safe_open
    Moments.from_data(torch.zeros(3, 1, 40, 40, dtype=torch.uint8)).save(path)

    def cutting(*arguments, **options):
        file = opened(*arguments, **options)
        os.truncate(path, 20_000)
        return file

    monkeypatch.setattr(safetensors, "safe_open", cutting)
    with pytest.raises(ValueError, match=r"moments\.safetensors is damaged .*cut short"):
        Moments.load(path)


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "moments.safetensors"
    left = [path.with_name(f".{path.name}.{number * 16}.tmp") for number in ("0f", "1e")]
    other = path.with_name(f".other.safetensors.{'0f' * 16}.tmp")
    for file in (*left, other):
        file.write_bytes(b"half")
    moments = Moments.from_data(byte_images(20))
    with open(left[1], "r+b") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        moments.save(path)
        assert sorted(tmp_path.iterdir()) == sorted([path, left[1], other])


def test_files_of_others_and_other_versions_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"gram": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold moments"):
        Moments.load(path)
    save_file({"gram": torch.zeros(3)}, path, {"format": "pyflocality-moments", "version": "2"})
    with pytest.raises(ValueError, match=r"other\.safetensors has version 2.*reads version 1"):
        Moments.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        Moments.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Moments.from_data(byte_images(2)).save(tmp_path / "nowhere" / "moments.safetensors")
