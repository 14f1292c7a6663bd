"""`pyflocality calibrate`, and what is made by its choices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import pyflocality as pf

STEPS = ("--steps", "3", "--no-progress")


@pytest.fixture
def chosen(run, source, tmp_path):
    """A calibration of the source."""
    file = tmp_path / "choices.json"
    code, _, err = run("calibrate", source, "--out", file, *STEPS)
    assert code == 0, err
    return file


def test_calibrate_writes_what_the_library_finds(run, source, images, tmp_path):
    file = tmp_path / "choices.json"
    code, out, err = run("calibrate", source, "--out", file, "--seed", "3", *STEPS)
    assert (code, err) == (0, "")
    data = pf.TrainingSet(images, labels=torch.arange(20) % 2)
    expected = pf.calibrate(data, steps=3, seed=3, progress=False)
    assert pf.Calibration.load(file) == expected
    lines = out.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:4]] == list(map(str, expected.choices))
    assert "choices.json" in lines[4]
    code, out, _ = run("calibrate", source, "--out", file, "--json", "--force", "--flip", *STEPS)
    record = json.loads(out)
    mirrored = pf.Calibration.load(file)
    assert record["content_key"] == data.augmented(flip=True).content_key()
    assert [one["model"] for one in record["levels"]] == [c.as_json() for c in mirrored.choices]


def test_calibrate_goes_by_the_schedule(run, source, tmp_path):
    file = tmp_path / "choices.json"
    code, _, err = run("calibrate", source, "--out", file, "--schedule", "karras", *STEPS)
    assert code == 0, err
    levels = pf.Calibration.load(file).levels
    assert [level.sigma for level in levels] == pf.KarrasSchedule().timesteps(3).tolist()


def test_generate_follows_a_calibration(run, source, chosen, images, tmp_path):
    folder = tmp_path / "made"
    arguments = ("generate", source, "--calibration", chosen, "--out", folder, "-n", "2", *STEPS)
    code, _, err = run(*arguments)
    assert code == 0, err
    record = json.loads((folder / "run.json").read_text())
    calibration = pf.Calibration.load(chosen)
    told = record["denoiser"]["calibration"]
    assert record["denoiser"]["name"] == "calibrated"
    assert told["content_key"] == calibration.content_key == record["data"]["content_key"]
    for level, choice in zip(told["levels"], calibration.choices, strict=True):
        assert {k: v for k, v in level.items() if k not in ("alpha", "sigma")} == choice.as_json()
    denoiser = pf.CalibratedDenoiser(pf.TrainingSet(images), calibration)
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="not near pure noise"):
        expected = pf.sample(denoiser, 2, steps=3, generator=generator, progress=False).images
    made = np.load(folder / "samples.npy")
    np.testing.assert_allclose(made, expected.numpy(), rtol=0, atol=1e-6)
    # With the same seed another model makes other images.
    other = ("generate", source, "--out", tmp_path / "other", "-n", "2", *STEPS)
    assert run(*other)[0] == 0
    assert not np.allclose(np.load(tmp_path / "other" / "samples.npy"), made, atol=1e-3)


def test_compare_takes_a_calibration(run, source, chosen, tmp_path):
    folder = tmp_path / "compared"
    models = ("--methods", "calibrated,local", "--calibration", chosen)
    code, out, err = run("compare", source, *models, "--out", folder, "-n", "2", *STEPS)
    assert code == 0, err
    assert "calibrated" in out and (folder / "compare.png").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--denoiser", "local"], "`--calibration` belongs to calibrated, not to local"),
        (["--threshold", "0.1"], "`--threshold` belongs to pca-locality, not to calibrated"),
    ],
)
def test_options_of_other_models_are_refused(run, source, chosen, tmp_path, words, told):
    arguments = ("--calibration", chosen, "--out", tmp_path / "made")
    code, _, err = run("generate", source, *arguments, *words)
    assert code == 2 and told in err and not (tmp_path / "made").exists()


def test_wrong_calibrations_are_refused(run, source, chosen, tmp_path):
    out = ("--out", tmp_path / "made")
    code, _, err = run("generate", source, "--calibration", tmp_path / "none.json", *out)
    assert code == 2 and "none.json is not a file" in err
    code, _, err = run("generate", source, "--denoiser", "calibrated", *out)
    assert code == 2 and "`--calibration` must be given for calibrated" in err
    content = json.loads(chosen.read_text()) | {"further": 1}
    chosen.write_text(json.dumps(content))
    code, _, err = run("generate", source, "--calibration", chosen, *out)
    assert code == 2 and "choices.json is damaged: has an unknown 'further'" in err
    code, _, err = run("calibrate", source, "--out", chosen)
    assert code == 2 and "already there" in err


def test_another_set_than_the_calibrated_is_told(run, chosen, tmp_path, images):
    other = tmp_path / "other.npy"
    np.save(other, images[:10].numpy())
    arguments = ("--calibration", chosen, "--out", tmp_path / "made", "-n", "1", *STEPS)
    code, _, err = run("generate", other, *arguments)
    assert code == 0 and "the calibration is of another set, of 20 images" in err
