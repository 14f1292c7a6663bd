"""What a calibration tries: single steps at every level, then whole runs along their own way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pyflocality._support.checks import NoiseLevel
from pyflocality._support.progress import progress_bar
from pyflocality.calibration.candidates import Candidate, Posterior
from pyflocality.calibration.counts import COMPARED, DRAWS, RESTORED, screened_of_fold
from pyflocality.calibration.folds import Fold
from pyflocality.calibration.record import Restored, RunTrial, Trial, simplest
from pyflocality.calibration.trained import Trained, squared_errors
from pyflocality.calibration.trials import (
    Comparison,
    compared,
    mean_error,
    restoration,
    sharpness,
)
from pyflocality.metrics import gradient_energy
from pyflocality.sampling import DDIM, DenoiserFunction

# Who restores images has an error at most so much above the best candidate's.
_HOPEFUL = 1.15
# Images are restored where the best error is at most so much of that of the mean image.
_TELLING = 2 / 3


@dataclass(frozen=True)
class _Seen:
    """What C candidates make of images at a level.

    Attributes:
        numbers: Their positions among all candidates.
        errors: Mean squared errors, fold by fold, float64 [C, n].
        answers: The answers to each fold, [C, n, C, H, W].
    """

    numbers: Sequence[int]
    errors: Tensor
    answers: list[Tensor]

    @cached_property
    def comparison(self) -> Comparison:
        """How their errors compare."""
        return compared(mean_error, self.errors)

    def trials(self) -> list[Trial]:
        """What is recorded of them."""
        result, images = self.comparison, self.errors.shape[1]
        rows = torch.stack([result.values, result.excess, result.deviation], dim=1).tolist()
        return [
            Trial(number, images, error, excess, deviation, None)
            for number, (error, excess, deviation) in zip(self.numbers, rows, strict=True)
        ]

    def of(self, numbers: Sequence[int]) -> _Seen:
        """The same of some of the candidates."""
        places = [self.numbers.index(number) for number in numbers]
        return _Seen(numbers, self.errors[places], [some[places] for some in self.answers])

    def joined(self, other: _Seen) -> _Seen:
        """The same of further images of every fold."""
        pairs = zip(self.answers, other.answers, strict=True)
        errors = torch.cat([self.errors, other.errors], dim=1)
        return _Seen(self.numbers, errors, [torch.cat(pair, dim=1) for pair in pairs])


@dataclass(frozen=True)
class _Images:
    """Images that c candidates restored: float64 [c, n] each.

    Attributes:
        errors: Mean squared errors.
        energies: Gradient energies.
        own: Gradient energies of the images themselves.
    """

    errors: Tensor
    energies: Tensor
    own: Tensor

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of them."""
        return self.errors, self.energies, self.own

    def told(self) -> list[Restored]:
        """What is recorded of them, with how they compare; the first is the simplest."""
        comparison = compared(restoration, self.errors, self.energies)
        errors, energies, own = (part.mean(1) for part in self.numbers)
        result = comparison.excess, comparison.deviation
        rows = torch.stack([errors, sharpness(energies, own), *result], dim=1)
        return [Restored(*row) for row in rows.tolist()]


@dataclass(frozen=True)
class _Run:
    """A run in the making, of candidates that have the same posterior.

    Attributes:
        posterior: `Candidate.posterior`.
        numbers: Positions of its candidates.
        choices: Which candidate it takes at levels, by their positions.
    """

    posterior: Posterior
    numbers: Sequence[int]
    choices: dict[int, int] = field(default_factory=dict)


