"""The stages of a run: what they cost, which there are, and the command that tells them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import pyflocality as pf
from pyflocality.backends.selection import machine_reason
from pyflocality.cli import main
from pyflocality.moments.marks import Tile
from pyflocality.moments.mask_source import making_products
from pyflocality.planner import Job, Setting, check_fits, peak_of, seconds_of, stages_of
from pyflocality.planner import masks as _masks
from pyflocality.planner import stages as _stages
from pyflocality.sources import cache

FEW = Setting(200, (3, 16, 16), 4)
MANY = Setting(2000, (3, 16, 16), 4)


def names(job):
    return [stage.name for stage in stages_of(job, aim=None)]


def test_which_stages_there_are():
    """Few images have thin components, many a covariance; what is at hand is not made."""
    rest = ["masks", "steps", "nearest images"]
    assert names(Job(FEW, "pca-locality")) == ["components", *rest]
    # Masks of many images by Cholesky factors, which need a covariance alone.
    assert names(Job(MANY, "pca-locality")) == ["moments", *rest]
    assert names(Job(MANY, "pca-locality", has_moments=True)) == rest
    assert names(Job(FEW, "pca-locality", of_moments=True)) == ["moments", *rest]
    assert names(Job(MANY, "wiener")) == ["moments", "components", *rest[1:]]
    assert names(Job(MANY, "wiener", has_moments=True)) == ["components", *rest[1:]]
    assert names(Job(MANY, "pca-locality", has_components=True)) == rest
    assert names(Job(MANY, "pca-locality", missing=0)) == rest[1:]
    assert names(Job(FEW, "wiener", nearest=False)) == ["components", "steps"]
    for model in ("optimal", "local", "fourier", "nearest", "equivariant", "patch-set"):
        assert names(Job(MANY, model)) == rest[1:]


def test_operations_are_those_of_the_parts():
    job = Job(MANY, "pca-locality", levels=3, calls=5, nearest=False)
    moments, masks, steps = stages_of(job, aim=None)
    values = 3 * 16 * 16
    assert moments.flops == 2000 * values * (values + 1)
    each = values * (7 + MANY.mask_share * values)
    assert steps.flops == pytest.approx(5 * 2000 * 4 * each)
    one = stages_of(replace(job, missing=1), aim=None)[1]
    assert masks.flops == 3 * one.flops > 0
    assert masks.flops == 2 * making_products("cholesky", 2000, values, 3)
    batches = stages_of(replace(job, batches=3, nearest=True), aim=None)[2:]
    one = stages_of(replace(job, nearest=True), aim=None)[2:]
    assert [many.flops for many in batches] == [3 * stage.flops for stage in one]


def test_times_are_operations_by_measured_rates(monkeypatch):
    """A machine with a rate for each kind of work."""
    monkeypatch.setattr(_stages, "_sums_rate", lambda: 1e-9)
    monkeypatch.setattr(_stages, "product_seconds", lambda flops, *dtype: 1e-6 * flops)
    monkeypatch.setattr(_stages, "solver_seconds", lambda side: 1000.0 * side)
    monkeypatch.setattr(_stages, "seconds_of", lambda model, setting, aim: 7.0)
    monkeypatch.setattr(_masks, "_measured_tile_seconds", lambda rank: (0.7 + rank, 0.2 + rank))
    monkeypatch.setattr(_stages, "_search_seconds", lambda shape, batch: 0.01 * batch)
    monkeypatch.setattr(_stages, "scheduled_seconds", lambda share: 1e-6 * share)
    job = Job(MANY, "pca-locality", levels=3, calls=5)
    moments, masks, steps, nearest = stages_of(job)
    values = 3 * 16 * 16
    assert moments.seconds == pytest.approx(1e-9 * moments.flops)
    whole = stages_of(Job(MANY, "wiener"))[1]
    assert whole.seconds == pytest.approx(1000.0 * values)
    # 768 values are two tiles on the diagonal and one above it.
    factors = 0.75 * 1e-6 * masks.flops
    # Of two by two blocks of a triangle's rows one has all 768, and two have half of them.
    assert masks.seconds == pytest.approx(factors + 3 * (2 * 512.7 + 512.2))
    thin_masks = stages_of(Job(FEW, "pca-locality", levels=3))[1]
    assert thin_masks.seconds == pytest.approx(3 * (2 * 199.7 + 199.2))
    beyond = Job(replace(FEW, memory_budget="16MB", shape=(3, 64, 64)), "pca-locality", levels=3)
    assert stages_of(beyond)[1].seconds == pytest.approx(3 * 3 * (24 * 199.7 + 276 * 199.2))
    share = MANY.mask_share
    # A schedule for each level; beyond the budget for each call.
    assert steps.seconds == pytest.approx(35.0 + 3 * 1e-6 * share * values**2)
    assert stages_of(replace(beyond, calls=7))[2].seconds == pytest.approx(
        7 * (7.0 + 1e-6 * share * (3 * 64 * 64) ** 2)
    )
    assert nearest.seconds == pytest.approx(0.01 * 4 * 2000)
    assert [stage.known for stage in (masks, steps)] == ["counted", "assumed"]
    assert stages_of(replace(job, knows_masks=True))[2].known == "counted"
    thin = stages_of(Job(FEW, "wiener", nearest=False))[0]
    sums, products = values * 200 * 201, 2 * values * 199 * 200 + 3 * values * 199**2
    assert thin.seconds == pytest.approx(1e-9 * sums + 1e-6 * products + 1000.0 * 200)


def test_tiles_lie_on_the_line_through_two_measurements(monkeypatch):
    measured = {64: (4.0, 1.0), 2048: (23.84, 10.92)}
    monkeypatch.setattr(_masks, "_measured_tile_seconds", measured.get)
    # .01 and .005 a component.
    assert _masks.tiles_seconds(3, 1064) == pytest.approx(3 * 14.0 + 3 * 6.0)
    assert _masks.tiles_seconds(1, 0) == pytest.approx(4.0)
    monkeypatch.undo()
    assert 0 < _masks.tiles_seconds(2, 100) < 1


def test_tiles_on_the_diagonal_are_told_from_the_others(monkeypatch):
    """Those hold the largest entries, and are made in double precision for them."""
    made = []
    to_double, marked = Tile._to_double, Tile._marked
    monkeypatch.setattr(Tile, "_to_double", lambda tile: made.append("double") or to_double(tile))
    monkeypatch.setattr(
        Tile, "_marked", lambda tile, cutoffs: made.append("single") or marked(tile, cutoffs)
    )
    spent = iter((5.0, 2.0))
    monkeypatch.setattr(_masks, "shortest", lambda call: call() or next(spent))
    assert _masks._measured_tile_seconds.__wrapped__(64) == (5.0, 2.0)
    if machine_reason("cpu") is None:
        # A tile beside the diagonal serves both sides.
        assert made == ["double", "single", "single"]


def test_schedules_of_levels_that_are_kept_stay():
    job = Job(replace(FEW, mask_share=0.5), "pca-locality", levels=3, knows_masks=True)
    schedule = 4 * (3 * 16 * 16) ** 2 // 2
    without = stages_of(replace(job, setting=replace(FEW, mask_share=0.0)), aim=None)
    told = stages_of(job, aim=None)
    more = [with_.bytes - bare.bytes for with_, bare in zip(told, without, strict=True)]
    # Components first; steps make one more, however dense; the search comes last.
    assert more == [0, 3 * schedule, 3 * schedule, 3 * schedule]


def test_schedules_of_bands_are_made_for_every_call():
    small, large = ((3, side, side) for side in (64, 128))
    assert _masks.bands(small) == 1 and _masks.bands(large) > 1
    # Four bytes a term; of bands the next one is made beside, from a copy of its bits.
    assert _masks.schedule_bytes(small, 0.5) == 2 * (3 * 64 * 64) ** 2
    each = (3 * 128 * 128) ** 2 / _masks.bands(large)
    assert _masks.schedule_bytes(large, 0.5) == pytest.approx(4 * each + each / 8)
    if machine_reason("cpu") is None:
        assert 0 < _masks.scheduled_seconds(0.1) < 1e-5


def test_nothing_is_measured_for_memory(monkeypatch):
    for name in ("product_seconds", "solver_seconds", "seconds_of", "_sums_rate"):
        monkeypatch.delattr(_stages, name)
    stages = stages_of(Job(MANY, "pca-locality"), aim=None)
    assert all(stage.seconds is None for stage in stages)
    assert peak_of(stages) == max(stage.bytes for stage in stages)


def test_measured_stages_of_every_model():
    for model in ("pca-locality", "local", "wiener", "ledoit-wolf", "fourier", "nearest"):
        stages = stages_of(Job(Setting(40, (1, 9, 9), 2), model), aim=0.01)
        assert all(0 < stage.seconds < 5 for stage in stages), model
    assert seconds_of("local", Setting(40, (1, 9, 9), 2), 0.01) > 0


def test_what_does_not_fit_is_refused(monkeypatch):
    job = Job(Setting(2000, (3, 256, 256), 8), "wiener")
    monkeypatch.setattr("pyflocality._support.memory.available_memory", lambda: 10**9)
    told = r"wiener: \w+ \(.* takes .* and 1 GB are there: take fewer"
    with pytest.raises(MemoryError, match=told):
        check_fits(job, "take fewer")
    check_fits(replace(job, setting=FEW), "take fewer")


def run_json(capsys, *words):
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files that are not decoded yet, of two classes, with a cache of their own."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "cache"))
    generator = np.random.default_rng(1)
    for label, count in (("cat", 30), ("dog", 50)):
        place = tmp_path / "set" / label
        place.mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "set"


def test_command_decodes_nothing(folder, capsys, tmp_path):
    record = run_json(capsys, folder, "-n", 3, "--steps", 4, "--flip", "--threshold", 0.02)
    assert record["images"] == 160 and record["shape"] == [3, 8, 8]
    assert record["calls"] == 4 and record["samples"] == 3
    assert 0 < record["decoding_seconds"] < 5
    assert [one["name"] for one in record["stages"]][:2] == ["components", "masks"]
    assert record["seconds"] > record["decoding_seconds"]
    assert record["peak_bytes"] > max(one["bytes"] for one in record["stages"])
    assert not (tmp_path / "cache").exists()
    cats = run_json(capsys, folder, "--label", "cat", "--denoiser", "local", "--no-nearest")
    assert cats["images"] == 30 and [one["name"] for one in cats["stages"]] == ["steps"]


def test_finding_the_images_counts_beside_decoding_them(folder, capsys, monkeypatch):
    monkeypatch.setattr(cache, "_sampled_seconds", lambda job: 10.0)
    record = run_json(capsys, folder, "-n", 1, "--steps", 1, "--denoiser", "local")
    assert 10 < record["decoding_seconds"] < 15


def test_command_of_a_set_that_is_decoded(tmp_path, capsys):
    images = torch.randint(0, 256, (50, 1, 6, 6), dtype=torch.uint8)
    np.save(tmp_path / "set.npy", images.numpy())
    source = str(tmp_path / "set.npy")
    record = run_json(capsys, source, "--sampler", "heun", "--steps", 3, "--mask-share", 0.2)
    assert record["decoding_seconds"] == 0 and record["mask_share"] == 0.2
    # Heun's method asks twice, but for the last step.
    assert record["calls"] == 5
    assert main(["plan", source, "--threshold", "0.02"]) == 0
    out = capsys.readouterr().out
    # Masks of so few values are made for the plan.
    assert "are there" in out and "(assumed)" not in out and "--mask-share" not in out
    told = run_json(capsys, source, "--device", "h200")
    assert told["seconds"] is None and all(one["seconds"] is None for one in told["stages"])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["digits", "--images", "3"],
        ["digits", "--batch", "3"],
        ["digits", "--images", "3", "--shape", "1x8x8"],
        ["--images", "3"],
        ["digits", "--threshold", "2"],
        ["digits", "--denoiser", "local", "--threshold", "0.1"],
        ["digits", "--steps", "0"],
        ["no-such-set"],
    ],
)
def test_wrong_plans_are_refused(words, capsys):
    assert main(["plan", *words]) == 2
    assert "error" in capsys.readouterr().err


def test_masks_that_are_cached_are_known(tmp_path, capsys, monkeypatch):
    """Nothing is made where all masks are in the cache, and these tell what their sums take."""
    pytest.importorskip("pyflocality._C")
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "cache"))
    images = torch.randint(0, 256, (40, 3, 20, 20), dtype=torch.uint8)
    np.save(tmp_path / "set.npy", images.numpy())
    source = str(tmp_path / "set.npy")
    steps = ["--steps", "2", "--spacing", "trailing", "--denoiser", "pca-locality"]
    before = run_json(capsys, source, *steps)
    assert [one["name"] for one in before["stages"]][:2] == ["components", "masks"]
    assert before["mask_share"] == 0.022
    assert main(["plan", source, *steps]) == 0
    out = capsys.readouterr().out
    assert "(assumed)" in out and "--mask-share" in out
    words = ["generate", source, "--out", str(tmp_path / "out"), "-n", "1", *steps]
    assert main([*words, "--no-progress", "--no-nearest"]) == 0
    capsys.readouterr()
    after = run_json(capsys, source, *steps)
    assert [one["name"] for one in after["stages"]] == ["steps", "nearest images"]
    assert after["way"] is None and after["stages"][0]["known"] == "counted"
    from pyflocality.kernels.cpu.masked_posterior import difference_tree

    denoiser = pf.PCALocalityDenoiser(pf.TrainingSet(images))
    levels = [pf.DDPMSchedule(spacing="trailing")(t) for t in (999, 499)]
    terms = [difference_tree(denoiser.weights_at(one), (3, 20, 20)).terms for one in levels]
    assert after["mask_share"] == pytest.approx(sum(terms) / 2 / 1200**2)
    # Another threshold has masks of its own.
    other = run_json(capsys, source, *steps, "--threshold", "0.1")
    assert [one["name"] for one in other["stages"]][:2] == ["components", "masks"]
