"""`pyflocality cache`: where the cache is, what it holds, and how it is emptied."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyflocality as pf


@pytest.fixture
def folder() -> Path:
    """A cache with the masks of two noise levels, and a file of somebody else."""
    folder = Path(os.environ["PYFLOCALITY_CACHE_DIR"])
    images = torch.randint(0, 256, (9, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    moments = pf.Moments.from_data(images.to(torch.uint8))
    for sigma in (0.3, 0.4):
        pf.masks.cached_pca_locality_weights(moments, sigma)
    (folder / "masks" / "notes.txt").write_text("mine")
    return folder


def masks_of(folder: Path) -> int:
    """Bytes of both masks: of 1,024 values each, eight in a byte, and what stands beside them."""
    size = sum(path.stat().st_size for path in (folder / "masks").glob("*.bits"))
    assert 2 * 1024 * 128 < size < 2 * 1024 * 130
    return size


def decoded(tmp_path: Path) -> pf.TrainingSet:
    """A set of 1,000 images that is decoded into the cache."""
    values = np.random.default_rng(0).integers(0, 256, (1000, 8, 8), np.uint8)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for index, image in enumerate(values):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            file.writestr(f"{index:04d}.png", content.getvalue())
    return pf.TrainingSet.load(tmp_path / "images.zip", progress=False)


def test_what_is_there_is_told(run, folder, tmp_path, monkeypatch):
    size = masks_of(folder)
    assert run("cache", "path") == (0, f"{folder}\n", "")
    assert run("cache", "size") == (0, f"{size}\n", "")
    code, text, _ = run("cache")
    told = f"{size / 1000:.3g} kB"
    assert code == 0
    assert text == f"{folder}: {told} in 2 entries (masks {told}), at most 21.5 GB\n"
    code, doctor, _ = run("doctor")
    assert code == 0 and f"\ncache: {text}" in doctor
    decoded(tmp_path)
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "1GB")
    code, text, _ = run("cache", "--json")
    use = json.loads(text)
    assert code == 0 and use["limit"] == 2**30
    assert use["folder"] == str(folder) and use["entries"] == 3
    assert use["kinds"]["masks"] == size and use["kinds"]["images"] > 64000
    assert use["bytes"] == sum(use["kinds"].values())
    assert use["bytes"] == sum(
        path.stat().st_size for path in folder.rglob("*") if len(path.stem) == 32
    )


@pytest.mark.skipif(os.name == "nt", reason="the system keeps what is open there")
def test_clear_removes_our_files_that_nobody_has_open(run, folder, tmp_path):
    data, size = decoded(tmp_path), masks_of(folder)
    code, text, _ = run("cache", "clear")
    assert code == 0
    assert text.startswith(f"removed 2 entries ({size / 1000:.3g} kB); 1 entries (")
    assert text.endswith(" are in use and stay\n")
    assert [path.name for path in (folder / "masks").iterdir()] == ["notes.txt"]
    # The set is as it was.
    assert pf.OptimalDenoiser(data)(data.values(0, 1), 0.1).isfinite().all()
    del data
    code, text, _ = run("cache", "clear", "--json")
    record = json.loads(text)
    assert code == 0 and record["removed"]["entries"] == 1
    assert record["removed"]["bytes"] > 64000
    assert record["in_use"] == {"entries": 0, "bytes": 0}
    assert record["bytes"] == record["entries"] == 0
    assert [path.name for path in folder.rglob("*")] == ["masks", "notes.txt"]
    assert run("cache", "clear")[1] == "removed 0 entries (0 B)\n"


def test_where_there_is_no_cache(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "file"))
    code, text, told = run("cache")
    assert (code, text) == (0, "no folder can be used\n")
    assert f"{tmp_path / 'file'} is no folder" in told
    assert json.loads(run("cache", "clear", "--json")[1])["folder"] is None


@pytest.mark.parametrize("words", [["remove"], ["clear", "now"], ["--all"]])
def test_wrong_words_are_refused(run, folder, words):
    code, _, told = run("cache", *words)
    assert code == 2 and "pyflocality cache --help" in told
    assert run("cache", "size")[1] == f"{masks_of(folder)}\n"


def test_a_limit_that_cannot_be_read_is_refused(run, monkeypatch):
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "much")
    code, _, told = run("cache")
    assert code == 2 and "PYFLOCALITY_CACHE_LIMIT must be bytes or a string like '2GB'" in told
