"""Samples that are training images are told: in a line, in the record, in the picture."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import pyflocality as pf
from pyflocality import analysis, pictures


def red_of(path):
    """Where a picture is red, bool [height, width]; nowhere in a grey one."""
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn).astype(int)
    if pixels.ndim == 2:
        return np.zeros(pixels.shape, bool)
    # Letters have smooth edges.
    return pixels[..., 0] > pixels[..., 1] + 100


def generate(run, source, out, *more):
    words = ["generate", source, "--out", out, "--n", 3, "--steps", 4, "--no-progress", *more]
    code, stdout, stderr = run(*words)
    assert code == 0, stderr
    return stdout, json.loads((out / "run.json").read_text())


def test_recitation_is_told(run, source, images, tmp_path):
    out = tmp_path / "out"
    stdout, record = generate(run, source, out, "--denoiser", "optimal")
    assert record["recited"] == {"number": 3, "which": [0, 1, 2], "within_rms": 1 / 255}
    lines = stdout.splitlines()
    assert lines[1] == (
        "3 of 3 samples are training images (within rms 1/255), framed in samples.png: try more "
        "images, or --denoiser pca-locality, local or patch-set"
    )
    # All around every sample, and below the sheet in words.
    red = red_of(out / "samples.png")
    side = 6 * pictures.default_scale(6, 6)
    top = pictures.CAPTION_HEIGHT
    for index in range(3):
        left = index * (side + 2)
        frame = red[top : top + side + 4, left : left + side + 4]
        assert frame[:2].all() and frame[-2:].all() and frame[:, :2].all() and frame[:, -2:].all()
        assert not frame[2:-2, 2:-2].any()
    sheet = 2 * (pictures.CAPTION_HEIGHT + side + 4)
    assert red.shape[0] == sheet + pictures.CAPTION_HEIGHT and red[sheet:].any()
    assert not red[sheet // 2 : sheet].any()
    # The same by the library.
    data = pf.TrainingSet(images)
    samples = torch.from_numpy(np.load(out / "samples.npy"))
    assert analysis.memorization(samples, data).recited.tolist() == [True] * 3


def test_new_images_are_told_as_such(run, source, tmp_path):
    out = tmp_path / "out"
    stdout, record = generate(run, source, out, "--denoiser", "local", "--window", 3)
    assert record["recited"] == {"number": 0, "which": [], "within_rms": 1 / 255}
    assert "none of 3 samples is a training image (within rms 1/255)" in stdout
    assert not red_of(out / "samples.png").any()


def test_it_is_said_that_nobody_looked(run, source, tmp_path):
    out = tmp_path / "out"
    stdout, record = generate(run, source, out, "--denoiser", "optimal", "--no-nearest")
    why = "nobody looked for the nearest training images (--no-nearest)"
    assert record["recited"] == {"number": None, "reason": why}
    assert record["nearest"] is None
    assert f"whether samples are training images is not known: {why}" in stdout
    assert not red_of(out / "samples.png").any()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (["--denoiser", "nearest"], "--denoiser pca-locality, local or patch-set"),
        (["--threshold", "0.001"], "a larger --threshold, or --denoiser local or patch-set"),
        (
            ["--denoiser", "local", "--window", 11],
            "more images, or a smaller --window (a larger one recites more)",
        ),
    ],
)
def test_what_to_try_depends_on_the_model(run, source, tmp_path, model, words):
    stdout, record = generate(run, source, tmp_path / "out", *model)
    assert record["recited"]["number"] > 0 and words in stdout


def test_compare_tells_it_for_every_model(run, source, tmp_path):
    out = tmp_path / "out"
    words = ["--methods", "optimal,local", "--window", 3, "--n", 3, "--steps", 4, "--no-progress"]
    code, stdout, _ = run("compare", source, "--out", out, *words)
    assert code == 0
    record = json.loads((out / "run.json").read_text())
    told = {method["name"]: method["recited"] for method in record["methods"]}
    assert told["optimal"] == {"number": 3, "which": [0, 1, 2], "within_rms": 1 / 255}
    assert told["local"]["number"] == 0
    lines = stdout.splitlines()
    assert lines[0].split()[-1] == "recited"
    assert (lines[1].split()[-1], lines[2].split()[-1]) == ("3", "0")
    assert any(line.startswith("optimal: 3 of 3 samples are training images") for line in lines)
    assert not any(line.startswith("local: ") for line in lines)
    red = red_of(out / "compare.png")
    row = pictures.CAPTION_HEIGHT + 4 + 6 * pictures.default_scale(6, 6)
    assert red[:row].any() and not red[row : 3 * row].any() and red[3 * row :].any()


def test_the_measure_is_half_a_step_of_8_bits():
    """Root mean square: some values may be further off."""
    images = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    images[1] = 200
    data = pf.TrainingSet(images)
    base = data.values(0, 1)
    # All by slightly less and slightly more than half a step; and one value alone by two steps.
    offsets = torch.zeros(4, 1, 4, 4)
    offsets[0], offsets[1] = 0.999 / 255, 1.001 / 255
    offsets[2, 0, 0, 0], offsets[3, 0, 0, 0] = 3.99 / 255, 4.01 / 255
    result = analysis.memorization(base + offsets, data)
    assert result.recited.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("words", "models"),
    [
        (["generate", "--denoiser", "pca-locality"], "PCA locality"),
        (
            ["compare", "--methods", "local,pca-locality,wiener"],
            "PCA locality and the Wiener filter",
        ),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_too_few_images_are_told_once_and_before_any_work(
    run, source, tmp_path, words, models, given
):
    if given:
        assert run("moments", source, "--out", tmp_path / "moments")[0] == 0
        words = [*words, "--moments", tmp_path / "moments"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, stderr = run(*words, source, "--out", tmp_path / "out", "--n", 1, "--steps", 4)
    assert code == 0
    lines = stderr.splitlines()
    (told,) = [number for number, line in enumerate(lines) if "too few" in line]
    assert f"20 images are too few for {models} of 36 values that vary" in lines[told]
    work = [number for number, line in enumerate(lines) if "eigen" in line or "sampling" in line]
    assert work and told < min(work)
