"""What every case has: what runs, what it must equal, what it costs, what it runs beside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflocality import ops
from pyflocality.storage.reader import training_values

from . import baselines, libraries
from .registry import Case
from .sets import BenchmarkSet

# Rounding of a float32 number, relative.
EPS = 1.2e-7


@dataclass(frozen=True)
class Yardstick:
    """What runs in turns with a case.

    Attributes:
        run: One run.
        share: Share of the case's work that one run does; its time is divided by it.
        note: What runs, in words.
        answer: The case's answer from training values [n, C, H, W]; None where it computes
            something else.
        check_images: Images n that the answer is checked on; None for as many as the case is.
    """

    run: Callable[[], object]
    share: float
    note: str
    answer: Callable[[Tensor], Tensor] | None = None
    check_images: int | None = None


def largest_error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Largest difference, relative where the exact values are larger than 1."""
    errors = []
    for one, other in zip(found, exact, strict=True):
        if not other.is_floating_point():
            errors.append(float((one - other).abs().max()))
            continue
        size = max(1.0, float(other.abs().max()))
        errors.append(float((one.double() - other).abs().max()) / size)
    # NaN wins over everything.
    return float(np.max(errors))


class Workload(ABC):
    """A case on a set of images.

    Args:
        case: What to run.
        data: The set; a case takes its first N images.

    Attributes:
        images: The case's images, uint8 [N, C, H, W].
    """

    def __init__(self, case: Case, data: BenchmarkSet) -> None:
        if case.images > len(data.images):
            raise ValueError(f"{case.id}: the set has only {len(data.images)} images")
        self.case, self.data = case, data
        self.images = data.images[: case.images]
        self.shape: tuple[int, int, int] = tuple(self.images.shape[1:])
        self.values = self.images[0].numel()

    @abstractmethod
    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """The operation over some images, on a backend, computed in a dtype."""

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations (integer ones for the covariance) of one run."""

    @abstractmethod
    def bytes(self) -> int:
        """Least memory traffic of one run: every input read once, every result written once."""

    @abstractmethod
    def rounding(self, images: Tensor) -> float:
        """What float32 may cost beyond twice what it costs the reference; 0 must be exact."""

    def run(self) -> object:
        """One run, as it is timed."""
        return self.answers(self.images, self.case.backend)

    def facts(self) -> dict[str, Any]:
        """What else a reader of the timing wants to know."""
        return {}

    def yardstick(self, name: str) -> Yardstick:
        """The yardstick of a name: the method `_beside_<name>`."""
        return getattr(self, f"_beside_{name}")()

    def _beside_read_bytes(self) -> Yardstick:
        return Yardstick(
            lambda: baselines.read_bytes(self.images), 1.0, "one sequential read of the images"
        )


class PosteriorWorkload(Workload):
    """A posterior mean at a noise level."""

    def __init__(self, case: Case, data: BenchmarkSet) -> None:
        super().__init__(case, data)
        self.alpha, self.sigma = data.level(case.timestep)
        self.x = data.queries(case.timestep, case.batch)

    @abstractmethod
    def arguments(self) -> tuple[Any, ...]:
        """What the operation takes between the images and the noise level."""

    @abstractmethod
    def neighbours(self) -> int:
        """Inputs of the largest neighbourhood."""

    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Posterior means [B, C, H, W]."""
        mean = getattr(ops, f"{self.case.op}_mean")
        x = self.x.to(dtype)
        return (mean(x, images, *self.arguments(), self.sigma, self.alpha, backend=backend),)

    def bytes(self) -> int:
        """Images, noisy images and answers."""
        return self.images.nbytes + 2 * self.x.nbytes

    def rounding(self, images: Tensor) -> float:
        """Rounding of the logits: a squared distance of that many terms, over 2 sigma^2."""
        # Where an image fits, a term is about sigma^2; where none does, the data's own spread.
        logit = self.neighbours() * (1 + 1 / max(self.sigma / self.alpha, 0.1))
        return 4 * EPS * logit

    def pairs(self) -> int:
        """Pairs of a noisy and a training image."""
        return self.case.images * self.case.batch

    def _eager(
        self, function: Callable[..., Tensor], arguments: tuple[Any, ...], note: str
    ) -> Yardstick:
        """An eager algorithm, timed on some of the images."""

        def answer(values: Tensor) -> Tensor:
            return function(self.x, values, *arguments, self.sigma, self.alpha)

        values = self._eager_values()
        return self._on_some(lambda: answer(values), answer, len(values), note)

    def _compiled(
        self, function: Callable[..., Tensor], arguments: tuple[Any, ...], rows: int | None = None
    ) -> Yardstick:
        """The same through torch.compile, for exactly these sizes, some noisy images at a time."""
        values, level = self._eager_values(), (self.sigma, self.alpha)
        parts = self.x.split(rows or len(self.x))
        compiled = libraries.compiled(function, parts[0], values, *arguments, *level)

        def answer(values: Tensor) -> Tensor:
            return torch.cat([compiled(part, values, *arguments, *level) for part in parts])

        note = f"torch.compile of {function.__name__}"
        # Another number of images would be compiled again.
        yardstick = self._on_some(lambda: answer(values), answer, len(values), note)
        return replace(yardstick, check_images=len(values))

    def _eager_values(self) -> Tensor:
        return training_values(self.images[: self.case.eager_images], torch.float32)

    def _on_some(
        self,
        run: Callable[[], object],
        answer: Callable[[Tensor], Tensor],
        count: int,
        note: str,
    ) -> Yardstick:
        """A yardstick that runs on some of the images."""
        scaled = f"{note}; timed on {count} images and scaled to {self.case.images}"
        return Yardstick(run, count / self.case.images, scaled, answer)
