"""What a calibration found, as an object and as a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from pyflocality._support.checks import NoiseLevel, check_single_level
from pyflocality._support.json import COUNT, COUNTS, POSITIVE, TEXT, Kind, check_fields, shape
from pyflocality.calibration.candidates import Candidate, candidate_of
from pyflocality.calibration.files import read_object, write_object
from pyflocality.denoisers.window import level_rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WHAT = "calibration"
VERSION = 3
# Differences of so small a share are those of float32: nothing decides by them.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Restored:
    """How well a candidate restores held-out images from a noise level, by the whole way down.

    Attributes:
        error: Mean squared error of what is restored, in [-1, 1].
        sharpness: Its gradient energy as a share of the images' own.
        excess: How far its criterion lies above the least of those it is compared with (see
            `calibrate`).
        deviation: Standard error of that difference.
    """

    error: float
    sharpness: float
    excess: float
    deviation: float


@dataclass(frozen=True)
class Trial:
    """How a candidate did at a noise level.

    Attributes:
        candidate: Its position among the candidates.
        images: Held-out images that it was tried on: few, where these left no hope.
        error: Mean squared error of its answers, clipped to [-1, 1].
        excess: How far that lies above the best candidate's on the same images.
        deviation: Standard error of that difference.
        restored: How it restores images, compared with the other candidates of its run; None
            where its answers were too far from the best, or the level is so noisy that the errors
            of single steps choose.
    """

    candidate: int
    images: int
    error: float
    excess: float
    deviation: float
    restored: Restored | None


@dataclass(frozen=True)
class CalibratedLevel:
    """A noise level, and how all candidates did there.

    Attributes:
        time: Its time in the schedule.
        alpha: Signal coefficient.
        sigma: Noise level.
        trials: The trials, in the order of the candidates.
    """

    time: float
    alpha: float
    sigma: float
    trials: tuple[Trial, ...]

    @property
    def ratio(self) -> float:
        """The noise level sigma / alpha."""
        return self.sigma / self.alpha


def simplest(trials: Sequence[Trial]) -> Trial:
    """The first of some trials within one standard error of the best.

    Of those that restored images, by how they did; else by the errors of single steps, of those
    that were tried on the most images.
    """
    most = max(trial.images for trial in trials)
    # A criterion of restored images is a logarithm.
    told: list[tuple[Trial, Trial | Restored, float]] = [
        (trial, trial.restored, 1.0) for trial in trials if trial.restored is not None
    ] or [(trial, trial, trial.error) for trial in trials if trial.images == most]
    for trial, result, scale in told:
        if _within(result, scale):
            return trial
    raise ValueError("no candidate is the best of the trials of a level")


def _within(result: Trial | Restored, scale: float) -> bool:
    return result.excess <= result.deviation + _ROUNDING * scale


@dataclass(frozen=True)
class RunTrial:
    """How a whole run did: one temperature and slope, of single models or of means.

    Runs differ between the noisiest level from which images can be restored and the last but one;
    above and below they have the same candidates.

    Attributes:
        means: Whether its candidates are means.
        posteriors: Temperature and slope of its models, where their families have that: one pair,
            but for means whose parts differ.
        choices: Positions of its candidates at every level, from noise to data.
        restored: How it restores images from the noisiest of these levels, compared with the other
            runs; None of one that is alone.
    """

    means: bool
    posteriors: tuple[tuple[float, float], ...]
    choices: tuple[int, ...]
    restored: Restored | None

    def __str__(self) -> str:
        """What it is in words: "means, temperature 1.4, slope 0.25"."""
        pairs = " and ".join(
            f"temperature {heat:g}, slope {slope:g}" for heat, slope in self.posteriors
        )
        return f"means, {pairs}" if self.means else pairs


@dataclass(frozen=True)
class Calibration:
    """The model of each noise level, chosen by `calibrate`.

    Attributes:
        candidates: What was chosen among, the simplest first.
        levels: The noise levels, from noise to data.
        runs: The whole runs that were compared, the simplest first.
        content_key: `TrainingSet.content_key` of the set.
        image_shape: Shape (C, H, W) of its images.
        images: Number of its images.
        searched: Images of these that took part: held out, or in the models.
        held_out: Images that were held out, in all folds together.
        folds: Number of folds.
        seed: Seed of the choice of images and of the noise.
        versions: Releases of pyflocality and torch that made it.
    """

    candidates: tuple[Candidate, ...]
    levels: tuple[CalibratedLevel, ...]
    runs: tuple[RunTrial, ...]
    content_key: str
    image_shape: tuple[int, int, int]
    images: int
    searched: int
    held_out: int
    folds: int
    seed: int
    versions: Mapping[str, str]

    @property
    def run(self) -> RunTrial:
        """The first run within one standard error of the best."""
        for run in self.runs:
            if run.restored is None or _within(run.restored, 1.0):
                return run
        raise ValueError("no run is the best of the trials of runs")

    @property
    def chosen(self) -> tuple[Trial, ...]:
        """The trial of the candidate of each level."""
        pairs = zip(self.levels, self.run.choices, strict=True)
        return tuple(level.trials[number] for level, number in pairs)

    @property
    def choices(self) -> tuple[Candidate, ...]:
        """The candidate of each level."""
        return tuple(self.candidates[number] for number in self.run.choices)

    def at(self, sigma: float | NoiseLevel, alpha: float = 1.0) -> Candidate:
        """The candidate of a noise level: that of the nearest level in log(sigma / alpha).

        Args:
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Raises:
            TypeError: A level is not a number.
            ValueError: A level is out of range.
        """
        ratios = (level.ratio for level in self.levels)
        table = list(zip(ratios, self.choices, strict=True))
        rule = level_rule(table, "levels", lambda choice: cast("Candidate", choice), Candidate)
        return rule(*check_single_level(sigma, alpha))

    def plot(self) -> Figure:
        """A figure: errors of all candidates over noise levels, and what was chosen.

        Raises:
            ImportError: matplotlib is not installed (the extra `plot`).
        """
        from pyflocality.calibration.figure import calibration_figure

        return calibration_figure(self)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a JSON file with all trials, from which `load` makes the same object.

        Args:
            path: File to write; its folder must exist.
            force: Whether a file that is there may be replaced.

        Raises:
            FileExistsError: The file is there and `force` is False; it is a pipe or a device.
            IsADirectoryError: `path` is a folder.
            FileNotFoundError: The folder of `path` does not exist.
            OSError: The file cannot be written.
        """
        write_object(path, self.as_json(), force)

    def as_json(self) -> dict[str, object]:
        """What `save` writes."""
        facts = {name: getattr(self, name) for name in _FACTS}
        candidates = [candidate.as_json() for candidate in self.candidates]
        levels = [
            {"time": one.time, "alpha": one.alpha, "sigma": one.sigma}
            | {"trials": [asdict(trial) for trial in one.trials]}
            for one in self.levels
        ]
        head = {"format": f"pyflocality {_WHAT}", "version": VERSION, **facts}
        head |= {"image_shape": list(self.image_shape), "versions": dict(self.versions)}
        runs = [asdict(run) for run in self.runs]
        chosen = self.runs.index(self.run)
        return head | {"candidates": candidates, "levels": levels, "runs": runs, "chosen": chosen}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The system does not let it be read, or takes no such name.
            ValueError: The file is damaged, or not a calibration of this version.
        """
        content = read_object(path, _WHAT, VERSION)
        try:
            return calibration_of(content)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]  # a number by now


_NUMBER = Kind("a finite number", _is_number)
_AMOUNT = Kind("a finite number, not negative", lambda v: _is_number(v) and v >= 0)  # type: ignore[operator]  # a number by now
_ABOVE = Kind("a finite number above 0", lambda v: _is_number(v) and v > 0)  # type: ignore[operator]  # a number by now
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_FILLED = Kind(
    "objects, one at least",
    lambda v: isinstance(v, list) and len(v) > 0 and all(map(_OBJECT.fits, v)),
)
_TEXTS = Kind(
    "an object of strings",
    lambda v: isinstance(v, dict) and all(isinstance(text, str) for text in v.values()),
)

_FACTS = {
    "content_key": TEXT,
    "image_shape": shape(3),
    "images": POSITIVE,
    "searched": POSITIVE,
    "held_out": POSITIVE,
    "folds": POSITIVE,
    "seed": COUNT,
    "versions": _TEXTS,
}
_HEAD = {"format": TEXT, "version": POSITIVE, **_FACTS, "chosen": COUNT}
_HEAD |= dict.fromkeys(("candidates", "levels", "runs"), _FILLED)
_LEVEL = {"time": _NUMBER, "alpha": _ABOVE, "sigma": _ABOVE, "trials": _FILLED}
_RESTORED = dict.fromkeys(("error", "sharpness", "excess", "deviation"), _AMOUNT)
_TRIAL = {"candidate": COUNT, "images": POSITIVE}
_TRIAL |= {"error": _AMOUNT, "excess": _AMOUNT, "deviation": _AMOUNT, "restored": _OBJECT.or_none()}
_PAIRS = Kind(
    "pairs of finite numbers, one at least",
    lambda v: (
        isinstance(v, list)
        and len(v) > 0
        and all(isinstance(pair, list) and len(pair) == 2 for pair in v)
        and all(_is_number(value) for pair in v for value in pair)
    ),
)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_RUN = {"means": _FLAG, "posteriors": _PAIRS, "choices": COUNTS, "restored": _OBJECT.or_none()}


def _strictly(entry: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Mapping[str, Any]:
    """An object that has these fields and no others."""
    check_fields(entry, kinds)
    for name in entry:
        if name not in kinds:
            raise ValueError(f"has an unknown {name!r}")
    return entry


def calibration_of(content: Mapping[str, Any]) -> Calibration:
    """The calibration of what `as_json` answered.

    Raises:
        ValueError: It is something else.
    """
    try:
        return _calibration(content)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _calibration(content: Mapping[str, Any]) -> Calibration:
    facts = {name: _strictly(content, _HEAD)[name] for name in _FACTS}
    channels, height, width = facts["image_shape"]
    candidates = tuple(candidate_of(entry) for entry in content["candidates"])
    if len(set(candidates)) < len(candidates):
        raise ValueError("'candidates' has one of them twice")
    levels = tuple(_level(entry, len(candidates)) for entry in content["levels"])
    runs = tuple(_run(entry, len(levels), len(candidates)) for entry in content["runs"])
    facts["image_shape"] = channels, height, width
    result = Calibration(candidates, levels, runs, **facts)
    if runs.index(result.run) != content["chosen"]:
        raise ValueError(f"'chosen' {content['chosen']} does not follow from the runs")
    return result


def _level(entry: Mapping[str, Any], candidates: int) -> CalibratedLevel:
    _strictly(entry, _LEVEL)
    trials = tuple(_trial(trial) for trial in entry["trials"])
    if [trial.candidate for trial in trials] != list(range(candidates)):
        raise ValueError(f"'trials' must have one of each of {candidates} candidates, in order")
    return CalibratedLevel(entry["time"], entry["alpha"], entry["sigma"], trials)


def _trial(entry: Mapping[str, Any]) -> Trial:
    restored = _restored(_strictly(entry, _TRIAL)["restored"])
    return Trial(**(dict(entry) | {"restored": restored}))


def _run(entry: Mapping[str, Any], levels: int, candidates: int) -> RunTrial:
    restored = _restored(_strictly(entry, _RUN)["restored"])
    choices = tuple(entry["choices"])
    if len(choices) != levels or max(choices) >= candidates:
        raise ValueError(
            f"'choices' must be one of {candidates} candidates for each of {levels} levels"
        )
    posteriors = tuple((heat, slope) for heat, slope in entry["posteriors"])
    return RunTrial(entry["means"], posteriors, choices, restored)


def _restored(entry: Mapping[str, Any] | None) -> Restored | None:
    return None if entry is None else Restored(**_strictly(entry, _RESTORED))
