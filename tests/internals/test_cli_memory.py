"""Runs that the memory cannot hold are refused before any work; long ones are told beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyflocality as pf
from pyflocality._support import memory
from pyflocality._support.text import time_told
from pyflocality.cli import _foreseen, main
from pyflocality.cli._foreseen import foreseen, levels_of
from pyflocality.cli._options import SamplingOptions
from pyflocality.planner import Stage


@pytest.fixture
def source(tmp_path):
    """A set that is loaded in no time, of images whose components take more than a little."""
    images = torch.randint(0, 256, (40, 3, 64, 64), generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "set.npy", images.to(torch.uint8).numpy())
    return str(tmp_path / "set.npy")


@pytest.fixture
def little(monkeypatch):
    """A machine with a megabyte left, on which every job is held against it."""
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    monkeypatch.setattr("pyflocality.planner.stages._LITTLE_BYTES", 0)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--denoiser", "pca-locality"],
        ["compare", "--methods", "pca-locality,optimal"],
        ["sensitivity", "--denoiser", "pca-locality"],
        ["spectrum", "--denoiser", "pca-locality"],
        ["memorize", "--denoiser", "pca-locality", "--sizes", "1,10"],
    ],
)
def test_refused_before_any_work(words, source, little, tmp_path, capsys, monkeypatch):
    for package in ("matplotlib", "scipy"):
        pytest.importorskip(package)
    monkeypatch.setattr("pyflocality.Moments.from_data", None)
    monkeypatch.setattr("pyflocality.Basis.from_data", None)
    command, *rest = words
    code = main([command, source, "--out", str(tmp_path / "out"), "--no-progress", *rest])
    err = capsys.readouterr().err
    assert code == 1 and "1 MB are there" in err, err
    assert "pca-locality: " in err and "--denoiser local or patch-set would run" in err
    assert "--ignore-memory" in err and not list((tmp_path / "out").glob("*"))


def test_a_table_of_models_is_refused_before_any_run(tmp_path, capsys, monkeypatch):
    networks = pytest.importorskip("pyflocality.benchmarks.reproduce.networks")
    methods = pytest.importorskip("pyflocality.benchmarks.reproduce.methods")
    data = pf.TrainingSet(torch.zeros(40, 3, 64, 64, dtype=torch.uint8))
    monkeypatch.setattr(methods, "load_mixed", lambda source, progress: data)
    monkeypatch.setattr(networks, "check_networks", lambda *given: [])
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    words = ["reproduce", "set", "--network", "n", "--out", str(tmp_path / "out")]
    assert main([*words, "--no-progress"]) == 1
    err = capsys.readouterr().err
    assert "wiener: " in err and "1 MB are there" in err, err
    assert "--methods without moments would run" in err and "--ignore-memory" in err
    assert not list((tmp_path / "out").glob("*"))


def test_refusals_can_be_overridden(source, little, tmp_path, capsys):
    words = ["generate", source, "--out", str(tmp_path / "out"), "--denoiser", "local", "-n", "1"]
    words += ["--window", "3", "--steps", "1", "--spacing", "trailing", "--no-progress"]
    assert main(words) == 1
    assert "local: steps" in capsys.readouterr().err
    assert main([*words, "--ignore-memory"]) == 0


def test_long_runs_are_told_beforehand(source, tmp_path, monkeypatch, capsys):
    words = ["generate", source, "--out", str(tmp_path / "out"), "--denoiser", "local", "-n", "1"]
    words += ["--window", "3", "--steps", "1", "--spacing", "trailing", "--force"]
    assert main(words) == 0
    assert "about" not in capsys.readouterr().err
    monkeypatch.setattr(_foreseen, "_LONG_FLOPS", 0.0)
    monkeypatch.setattr(_foreseen, "_LONG_SECONDS", 0.0)
    assert main(words) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    assert line.startswith("local: about ") and line.endswith("of memory beside the images")
    assert main([*words, "--no-progress"]) == 0
    assert capsys.readouterr().err == ""


def test_the_line_names_what_takes_long_and_the_most_memory():
    def stage(name, seconds, size):
        return Stage(name, "", 0.0, seconds, size, "counted")

    stages = [stage("moments", 1.0, 10), stage("masks", 300.0, 4 * 10**9), stage("steps", 60.0, 5)]
    told = foreseen("pca-locality", stages)
    parts = "masks 5 min, steps 60 s"
    assert told == f"pca-locality: about 6 min ({parts}), up to 4 GB of memory beside the images"
    assert foreseen("pca-locality", stages[:1]) is None
    unknown = foreseen("local", [*stages, stage("steps", None, 5)])
    assert "about 6 min at least (" in unknown


def test_moments_are_refused(tmp_path, capsys, monkeypatch):
    """More images than values: there is no thin way."""
    np.save(
        tmp_path / "set.npy", np.random.default_rng(0).integers(0, 256, (800, 28, 28), np.uint8)
    )
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 10**7)
    monkeypatch.setattr("pyflocality.planner.stages._LITTLE_BYTES", 0)
    words = ["moments", str(tmp_path / "set.npy"), "--out", str(tmp_path / "m"), "--no-progress"]
    assert main([*words, "--resolution", "14"]) == 0
    assert main([*words, "--force"]) == 1
    err = capsys.readouterr().err
    assert "wiener: components (eigenvectors of the products of 784 values)" in err
    assert "20 MB are there" in err and "--ignore-memory" in err


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.012, "0.012 s"), (41.3, "41 s"), (99.6, "1.7 min"), (12_600, "3.5 h")]
)
def test_times_in_the_unit_that_fits(seconds, told):
    assert time_told(seconds) == told


def test_levels_are_those_that_the_sampler_asks_for():
    schedule = SamplingOptions(steps=4).noise_schedule()
    expected = [schedule(t) for t in schedule.timesteps(4)]
    assert levels_of(SamplingOptions(steps=4)) == expected
    assert len(levels_of(SamplingOptions(steps=4, sampler="heun"))) == 7
