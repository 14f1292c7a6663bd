"""Calibrations in a moment: bounded by counts, by a part of large sets, kept in the cache."""

from __future__ import annotations

import math

import pytest
import torch
from truth import random_images

import pyflocality as pf
from pyflocality.calibration import quick
from pyflocality.calibration.quick import kept_calibration, quick_calibration, quick_plan

SHAPE = (1, 6, 6)
SCHEDULE = pf.DDPMSchedule()


def training_set(count=60):
    images = random_images(torch.Generator().manual_seed(3), count, SHAPE, torch.uint8)
    return pf.TrainingSet(images, labels=torch.arange(count) % 3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 32, 48), (3, 64, 64)])
@pytest.mark.parametrize("count", [4, 200, 60_000])
def test_the_counted_work_is_bounded(shape, count):
    plan = quick_plan(count, shape, 10)
    assert plan is not None
    assert plan.work(shape).flops <= quick.MOST_FLOPS
    assert plan.images == count or plan.images >= quick.LEAST_IMAGES
    sides = [one.window for one in plan.candidates if one.window]
    assert sides and max(sides) <= min(shape[1:])
    more = quick_plan(count, shape, 10, copies=2)
    assert more is None or more.work(shape).flops <= quick.MOST_FLOPS


def test_large_images_have_patches_alone_and_larger_ones_nothing():
    assert {one.model for one in quick_plan(2000, (3, 64, 64), 10).candidates} == {
        "wiener", "patch-set",
    }  # fmt: skip
    assert quick_plan(2000, (3, 256, 256), 10) is None


def test_too_few_images_have_none():
    assert quick_plan(3, SHAPE, 10) is None
    assert quick_plan(4, SHAPE, 10) is not None


def test_it_is_what_calibrate_finds():
    data, plan = training_set(), quick_plan(60, SHAPE, 4)
    found = quick_calibration(data, plan, SCHEDULE, progress=False)
    assert found == pf.calibrate(
        data, steps=4, candidates=plan.candidates, seed=quick.SEED, progress=False
    )


def test_of_a_large_set_a_part_is_searched(monkeypatch):
    data = training_set()
    monkeypatch.setattr(quick, "LEAST_IMAGES", 10)
    most = quick_plan(60, SHAPE, 3).work(SHAPE).flops / 3
    monkeypatch.setattr(quick, "MOST_FLOPS", most)
    plan = quick_plan(60, SHAPE, 3)
    assert 10 <= plan.images < 60
    found = quick_calibration(data, plan, SCHEDULE, progress=False)
    assert (found.images, found.searched) == (60, plan.images)
    assert found.held_out <= plan.images // 2
    assert found.content_key == data.content_key()
    # Of the whole set it is another one.
    whole = pf.calibrate(data, steps=3, candidates=plan.candidates, progress=False)
    assert [level.trials for level in found.levels] != [level.trials for level in whole.levels]


def test_a_long_run_goes_by_ten_of_its_levels():
    plan = quick_plan(60, SHAPE, 50)
    times, levels = plan.levels_of(SCHEDULE)
    own = SCHEDULE.timesteps(50).tolist()
    assert len(times) == quick.MOST_STEPS == len(levels) - 1
    assert set(times) < set(own) and (times[0], times[-1]) == (own[0], own[-1])
    assert levels[-1] == SCHEDULE.final
    assert plan.work(SHAPE) == quick_plan(60, SHAPE, 10).work(SHAPE)


def test_what_it_depends_on_has_another_name():
    data, plan = training_set(), quick_plan(60, SHAPE, 4)
    names = [
        plan.name(data, SCHEDULE),
        plan.name(training_set(61), SCHEDULE),
        plan.name(pf.TrainingSet(data.images), SCHEDULE),
        plan.name(data.augmented(flip=True), SCHEDULE),
        plan.name(data, pf.CosineSchedule()),
        quick_plan(60, SHAPE, 3).name(data, SCHEDULE),
    ]
    assert len(set(names)) == len(names)
    assert plan.name(training_set(), SCHEDULE) == names[0]


def test_it_is_kept_and_a_damaged_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "cache"))
    data, plan = training_set(), quick_plan(60, SHAPE, 2)
    assert kept_calibration(data, plan, SCHEDULE) is None
    found = quick_calibration(data, plan, SCHEDULE, progress=False)
    assert kept_calibration(data, plan, SCHEDULE) == found
    (file,) = (tmp_path / "cache" / "calibrations").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    with pytest.warns(UserWarning, match="damaged"):
        assert kept_calibration(data, plan, SCHEDULE) is None
    # Whole, but no calibration.
    quick.write_blob(plan.name(data, SCHEDULE), b'{"format": "something else"}')
    with pytest.warns(UserWarning, match="cannot be used and is made anew"):
        assert kept_calibration(data, plan, SCHEDULE) is None


def test_operations_are_those_of_steps_models_and_linear_images():
    """Counted by hand for one family, whose slope makes linear images."""
    family = pf.Candidate("local", window=3)
    plan = quick.QuickPlan((family, pf.Candidate("local", window=3, slope=0.5)), 60, 2, 1)
    work = plan.work(SHAPE)
    from pyflocality.calibration.counts import counts_of
    from pyflocality.planner import Setting, cost_of

    counts = counts_of(2, work.held_out, plan.candidates, work.folds)
    rows = counts.screened + counts.compared + counts.restored
    step = cost_of("local", Setting(60, SHAPE, 1, window=3)).flops
    linear = work.folds * 2 * (2 * 60 * math.prod(SHAPE) ** 2)
    assert work.flops == pytest.approx(step * rows + linear)
