"""The cost model of `pyflocality plan` counts what the formulas ask for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pyflocality.cli import main
from pyflocality.moments.basis import basis_bytes
from pyflocality.ops.masked_posterior import MASKED_POSTERIOR
from pyflocality.planner import Setting, cost_of, models, seconds_of
from pyflocality.planner import steps as _costs


def test_models_come_by_what_they_take():
    expected = ["optimal", "local", "patch-set", "pca-locality", "equivariant", "wiener"]
    assert models() == expected


def test_costs_of_a_small_set():
    setting = Setting(10, (3, 8, 9), 2, "1MB")
    values, pixels = 3 * 8 * 9, 8 * 9
    assert cost_of("optimal", setting).flops == 10 * 2 * 5 * values
    local = cost_of("local", setting)
    assert local.flops == 10 * 2 * (5 * values + 6 * pixels)
    assert local.bytes == 10 * values + 2 * 2 * 4 * values
    assert local.working_bytes == 2**20
    patches = cost_of("patch-set", setting)
    assert patches.flops == 10 * 2 * (8 * values + 16 * pixels)
    assert patches.scans == 2 and patches.bytes == 2 * 10 * values + 2 * 2 * 4 * values
    # Windows of 7 fit at 2 x 3 places.
    assert cost_of("equivariant", setting).flops == 6 * local.flops
    masked = cost_of("pca-locality", replace(setting, mask_share=0.25))
    assert masked.flops == 10 * 2 * values * (7 + values / 4)
    assert cost_of("pca-locality", setting).flops < masked.flops
    components = basis_bytes(10, values)
    assert cost_of("pca-locality", setting).working_bytes == 2**20 + components
    # Ten images span nine directions.
    assert cost_of("wiener", setting).flops == 4 * 2 * values * 9
    assert cost_of("wiener", setting).working_bytes == components
    assert cost_of("wiener", replace(setting, images=500)).flops == 4 * 2 * values**2
    narrow = replace(setting, window=3)
    assert cost_of("equivariant", narrow).flops == 6 * 7 * local.flops


def test_scans_cost_in_proportion():
    small, large = Setting(100, (3, 8, 8), 2), Setting(300, (3, 8, 8), 8)
    for model in set(models()) - {"wiener"}:
        assert cost_of(model, large).flops == pytest.approx(12 * cost_of(model, small).flops)


def test_time_lies_on_the_line_through_two_measurements(monkeypatch):
    """A machine that takes 10 ms and 1 ms for every image and noisy image."""
    measured, made = [], []

    def step(model, setting, images):
        made.append(images)
        return lambda count: (setting.batch, count)

    def timed(step, count):
        batch, count = step(count)
        measured.append((batch, count))
        return (0.001 * count + 0.01) * batch

    monkeypatch.setattr(_costs, "_step", step)
    monkeypatch.setattr(_costs, "_timed", timed)
    found = seconds_of("local", Setting(50_000, (1, 8, 8), 20))
    assert found == pytest.approx(20 * (50 + 0.01), rel=1e-6)
    # Of twenty noisy images five take about as long as a measurement may.
    assert max(batch for batch, _ in measured) == 5
    assert max(count for _, count in measured) < 1000
    # A glance makes fewer images, in proportion.
    seconds_of("local", Setting(10**7, (1, 8, 8), 20))
    seconds_of("local", Setting(10**7, (1, 8, 8), 20), _costs.MEASURED_SECONDS / 8)
    assert made[2:] == [2**21] * 2 + [2**18] * 2


def test_measured_on_this_machine():
    for model in models():
        seconds = seconds_of(model, Setting(3, (1, 9, 9), 2))
        assert 0 < seconds < 5


def test_masks_of_large_images_are_measured_on_smaller_ones(monkeypatch):
    """A machine that takes a nanosecond for each operation, and an images' worth at the start."""
    seen = []

    def step(model, setting, images):
        seen.append(setting.shape)
        return lambda count: cost_of(model, replace(setting, images=count)).flops

    monkeypatch.setattr(_costs, "_step", step)
    monkeypatch.setattr(_costs, "_timed", lambda step, count: 1e-9 * step(count))
    setting = Setting(2000, (3, 64, 64), 8, mask_share=0.07)
    expected = 1e-9 * cost_of("pca-locality", setting).flops
    assert seconds_of("pca-locality", setting) == pytest.approx(expected, rel=1e-6)
    assert set(seen) == {(3, 32, 32)}


def test_measured_masks_take_the_share_they_are_planned_for():
    posterior = pytest.importorskip("pyflocality.kernels.cpu.masked_posterior")
    pytest.importorskip("pyflocality._C")
    for share in (0.022, 0.1, 0.5):
        setting = Setting(2, (3, 16, 16), 1, mask_share=share)
        (weights,) = MASKED_POSTERIOR.example(setting.size, torch.Generator().manual_seed(0))
        terms = posterior.difference_tree(weights, setting.shape).terms
        assert terms / setting.values**2 == pytest.approx(share, rel=0.1)


def test_command(capsys):
    arguments = ["plan", "--images", "1281167", "--shape", "3x64x64", "--batch", "64"]
    assert main([*arguments, "--device", "h200", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["set_bytes"] == 1281167 * 12288
    assert record["models"]["optimal"]["flops"] == 5.0 * 1281167 * 64 * 12288
    assert all(cost["seconds"] is None for cost in record["models"].values())
    assert main([*arguments, "--device", "h200"]) == 0
    assert "Time not measured on this device: h200." in capsys.readouterr().out
    assert main(["plan", "--images", "20", "--shape", "1x8x8", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "Time is measured here" in out and "not measured" not in out
    assert main([*arguments, "--device", "h200", "--mask-share", "0.5", "--json"]) == 0
    dense = json.loads(capsys.readouterr().out)
    flops = [found["models"]["pca-locality"]["flops"] for found in (record, dense)]
    assert flops[1] / flops[0] == pytest.approx((7 + 0.5 * 12288) / (7 + 0.022 * 12288))
    for wrong in (
        ["--mask-share", "0"],
        ["--mask-share", "0.6"],
        ["--shape", "64"],
        ["--images", "0"],
        ["--memory-budget", "much"],
        ["--device", "tpu"],
    ):
        assert main([*arguments, *wrong]) == 2
