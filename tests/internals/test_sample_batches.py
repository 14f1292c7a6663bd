"""Many samples of `generate`: batch by batch, to the bits of one batch, in the memory of one."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from peak_memory import peak_of
from PIL import Image

import pyflocality as pf
from pyflocality import pictures
from pyflocality.cli import _generate, _samples, main

SHAPE = (1, 6, 6)


@pytest.fixture
def source(tmp_path):
    images = torch.randint(0, 256, (20, *SHAPE), generator=torch.Generator().manual_seed(11))
    path = tmp_path / "tiny.npy"
    np.save(path, images.to(torch.uint8).numpy())
    return path


def generate(source, out, *more, n=8, steps=3):
    words = ["generate", source, "--out", out, "--denoiser", "local", "--window", 3, "--n", n]
    return main([str(word) for word in [*words, "--steps", steps, "--no-progress", *more]])


def record(out):
    return json.loads((out / "run.json").read_text())


@pytest.fixture
def in_threes(monkeypatch):
    """Batches of three samples, from here on."""

    def begin():
        monkeypatch.setattr(_samples, "_LEAST", 3)
        monkeypatch.setattr(_samples, "_STATE_BYTES", 1)

    return begin


@pytest.fixture
def stop_after(monkeypatch):
    """Stop a run in the middle of a call of the denoiser."""
    whole = pf.Denoiser.__call__

    def stop(calls):
        left = itertools.chain([True] * calls, itertools.repeat(False))

        def call(self, *arguments):
            if not next(left):
                raise KeyboardInterrupt
            return whole(self, *arguments)

        monkeypatch.setattr(pf.Denoiser, "__call__", call)

    return stop


@needs_cpu
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_batches_make_the_files_of_one_batch(source, tmp_path, in_threes, sampler):
    assert generate(source, tmp_path / "whole", "--sampler", sampler, "--individual") == 0
    in_threes()
    assert generate(source, tmp_path / "parts", "--sampler", sampler, "--individual") == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names
    for name in set(names) - {"run.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    whole, parts = record(tmp_path / "whole"), record(tmp_path / "parts")
    for field in ("nearest", "recited", "sampling", "resumed_calls", "resumed_samples"):
        assert whole[field] == parts[field], field
    # Each of the three batches asks by itself.
    assert len(parts["calls"]) == 3 * len(whole["calls"])


def test_batches_are_bounded_by_states_and_answers():
    """16 MiB of states, 1 GiB of answers, but 64 samples at least."""
    assert _samples.batch_size((3, 32, 32), 10) == 2**24 // (4 * 3072) == 1365
    assert _samples.batch_size((3, 32, 32), 100) == 2**30 // 100 // (4 * 3072) == 873
    assert _samples.batch_size((3, 64, 64), 10) == 341
    assert _samples.batch_size((3, 256, 256), 10) == 64
    assert _samples.batch_size((3, 256, 256), 1000) == 64


def test_what_is_held_does_not_grow_with_steps_or_samples(source, tmp_path, monkeypatch, in_threes):
    """But for the starting noise, and what is kept of the ways that are drawn."""
    in_threes()
    for module in (_samples, _generate):
        monkeypatch.setattr(module, "SHOWN", 6)
    out = iter(range(100))

    def peak(n, steps, *more):
        folder = tmp_path / str(next(out))
        return peak_of(lambda: generate(source, folder, *more, n=n, steps=steps))

    # What the times of a schedule take, in float64.
    image, slack = 4 * 36, 10 * 100 * 8
    few = peak(6, 4, "--no-trajectory")
    assert peak(6, 100, "--no-trajectory") <= few + slack
    # Starting noise, and two numbers for each nearest image.
    assert peak(606, 4, "--no-trajectory") <= few + 600 * (image + 4 * 12) + slack
    # Ten columns are drawn of a way, however long it is.
    assert peak(6, 100) <= peak(6, 10) + slack


@needs_cpu
@pytest.mark.parametrize(
    ("calls", "samples", "answers"),
    [(0, 0, 0), (2, 0, 2), (3, 3, 0), (4, 3, 1), (6, 6, 0), (8, 6, 2)],
)
def test_a_run_goes_on_behind_its_last_step(
    source, tmp_path, in_threes, stop_after, calls, samples, answers
):
    assert generate(source, tmp_path / "whole") == 0
    in_threes()
    out = tmp_path / "out"
    stop_after(calls)
    assert generate(source, out) == 130
    stop_after(100)
    assert generate(source, out) == 0
    found = record(out)
    assert (found["resumed_samples"], found["resumed_calls"]) == (samples, answers)
    for name in ("samples.npy", "samples.png", "trajectory.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert found["nearest"] == record(tmp_path / "whole")["nearest"]
    assert not list(out.glob(".*"))


def test_what_is_kept_grows_with_the_samples_not_with_their_steps(
    source, tmp_path, in_threes, stop_after
):
    in_threes()
    for steps in (5, 50):
        out = tmp_path / str(steps)
        # In the middle of the last of five batches.
        stop_after(4 * steps + 2)
        assert generate(source, out, "--no-trajectory", n=15, steps=steps) == 130
        left = {path.suffix: path.stat().st_size for path in out.iterdir()}
        header = 16
        assert left == {
            ".samples": 4 * (header + 3 * 4 * 36),
            ".answers": 2 * (header + 3 * 4 * 36),
        }


@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_damaged_samples_are_made_again(source, tmp_path, in_threes, stop_after, damage):
    in_threes()
    assert generate(source, tmp_path / "whole") == 0
    out = tmp_path / "out"
    stop_after(7)
    assert generate(source, out) == 130
    (kept,) = out.glob(".*.samples")
    content = bytearray(kept.read_bytes())
    if damage == "cut short":
        content = content[:-7]
    else:
        content[40] ^= 1
    kept.write_bytes(content)
    stop_after(100)
    assert generate(source, out) == 0
    assert record(out)["resumed_samples"] == (3 if damage == "cut short" else 0)
    whole = np.load(tmp_path / "whole" / "samples.npy")
    assert np.array_equal(np.load(out / "samples.npy"), whole)


def test_the_picture_has_the_first_of_many(source, tmp_path, monkeypatch, in_threes, capsys):
    in_threes()
    for module in (_samples, _generate):
        monkeypatch.setattr(module, "SHOWN", 4)
    out = tmp_path / "out"
    assert generate(source, out, "--no-nearest") == 0
    assert "samples.png has the first 4 of them" in capsys.readouterr().out
    shown = torch.from_numpy(np.load(out / "samples.npy")[:4])
    with Image.open(out / "samples.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(pictures.sample_sheet(shown))).all()
    assert np.load(out / "samples.npy", mmap_mode="r").shape == (8, *SHAPE)
