"""`pyflocality compare`: rows, numbers, files, and mistakes; patch sets on the command line."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import pyflocality as pf
from pyflocality import cli, pictures

# The sets of these tests have fewer images than values.
pytestmark = pytest.mark.filterwarnings("ignore:.* images are too few for:UserWarning")

FILES = ["compare.png", "run.json", "samples.npz"]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 256, (20, 1, 6, 6), generator=generator).to(torch.uint8)


@pytest.fixture
def source(tmp_path, images):
    """A set of 20 images 6x6."""
    path = tmp_path / "tiny.npy"
    np.save(path, images.numpy())
    return str(path)


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, standard output, standard error."""

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def small(source, out, *more):
    return ["compare", source, "--out", out, "--n", 3, "--steps", 4, "--no-progress", *more]


def sampled(denoiser, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pf.sample(denoiser, 3, steps=4, generator=generator, progress=False).images


def test_rows_and_numbers_are_those_of_the_library(run, source, images, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = run(
        *small(source, out, "--methods", "local,patch-set,optimal", "--against", "patch-set"),
        *("--window", 3, "--seed", 4, "--json"),
    )
    assert (code, stderr) == (0, "")
    assert sorted(os.listdir(out)) == FILES
    data = pf.TrainingSet(images)
    rows = {
        "local": sampled(pf.LocalDenoiser(data, 3), 4),
        "patch-set": sampled(pf.PatchSetDenoiser(data, 3), 4),
        "optimal": sampled(pf.OptimalDenoiser(data), 4),
    }
    distance = torch.cdist(rows["patch-set"].flatten(1), data.values().flatten(1))
    nearest = data.values()[distance.argmin(1)]
    with np.load(out / "samples.npz") as saved:
        assert list(saved) == [*rows, "nearest_training_images"]
        for name, expected in rows.items():
            assert saved[name].dtype == np.float32
            np.testing.assert_allclose(saved[name], expected.numpy(), rtol=0, atol=1e-6)
        assert (saved["nearest_training_images"] == nearest.numpy()).all()

    record = json.loads(stdout)
    assert record == json.loads((out / "run.json").read_text())
    assert record["against"] == "patch-set"
    assert record["nearest"]["index"] == distance.argmin(1).tolist()
    target = rows["patch-set"]
    told = {method["name"]: method for method in record["methods"]} | {"near": record["nearest"]}
    for name, values in (rows | {"near": nearest}).items():
        mse, r2 = pf.metrics.mse(values, target), pf.metrics.r2(values, target)
        assert told[name]["mse"]["values"] == pytest.approx(mse.tolist(), abs=1e-6)
        assert told[name]["r2"]["values"] == pytest.approx(r2.tolist(), abs=1e-5)
        assert told[name]["mse"]["mean"] == pytest.approx(float(mse.mean()), abs=1e-6)
        assert told[name]["r2"]["mean"] == pytest.approx(float(r2.mean()), abs=1e-5)
    assert told["patch-set"]["mse"]["mean"] == 0 and told["patch-set"]["r2"]["mean"] == 1
    assert told["local"]["mse"]["mean"] > 1e-3
    assert (told["local"]["window"], "window" in told["optimal"]) == (3, False)
    assert len(told["local"]["calls"]) == 4
    assert set(record["seconds"]) == {
        "load", "sampling local", "sampling patch-set", "sampling optimal", "nearest", "total",
    }  # fmt: skip
    assert record["files"] == ["compare.png", "samples.npz", "run.json"]

    # The picture: rows in the order asked for, each below its caption.
    with Image.open(out / "compare.png") as drawn:
        pixels = np.asarray(drawn)
    scale = pictures.default_scale(6, 6)
    height = pictures.CAPTION_HEIGHT + 4 + 6 * scale
    # The optimal model recites: its samples are framed, and a line below says so.
    assert [told[name]["recited"]["number"] for name in rows] == [0, 0, 3]
    assert pixels.shape[0] == 4 * height + pictures.CAPTION_HEIGHT
    # Letters have smooth edges.
    red = pixels[..., 0].astype(int) - pixels[..., 1] > 100
    assert red[2 * height : 3 * height].any() and red[4 * height :].any()
    assert not red[: 2 * height].any() and not red[3 * height : 4 * height].any()
    pixels = pixels[..., 0]
    for row, shown in enumerate((*rows.values(), nearest)):
        top = row * height + pictures.CAPTION_HEIGHT + 2
        assert (pixels[top - pictures.CAPTION_HEIGHT : top - 2] < 128).any()
        for column in range(3):
            left = 2 + column * (6 * scale + 2)
            tile = pixels[top : top + 6 * scale : scale, left : left + 6 * scale : scale]
            expected = pictures.to_bytes(shown)[column, 0].numpy().astype(int)
            assert np.abs(tile - expected).max() <= 1


def test_the_table_names_every_model(run, source, tmp_path):
    code, stdout, stderr = run(*small(source, tmp_path / "out", "--threshold", 0.1))
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    names = ["pca-locality", "local", "wiener", "optimal", "nearest training images"]
    for name, line in zip(names, lines[1:], strict=False):
        assert line.startswith(name)
    # The first is what the others are measured against.
    assert "against pca-locality, means of 3 images" in stdout
    assert all(str(tmp_path / "out" / name) in stdout for name in FILES)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert f"{record['methods'][1]['mse']['mean']:.4f}" in lines[2]
    assert f"{record['methods'][1]['r2']['mean']:.3f}" in lines[2]


def test_a_row_equals_what_generate_makes(run, source, tmp_path):
    assert run(*small(source, tmp_path / "a", "--methods", "wiener,local", "--flip"))[0] == 0
    single = ["generate", *small(source, tmp_path / "b", "--flip")[1:], "--denoiser", "local"]
    assert run(*single)[0] == 0
    with np.load(tmp_path / "a" / "samples.npz") as saved:
        assert (saved["local"] == np.load(tmp_path / "b" / "samples.npy")).all()


def test_images_of_one_colour_have_no_r2(run, tmp_path):
    flat = tmp_path / "flat.npy"
    np.save(flat, np.full((4, 3, 3), 51, np.uint8))
    out = tmp_path / "out"
    code, stdout, _ = run(*small(flat, out, "--methods", "optimal,nearest"))
    assert code == 0 and " - " in stdout.replace("-\n", "- \n")
    record = json.loads((out / "run.json").read_text())
    assert record["methods"][1]["r2"] == {"mean": None, "values": [None] * 3}
    assert "sampling nearest" in record["seconds"] and "nearest" in record["seconds"]


def test_existing_files_are_replaced_only_by_force(run, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("precious")
    arguments = small(source, out, "--methods", "optimal")
    code, _, stderr = run(*arguments)
    assert code == 2 and "run.json" in stderr and "--force" in stderr
    assert (out / "run.json").read_text() == "precious" and os.listdir(out) == ["run.json"]
    assert run(*arguments, "--force")[0] == 0
    assert sorted(os.listdir(out)) == FILES


WRONG = {
    "method": (["--methods", "local,unet"], "--methods"),
    "no method": (["--methods", ""], "--methods"),
    "method twice": (["--methods", "local,local"], "--methods"),
    "against": (["--methods", "local,optimal", "--against", "wiener"], "--against"),
    "foreign option": (["--methods", "optimal", "--window", 3], "--window"),
    "foreign moments": (["--methods", "optimal", "--moments", "m"], "--moments"),
    "patch set alone": (["--methods", "optimal,patch-set"], "--window"),
    "even window": (["--methods", "patch-set,local", "--window", 2], "--window"),
    "large window": (["--methods", "patch-set", "--window", 7], "--window"),
    "threshold": (["--threshold", 1], "--threshold"),
    "n": (["--n", 0], "--n"),
    "steps": (["--steps", 0], "--steps"),
    "seed": (["--seed", -1], "--seed"),
    "device": (["--device", "abacus"], "--device"),
    "label": (["--label", 2], "--label"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named_and_leave_nothing(run, source, tmp_path, case):
    arguments, name = WRONG[case]
    code, stdout, stderr = run(*small(source, tmp_path / "deep" / "out", *arguments))
    assert (code, stdout) == (2, "")
    assert name in stderr and "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["tiny.npy"]


def test_progress_is_told_on_standard_error(run, source, tmp_path):
    arguments = small(source, tmp_path / "out", "--methods", "wiener,local")
    arguments.remove("--no-progress")
    code, stdout, stderr = run(*arguments)
    assert code == 0
    for words in ("loading", "components of 20 images", "sampling local: 3 images", "nearest"):
        assert words in stderr
    assert "loading" not in stdout


@pytest.mark.parametrize("window", ["2", "3", "10:4,0.5:2"])
def test_patch_sets_are_generated(run, source, images, tmp_path, window):
    out = tmp_path / "out"
    single = ["generate", *small(source, out)[1:], "--denoiser", "patch-set", "--window", window]
    code, _, stderr = run(*single)
    assert (code, stderr) == (0, "")
    size = int(window) if ":" not in window else [(10, 4), (0.5, 2)]
    expected = sampled(pf.PatchSetDenoiser(pf.TrainingSet(images), size))
    saved = torch.from_numpy(np.load(out / "samples.npy"))
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-6)


def test_patch_sets_need_a_window(run, source, tmp_path):
    code, _, stderr = run("generate", source, "--out", tmp_path / "o", "--denoiser", "patch-set")
    assert code == 2 and "`--window` must be given for patch-set" in stderr
