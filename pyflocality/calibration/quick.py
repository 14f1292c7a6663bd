"""The calibration of a run that names no model: made in a moment, once, and kept.

It is bounded by counted operations, so that every machine chooses alike: by few candidates, and
where the set is large by a part of it. What is best for a part need not be best for the whole: of
fewer images a linear model may win where more of them would have patches. `calibrate` goes by all.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyflocality import _version
from pyflocality._support.caller import caller_level
from pyflocality._support.json import parsed_object
from pyflocality.calibration.candidates import Candidate
from pyflocality.calibration.counts import FEWEST
from pyflocality.calibration.foreseen import Calibrating
from pyflocality.calibration.record import VERSION, Calibration, calibration_of
from pyflocality.calibration.search import calibrated_by
from pyflocality.data import TrainingSet
from pyflocality.noise import NoiseSchedule
from pyflocality.sampling import Level, levels_of_run
from pyflocality.storage.blobs import read_blob, write_blob

# Counted operations of a calibration at most: about a minute of two cores.
MOST_FLOPS = 4e12
# A part of a set has so many images at least.
LEAST_IMAGES = 1000
# Levels at most: those of a run of more steps take what the nearest of these has.
MOST_STEPS = 10
SEED = 0
# Another number where the search chooses otherwise within a release.
_RULE = 2

_THRESHOLDS = (0.05, 0.02, 0.005)
_SIDES = (3, 5, 7, 11, 15, 21)
_POSTERIORS = ((1.0, 0.0), (1.4, 0.25))


@dataclass(frozen=True)
class QuickPlan:
    """How a set is calibrated in a moment.

    Attributes:
        candidates: What is chosen among.
        images: How many images of the set it goes by.
        steps: Steps of the run.
        copies: Copies of each image.
    """

    candidates: tuple[Candidate, ...]
    images: int
    steps: int
    copies: int

    def work(self, shape: tuple[int, int, int]) -> Calibrating:
        """The work that it is."""
        levels = min(self.steps, MOST_STEPS)
        return Calibrating(self.images, shape, self.candidates, levels, self.copies)

    def levels_of(self, schedule: NoiseSchedule) -> tuple[list[float], list[Level]]:
        """Times and levels, with the end: all of the run, or as many as may be, first and last."""
        times, levels = levels_of_run(schedule, self.steps)
        count = min(self.steps, MOST_STEPS)
        places = [place * (self.steps - 1) // max(1, count - 1) for place in range(count)]
        chosen = [levels[place] for place in places]
        return [float(times[place]) for place in places], [*chosen, levels[-1]]

    def name(self, data: TrainingSet, schedule: NoiseSchedule) -> str:
        """Under which name the cache keeps it."""
        parts = {
            "release": [_version.__version__, VERSION, _RULE],
            "set": data.content_key(),
            # Labels decide which images are held out.
            "labels": None if data.labels is None else _digest(data.labels.cpu().numpy().tobytes()),
            "levels": self.levels_of(schedule)[1],
            "candidates": [one.as_json() for one in self.candidates],
            "images": self.images,
            "seed": SEED,
        }
        return f"calibrations/{_digest(json.dumps(parts).encode())}.calibration"


def quick_plan(
    count: int, shape: tuple[int, int, int], steps: int, copies: int = 1
) -> QuickPlan | None:
    """How images are calibrated by within the counted work; None where a moment is too short.

    Args:
        count: Number of images.
        shape: Their shape (C, H, W).
        steps: Steps of the run.
        copies: Copies of each image.
    """
    if count < FEWEST:
        return None
    for candidates in (quick_candidates(shape), _patches_alone(shape)):
        part = count
        while part >= min(count, LEAST_IMAGES):
            plan = QuickPlan(candidates, part, steps, copies)
            if plan.work(shape).flops <= MOST_FLOPS:
                return plan
            part = part * 9 // 10
    return None


def quick_candidates(shape: tuple[int, int, int]) -> tuple[Candidate, ...]:
    """What is chosen among in a moment, the simplest first.

    The Wiener filter; PCA locality at thresholds 0.05, 0.02 and 0.005, and patch sets with patches
    of 3 to 21 pixels, as far as they fit images (C, H, W); the same at temperature 1.4 with a slope
    of 0.25.
    """
    families = [Candidate("pca-locality", threshold=share) for share in _THRESHOLDS]
    families += _patch_sets(shape)
    return _tried(families, _POSTERIORS)


def _patches_alone(shape: tuple[int, int, int]) -> tuple[Candidate, ...]:
    """What is left where images are large: no model of the products of all pairs of values."""
    return _tried(_patch_sets(shape), [(heat, 0.0) for heat, _ in _POSTERIORS])


def _patch_sets(shape: tuple[int, int, int]) -> list[Candidate]:
    return [Candidate("patch-set", window=side) for side in _SIDES if side <= min(shape[1:])]


def _tried(
    families: Sequence[Candidate], posteriors: Sequence[tuple[float, float]]
) -> tuple[Candidate, ...]:
    tried = [Candidate("wiener")]
    for heat, slope in posteriors:
        tried += [replace(family, temperature=heat, slope=slope) for family in families]
    return tuple(tried)


def kept_calibration(
    data: TrainingSet, plan: QuickPlan, schedule: NoiseSchedule
) -> Calibration | None:
    """The calibration of a plan where the cache has it; a damaged one is reported by a warning."""
    content = read_blob(plan.name(data, schedule))
    if content is None:
        return None
    try:
        return calibration_of(parsed_object(content.tobytes()))
    except ValueError as error:
        warnings.warn(
            f"the kept calibration of {data.name} cannot be used and is made anew: {error}",
            stacklevel=caller_level(),
        )
        return None


def quick_calibration(
    data: TrainingSet, plan: QuickPlan, schedule: NoiseSchedule, *, progress: bool
) -> Calibration:
    """Make the calibration of a plan, and leave it in the cache."""
    found = calibrated_by(
        data,
        *plan.levels_of(schedule),
        plan.candidates,
        seed=SEED,
        images=plan.images,
        progress=progress,
    )
    content = json.dumps(found.as_json(), allow_nan=False).encode()
    write_blob(plan.name(data, schedule), content)
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
