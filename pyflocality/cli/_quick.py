"""What `generate` takes where no option names a model or sets one: a calibration made in a moment.

It is made once for a set and a schedule, and kept in the cache. Where a moment is too short for
the images, or they are too few, it is the published model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pyflocality._support.streams import tell
from pyflocality.cli._denoisers import DENOISERS, DenoiserOptions
from pyflocality.cli._foreseen import hold, jobs_of

if TYPE_CHECKING:
    import torch

    from pyflocality import Calibration, TrainingSet
    from pyflocality._support.record import Stages
    from pyflocality.calibration.quick import QuickPlan
    from pyflocality.cli._options import NoiseOptions
    from pyflocality.planner import Job
    from pyflocality.posterior.ranks import Ranks

# The model that a run without a calibration takes.
PUBLISHED = "pca-locality"
# Options of models that say how, not what.
_HOW = ("backend", "memory_budget")


def says_nothing(given: Mapping[str, Any]) -> bool:
    """Whether options that were given leave the model open."""
    return all(name in _HOW for name in given)


@dataclass(frozen=True)
class Quick:
    """A calibration in a moment.

    Attributes:
        data: The set, whole, on the CPU.
        given: What goes to the model whatever it is.
        sampling: The run.
    """

    data: TrainingSet
    given: Mapping[str, Any]
    sampling: NoiseOptions

    @cached_property
    def plan(self) -> QuickPlan | None:
        """How it is made; None where the published model is taken."""
        from pyflocality.calibration.quick import quick_plan

        data = self.data
        return quick_plan(len(data), data.image_shape, self.sampling.steps, data.copies)

    def model(self, calibration: Calibration | None) -> DenoiserOptions:
        """The model of a run."""
        if calibration is None:
            return DenoiserOptions(PUBLISHED, self.given)
        return DenoiserOptions("calibrated", {**self.given, "calibration": calibration})

    def kept(self) -> Calibration | None:
        """The calibration, where the cache has it."""
        from pyflocality.calibration.quick import kept_calibration

        plan = self.plan
        if plan is None:
            return None
        return kept_calibration(self.data, plan, self.sampling.noise_schedule())

    def dearest(self, *, is_sketch: bool = False) -> list[Job]:
        """The run by every model that may be chosen, as if it were chosen for all levels."""
        plan = self.plan
        assert plan is not None
        jobs = []
        for name in dict.fromkeys(one.model for one in plan.candidates):
            sides = [one.window for one in plan.candidates if one.model == name and one.window]
            taken = DENOISERS[name].options
            given = {key: value for key, value in self.given.items() if key in taken}
            options = DenoiserOptions(name, given | ({"window": max(sides)} if sides else {}))
            jobs += jobs_of(self.data, options, self.sampling, nearest=False, is_sketch=is_sketch)
        return jobs

    def settled(
        self, stages: Stages, ranks: Ranks | None, device: torch.device
    ) -> tuple[DenoiserOptions, str]:
        """The model, the same on every rank, and where its calibration is from.

        Raises:
            MemoryError: A model that may be chosen takes more memory than there is.
        """
        from pyflocality.calibration.record import calibration_of

        if self.plan is None:
            if stages.announce:
                tell(self._why_not())
            return self.model(None), "none"
        found, origin = None, "other rank"
        if ranks is None or ranks.rank == 0:
            found, origin = self.kept(), "cache"
            if found is None:
                found, origin = self._made(stages), "made"
            if stages.announce:
                tell(_told(found, origin))
        if ranks is not None:
            text = None if found is None else json.dumps(found.as_json(), allow_nan=False)
            found = calibration_of(json.loads(ranks.text_of_first(text, device)))
        return self.model(found), origin

    def _made(self, stages: Stages) -> Calibration:
        from pyflocality.calibration.quick import quick_calibration

        plan = self.plan
        assert plan is not None
        # Whatever is going to be chosen.
        hold(self.dearest(), announce=False)
        searched = f"{plan.images:,} of {len(self.data):,} images"
        if plan.images == len(self.data):
            searched = f"{plan.images:,} images"
        with stages("calibrate", f"no model is named: calibrating by {searched}"):
            return quick_calibration(
                self.data, plan, self.sampling.noise_schedule(), progress=stages.announce
            )

    def _why_not(self) -> str:
        from pyflocality.calibration.counts import FEWEST

        why = "are too large to calibrate a model by them in a moment"
        if len(self.data) < FEWEST:
            why = "are too few to calibrate a model by them"
        return (
            f"the images {why}: PCA locality is taken; --denoiser names another model, and "
            "--calibration takes what `pyflocality calibrate` writes"
        )


def _told(calibration: Calibration, origin: str) -> str:
    """The choices in a line, from noise to data."""
    levels = zip(calibration.levels, calibration.choices, strict=True)
    parts = []
    for choice, some in groupby(levels, key=lambda pair: pair[1]):
        parts.append(f"{choice} to {[*some][-1][0].ratio:.2g}")
    where = "found in the cache" if origin == "cache" else "by held-out images"
    return (
        f"calibrated {where}, models down to noise levels (sigma / alpha): {'; '.join(parts)}. "
        "--denoiser names a model instead"
    )
