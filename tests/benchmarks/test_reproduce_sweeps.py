"""Sweeps of the reproduction, and what their numbers are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from reproduced import loaded, network_truth, truth
from tiny_sets import COUNT, SHAPE  # noqa: E402

import pyflocality as pf
from pyflocality.benchmarks.reproduce import (  # noqa: E402
    diagnosis,
    networks,
    scores,
    sweeps,
)


def test_summary_leaves_out_what_is_no_number():
    values = torch.tensor([1.0, 3.0, -torch.inf, 5.0, torch.nan])
    assert scores.summary(values) == {
        "mean": 3.0,
        "standard_error": pytest.approx(2 / 3**0.5),
        "median": 3.0,
        "left_out": 2,
    }
    assert scores.summary(torch.tensor([2.0]))["standard_error"] is None
    nothing = scores.summary(torch.tensor([torch.nan]))
    assert nothing["mean"] is None and scores.shown(nothing, 3) == "-"
    assert scores.shown(scores.summary(values), 2) == "3.00 ± 1.15"


def test_effective_sizes_are_those_of_the_weights(folder):
    data = loaded(folder)
    denoiser = pf.PCALocalityDenoiser(data, 0.3, dtype=torch.float64, backend="reference")
    alpha, sigma = pf.DDPMSchedule()(100)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = denoiser.weights_at(sigma, alpha).dense(torch.float64)
    squared = (x.flatten(1)[:, None] - alpha * data.values(dtype=torch.float64).flatten(1)) ** 2
    logits = -torch.einsum("qd,bnd->bqn", weights, squared) / (2 * sigma**2)
    exact = logits.softmax(-1)
    parts = logits.split(7, -1)
    mixture = torch.cat([part.softmax(-1) / len(parts) for part in parts], -1)
    # The same in another order: other batches, other sizes.
    order = torch.arange(COUNT).flip(0)
    turned = torch.cat([p.softmax(-1) / len(parts) for p in logits[..., order].split(7, -1)], -1)
    assert (turned.square().sum(-1) / mixture.square().sum(-1) - 1).abs().max() > 0.01

    def batch_mean(images):
        options = {"dtype": torch.float64, "backend": "reference"}
        return pf.PCALocalityDenoiser(images, 0.3, 1.0, "batch_mean", 7, **options)

    models = (denoiser, batch_mean(data), batch_mean(data.subset(order)))
    for model, p in zip(models, (exact, mixture, turned), strict=True):
        found = diagnosis.effective_sizes(model, x, sigma, alpha)
        torch.testing.assert_close(found, 1 / p.square().sum(-1), rtol=1e-6, atol=0)
    # Four batches: no batch mean rests on fewer images.
    assert found.min() >= 4 - 1e-9 and (1 / exact.square().sum(-1)).min() < 2


def test_weighted_quantiles():
    sizes = torch.tensor([[5.0, 1.0, 9.0], [3.0, 2.0, 8.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    # In order 1 (3), 2 (3), 3 (1), 5 (1), 8 (0), 9 (0): 8 in all.
    assert diagnosis.weighted_quantiles(sizes, weights) == [1.0, 2.0, 5.0]


def test_sweeps(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "TEMPERATURES", (1.0, 2.0))
    monkeypatch.setattr(sweeps, "THRESHOLDS", (1 / 3, 1.0, 10.0))
    monkeypatch.setattr(sweeps, "FURTHER_THRESHOLDS", (1 / 3,))
    monkeypatch.setattr(sweeps, "FURTHER", 7)
    monkeypatch.setattr(sweeps, "ORDERS", (2,))
    monkeypatch.setattr(sweeps, "BATCHES", (7,))
    monkeypatch.setattr(sweeps, "DIAGNOSED", (7,))
    out = tmp_path / "sweeps.json"
    arguments = [
        *("--source", str(folder / "set.npz"), "--network", str(folder / "a.safetensors")),
        *("--network", str(folder / "b.safetensors"), "--out", str(out), "--no-progress"),
        *("--threshold", "0.3", "--samples", "2", "--seeds", "2"),
    ]
    assert sweeps.main(arguments) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    found = report["results"]["sweeps"]
    assert list(found["temperature"]) == ["1", "2"] and list(found["threshold"]) == ["0.1", "0.3"]
    assert list(found["aggregation"]) == [
        *("exact", "batch_mean 7", "batch_mean 7, order 2"),
        *(sweeps.CLASS_ORDER, "batch_mean 7, threshold 0.1"),
    ]
    # One model under three names.
    assert found["temperature"]["1"]["against"] == found["aggregation"]["exact"]["against"]
    assert found["threshold"]["0.3"]["against"] == found["aggregation"]["exact"]["against"]

    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    noise = torch.cat([torch.randn(2, *SHAPE, generator=generator) for generator in seeds])
    data = loaded(folder)
    options = {"dtype": torch.float64, "backend": "reference"}
    y = network_truth(folder / "b.safetensors", noise)

    def r2(images, *settings):
        u = truth(pf.PCALocalityDenoiser(images, *settings, **options), noise)
        return 1 - ((u - y) ** 2).mean(-1) / y.var(-1, ddof=1)

    mixed = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))
    by_class = data.labels.argsort(stable=True)
    exact, other = r2(data, 0.3), r2(data, 0.1)
    expected = {
        ("temperature", "2"): r2(data, 0.3, 2.0) - exact,
        ("threshold", "0.1"): other - exact,
        ("threshold", "0.3"): exact - exact,
        ("aggregation", "batch_mean 7"): r2(data, 0.3, 1.0, "batch_mean", 7) - exact,
        ("aggregation", "batch_mean 7, order 2"): (
            r2(data.subset(mixed), 0.3, 1.0, "batch_mean", 7) - exact
        ),
        ("aggregation", sweeps.CLASS_ORDER): (
            r2(data.subset(by_class), 0.3, 1.0, "batch_mean", 7) - exact
        ),
        ("aggregation", "batch_mean 7, threshold 0.1"): (
            r2(data, 0.1, 1.0, "batch_mean", 7) - other
        ),
    }
    for (kind, value), difference in expected.items():
        told = found[kind][value]["minus_exact"]["network B"]
        ends, mean = difference[-1], difference.mean(0)
        for record, values in ((told["final"], ends), (told["all_steps"], mean)):
            assert record["mean"] == pytest.approx(values.mean(), abs=5e-3)
            error = values.std(ddof=1) / 2
            assert record["standard_error"] == pytest.approx(error, rel=2e-2, abs=2e-3)
            by_seed = values.reshape(2, 2).mean(1)
            np.testing.assert_allclose(record["by_seed"], by_seed, rtol=0, atol=5e-3)
        assert told["final"]["positive_share"] == pytest.approx((ends > 0).mean())
    assert abs(expected["aggregation", sweeps.CLASS_ORDER]).max() > 0.05
    alpha, sigma = pf.DDPMSchedule()(900)
    dense = pf.PCALocalityDenoiser(data, 0.1).weights_at(sigma, alpha).dense(torch.float64)
    [*_, last] = report["results"]["masks"]["0.1"]
    first = report["results"]["masks"]["0.1"][0]
    assert first["density"] == pytest.approx(float(dense.mean())) and last["t"] == 0
    assert report["results"]["why"]["batches"] == {"batch_mean 7": 4, sweeps.CLASS_ORDER: 4}
    why = report["results"]["why"]["models"]
    assert list(why) == ["network", "exact", "batch_mean 7", sweeps.CLASS_ORDER]
    assert len(why["exact"]) == 10 and why["batch_mean 7"][-1]["effective_sample_size"][0] >= 3.99
    network = networks.load(folder / "a.safetensors")
    network.module.double()
    out_of = pf.sample(network, x_T=noise[:2].double(), steps=10, progress=False)
    alpha, sigma = pf.DDPMSchedule()(300)
    at = out_of.timesteps.tolist().index(300)
    x, target = out_of.x_t[at], out_of.x0[at].clamp(-1, 1)
    sorted_mean = pf.PCALocalityDenoiser(
        data.subset(by_class), 0.3, 1.0, "batch_mean", 7, **options
    )
    plain = pf.PCALocalityDenoiser(data, 0.3, **options)
    apart = [pf.metrics.r2(u(x, sigma, alpha).clamp(-1, 1), target) for u in (sorted_mean, plain)]
    told = why[sweeps.CLASS_ORDER][at]["r2_minus_exact"]
    assert told["mean"] == pytest.approx(float((apart[0] - apart[1]).mean()), abs=2e-3)
    assert abs(told["mean"]) > 0.005 and why["exact"][at]["r2_minus_exact"]["mean"] == 0
    for suffix in (".png", "-why.png", "-samples.png"):
        assert (tmp_path / f"sweeps{suffix}").stat().st_size > 1000

    with pytest.raises(SystemExit):
        sweeps.main(arguments)
    assert "--force replaces it" in capsys.readouterr().err

    def refuse(*_):
        raise AssertionError("nothing is to be made again")

    monkeypatch.setattr(sweeps, "perform", refuse)
    monkeypatch.setattr(diagnosis, "diagnose", refuse)
    assert sweeps.main([*arguments, "--force"]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["results"] == report["results"]


def test_outputs_without_inputs():
    generator = torch.Generator().manual_seed(2)
    values = 0.5 * torch.randn(500, 1, 4, 4, generator=generator)
    # The first value hardly varies, and does so with the second: its row of the filter explodes.
    values[:, 0, 0, 0] = 0.003 * values[:, 0, 0, 1]
    data = pf.TrainingSet(values.clamp(-1, 1))
    moments = pf.Moments.from_data(data)
    [*_, last] = sweeps.masks(data, moments, 0.3)
    scaled = moments.covariance * 0.9999
    filtered = scaled @ (scaled + 1e-4 * torch.eye(16, dtype=torch.float64)).inverse()
    scaled = (filtered / filtered.diagonal()[:, None]).abs()
    kept = scaled >= 0.3 * scaled.max()
    assert last["without_inputs"] == pytest.approx(float((~kept.any(0)).double().mean()))
    assert 0 < last["without_inputs"] < 1
