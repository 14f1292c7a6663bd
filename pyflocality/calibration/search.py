"""The model of every noise level, chosen by held-out images: no network is involved."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyflocality._support.checks import (
    NoiseLevel,
    check_count,
    check_flag,
    check_rounds,
    describe,
)
from pyflocality._support.progress import progress_bar
from pyflocality._support.record import software
from pyflocality._support.streams import tell
from pyflocality.calibration.candidates import Candidate, check_candidates
from pyflocality.calibration.counts import COMPARED, RESTORED, screened_of_fold
from pyflocality.calibration.folds import Fold, check_whole, folds_of, held_out_positions
from pyflocality.calibration.foreseen import foreseen
from pyflocality.calibration.record import CalibratedLevel, Calibration, Restored, Trial
from pyflocality.calibration.trials import (
    Comparison,
    compared,
    mean_error,
    restoration,
    sharpness,
)
from pyflocality.data import TrainingSet
from pyflocality.denoisers import Denoiser, WienerDenoiser
from pyflocality.denoisers.base import PosteriorDenoiser, check_set
from pyflocality.denoisers.locally_linear import answers_at_temperatures
from pyflocality.metrics import gradient_energy
from pyflocality.moments import Basis, Moments
from pyflocality.moments.linear_images import LinearImages
from pyflocality.noise import DDPMSchedule, NoiseSchedule
from pyflocality.sampling import DDIM, DenoiserFunction, levels_of_run

# Who restores images has an error at most so much above the best candidate's.
_HOPEFUL = 1.15
# Images are restored where the best error is at most so much of that of the mean image.
_TELLING = 2 / 3


def calibrate(
    data: TrainingSet,
    *,
    schedule: NoiseSchedule | None = None,
    steps: int = 10,
    candidates: Sequence[Candidate] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Choose the model of every noise level of a run, by images that it has not seen.

    Images are held out, and all candidates are models of the rest: :math:`x = \alpha x_0 + \sigma
    \epsilon` with the same images and the same noise for all of them. At each level

    1. all candidates denoise a few of the images in one step, and those of the four families of
       the least errors :math:`\lVert \hat x_0 - x_0 \rVert^2 / D`, answers clipped to [-1, 1],
       all of them. Candidates of a family differ in temperature and slope alone, and share passes
       over the set. Of means the two best families go on beside these;
    2. of the two best families, and the best of means, those within 15 percent of the best restore
       the images: DDIM goes from the noisy image down to the data, by the candidate at its first
       step and by what was chosen for the levels below, from the cleanest level upwards;
    3. the best has the least :math:`\log e + 0.1 \, |\log g|`, with e the mean squared error of
       what is restored and g its gradient energy (`metrics.gradient_energy`) as a share of the
       images' own. Chosen is the simplest of those within one standard error of it.

    Sampling meets states of its own making, not noised images, so the error of one step alone
    prefers the wrong model; the error of what is restored prefers what is too smooth, which the
    gradient energy weighs against. Where the best error is above two thirds of that of the mean
    image, a noisy image tells too little of what it was for its restoration to be told from any
    other image: there the errors of single steps choose, again the simplest within one standard
    error of the best.

    64 images are held out, half of the set at most, drawn from all classes in proportion; of
    small sets in up to five folds, each of which leaves out a twentieth of the images. All work is
    counted: two machines do the same, and choose the same but for what rounding decides.

    Args:
        data: The training set, whole. Copies of an augmentation are left out with their images.
        schedule: Noise schedule of the runs; by default `DDPMSchedule()`.
        steps: Their number of steps, which is that of noise levels.
        candidates: What to choose among, the simplest first; by default `default_candidates`.
        seed: Seed of the choice of images and of the noise, in [0, 2^63).
        progress: Whether to tell on standard error how long it takes, and to show progress bars.

    Returns:
        The choices with all that they were made by: for `CalibratedDenoiser`, or to be saved.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, a window does not fit the images, or the set has
            fewer than four images or is one rank's part.

    References:
        Breiman, Friedman, Olshen and Stone, Classification and regression trees, 1984 (the rule of
        one standard error).
    """
    check_whole(check_set(data))
    schedule = DDPMSchedule() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"`schedule` must be a NoiseSchedule, got {describe(schedule)}")
    times, levels = levels_of_run(schedule, check_rounds(steps, "steps"))
    noisy = [NoiseLevel(*level) for level in levels[:-1]]
    tried = check_candidates(candidates, data.image_shape)
    _check_fit(tried, data)
    seed = check_count(seed, "seed", minimum=0, maximum=2**63 - 1)
    progress = check_flag(progress, "progress")
    generator = torch.Generator().manual_seed(seed)
    positions = held_out_positions(data, generator)
    if progress:
        told = foreseen(data, tried, noisy, positions)
        if told is not None:
            tell(told)
    # Of few images, and of masks that keep nothing: what comes of it the errors tell.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        needed = any(candidate.takes_moments for candidate in tried)
        folds = folds_of(data, positions, moments=needed, progress=progress)
        search = _Search(folds, tried, [*noisy, NoiseLevel(*levels[-1])], generator)
        trials = search.run(progress)
    found = tuple(
        CalibratedLevel(float(time), level.alpha, level.sigma, some)
        for time, level, some in zip(times, search.levels, trials, strict=False)
    )
    versions = {name: software()[name] for name in ("pyflocality", "torch", "numpy")}
    held_out = sum(map(len, positions))
    return Calibration(
        tried, found, data.content_key(), data.image_shape, len(data), held_out, len(folds), seed,
        versions,
    )  # fmt: skip


