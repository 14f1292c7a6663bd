"""Models of what is left of a fold, and what they make of its held-out images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pyflocality._support.checks import NoiseLevel
from pyflocality.calibration.candidates import Candidate
from pyflocality.calibration.folds import Fold
from pyflocality.denoisers import Denoiser, WienerDenoiser
from pyflocality.denoisers.base import PosteriorDenoiser
from pyflocality.denoisers.locally_linear import answers_at_temperatures
from pyflocality.moments import Basis, Moments
from pyflocality.moments.linear_images import LinearImages


class Trained:
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

    def drawn(self, level: NoiseLevel, draws: int, generator: torch.Generator) -> Tensor:
        """The images with fresh noise of a level, each several times: [draws n, C, H, W]."""
        images = self.images.repeat(draws, 1, 1, 1)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        return level.alpha * images + level.sigma * noise

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


def squared_errors(answers: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each image, of answers clipped to [-1, 1], float64 [n]."""
    return (answers.double().clamp(-1, 1) - images.double()).square().flatten(1).mean(1).cpu()
