"""Blocks that readers of mapped sets hand out, whatever becomes of the file."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch

import pyflocality as pf
from pyflocality.kernels.stored import StoredProblem
from pyflocality.storage.mapped import _files, mapped_file
from pyflocality.storage.reader import Reader

# Of a file that is cut short: images, and bytes that are left.
COUNT, LEFT = 900, 10_000
BUDGET = 64 * 2**10


@pytest.fixture
def path(tmp_path):
    """A file of 900 images, 7 times the budget."""
    found = tmp_path / "images.npy"
    np.save(found, np.random.default_rng(3).integers(0, 256, (900, 2, 16, 16), dtype=np.uint8))
    return found


def test_streamed_blocks_are_the_images(path):
    images = pf.TrainingSet.load(path).images
    blocks = [block.clone() for block in Reader(images, memory_budget=BUDGET).blocks(130)]
    assert [len(block) for block in blocks] == [130] * 6 + [120]
    assert torch.equal(torch.cat(blocks), torch.from_numpy(np.load(path)))
    part = images[100:333]
    assert torch.equal(
        torch.cat([b.clone() for b in Reader(part, memory_budget=1).blocks(50)]), part
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("layout", ["C", "F", "channels last", "raw"])
def test_streamed_blocks_of_other_layouts(tmp_path, layout, dtype):
    """Whatever the order of the values in the file; images of odd sizes behind an odd offset."""
    values = np.random.default_rng(4).integers(0, 256, (50, 3, 5, 7)).astype(dtype)
    values = values if dtype == np.uint8 else values / np.float32(127.5) - 1
    path = tmp_path / "images.npy"
    if layout == "raw":
        path.write_bytes(b"x" * 5004 + values.tobytes())
        data = pf.TrainingSet(np.memmap(path, dtype, "r", 5004, values.shape))
    else:
        stored = np.moveaxis(values, 1, 3) if layout == "channels last" else values
        np.save(path, np.array(stored, order="F" if layout == "F" else "C"))
        data = pf.TrainingSet.load(path)
    expected = torch.from_numpy(values)
    assert mapped_file(data.images) is not None
    for images, wanted in (
        (data.images, expected),
        (data.images[7:31], expected[7:31]),
        (data.images[:, 1:, :, 2:6], expected[:, 1:, :, 2:6]),
        (data.images[::3], expected[::3]),
    ):
        blocks = [block.clone() for block in Reader(images, memory_budget=1).blocks(9)]
        assert [len(block) for block in blocks[:-1]] == [9] * (len(blocks) - 1)
        assert torch.equal(torch.cat(blocks), wanted)


def test_maps_that_hold_something_else_are_not_read_from_their_file(path):
    changed = np.load(path, mmap_mode="c")
    changed[:] = 7
    images = pf.TrainingSet(changed).images
    assert all((block == 7).all() for block in Reader(images, memory_budget=1).blocks(100))

    old = np.load(path, mmap_mode="r")
    other = path.with_name("other.npy")
    np.save(other, np.zeros((900, 2, 16, 16), np.uint8))
    os.replace(other, path)
    images = pf.TrainingSet(old).images
    assert all((block != 0).any() for block in Reader(images, memory_budget=1).blocks(100))


def test_a_change_during_a_scan_is_noticed(path, rng, monkeypatch):
    data = pf.TrainingSet.load(path)
    blocks = StoredProblem.rows

    def slow(problem):
        yield from blocks(problem)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(StoredProblem, "rows", slow)
    denoiser = pf.OptimalDenoiser(data, backend="cpu", memory_budget=BUDGET)
    with pytest.raises(ValueError, match="was changed"):
        denoiser(torch.randn(1, 2, 16, 16, generator=rng), 1.0)


@pytest.mark.parametrize("left", [0, 100_000])
def test_a_file_cut_short_between_two_blocks(path, left):
    images = pf.TrainingSet.load(path).images
    blocks = Reader(images, memory_budget=BUDGET).blocks(100)
    next(blocks)
    os.truncate(path, left)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .* has {left} bytes, and had"):
        list(blocks)
    # Without a name, too.
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .* has {left} bytes, and had"):
        list(Reader(images, memory_budget=BUDGET).blocks(100))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_files_are_forgotten_with_their_sets(path):
    before, opened = len(_files), len(os.listdir("/proc/self/fd"))
    data = pf.TrainingSet.load(path)
    part = data.subset(slice(0, 10)).images
    assert len(_files) == before + 1 and mapped_file(part).path == str(path)
    del data
    assert len(_files) == before + 1
    del part
    assert len(_files) == before and len(os.listdir("/proc/self/fd")) == opened


def test_the_cause_of_another_error_is_named(tmp_path):
    """A computation that stumbles over zeros is not what went wrong."""
    path = tmp_path / "images.npy"
    np.save(path, np.full((COUNT, 2, 16, 16), 7, np.uint8))
    data = pf.TrainingSet.load(path)

    def read():
        os.truncate(path, LEFT)
        if data.images[-1].sum() == 0:
            raise ZeroDivisionError

    with pytest.raises(ValueError, match=re.escape(f"{path}: the file")) as caught:
        Reader(data.images).checked(read)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_page_that_cannot_be_read_is_not_forgotten(tmp_path, monkeypatch):
    """Of a disk that fails the file looks as it did."""
    path = tmp_path / "images.npy"
    np.save(path, np.full((COUNT, 2, 16, 16), 7, np.uint8))
    data = pf.TrainingSet.load(path)
    status = os.stat(path)

    def read():
        os.truncate(path, LEFT)
        found = data.images.sum()
        os.truncate(path, status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return found

    for use in (lambda: Reader(data.images).checked(read), data.values, data.content_key):
        with pytest.raises(ValueError, match=r"images\.npy: .* was not readable everywhere"):
            use()
