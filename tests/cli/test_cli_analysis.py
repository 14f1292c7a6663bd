"""`pyflocality sensitivity | spectrum | memorize` on scikit-learn's digits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the commands run on scikit-learn's digits")
pytest.importorskip("matplotlib", reason="the commands draw with matplotlib")
pytest.importorskip("scipy", reason="spectra need SciPy")

import pyflocality as pf  # noqa: E402
from pyflocality import analysis, cli  # noqa: E402


def run(*words: object) -> int:
    return cli.main([*map(str, words), "--no-progress"])


def test_sensitivity(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--pixel", "0,2,3", "--denoiser", "local", "--window", 3, "--n", 2, "--steps", 3]
    assert run("sensitivity", "digits", "--out", out, *arguments, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["pixels"] == [[0, 2, 3]] and record["files"][0] == "sensitivity.png"
    assert (out / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    found = np.load(out / "sensitivity.npz")
    data = pf.TrainingSet.load("digits")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, denoiser in (
        ("local", pf.LocalDenoiser(data, 3)),
        ("wiener", pf.WienerDenoiser(pf.Moments.from_data(data))),
    ):
        expected = analysis.sensitivity_along_run(
            denoiser, (0, 2, 3), steps=3, x_T=noise, progress=False
        )
        np.testing.assert_allclose(found[f"fields_{name}"], expected.fields, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["timesteps"], expected.timesteps)


def test_spectrum(tmp_path):
    out = tmp_path / "out"
    assert run("spectrum", "digits", "--out", out, "--t", "600,300", "--k", 4, "--image", 5) == 0
    found = np.load(out / "spectrum.npz")
    data = pf.TrainingSet.load("digits")
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, sigma = pf.DDPMSchedule()(300)
    x = alpha * data.values(5, 6) + sigma * noise
    expected = analysis.jacobian_spectrum(pf.OptimalDenoiser(data), x, sigma, alpha, k=4)
    assert found["vectors"].shape == (2, 4, 1, 8, 8)
    np.testing.assert_allclose(found["values"][1], expected.values, rtol=1e-3, atol=1e-5)
    assert (out / "spectrum.png").stat().st_size > 5000


def test_memorize(tmp_path):
    out = tmp_path / "out"
    arguments = ["--sizes", "1,20", "--denoiser", "optimal", "--n", 2, "--steps", 3]
    assert run("memorize", "digits", "--out", out, *arguments) == 0
    found = np.load(out / "memorize.npz")
    assert found["samples"].shape == (2, 2, 2, 1, 8, 8)
    # A model of one image makes that image.
    np.testing.assert_allclose(found["nearest"][0], 1.0, atol=1e-6)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(record["between_models"], found["between"].mean(1))
    assert (out / "memorize.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sensitivity", "digits", "--pixel", "1"], "`--pixel` must be channel,row,column"),
        (["sensitivity", "digits", "--pixel", "0,8,0"], "`--pixel` must lie in an image"),
        (["spectrum", "digits", "--t", "high"], "`--t` must be numbers"),
        (["spectrum", "digits", "--t", "300,300"], "`--t` must hold different times"),
        (
            ["spectrum", "digits", "--schedule", "flow", "--t", "0.5,1"],
            "`--t` must be times with both signal and noise",
        ),
        (["spectrum", "digits", "--image", 5000], "`--image` must be from 0 to 1796"),
        (["memorize", "digits", "--sizes", "1,2000"], "`--sizes` must hold numbers from 1 to 898"),
        (["memorize", "digits", "--window", 3, "--denoiser", "optimal"], "`--window` belongs to"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(words, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*words, "--out", out) == 2
    assert message in capsys.readouterr().err.replace("`window`", "`--window`")
    assert not out.exists()


def test_results_are_kept_unless_forced(tmp_path, capsys):
    (tmp_path / "memorize.npz").write_text("mine")
    assert run("memorize", "digits", "--out", tmp_path, "--sizes", "1") == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "memorize.npz").read_text() == "mine"
