"""The command line: files, records, determinism, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from cli_files import FILES, small
from PIL import Image

import pyflocality as pf
from pyflocality import pictures
from pyflocality.backends import configuration

# The sets of these tests have fewer images than values.
pytestmark = pytest.mark.filterwarnings("ignore:.* images are too few for:UserWarning")

# The model whose records are looked at.
PUBLISHED = ("--denoiser", "pca-locality")


def test_generate_takes_a_softness(run, source, images, tmp_path):
    options = ("--threshold", 0.1, "--softness", 0.5, "--seed", 5)
    assert run(*small(source, tmp_path, *options))[0] == 0
    denoiser = pf.PCALocalityDenoiser(pf.TrainingSet(images), 0.1, softness=0.5)
    noise = torch.Generator().manual_seed(5)
    result = pf.sample(denoiser, 3, steps=4, generator=noise, progress=False)
    assert (np.load(tmp_path / "samples.npy") == result.images.numpy()).all()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["denoiser"]["softness"] == 0.5


def test_generate_writes_what_the_library_computes(run, source, images, tmp_path):
    out = tmp_path / "new" / "out"
    code, stdout, stderr = run(*small(source, out, "--threshold", 0.1, "--seed", 5))
    assert (code, stderr) == (0, "")
    assert sorted(os.listdir(out)) == FILES
    assert all(str(out / name) in stdout for name in FILES)

    data = pf.TrainingSet(images)
    result = pf.sample(
        pf.PCALocalityDenoiser(data, 0.1),
        3,
        steps=4,
        generator=torch.Generator().manual_seed(5),
        progress=False,
    )
    saved = np.load(out / "samples.npy")
    assert saved.dtype == np.float32
    assert (saved == result.images.numpy()).all()

    # Brute force beside the recorded neighbours.
    distance = torch.cdist(result.images.flatten(1).double(), data.values().flatten(1).double())
    record = json.loads((out / "run.json").read_text())
    assert record["nearest"]["index"] == distance.argmin(1).tolist()
    assert record["nearest"]["rms_difference"] == pytest.approx(
        (distance.min(1).values / 6).tolist(), rel=1e-5, abs=1e-6
    )

    with Image.open(out / "samples.png") as sheet:
        pixels = np.asarray(sheet)
    scale = pictures.default_scale(6, 6)
    row = pictures.CAPTION_HEIGHT + 4 + 6 * scale
    shown = (pictures.to_bytes(result.images), images[distance.argmin(1)])
    for index in range(3):
        left = 2 + index * (6 * scale + 2)
        for number, expected in enumerate(shown):
            top = number * row + pictures.CAPTION_HEIGHT + 2
            tile = pixels[top : top + 6 * scale, left : left + 6 * scale]
            grey = tile if tile.ndim == 2 else tile[..., 0]
            assert (grey == np.kron(expected[index, 0], np.ones((scale, scale)))).all()

    strip = pictures.trajectory_strip(result.x_t, result.x0, result.timesteps)
    with Image.open(out / "trajectory.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(strip)).all()


def test_record_tells_settings_backends_and_time(run, source, images, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = run(*small(source, out, "--json", "--label", 1, *PUBLISHED))
    record = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert record == json.loads((out / "run.json").read_text())
    assert record["source"]["source"] == source
    assert record["data"]["images"] == 10
    assert record["data"]["content_key"] == pf.TrainingSet(images[1::2]).content_key()
    assert record["denoiser"] == {
        "name": "pca-locality",
        "threshold": 0.02,
        "softness": 0.0,
        "temperature": 1.0,
        "aggregation": "exact",
        "loader_batch": 256,
        "backend": None,
        "memory_budget": None,
    }
    expected = {"n": 3, "steps": 4, "schedule": "ddpm", "sampler": "ddim", "seed": 0}
    assert record["sampling"] == expected | {"timesteps": [750, 500, 250, 0]}
    assert set(record["backends"]) == {"covariance", "masked_posterior", "nearest"}
    levels = [pf.DDPMSchedule()(time) for time in (750, 500, 250, 0)]
    assert [(call["alpha"], call["sigma"]) for call in record["calls"]] == levels
    assert all(0 < call["density"] <= 1 for call in record["calls"])
    assert set(record["seconds"]) == {
        "load", "sampling", "nearest", "total",
    }  # fmt: skip
    assert record["peak_memory_bytes"] > 2**20
    assert record["files"] == ["samples.png", "samples.npy", "trajectory.png", "run.json"]


@pytest.mark.parametrize(
    ("spacing", "schedule", "times"),
    [
        ("trailing", "ddpm", [999, 749, 499, 249]),
        ("linspace", "ddpm", [999, 666, 333, 0]),
        ("trailing", "cosine", [1, 0.75, 0.5, 0.25]),
    ],
)
def test_steps_are_spaced_as_told(run, source, tmp_path, spacing, schedule, times):
    code, stdout, stderr = run(
        *small(source, tmp_path / "out", "--schedule", schedule, "--spacing", spacing, "--json")
    )
    assert (code, stderr) == (0, "")
    record = json.loads(stdout)["sampling"]
    assert (record["spacing"], record["timesteps"]) == (spacing, times)


def test_a_start_far_from_noise_is_told(run, source, tmp_path):
    code, _, stderr = run(*small(source, tmp_path / "out", "--steps", 2))
    assert code == 0 and stderr.count("\n") == 1
    assert "warning: the first of 2 times, 500, is not near pure noise" in stderr
    assert "--spacing trailing" in stderr


def test_too_few_images_are_told_once(run, source, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, stderr = run(*small(source, tmp_path / "out", *PUBLISHED))
    assert code == 0 and stderr.count("\n") == 1
    assert "warning: 20 images are too few for PCA locality of 36 values that vary" in stderr


def test_one_seed_one_result(run, source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*small(source, tmp_path / name, "--seed", seed))[0] == 0
    contents = {name: (tmp_path / name / "samples.npy").read_bytes() for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]
    for name in ("samples.png", "trajectory.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "build"),
    [
        (["optimal", "--temperature", 2], lambda data: pf.OptimalDenoiser(data, temperature=2)),
        (["local", "--window", "3"], lambda data: pf.LocalDenoiser(data, 3)),
        (["local", "--window", "5:11,1:3"], lambda data: pf.LocalDenoiser(data, [(5, 11), (1, 3)])),
        (["nearest", "--memory-budget", "1K"], pf.NearestDenoiser),
        (["wiener"], pf.WienerDenoiser),
        (
            ["pca-locality", "--aggregation", "batch-mean", "--loader-batch", 7],
            lambda data: pf.PCALocalityDenoiser(data, aggregation="batch_mean", batch_size=7),
        ),
    ],
)
def test_every_denoiser(run, source, images, tmp_path, arguments, build):
    code, _, stderr = run(
        *small(source, tmp_path / "out", "--schedule", "karras", "--sampler", "heun"),
        "--denoiser",
        *arguments,
    )
    assert (code, stderr) == (0, "")
    result = pf.sample(
        build(pf.TrainingSet(images)),
        3,
        steps=4,
        schedule=pf.KarrasSchedule(),
        sampler="heun",
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    saved = torch.from_numpy(np.load(tmp_path / "out" / "samples.npy"))
    torch.testing.assert_close(saved, result.images, rtol=0, atol=1e-6)


SUBSETS = {
    "golden": (
        ["--subset", "golden", "--threshold", 0.1],
        lambda data: pf.GoldenSubset(pf.PCALocalityDenoiser(data, 0.1)),
        {"name": "golden", "k_min": 1, "k_max": 2},
    ),
    "certified": (
        ["--subset", "certified", "--denoiser", "optimal"],
        lambda data: pf.CertifiedSubset(pf.OptimalDenoiser(data)),
        {"name": "certified", "tol": 1e-3},
    ),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_subsets_are_searched(run, source, images, tmp_path, name):
    arguments, build, told = SUBSETS[name]
    out = tmp_path / "out"
    code, stdout, _ = run(*small(source, out, "--seed", 5, "--json", *arguments))
    assert code == 0
    generator = torch.Generator().manual_seed(5)
    data = pf.TrainingSet(images)
    result = pf.sample(build(data), 3, steps=4, generator=generator, progress=False)
    saved = torch.from_numpy(np.load(out / "samples.npy"))
    torch.testing.assert_close(saved, result.images, rtol=0, atol=1e-6)
    record = json.loads(stdout)
    assert record["subset"] == told
    # What the certificate is made of takes its time before the first call.
    assert ("components" in record["seconds"]) == (name == "certified")
    if name == "golden":
        generator.manual_seed(5)
        whole = pf.PCALocalityDenoiser(data, 0.1)
        result = pf.sample(whole, 3, steps=4, generator=generator, progress=False)
        assert (saved - result.images).abs().max() > 1e-2


def test_individual_files_hold_the_samples(run, source, tmp_path):
    out = tmp_path / "out"
    assert run(*small(source, out, "--individual", "--no-trajectory", "--no-nearest"))[0] == 0
    singles = [f"sample-{index:03d}.png" for index in range(3)]
    assert sorted(os.listdir(out)) == sorted([*singles, "run.json", "samples.npy", "samples.png"])
    stored = pictures.to_bytes(torch.from_numpy(np.load(out / "samples.npy")))
    for index, name in enumerate(singles):
        with Image.open(out / name) as single:
            assert (np.asarray(single) == stored[index, 0].numpy()).all()
    assert json.loads((out / "run.json").read_text())["nearest"] is None


def test_the_backend_asked_for_runs(run, source, tmp_path):
    code, stdout, _ = run(
        *small(source, tmp_path / "out", "--backend", "reference", "--json", *PUBLISHED)
    )
    assert code == 0
    record = json.loads(stdout)
    assert record["backends"]["masked_posterior"] == ["reference"]
    assert record["denoiser"]["backend"] == "reference"


def test_the_chosen_backend_is_not_that_of_the_caption(run, source, tmp_path, monkeypatch):
    if configuration()["backends"]["cpu"] is not None:
        pytest.skip("the native extension is not built")
    arguments = ["--denoiser", "optimal", "--json"]
    for name, more in (("option", ["--backend", "cpu"]), ("environment", [])):
        if not more:
            monkeypatch.setenv("PYFLOCALITY_BACKEND", "cpu")
        code, stdout, _ = run(*small(source, tmp_path / name, *arguments, *more))
        assert code == 0
        record = json.loads(stdout)
        assert record["backends"]["global_posterior"] == ["cpu"]
        assert len(record["nearest"]["index"]) == 3


def test_progress_is_told_on_standard_error(run, source, tmp_path):
    arguments = small(source, tmp_path / "out")
    arguments.remove("--no-progress")
    code, stdout, stderr = run(*arguments)
    assert code == 0
    for words in ("loading", "sampling 3", "nearest"):
        assert words in stderr and words not in stdout


def test_moments_are_saved_told_and_used(run, source, images, tmp_path):
    path, picture = tmp_path / "m.safetensors", tmp_path / "m.png"
    base = ["moments", source, "--out", path, "--no-progress"]
    code, stdout, stderr = run(*base, "--picture", picture, "--json")
    assert (code, stderr) == (0, "")
    record = json.loads(stdout)
    expected = pf.Moments.from_data(pf.TrainingSet(images))
    assert torch.equal(pf.Moments.load(path).covariance, expected.covariance)
    values = np.linalg.eigvalsh(expected.covariance.numpy())[::-1]
    assert record["images"] == 20
    assert record["image_shape"] == [1, 6, 6]
    # Twenty images span at most nineteen directions about their mean.
    assert record["rank"] == 19
    assert record["total_variance"] == pytest.approx(values.sum())
    assert set(record["variance_share"]) == {"1", "10"}
    assert record["variance_share"]["10"] == pytest.approx(values[:10].sum() / values.sum())
    with Image.open(picture) as drawn:
        pixels = np.asarray(drawn)
    scale = pictures.default_scale(6, 6)
    top = pictures.CAPTION_HEIGHT + 2
    mean = pixels[top : top + 6 * scale : scale, 2 : 2 + 6 * scale : scale]
    assert (mean == pictures.to_bytes(expected.mean)[0].numpy()).all()

    assert run(*base)[0] == 2
    code, stdout, _ = run(*base, "--force")
    assert code == 0 and "20 of 1x6x6" in stdout

    assert run(*small(source, tmp_path / "with", "--moments", path))[0] == 0
    assert run(*small(source, tmp_path / "without", *PUBLISHED))[0] == 0
    both = [(tmp_path / name / "samples.npy").read_bytes() for name in ("with", "without")]
    assert both[0] == both[1]
    code, _, stderr = run(*small(source, tmp_path / "part", "--moments", path, "--label", 0))
    assert code == 0
    assert "warning: the moments are of 20 images, tiny.npz has 10" in stderr
    code, _, stderr = run(*small(source, tmp_path / "no", "--moments", path, "--resolution", 3))
    assert code == 2 and "--moments" in stderr


def test_moments_picture_must_be_png(run, source, tmp_path):
    code, _, stderr = run("moments", source, "--out", tmp_path / "m", "--picture", "m.svg")
    assert code == 2 and "--picture" in stderr
    assert os.listdir(tmp_path) == ["tiny.npz"]


def test_moments_and_their_picture_are_two_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Refused before the source, which is not there, is looked at.
    code, _, stderr = run("moments", "nowhere", "--out", "./x.png", "--picture", "x.png")
    assert code == 2 and "`--picture` must be another file than `--out`" in stderr
    assert os.listdir(tmp_path) == []


def test_moments_of_equal_images_have_no_share(run, tmp_path):
    source = tmp_path / "flat.npy"
    np.save(source, np.full((4, 3, 3), 7, np.uint8))
    arguments = ["moments", source, "--out", tmp_path / "m", "--picture", tmp_path / "m.png"]
    code, stdout, _ = run(*arguments, "--json", "--no-progress")
    assert code == 0
    assert json.loads(stdout)["variance_share"] == {"1": None}


def test_doctor_names_every_backend_and_reason(run):
    code, text, _ = run("doctor")
    assert code == 0
    for name, reason in configuration()["backends"].items():
        assert f"{name:<10} {'ready' if reason is None else 'unavailable: ' + reason}" in text
    for operation in ("covariance", "masked_posterior", "window_posterior"):
        assert operation in text
    for operation, by_name in configuration()["by_name_only"].items():
        for name, reason in by_name.items():
            assert re.search(rf"^  {operation} .*\b{name} \(by name only\)", text, re.MULTILINE)
            assert re.search(rf"^by name only: .*\b{name}\b.* as {reason}; ", text, re.MULTILINE)
    # A kernel that runs on one thread of many is no wonder then.
    threads, cores = configuration()["threads"], configuration()["cores"]
    assert cores >= 1 and f"CPU threads: {threads} of {cores} cores" in text
    code, text, _ = run("doctor", "--json")
    assert code == 0
    assert json.loads(text) == json.loads(json.dumps(configuration()))


def test_module_runs_and_helps():
    for arguments, words in ((["--version"], pf.__version__), (["generate", "--help"], "--seed")):
        done = subprocess.run(
            [sys.executable, "-m", "pyflocality", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1"},
        )
        assert words in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "pyflocality", "generate", "nowhere", "--out", "o"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("pyflocality: error: `SOURCE`")
    assert "Traceback" not in done.stderr
