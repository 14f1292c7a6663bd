"""Criteria of a calibration beside networks, on a tiny set with tiny networks."""

from __future__ import annotations

import json

import pytest
import torch

import pyflocality as pf

pytest.importorskip("matplotlib", reason="the studies draw with matplotlib")

from tiny_sets import SHAPE, write_network, write_sets  # noqa: E402

from pyflocality.benchmarks.reproduce import criteria, methods, networks  # noqa: E402
from pyflocality.benchmarks.reproduce.runs import STEPS, starting_noise  # noqa: E402

LOCAL, WARM = (pf.Candidate("local", window=3, temperature=heat) for heat in (1.0, 1.4))
PATCHES = pf.Candidate("patch-set", window=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, and two networks."""
    folder = tmp_path_factory.mktemp("criteria")
    write_sets(folder)
    for seed, name in enumerate("ab"):
        write_network(folder / f"{name}.safetensors", seed)
    return folder


def test_runs_are_sampled_and_ranked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(criteria, "candidates", lambda shape: [LOCAL, PATCHES, WARM])
    out = tmp_path / "criteria.json"
    words = ["--source", str(folder / "set.npz"), "--out", str(out), "--samples", "3"]
    words += [word for name in "ab" for word in ("--network", str(folder / f"{name}.safetensors"))]
    assert criteria.main([*words, "--no-progress"]) == 0
    results = json.loads(out.read_text())["results"]
    calibration = pf.Calibration.load(out.with_suffix(".calibration.json"))
    data = methods.load_mixed(str(folder / "set.npz"), progress=False)
    assert calibration.content_key == data.content_key()
    noise = starting_noise(SHAPE, 3, criteria.SEED)
    target = pf.sample(
        networks.load(folder / "b.safetensors"), x_T=noise, steps=STEPS, progress=False
    ).images
    assert [row["run"] for row in results["runs"]] == list(map(str, calibration.runs))
    for row, run in zip(results["runs"], calibration.runs, strict=True):
        assert row["chosen"] == (run == calibration.run)
        models = [calibration.candidates[number].build(data) for number in run.choices]
        table = [(level.ratio, models[place]) for place, level in enumerate(calibration.levels)]

        def followed(x, sigma, alpha, table=table):
            return min(table, key=lambda pair: abs(pair[0] - sigma / alpha))[1](x, sigma, alpha)

        made = pf.sample(followed, x_T=noise, steps=STEPS, progress=False).images
        r2 = pf.metrics.r2(made.clamp(-1, 1), target.clamp(-1, 1))
        told = row["against"]["network B"]["final"]
        assert told["mean"] == pytest.approx(float(r2.mean()), rel=1e-4)
        energy = float(pf.metrics.gradient_energy(made.clamp(-1, 1)).mean())
        assert row["gradient_energy"]["mean"] == pytest.approx(energy, rel=1e-4)
    # Finished runs and the calibration are found again.
    monkeypatch.setattr(pf, "calibrate", None)
    monkeypatch.setattr(pf, "sample", None)
    assert criteria.main([*words, "--no-progress", "--force"]) == 0
    assert json.loads(out.read_text())["results"] == results


def test_ranks_are_correlated():
    assert criteria.correlation([1.0, 2.0, 3.0], [0.1, 0.5, 0.9]) == pytest.approx(1.0)
    assert criteria.correlation([1.0, 2.0, 3.0], [0.9, 0.5, 0.1]) == pytest.approx(-1.0)
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randperm(9, generator=generator).tolist() for _ in range(2))
    distance = sum((one - other) ** 2 for one, other in zip(a, b, strict=True))
    assert criteria.correlation(a, b) == pytest.approx(1 - 6 * distance / (9 * 80))


def test_further_candidates_are_the_same_families_elsewhere():
    tried = criteria.candidates((1, 12, 12))
    defaults = pf.calibration.default_candidates((1, 12, 12))
    assert set(defaults) < set(tried) and len(set(tried)) == len(tried)
    assert {one.family for one in tried} == {one.family for one in defaults}
    runs = {one.posterior for one in tried}
    assert len(runs) == 2 * 4 + len(criteria.FURTHER)