def _check_fit(candidates: Sequence[Candidate], data: TrainingSet) -> None:
    """Refuse what does not fit the images, before any work."""
    for candidate in candidates:
        # Nothing else has to fit the images.
        for leaf in candidate.leaves:
            if leaf.window is None:
                continue
            try:
                # Without what a slope is made of.
                leaf.family.build(data)
            except ValueError as error:
                raise ValueError(f"`candidates` holds {candidate}: {error}") from error


class _Trained:
    """What candidates are over the rest of a fold, with the fold's images at every level.

    Attributes:
        images: The held-out images, [n, C, H, W].
        noisy: The same at every level, [n, C, H, W] each.
    """

    def __init__(
        self, fold: Fold, levels: Sequence[NoiseLevel], generator: torch.Generator
    ) -> None:
        self.images, self._fold = fold.images, fold
        self.noisy = []
        for level in levels:
            noise = torch.randn(fold.images.shape, generator=generator).to(fold.images.device)
            self.noisy.append(level.alpha * fold.images + level.sigma * noise)
        # By family.
        self._denoisers: dict[Candidate, Denoiser] = {}

    def answers(
        self, candidates: Sequence[Candidate], x: Tensor, level: NoiseLevel
    ) -> Iterator[tuple[Candidate, Tensor]]:
        """Answers [b, C, H, W] of candidates, those of a family and their means by one pass."""
        if len(x) == 0:
            yield from ((candidate, x) for candidate in candidates)
            return
        leaves = dict.fromkeys(leaf for one in candidates for leaf in one.leaves)
        found = dict(self._of_leaves(list(leaves), x, level))
        for candidate in candidates:
            parts = [found[leaf] for leaf in candidate.leaves]
            yield candidate, parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)

    def _of_leaves(
        self, candidates: Sequence[Candidate], x: Tensor, level: NoiseLevel
    ) -> Iterator[tuple[Candidate, Tensor]]:
        """The same of candidates that are no means."""
        families: dict[Candidate, list[Candidate]] = {}
        for candidate in candidates:
            families.setdefault(candidate.family, []).append(candidate)
        filtered = None
        if any(candidate.slope > 0 for candidate in candidates):
            filtered = self._wiener(x, level) - self._basis.mean.to(torch.float32)
        for family, members in families.items():
            if family not in self._denoisers:
                self._denoisers[family] = family.build(self._fold.rest, self._fold.moments)
            denoiser = self._denoisers[family]
            if isinstance(denoiser, PosteriorDenoiser):
                answers = self._of_family(denoiser, members, x, level, filtered)
                yield from zip(members, answers, strict=True)
            else:
                yield family, denoiser(x, level)

    def _of_family(
        self,
        denoiser: PosteriorDenoiser,
        members: Sequence[Candidate],
        x: Tensor,
        level: NoiseLevel,
        filtered: Tensor | None,
    ) -> Iterator[Tensor]:
        """Answers [b, C, H, W] at the temperatures and slopes of the members of a family.

        Where any has a slope, what the Wiener filter makes of x less its mean is given.
        """
        heats = list(dict.fromkeys(member.temperature for member in members))
        along = None
        if any(member.slope > 0 for member in members):
            along = self._linear.at(level.alpha, level.sigma)[:, None]
        warm = torch.tensor(heats, dtype=torch.float64, device=x.device)
        found = answers_at_temperatures(denoiser, x, level, warm, along)
        for member in members:
            answer = found[heats.index(member.temperature)]
            if along is None or filtered is None:
                yield answer
                continue
            image, linear = answer.unbind(1)
            yield image if member.slope == 0 else image + member.slope * (filtered - linear)

    @cached_property
    def _basis(self) -> Basis:
        moments = self._fold.moments
        # Who has a slope takes moments.
        assert moments is not None
        basis = moments.basis() if isinstance(moments, Moments) else moments
        return basis.to(self.images.device)

    @cached_property
    def _linear(self) -> LinearImages:
        return LinearImages.shared(self._fold.rest, self._basis)

    @cached_property
    def _wiener(self) -> WienerDenoiser:
        return WienerDenoiser(self._basis)

    def answer(self, candidate: Candidate, x: Tensor, level: NoiseLevel) -> Tensor:
        """The answer of one of them."""
        return next(self.answers([candidate], x, level))[1]


