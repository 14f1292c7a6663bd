"""How long a calibration takes at most, from the counts of its work and rates of this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pyflocality._support.rates import product_seconds
from pyflocality._support.text import bytes_told, time_told
from pyflocality.calibration.candidates import Candidate, is_thin
from pyflocality.calibration.counts import counts_of, temperatures_of
from pyflocality.data import TrainingSet
from pyflocality.noise import NoiseLevel
from pyflocality.planner import Job, Setting, Stage, cost_of, seconds_of, stages_of

# Work of fewer operations is quick: nothing is measured and nothing told of it.
_LONG_FLOPS = 2e11
# A pass that answers a value image beside the image takes at most so much of one.
_BESIDE = 1.5
# Of a measurement for a line that is told before the work, in seconds.
_GLANCE = 0.03


def foreseen(
    data: TrainingSet,
    candidates: Sequence[Candidate],
    levels: Sequence[NoiseLevel],
    positions: Sequence[Tensor],
) -> str | None:
    """A line on a calibration: how long at most, and of what; None of a quick one."""
    held_out, folds = sum(map(len, positions)), len(positions)
    counts = counts_of(len(levels), held_out, candidates, folds)
    heats = temperatures_of(candidates)
    sloped = {leaf.family for one in candidates for leaf in one.leaves if leaf.slope > 0}
    settings = {one: _setting(data, one, held_out) for one in heats}
    flops = {one: cost_of(one.model, setting).flops for one, setting in settings.items()}
    dearest = max(flops, key=lambda one: flops[one])
    rows = {one: heats[one] * counts.screened for one in heats}
    rows[dearest] += counts.compared + counts.restored
    if sum(flops[one] * count / held_out for one, count in rows.items()) < _LONG_FLOPS:
        return None
    measured: dict[tuple[str, int], float | None] = {}
    for one, setting in settings.items():
        key = one.model, setting.window
        if key not in measured:
            measured[key] = seconds_of(one.model, setting, _GLANCE)
    spent = [
        (measured[one.model, settings[one].window] or 0.0)
        * (_BESIDE if one in sloped else 1.0)
        * (count / held_out)
        for one, count in rows.items()
    ]
    stages = _making(data, settings, len(levels))
    making = sum(stage.seconds or 0.0 for stage in stages)
    most = max((stage.bytes for stage in stages), default=0)
    if sloped:
        # A linear image of every image, for each level.
        images = len(data) * data.copies * data.num_values
        making += len(levels) * product_seconds(2 * images * data.num_values, torch.float32)
        most += 4 * images
    total = sum(spent) + folds * making
    return (
        f"calibration: at most about {time_told(total)} ({len(candidates)} candidates at "
        f"{len(levels)} noise levels, {held_out} of {len(data):,} images held out in {folds} "
        f"fold{'s' * (folds > 1)}), up to {bytes_told(most)} of memory for moments, masks and "
        "linear images"
    )


def _setting(data: TrainingSet, candidate: Candidate, batch: int) -> Setting:
    """A step of a candidate for all held-out images."""
    setting = Setting(len(data) * data.copies, data.image_shape, batch)
    if candidate.window is None:
        return setting
    return dataclasses.replace(setting, window=candidate.window)


def _making(data: TrainingSet, settings: dict[Candidate, Setting], levels: int) -> list[Stage]:
    """Stages of what candidates are made of, in one fold."""
    stages: list[Stage] = []
    shares = {one.threshold for one in settings if one.model == "pca-locality"}
    for model in ("pca-locality", "wiener"):
        setting = next((settings[one] for one in settings if one.model == model), None)
        if setting is None:
            continue
        thin = is_thin(data)
        job = Job(
            setting,
            model,
            levels=levels,
            missing=levels * len(shares),
            # One model makes the moments of both.
            has_moments=bool(stages) and not thin,
            of_moments=not thin,
            image_bytes=data.images.element_size(),
            nearest=False,
        )
        stages += [stage for stage in stages_of(job, aim=_GLANCE) if stage.name != "steps"]
    return stages
