"""How much work a calibration is, and how long it takes: counts, and rates of this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pyflocality._support.rates import product_seconds
from pyflocality._support.text import bytes_told, time_told
from pyflocality.calibration.candidates import Candidate
from pyflocality.calibration.counts import counts_of, folds_of_set, rows_of
from pyflocality.data import TrainingSet
from pyflocality.moments.basis import basis_method
from pyflocality.noise import NoiseLevel
from pyflocality.planner import Job, Setting, Stage, cost_of, seconds_of, stages_of

# Work of fewer operations is quick: nothing is measured and nothing told of it.
_LONG_FLOPS = 2e11
# A pass that answers a value image beside the image takes at most so much of one.
_BESIDE = 1.5
# Of a measurement for a line that is told before the work, in seconds.
_GLANCE = 0.03


@dataclass(frozen=True)
class Calibrating:
    """A calibration that is planned.

    Attributes:
        images: Images of the set, copies not included.
        shape: Their shape (C, H, W).
        candidates: What is chosen among.
        levels: Number of noise levels.
        copies: Copies of each image.
        image_bytes: Bytes of a stored value.
    """

    images: int
    shape: tuple[int, int, int]
    candidates: Sequence[Candidate]
    levels: int
    copies: int = 1
    image_bytes: int = 1

    @property
    def held_out(self) -> int:
        """Images that are held out, in all folds together."""
        return folds_of_set(self.images)[0]

    @property
    def folds(self) -> int:
        """Number of folds."""
        return folds_of_set(self.images)[1]

    @cached_property
    def settings(self) -> dict[Candidate, Setting]:
        """A step for all held-out images, by family."""
        return {one: self._setting(one) for one in self._rows}

    @property
    def flops(self) -> float:
        """Operations at most: every level restores images."""
        scans = sum(
            cost_of(one.model, self.settings[one]).flops * rows / self.held_out
            for one, rows in self._rows.items()
        )
        making = sum(stage.flops for stage in self.making(None)) + self._linear_flops
        return scans + self.folds * making

    def seconds(self, aim: float) -> float:
        """Time on this machine, by measurements that take about so many seconds each.

        Images are taken to be restored at two thirds of the levels.
        """
        measured: dict[tuple[str, int], float] = {}
        spent = 0.0
        for one, rows in self._rows_of(-(-2 * self.levels // 3)).items():
            setting = self.settings[one]
            key = one.model, setting.window
            if key not in measured:
                measured[key] = seconds_of(one.model, setting, aim) or 0.0
            beside = _BESIDE if one in self._sloped else 1.0
            spent += beside * measured[key] * rows / self.held_out
        making = sum(stage.seconds or 0.0 for stage in self.making(aim))
        if self._sloped:
            making += product_seconds(self._linear_flops, torch.float32)
        return spent + self.folds * making

    @property
    def bytes(self) -> int:
        """Most memory for moments, masks and linear images."""
        most = max((stage.bytes for stage in self.making(None)), default=0)
        values = math.prod(self.shape)
        return most + (4 * self.images * self.copies * values if self._sloped else 0)

    def making(self, aim: float | None) -> list[Stage]:
        """Stages of what candidates are made of, in one fold; None measures nothing."""
        stages: list[Stage] = []
        shares = {one.threshold for one in self.settings if one.model == "pca-locality"}
        for model in ("pca-locality", "wiener"):
            setting = next(
                (self.settings[one] for one in self.settings if one.model == model), None
            )
            if setting is None:
                continue
            thin = basis_method(setting.images, setting.values) == "gram"
            job = Job(
                setting,
                model,
                levels=self.levels,
                missing=self.levels * len(shares),
                # One model makes the moments of both.
                has_moments=bool(stages) and not thin,
                of_moments=not thin,
                image_bytes=self.image_bytes,
                nearest=False,
            )
            stages += [stage for stage in stages_of(job, aim=aim) if stage.name != "steps"]
        return stages

    @cached_property
    def _rows(self) -> dict[Candidate, float]:
        return self._rows_of(self.levels)

    def _rows_of(self, telling: int) -> dict[Candidate, float]:
        counts = counts_of(self.levels, self.held_out, self.candidates, self.folds, telling)
        return rows_of(counts, self.candidates)

    @cached_property
    def _sloped(self) -> set[Candidate]:
        return {leaf.family for one in self.candidates for leaf in one.leaves if leaf.slope > 0}

    @property
    def _linear_flops(self) -> float:
        """Of a linear image of every image, for each level."""
        values = math.prod(self.shape)
        flops = 2.0 * self.levels * self.images * self.copies * values**2
        return flops if self._sloped else 0.0

    def _setting(self, candidate: Candidate) -> Setting:
        setting = Setting(self.images * self.copies, self.shape, self.held_out)
        if candidate.window is None:
            return setting
        return dataclasses.replace(setting, window=candidate.window)


def foreseen(
    data: TrainingSet, candidates: Sequence[Candidate], levels: Sequence[NoiseLevel]
) -> str | None:
    """A line on a calibration: about how long, and of what; None of a quick one."""
    work = Calibrating(
        len(data),
        data.image_shape,
        candidates,
        len(levels),
        data.copies,
        data.images.element_size(),
    )
    if work.flops < _LONG_FLOPS:
        return None
    return (
        f"calibration: about {time_told(work.seconds(_GLANCE))} ({len(candidates)} candidates at "
        f"{work.levels} noise levels, {work.held_out} of {len(data):,} images held out in "
        f"{work.folds} fold{'s' * (work.folds > 1)}), up to {bytes_told(work.bytes)} of memory for "
        "moments, masks and linear images"
    )
