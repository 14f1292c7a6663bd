"""An interrupted `generate` goes on behind its last finished step, to the same bits."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

import pyflocality as pf
from pyflocality.backends import machine_reason
from pyflocality.cli import main

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

ARGUMENTS = ["--denoiser", "local", "--window", "3", "--n", "2", "--steps", "6", "--no-progress"]


def generate(out, *more):
    return main(["generate", "digits", "--out", str(out), *ARGUMENTS, *more])


def record(out):
    return json.loads((out / "run.json").read_text())


@pytest.fixture
def stop_after(monkeypatch):
    """Stop a run in the middle of a call of the denoiser."""
    whole = pf.Denoiser.__call__

    def stop(calls, error=KeyboardInterrupt):
        left = itertools.chain([True] * calls, itertools.repeat(False))

        def call(self, *arguments):
            if not next(left):
                raise error
            return whole(self, *arguments)

        monkeypatch.setattr(pf.Denoiser, "__call__", call)

    yield stop


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_goes_on_to_the_same_bits(tmp_path, stop_after, sampler):
    assert generate(tmp_path / "whole", "--sampler", sampler) == 0
    assert record(tmp_path / "whole")["resumed_calls"] == 0
    out = tmp_path / "out"
    stop_after(4)
    assert generate(out, "--sampler", sampler) == 130
    left = [path.name for path in out.iterdir()]
    assert len(left) == 1 and left[0].endswith(".answers")
    stop_after(100)
    assert generate(out, "--sampler", sampler) == 0
    found = record(out)
    calls = 6 if sampler == "ddim" else 11
    assert (found["resumed_calls"], len(found["calls"])) == (4, calls - 4)
    whole = np.load(tmp_path / "whole" / "samples.npy")
    assert np.array_equal(np.load(out / "samples.npy"), whole)
    assert not list(out.glob(".*"))


def test_other_settings_begin_anew(tmp_path, stop_after):
    stop_after(4)
    assert generate(tmp_path / "out") == 130
    stop_after(100)
    assert generate(tmp_path / "out", "--seed", "1") == 0
    assert record(tmp_path / "out")["resumed_calls"] == 0


@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_damaged_answers_are_made_again(tmp_path, stop_after, damage):
    assert generate(tmp_path / "whole") == 0
    out = tmp_path / "out"
    stop_after(4)
    assert generate(out) == 130
    (kept,) = out.iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "cut short":
        content = content[:-7]
    else:
        # In the second of four answers.
        content[len(content) // 4 + 100] ^= 1
    kept.write_bytes(content)
    stop_after(100)
    assert generate(out) == 0
    assert record(out)["resumed_calls"] == (3 if damage == "cut short" else 1)
    whole = np.load(tmp_path / "whole" / "samples.npy")
    assert np.array_equal(np.load(out / "samples.npy"), whole)


def test_answers_are_never_written_through_a_link(tmp_path, stop_after, capsys):
    out, precious = tmp_path / "out", tmp_path / "precious"
    stop_after(4)
    assert generate(out) == 130
    (kept,) = out.iterdir()
    kept.rename(precious)
    content = precious.read_bytes()
    kept.symlink_to(precious)
    stop_after(100)
    assert generate(out) == 0
    assert "could not be resumed" in capsys.readouterr().err
    assert precious.read_bytes() == content
    assert record(out)["resumed_calls"] == 0 and not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("model", "backend", "resumed"),
    [("local", "auto", 4), ("local", "reference", 0), ("wiener", "auto", 0)],
)
def test_another_number_of_threads_resumes_where_it_changes_nothing(
    tmp_path, stop_after, model, backend, resumed
):
    if backend == "auto" and machine_reason("cpu") is not None:
        pytest.skip("the native extension is not built")
    words = ["generate", "digits", "--out", str(tmp_path / "out"), "--denoiser", model]
    words += ["--n", "2", "--steps", "6", "--no-progress"]
    words += ["--backend", backend] if model == "local" else []
    threads = torch.get_num_threads()
    stop_after(4)
    try:
        assert main(words) == 130
        torch.set_num_threads(threads + 1)
        stop_after(100)
        assert main(words) == 0
    finally:
        torch.set_num_threads(threads)
    assert record(tmp_path / "out")["resumed_calls"] == resumed
    assert record(tmp_path / "out")["software"]["threads"] == threads + 1
