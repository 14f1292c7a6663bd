"""Memory-mapped sets: same answers in blocks, bounded memory, changed files are noticed."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from every_denoiser import ReadingSubset

import pyflocality as pf
from pyflocality._mapped import _files, mapped_file, streamed

BUDGET = 64 * 2**10


@pytest.fixture
def path(tmp_path):
    """A file of 900 images, 7 times the budget."""
    found = tmp_path / "images.npy"
    np.save(found, np.random.default_rng(3).integers(0, 256, (900, 2, 16, 16), dtype=np.uint8))
    return found


def resident_bytes(path) -> int:
    """Memory of this process that is pages of a file."""
    total, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as maps:
        for line in maps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("flip", [False, True])
def test_same_answers_in_blocks(path, rng, backend, flip):
    mapped = pf.TrainingSet.load(path)
    resident = pf.TrainingSet(torch.from_numpy(np.load(path)))
    assert mapped_file(mapped.images) is not None and mapped_file(resident.images) is None
    x = torch.randn(2, 2, 16, 16, generator=rng)
    for make in (
        lambda data, **o: pf.OptimalDenoiser(data, **o),
        lambda data, **o: pf.LocalDenoiser(data, 3, **o),
        lambda data, **o: pf.PatchSetDenoiser(data, 3, **o),
        lambda data, **o: pf.PCALocalityDenoiser(data, 0.05, **o),
    ):
        options = {"backend": backend}
        expected = make(resident.augmented(flip=flip), **options)(x, 0.7)
        found = make(mapped.augmented(flip=flip), memory_budget=BUDGET, **options)(x, 0.7)
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_pages_behind_a_scan_are_given_back(path, rng, monkeypatch):
    data = pf.TrainingSet.load(path)
    x = torch.randn(1, 2, 16, 16, generator=rng)
    expected = pf.OptimalDenoiser(data)(x, 1.0)
    # Within the budget the set stays where it is.
    assert resident_bytes(path) > 0.9 * path.stat().st_size
    found = pf.OptimalDenoiser(data, memory_budget=BUDGET)(x, 1.0)
    assert resident_bytes(path) < BUDGET + 2**17
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", str(BUDGET))
    moments = pf.Moments.from_data(pf.TrainingSet(torch.from_numpy(np.load(path))))
    assert torch.equal(pf.Moments.from_data(data).covariance, moments.covariance)
    assert resident_bytes(path) < BUDGET + 2**17
    denoiser = pf.OptimalDenoiser(data)
    golden = pf.GoldenSubset(denoiser)
    for read in (
        # Without noise all images are compared, and nothing else is read.
        lambda: golden.select(x[0], 0.0),
        lambda: len(list(golden._pooled_chunks())),
        lambda: pf.CertifiedSubset(denoiser, moments=moments).index,
    ):
        read()
        assert resident_bytes(path) < BUDGET + 2**17
    data.content_key()
    assert resident_bytes(path) < BUDGET + 2**17


def test_streamed_blocks_are_the_images(path):
    images = pf.TrainingSet.load(path).images
    blocks = [block.clone() for block in streamed(images, 130, BUDGET)]
    assert [len(block) for block in blocks] == [130] * 6 + [120]
    assert torch.equal(torch.cat(blocks), torch.from_numpy(np.load(path)))
    part = images[100:333]
    assert torch.equal(torch.cat([b.clone() for b in streamed(part, 50, 1)]), part)


@pytest.mark.parametrize("damage", ["replaced", "changed", "cut short"])
def test_a_changed_file_is_noticed(path, rng, damage):
    data = pf.TrainingSet.load(path)
    x = torch.randn(1, 2, 16, 16, generator=rng)
    denoisers = [
        pf.OptimalDenoiser(data),
        pf.NearestDenoiser(data.subset(slice(3, 9))),
        pf.GoldenSubset(pf.OptimalDenoiser(data)),
        ReadingSubset(pf.OptimalDenoiser(data)),
    ]
    for denoiser in denoisers:
        denoiser(x, 1.0)
    if damage == "replaced":
        other = path.with_name("other.npy")
        np.save(other, np.zeros((900, 2, 16, 16), np.uint8))
        os.replace(other, path)
    elif damage == "changed":
        with open(path, "r+b") as file:
            file.seek(4000)
            file.write(b"\x00")
    else:
        os.truncate(path, path.stat().st_size // 2)
    for use in (*(lambda d=d: d(x, 1.0) for d in denoisers), lambda: pf.Moments.from_data(data)):
        with pytest.raises(ValueError, match=re.escape(f"{path}: the file of a memory-mapped")):
            use()
    if damage != "cut short":
        pf.OptimalDenoiser(pf.TrainingSet.load(path))(x, 1.0)


def test_a_change_during_a_scan_is_noticed(path, rng, monkeypatch):
    from pyflocality.native import posterior

    data = pf.TrainingSet.load(path)
    blocks = posterior.image_blocks

    def slow(problem):
        yield from blocks(problem)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(posterior, "image_blocks", slow)
    denoiser = pf.OptimalDenoiser(data, backend="cpu", memory_budget=BUDGET)
    with pytest.raises(ValueError, match="was changed"):
        denoiser(torch.randn(1, 2, 16, 16, generator=rng), 1.0)


def test_a_deleted_file_is_still_there(path, rng):
    data = pf.TrainingSet.load(path)
    x = torch.randn(1, 2, 16, 16, generator=rng)
    expected = pf.OptimalDenoiser(data)(x, 1.0)
    path.unlink()
    assert torch.equal(pf.OptimalDenoiser(data)(x, 1.0), expected)


def test_files_are_forgotten_with_their_sets(path):
    before = len(_files)
    data = pf.TrainingSet.load(path)
    part = data.subset(slice(0, 10)).images
    assert len(_files) == before + 1 and mapped_file(part).path == str(path)
    del data
    assert len(_files) == before + 1
    del part
    assert len(_files) == before