class Search:
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
        self.folds = [Trained(fold, levels[:-1], generator) for fold in folds]
        held_out = torch.cat([fold.images.double() for fold in self.folds])
        self.spread = float(held_out.var(0).mean())
        numbers: dict[Posterior, list[int]] = {}
        for number, candidate in enumerate(candidates):
            numbers.setdefault(candidate.posterior, []).append(number)
        self._runs = [_Run(posterior, some) for posterior, some in numbers.items()]
        # The first of single models and the first of means: their families are those of all.
        self._leaders = {run.posterior[0]: run for run in reversed(self._runs)}
        self._firsts = {one.family: place for place, one in reversed([*enumerate(candidates)])}
        self._telling = True
        # The noisiest level so far from which images can be restored.
        self._noisiest: int | None = None
        self._generator = generator

    def run(self, progress: bool) -> tuple[list[tuple[Trial, ...]], tuple[RunTrial, ...]]:
        """The trials of every level, from noise to data, and those of whole runs."""
        # From the cleanest level upwards: what lies below has been chosen.
        order = range(len(self.levels) - 2, -1, -1)
        trials = [
            self._trials(index)
            for index in progress_bar(order, description="calibrating", enabled=progress)
        ]
        return trials[::-1], self._compared(progress)

    def _compared(self, progress: bool) -> tuple[RunTrial, ...]:
        """How whole runs do; one alone where there is nothing that they could differ in."""
        told: list[Restored | None] = [None]
        index = self._noisiest
        if index is not None:
            noisy = [fold.drawn(self.levels[index], DRAWS, self._generator) for fold in self.folds]
            found = [
                self._from(index, noisy, run.choices).numbers
                for run in progress_bar(self._runs, description="whole runs", enabled=progress)
            ]
            images = _Images(*(torch.cat(part) for part in zip(*found, strict=True)))
            told = [*images.told()]
        order = range(len(self.levels) - 1)
        return tuple(
            RunTrial(*run.posterior, tuple(run.choices[index] for index in order), one)
            for run, one in zip(self._runs, told, strict=False)
        )

    def _trials(self, index: int) -> tuple[Trial, ...]:
        """All trials of a level, at which every run takes its choice."""
        trials, seen = self._single_steps(index)
        errors = seen.comparison.values.tolist()
        self._telling &= min(errors) <= _TELLING * self.spread
        if not self._telling:
            self._take(index, simplest(trials))
            return tuple(trials)
        seen = seen.of(self._best(seen, RESTORED))
        hopeful = _HOPEFUL * min(errors)
        going = [number for number in seen.numbers if trials[number].error <= hopeful]
        if index == len(self.levels) - 2:
            # No way from here but one step: runs do not differ in it.
            tried = self._tried(self._restored(index, seen.of(going), {}), going, trials)
            self._take(index, simplest(tried))
            self._record(trials, tried)
            return tuple(trials)
        for of_means, run in self._leaders.items():
            members = self._members(of_means, going, seen)
            images = self._restored(index, seen.of(members), run.choices)
            tried = self._tried(images, members, trials)
            chosen = simplest(tried).candidate
            run.choices[index] = chosen
            self._record(trials, tried)
        for run in self._runs:
            run.choices.setdefault(index, self._counterpart(run, index, seen))
        self._noisiest = index
        return tuple(trials)

    def _members(self, of_means: bool, going: Sequence[int], seen: _Seen) -> list[int]:
        """The first of every family that is among the best: of that kind one at least."""
        kind = [number for number in going if bool(self.candidates[number].parts) == of_means]
        if not kind:
            order = seen.comparison.values.argsort(stable=True).tolist()
            ranked = [seen.numbers[place] for place in order]
            kind = [one for one in ranked if bool(self.candidates[one].parts) == of_means][:1]
        return sorted({self._firsts[self.candidates[number].family] for number in kind})

    def _counterpart(self, run: _Run, index: int, seen: _Seen) -> int:
        """What a run takes at a level: one of its leader's family there, or the very same."""
        chosen = self._leaders[run.posterior[0]].choices[index]
        family = self.candidates[chosen].family
        own = [one for one in seen.numbers if one in run.numbers]
        return next((one for one in own if self.candidates[one].family == family), chosen)

    def _take(self, index: int, chosen: Trial) -> None:
        for run in self._runs:
            run.choices[index] = chosen.candidate

    @staticmethod
    def _record(trials: list[Trial], tried: Sequence[Trial]) -> None:
        for trial in tried:
            trials[trial.candidate] = trial

    @staticmethod
    def _tried(images: _Images, numbers: Sequence[int], trials: Sequence[Trial]) -> list[Trial]:
        return [
            dataclasses.replace(trials[number], restored=one)
            for number, one in zip(numbers, images.told(), strict=True)
        ]

    def _single_steps(self, index: int) -> tuple[list[Trial], _Seen]:
        """The trials by single steps, and those candidates that were tried on all images."""
        few = screened_of_fold(len(self.folds))
        seen = self._seen(index, range(len(self.candidates)), slice(few))
        trials = seen.trials()
        seen = seen.of(self._best(seen, COMPARED))
        if any(len(fold.images) > few for fold in self.folds):
            seen = seen.joined(self._seen(index, seen.numbers, slice(few, None)))
        self._record(trials, seen.trials())
        return trials, seen

    def _best(self, seen: _Seen, families: int) -> list[int]:
        """Which candidates are of the best families, and half as many of means."""
        order = seen.comparison.values.argsort(stable=True).tolist()
        ranked = [self.candidates[seen.numbers[place]].family for place in order]
        # Means go on beside their betters among single models, not in their place.
        single = list(dict.fromkeys(one for one in ranked if not one.parts))[:families]
        means = list(dict.fromkeys(one for one in ranked if one.parts))[: families // 2]
        best = {*single, *means}
        return [number for number in seen.numbers if self.candidates[number].family in best]

    def _seen(self, index: int, numbers: Sequence[int], rows: slice) -> _Seen:
        """What some candidates make of some images of every fold at a level."""
        chosen = [self.candidates[number] for number in numbers]
        answers: list[dict[Candidate, Tensor]] = []
        for fold in self.folds:
            answers.append(dict(fold.answers(chosen, fold.noisy[index][rows], self.levels[index])))
        errors = [
            torch.stack([squared_errors(some[one], fold.images[rows]) for one in chosen])
            for fold, some in zip(self.folds, answers, strict=True)
        ]
        by_fold = [torch.stack([some[one] for one in chosen]) for some in answers]
        return _Seen(numbers, torch.cat(errors, dim=1), by_fold)

    def _restored(self, index: int, seen: _Seen, choices: Mapping[int, int]) -> _Images:
        """How answers at a level go on down to the data, by the choices of the levels below."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for fold, answers in zip(self.folds, seen.answers, strict=True):
            count = len(answers)
            # All of them together: they share the passes of the levels below.
            x = fold.noisy[index].repeat(count, 1, 1, 1)
            images = self._down(fold, index, x, answers.flatten(0, 1), choices)
            errors, energies, own = _numbers(images, fold.images.repeat(count, 1, 1, 1))
            shape = count, -1
            parts.append((errors.reshape(shape), energies.reshape(shape), own.reshape(shape)))
        return _Images(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))

    def _from(self, index: int, noisy: Sequence[Tensor], choices: Mapping[int, int]) -> _Images:
        """What a run makes of several noisy states of each image, means over these: [1, n] each."""
        parts: list[Tensor] = []
        for fold, x in zip(self.folds, noisy, strict=True):
            answer = fold.answer(self.candidates[choices[index]], x, self.levels[index])
            images = self._down(fold, index, x, answer, choices)
            truth = fold.images.repeat(DRAWS, 1, 1, 1)
            drawn = torch.stack(_numbers(images, truth)).reshape(3, DRAWS, -1)
            parts.append(drawn.mean(1, keepdim=True))
        return _Images(*torch.cat(parts, dim=2))

    def _down(
        self, fold: Trained, index: int, x: Tensor, answer: Tensor, choices: Mapping[int, int]
    ) -> Tensor:
        """The images that DDIM makes of states whose first answer is known."""
        step = DDIM().step
        x, _ = step(_answering(answer), x, self.levels[index], self.levels[index + 1])
        for below in range(index + 1, len(self.levels) - 1):
            candidate, level = self.candidates[choices[below]], self.levels[below]
            answer = fold.answer(candidate, x, level)
            x, _ = step(_answering(answer), x, level, self.levels[below + 1])
        return x


def _numbers(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of restored images, their gradient energies, and the images' own: float64 [n]."""
    energies = gradient_energy(images.clamp(-1, 1)).cpu()
    return squared_errors(images, truth), energies, gradient_energy(truth).cpu()


def _answering(answer: Tensor) -> DenoiserFunction:
    return lambda *_: answer
