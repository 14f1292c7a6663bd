"""Mistakes on the command line: one line each, and nothing left behind."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from cli_files import FILES, small
from PIL import Image

from pyflocality import cli

# The sets of these tests have fewer images than values.
pytestmark = pytest.mark.filterwarnings("ignore:.* images are too few for:UserWarning")


def test_existing_files_are_replaced_only_by_force(run, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples.npy").write_text("precious")
    (out / "notes.txt").write_text("mine")
    code, _, stderr = run(*small(source, out))
    assert code == 2
    assert "samples.npy" in stderr and "--force" in stderr
    assert (out / "samples.npy").read_text() == "precious"
    assert sorted(os.listdir(out)) == ["notes.txt", "samples.npy"]
    assert run(*small(source, out, "--force"))[0] == 0
    assert np.load(out / "samples.npy").shape == (3, 1, 6, 6)
    assert sorted(os.listdir(out)) == sorted([*FILES, "notes.txt"])


WRONG = {
    "n": (["--n", 0], "--n"),
    "n as a word": (["--n", "many"], "--n"),
    "steps": (["--steps", 0], "--steps"),
    "too many steps": (["--steps", 1001], "--steps"),
    "seed": (["--seed", -1], "--seed"),
    "huge seed": (["--seed", 2**63], "--seed"),
    "denoiser": (["--denoiser", "unet"], "--denoiser"),
    "schedule": (["--schedule", "linear"], "--schedule"),
    "sampler": (["--sampler", "plms"], "--sampler"),
    "spacing": (["--spacing", "middle"], "--spacing"),
    "foreign spacing": (["--spacing", "trailing", "--schedule", "karras"], "--spacing"),
    "threshold 1": (["--threshold", 1], "--threshold"),
    "threshold nan": (["--threshold", "nan"], "--threshold"),
    "softness below 0": (["--softness", -1], "--softness"),
    "softness nan": (["--softness", "nan"], "--softness"),
    "softness of signed weights": (["--threshold", 0, "--softness", 1], "--softness"),
    "foreign softness": (["--denoiser", "optimal", "--softness", 1], "--softness"),
    "temperature 0": (["--temperature", 0], "--temperature"),
    "temperature inf": (["--temperature", "inf"], "--temperature"),
    "loader batch": (["--aggregation", "batch-mean", "--loader-batch", 0], "--loader-batch"),
    "loader batch alone": (["--loader-batch", 8], "--loader-batch"),
    "aggregation": (["--aggregation", "mean"], "--aggregation"),
    "foreign window": (["--window", 3], "--window"),
    "even window": (["--denoiser", "local", "--window", 4], "--window"),
    "large window": (["--denoiser", "local", "--window", 13], "--window"),
    "window without size": (["--denoiser", "local", "--window", "1:"], "--window"),
    "window at nan": (["--denoiser", "local", "--window", "nan:3"], "--window"),
    "window at 0": (["--denoiser", "local", "--window", "0:3,1:5"], "--window"),
    "foreign moments": (["--denoiser", "optimal", "--moments", "x"], "--moments"),
    "no moments": (["--moments", "nowhere.safetensors"], "nowhere.safetensors"),
    "wiener has no backend": (["--denoiser", "wiener", "--backend", "cpu"], "--backend"),
    "backend": (["--backend", "tpu"], "--backend"),
    "memory budget": (["--memory-budget", "plenty"], "--memory-budget"),
    "memory budget 0": (["--memory-budget", "0GB"], "--memory-budget"),
    "device": (["--device", "abacus"], "--device"),
    "foreign device": (["--device", "meta"], "--device"),
    "missing device": (["--device", "cuda:99"], "--device"),
    "channels": (["--channels", 2], "--channels"),
    "resolution": (["--resolution", "6by6"], "--resolution"),
    "resolution 0": (["--resolution", "0x4"], "--resolution"),
    "split": (["--split", "test"], "--split"),
    "label": (["--label", 2], "--label"),
    "label name": (["--label", "cat"], "--label"),
    "unknown option": (["--treshold", 0.1], "--treshold"),
    "subset": (["--subset", "silver"], "--subset"),
    "foreign subset": (["--denoiser", "local", "--subset", "certified"], "--subset"),
    "subset of moments": (["--denoiser", "wiener", "--subset", "golden"], "--subset"),
    "subset of mirror images": (["--subset", "golden", "--flip"], "--flip"),
    "subset of batches": (["--subset", "golden", "--aggregation", "batch-mean"], "--aggregation"),
    "moments of no use": (
        ["--denoiser", "optimal", "--subset", "golden", "--moments", "x"],
        "--moments",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named_and_leave_nothing(run, source, tmp_path, case):
    arguments, name = WRONG[case]
    code, stdout, stderr = run(*small(source, tmp_path / "deep" / "out", *arguments))
    assert code == 2
    assert stdout == ""
    assert name in stderr
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["tiny.npz"]


def test_wrong_sources_are_named_and_leave_nothing(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    out = tmp_path / "out"
    for arguments, words in (
        (small("nowhere", out), ["SOURCE", "nowhere"]),
        (small(folder, out), [str(folder)]),
        (["moments", "nowhere", "--out", out, "--no-progress"], ["SOURCE", "nowhere"]),
    ):
        code, _, stderr = run(*arguments)
        assert code == 2
        assert stderr.startswith("pyflocality: error: ") and stderr.count("\n") == 1
        assert all(word in stderr for word in words)
    for size in (4, 5):
        Image.new("L", (size, size)).save(folder / f"{size}.png")
    code, _, stderr = run(*small(folder, out))
    assert code == 2
    assert "5.png" in stderr and "--resolution" in stderr
    assert os.listdir(tmp_path) == ["images"]


def test_an_output_that_cannot_be_made_is_named(run, source, tmp_path):
    code, _, stderr = run(*small(source, tmp_path / "tiny.npz" / "out"))
    assert code == 2
    assert "tiny.npz" in stderr and "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["tiny.npz"]


def test_a_file_in_place_of_the_output_folder_is_named(run, tmp_path):
    out = tmp_path / "results"
    out.write_text("precious")
    # Refused before the source, which is not there, is looked at.
    code, _, stderr = run(*small("nowhere", out))
    assert (code, stderr) == (2, f"pyflocality: error: {out} is not a folder\n")
    assert out.read_text() == "precious"
    assert os.listdir(tmp_path) == ["results"]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_is_refused_before_any_work(run, source, tmp_path, backend):
    if torch.cuda.is_available():
        pytest.skip("GPU backends may run here")
    code, _, stderr = run(*small(source, tmp_path / "out", "--backend", backend))
    assert code == 1
    assert f"backend '{backend}' cannot run masked_posterior" in stderr
    assert "reference" in stderr and stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["tiny.npz"]


def test_a_missing_extra_is_one_line_with_the_cure(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, stderr = run(*small("digits", tmp_path / "out"))
    assert code == 1
    assert "pip install 'pyflocality[sets]'" in stderr and stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "samples.npy"), 1, "samples.npy: No space left"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_what_goes_wrong_midway_leaves_answers_alone(
    run, source, tmp_path, monkeypatch, error, code, words
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("pyflocality.cli._generate._write_pictures", fail)
    found, stdout, stderr = run(*small(source, tmp_path / "out"))
    assert (found, stdout) == (code, "")
    assert words in stderr and stderr.count("\n") == 1
    assert_only_answers_are_left(tmp_path)


def assert_only_answers_are_left(folder):
    """Nothing but the hidden file from which the same run goes on."""
    assert sorted(os.listdir(folder)) == ["out", "tiny.npz"]
    (left,) = os.listdir(folder / "out")
    assert left.startswith(".generate-") and left.endswith(".answers")


def test_a_fault_of_the_library_is_not_hidden(source, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("pyflocality.cli._generate._write_pictures", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([str(word) for word in small(source, tmp_path / "out")])
    assert_only_answers_are_left(tmp_path)
