"""Memory-mapped sets: same answers in blocks, bounded memory, changed files are noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from every_denoiser import ReadingSubset

import pyflocality as pf
from pyflocality.backends import trace_blocks

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
    x = torch.randn(2, 2, 16, 16, generator=rng)
    for make in (
        lambda data, **o: pf.OptimalDenoiser(data, **o),
        lambda data, **o: pf.LocalDenoiser(data, 3, **o),
        lambda data, **o: pf.PatchSetDenoiser(data, 3, **o),
        lambda data, **o: pf.PCALocalityDenoiser(data, 0.05, **o),
    ):
        options = {"backend": backend}
        expected = make(resident.augmented(flip=flip), **options)(x, 0.7)
        with trace_blocks() as blocks:
            found = make(mapped.augmented(flip=flip), memory_budget=BUDGET, **options)(x, 0.7)
        assert any(block.from_file for block in blocks)
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_scans_beyond_the_budget_leave_no_pages(path, rng, monkeypatch):
    moments = pf.Moments.from_data(pf.TrainingSet(torch.from_numpy(np.load(path))))
    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", str(BUDGET))
    data = pf.TrainingSet.load(path)
    x = torch.randn(1, 2, 16, 16, generator=rng)
    denoiser = pf.OptimalDenoiser(data)
    golden = pf.GoldenSubset(denoiser)
    for read in (
        lambda: denoiser(x, 1.0),
        lambda: pf.PCALocalityDenoiser(data, 0.05, moments=moments)(x, 1.0),
        lambda: torch.equal(pf.Moments.from_data(data).covariance, moments.covariance),
        lambda: len(list(golden._pooled_chunks())),
        lambda: pf.CertifiedSubset(denoiser, moments=moments).index,
        lambda: data.content_key(),
    ):
        assert read() is not False
        assert resident_bytes(path) < BUDGET + 2**17
    # Without noise all images are compared, and the few that rounding cannot tell apart are picked
    # from the map.
    resident = pf.GoldenSubset(pf.OptimalDenoiser(pf.TrainingSet(torch.from_numpy(np.load(path)))))
    assert torch.equal(golden.select(x[0], 0.0), resident.select(x[0], 0.0))
    # Within the budget the set stays where it is.
    pf.OptimalDenoiser(data, memory_budget="1GB")(x, 1.0)
    assert resident_bytes(path) > 0.9 * path.stat().st_size


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
    reads = [lambda: pf.Moments.from_data(data), lambda: data.values(0, 2)]
    # That of the whole set is known: principal components are told apart by it.
    reads.append(data.subset(slice(0, 500)).content_key)
    for use in (*(lambda d=d: d(x, 1.0) for d in denoisers), *reads):
        with pytest.raises(ValueError, match=re.escape(f"{path}: the file of a memory-mapped")):
            use()
    if damage != "cut short":
        pf.OptimalDenoiser(pf.TrainingSet.load(path))(x, 1.0)


SCANS = """
import sys, torch, pyflocality as pf
data = pf.TrainingSet.load(sys.argv[1])
options = {"memory_budget": sys.argv[3], "backend": sys.argv[2]}
denoisers = [
    pf.OptimalDenoiser(data, **options),
    pf.LocalDenoiser(data, 3, **options),
    pf.PatchSetDenoiser(data, 3, **options),
    pf.PCALocalityDenoiser(data, 0.05, **options),
]
x = torch.zeros(1, 2, 16, 16)
while True:
    for denoiser in denoisers:
        for sigma in (0.3, 1.0):
            denoiser(x, sigma)
    print("scanned", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="mapped files cannot be cut short there")
@pytest.mark.parametrize("budget", ["65536", "1GB"])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_a_file_cut_short_by_another_process(path, backend, budget):
    """The process ends with an error that names the file, not with a signal."""
    if backend == "cpu" or budget == "1GB":
        pytest.importorskip("pyflocality._C")
    program = [sys.executable, "-c", SCANS, str(path), backend, budget]
    environment = os.environ | {"PYFLOCALITY_MEMORY_BUDGET": budget}
    # Away from the sources: what is installed has the extension.
    child = subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=path.parent,
    )
    try:
        assert child.stdout.readline() == "scanned\n", child.communicate()
        os.truncate(path, path.stat().st_size // 2)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 1
    assert f"ValueError: {path}: the file of a memory-mapped training set was" in errors


@pytest.mark.parametrize("budget", [BUDGET, "1GB"])
def test_a_deleted_file_is_still_there(path, rng, budget):
    data = pf.TrainingSet.load(path)
    x = torch.randn(1, 2, 16, 16, generator=rng)
    expected = pf.OptimalDenoiser(data, memory_budget=budget)(x, 1.0)
    path.unlink()
    assert torch.equal(pf.OptimalDenoiser(data, memory_budget=budget)(x, 1.0), expected)