@dataclass(frozen=True)
class _Seen:
    """What C candidates make of images at a level.

    Attributes:
        errors: Mean squared errors, fold by fold, float64 [C, n].
        answers: The answers to each fold, [C, n, C, H, W].
    """

    errors: Tensor
    answers: list[Tensor]

    def of(self, places: Sequence[int]) -> _Seen:
        """The same of some of the candidates."""
        return _Seen(self.errors[places], [some[places] for some in self.answers])

    def joined(self, other: _Seen) -> _Seen:
        """The same of further images of every fold."""
        pairs = zip(self.answers, other.answers, strict=True)
        errors = torch.cat([self.errors, other.errors], dim=1)
        return _Seen(errors, [torch.cat(pair, dim=1) for pair in pairs])


class _Search:
    """Folds, candidates and levels (with the clean end), and what is known of them.

    Attributes:
        spread: Variance of a value of the held-out images: the error of their mean.
    """

    def __init__(
        self,
        folds: Sequence[Fold],
        candidates: Sequence[Candidate],
        levels: Sequence[NoiseLevel],
        generator: torch.Generator,
    ) -> None:
        self.candidates, self.levels = candidates, levels
        self.folds = [_Trained(fold, levels[:-1], generator) for fold in folds]
        held_out = torch.cat([fold.images.double() for fold in self.folds])
        self.spread = float(held_out.var(0).mean())
        self._choices: dict[int, Candidate] = {}

    def run(self, progress: bool) -> list[tuple[Trial, ...]]:
        """The trials of every level, from noise to data."""
        count = len(self.levels) - 1
        trials: list[tuple[Trial, ...]] = []
        # From the cleanest level upwards: what lies below has been chosen.
        order = list(reversed(range(count)))
        for index in progress_bar(order, description="calibrating", enabled=progress):
            some = self._trials(index)
            trials.append(some)
            chosen = CalibratedLevel(0.0, *self.levels[index], some).chosen
            self._choices[index] = self.candidates[chosen.candidate]
        return trials[::-1]

    def _trials(self, index: int) -> tuple[Trial, ...]:
        """All trials of a level."""
        few = screened_of_fold(len(self.folds))
        every = range(len(self.candidates))
        seen = self._seen(index, every, slice(few))
        first = compared(mean_error, seen.errors)
        trials = [_trial(number, seen, first, number) for number in every]
        hopeful = self._best(first, every, COMPARED)
        seen = seen.of(hopeful)
        if any(len(fold.images) > few for fold in self.folds):
            seen = seen.joined(self._seen(index, hopeful, slice(few, None)))
        second = compared(mean_error, seen.errors)
        for place, number in enumerate(hopeful):
            trials[number] = _trial(number, seen, second, place)
        least = float(second.values.min())
        if least <= _TELLING * self.spread:
            best = self._best(second, hopeful, RESTORED)
            going = [
                place
                for place, number in enumerate(hopeful)
                if number in best and second.values[place] <= _HOPEFUL * least
            ]
            for place, one in zip(going, self._restored(index, seen.of(going)), strict=True):
                number = hopeful[place]
                trials[number] = dataclasses.replace(trials[number], restored=one)
        return tuple(trials)

    def _best(self, comparison: Comparison, numbers: Sequence[int], families: int) -> list[int]:
        """Which of the compared are of the best families, and half as many of means."""
        order = comparison.values.argsort(stable=True).tolist()
        ranked = [self.candidates[numbers[place]].family for place in order]
        # Means go on beside their betters among single models, not in their place.
        single = list(dict.fromkeys(one for one in ranked if not one.parts))[:families]
        means = list(dict.fromkeys(one for one in ranked if one.parts))[: families // 2]
        best = {*single, *means}
        return [number for number in numbers if self.candidates[number].family in best]

    def _seen(self, index: int, numbers: Sequence[int], rows: slice) -> _Seen:
        """What some candidates make of some images of every fold at a level."""
        chosen = [self.candidates[number] for number in numbers]
        answers: list[dict[Candidate, Tensor]] = []
        for fold in self.folds:
            answers.append(dict(fold.answers(chosen, fold.noisy[index][rows], self.levels[index])))
        errors = [
            torch.stack([_error(some[one], fold.images[rows]) for one in chosen])
            for fold, some in zip(self.folds, answers, strict=True)
        ]
        by_fold = [torch.stack([some[one] for one in chosen]) for some in answers]
        return _Seen(torch.cat(errors, dim=1), by_fold)

    def _restored(self, index: int, seen: _Seen) -> list[Restored]:
        """How the answers of candidates at a level go on down to the data."""
        errors, energies, own = [], [], []
        for fold, answers in zip(self.folds, seen.answers, strict=True):
            count = len(answers)
            # All of them together: they share the passes of the levels below.
            x = fold.noisy[index].repeat(count, 1, 1, 1)
            images = self._down(fold, index, x, answers.flatten(0, 1))
            truth = fold.images.repeat(count, 1, 1, 1)
            errors.append(_error(images, truth).reshape(count, -1))
            energies.append(gradient_energy(images.clamp(-1, 1)).reshape(count, -1).cpu())
            own.append(gradient_energy(truth).reshape(count, -1).cpu())
        numbers = [torch.cat(part, dim=1) for part in (errors, energies, own)]
        error, energy, truth = (part.mean(1) for part in numbers)
        comparison = compared(restoration, *numbers)
        columns = (error, sharpness(energy, truth), comparison.excess, comparison.deviation)
        return [Restored(*row) for row in torch.stack(columns, dim=1).tolist()]

    def _down(self, fold: _Trained, index: int, x: Tensor, answer: Tensor) -> Tensor:
        """The images that DDIM makes of states whose first answer is known."""
        step = DDIM().step
        x, _ = step(_answering(answer), x, self.levels[index], self.levels[index + 1])
        for below in range(index + 1, len(self.levels) - 1):
            candidate, level = self._choices[below], self.levels[below]
            answer = fold.answer(candidate, x, level)
            x, _ = step(_answering(answer), x, level, self.levels[below + 1])
        return x


def _trial(candidate: int, seen: _Seen, comparison: Comparison, place: int) -> Trial:
    values = (comparison.values, comparison.excess, comparison.deviation)
    error, excess, deviation = (float(value[place]) for value in values)
    return Trial(candidate, seen.errors.shape[1], error, excess, deviation, None)


def _answering(answer: Tensor) -> DenoiserFunction:
    return lambda *_: answer


def _error(answers: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each image, of answers clipped to [-1, 1], float64 [n]."""
    return (answers.double().clamp(-1, 1) - images.double()).square().flatten(1).mean(1).cpu()
