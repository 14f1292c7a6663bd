"""`generate` where no option names a model: calibrated once, kept, told and recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cli_files import small
from truth import random_images

import pyflocality as pf
from pyflocality.calibration.quick import quick_calibration, quick_plan

pytestmark = pytest.mark.filterwarnings("ignore:.* images are too few for:UserWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(images):
    return pf.TrainingSet(images, labels=torch.arange(20) % 2)


def record(folder):
    return json.loads((folder / "run.json").read_text())


def told(run, *words):
    """Run a command that tells what it does."""
    return run(*(word for word in words if word != "--no-progress"))


def test_a_run_without_a_model_is_calibrated_once(run, source, data, cache, tmp_path):
    code, _, err = told(run, *small(source, tmp_path / "first"))
    assert code == 0
    assert "no model is named: calibrating by 20 images" in err
    assert "calibrated by held-out images, models down to noise levels" in err
    plan = quick_plan(20, (1, 6, 6), 4)
    found = quick_calibration(data, plan, pf.DDPMSchedule(), progress=False)
    first = record(tmp_path / "first")
    assert first["calibrated"] == "made"
    denoiser = first["denoiser"]
    assert denoiser["name"] == "calibrated"
    assert denoiser["calibration"]["searched"] == 20
    models = [
        {key: value for key, value in level.items() if key not in ("alpha", "sigma")}
        for level in denoiser["calibration"]["levels"]
    ]
    assert models == [choice.as_json() for choice in found.choices]
    model = pf.CalibratedDenoiser(data, found)
    noise = torch.Generator().manual_seed(0)
    expected = pf.sample(model, 3, steps=4, generator=noise, progress=False).images
    made = np.load(tmp_path / "first" / "samples.npy")
    assert np.array_equal(made, expected.numpy())
    code, _, err = told(run, *small(source, tmp_path / "again"))
    assert code == 0 and "calibrated found in the cache" in err and "calibrating by" not in err
    again = record(tmp_path / "again")
    assert again["calibrated"] == "cache" and again["denoiser"] == denoiser
    assert np.array_equal(np.load(tmp_path / "again" / "samples.npy"), made)
    code, out, _ = run("cache", "size", "--json")
    assert "calibrations" in json.loads(out)["kinds"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--denoiser", "local"], "local"),
        (["--threshold", "0.1"], "pca-locality"),
        (["--softness", "0"], "pca-locality"),
        (["--temperature", "1"], "pca-locality"),
        (["--aggregation", "exact"], "pca-locality"),
        (["--subset", "golden"], "pca-locality"),
        (["--moments", "MOMENTS"], "pca-locality"),
        (["--label", "0", "--global-share", "0.5"], "pca-locality"),
    ],
)
def test_an_option_of_a_model_means_the_published_one(run, source, tmp_path, words, name):
    if "MOMENTS" in words:
        words = ["--moments", tmp_path / "moments"]
        assert run("moments", source, "--out", words[1], "--no-progress")[0] == 0
    code, _, err = told(run, *small(source, tmp_path / "out", *words))
    assert code == 0 and "calibrat" not in err
    made = record(tmp_path / "out")
    assert made["denoiser"]["name"] == name and made["calibrated"] is None


@pytest.mark.parametrize(
    "words",
    [
        ["--backend", "reference"],
        ["--memory-budget", "64MB"],
        ["--flip"],
        ["--label", "1"],
        ["--no-nearest"],
        ["--schedule", "karras"],
        ["--ignore-memory"],
    ],
)
def test_other_options_leave_the_model_open(run, source, tmp_path, words):
    assert run(*small(source, tmp_path / "out", *words))[0] == 0
    made = record(tmp_path / "out")
    assert made["denoiser"]["name"] == "calibrated" and made["calibrated"] == "made"
    assert made["denoiser"]["backend"] == ("reference" if "reference" in words else None)
    chosen = made["denoiser"]["calibration"]
    assert chosen["images"] == chosen["searched"] == (10 if "--label" in words else 20)


def test_few_images_have_the_published_model_and_it_is_told(run, images, tmp_path):
    np.save(tmp_path / "three.npy", images[:3].numpy())
    code, _, err = told(run, *small(tmp_path / "three.npy", tmp_path / "out"))
    assert code == 0 and "the images are too few to calibrate a model by them" in err
    made = record(tmp_path / "out")
    assert made["denoiser"]["name"] == "pca-locality" and made["calibrated"] == "none"


def test_what_may_be_chosen_has_to_fit_before_any_work(run, source, cache, tmp_path, monkeypatch):
    from pyflocality.planner import stages

    def refused(most, what, instead):
        raise MemoryError(f"{what} does not fit")

    monkeypatch.setattr(stages, "_LITTLE_BYTES", 0)
    monkeypatch.setattr(stages, "check_memory", refused)
    code, _, err = run(*small(source, tmp_path / "out"))
    assert code == 1 and "does not fit" in err
    assert not (cache / "calibrations").exists()


def test_a_long_run_stays_within_its_levels(run, source, tmp_path):
    code, _, err = run(*small(source, tmp_path / "out", "--steps", 23))
    assert code == 0 and "outside the calibration" not in err
    assert len(record(tmp_path / "out")["denoiser"]["calibration"]["levels"]) == 10


def test_a_plan_tells_the_calibration_until_there_is_one(run, source, tmp_path):
    words = (source, "--n", 3, "--steps", 4, "--json")
    before = json.loads(run("plan", *words)[1])
    assert before["calibrates"] and before["stages"][0]["name"] == "calibration"
    # Of few images the making of masks is most of the work.
    assert before["denoiser"] == "pca-locality" and before["mask_share"] is not None
    assert "Counted as pca-locality at all noise levels" in run("plan", *words[:-1])[1]
    assert run(*small(source, tmp_path / "out"))[0] == 0
    after = json.loads(run("plan", *words)[1])
    assert not after["calibrates"] and after["denoiser"] == "calibrated" and after["calls"] == 4
    models = {one["model"] for one in record(tmp_path / "out")["denoiser"]["calibration"]["levels"]}
    assert {stage.get("model", after["denoiser"]) for stage in after["stages"]} <= models | {
        "calibrated"
    }
    named = json.loads(run("plan", *words, "--mask-share", "0.1")[1])
    assert named["denoiser"] == "pca-locality" and not named["calibrates"]


def test_a_plan_counts_the_dearest_of_what_may_be_chosen(run, tmp_path):
    images = random_images(torch.Generator().manual_seed(4), 500, (1, 8, 8), torch.uint8)
    np.save(tmp_path / "many.npy", images.numpy())
    words = ("plan", tmp_path / "many.npy", "--n", 3, "--steps", 4)
    counted = json.loads(run(*words, "--json")[1])
    assert counted["calibrates"] and counted["denoiser"] == "patch-set"
    assert counted["mask_share"] is None
    assert "Counted as patch-set at all noise levels" in run(*words)[1]


def test_a_plan_of_a_calibration_has_its_models(run, source, tmp_path):
    file = tmp_path / "choices.json"
    assert run("calibrate", source, "--out", file, "--steps", "3", "--no-progress")[0] == 0
    code, out, _ = run("plan", source, "--calibration", file, "--steps", "3", "--json")
    planned = json.loads(out)
    leaves = {leaf.model for one in pf.Calibration.load(file).choices for leaf in one.leaves}
    steps = [stage for stage in planned["stages"] if stage["name"] == "steps"]
    models = {stage.get("model") for stage in steps}
    assert code == 0 and models == (leaves if len(steps) > 1 else {None})
