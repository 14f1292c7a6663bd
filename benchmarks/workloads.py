"""Cases with their tensors: what runs, what it must equal, what it costs, what it runs beside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.registry import Case
from benchmarks.sets import BenchmarkSet
from pyflocality import ops
from pyflocality._problem import training_values

# Rounding of a float32 number, relative.
_EPS = 1.2e-7
# Rows of the matmul yardsticks; their time is scaled to all images.
_MATMUL_ROWS = 2048


@dataclass(frozen=True)
class Yardstick:
    """What runs in turns with a case.

    Attributes:
        run: One run.
        share: Share of the case's work that one run does; its time is divided by it.
        note: What runs, in words.
        answer: The case's answer from training values [n, C, H, W]; None where it computes
            something else.
    """

    run: Callable[[], object]
    share: float
    note: str
    answer: Callable[[Tensor], Tensor] | None = None


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
        return 4 * _EPS * logit

    def pairs(self) -> int:
        """Pairs of a noisy and a training image."""
        return self.case.images * self.case.batch

    def _eager(
        self, function: Callable[..., Tensor], arguments: tuple[Any, ...], note: str
    ) -> Yardstick:
        """An eager algorithm, timed on some of the images."""

        def answer(values: Tensor) -> Tensor:
            return function(self.x, values, *arguments, self.sigma, self.alpha)

        values = training_values(self.images[: self.case.eager_images], torch.float32)
        return Yardstick(
            lambda: answer(values),
            len(values) / self.case.images,
            f"{note}; timed on {len(values)} images and scaled to {self.case.images}",
            answer,
        )


class MaskedWorkload(PosteriorWorkload):
    """PCA locality: masks of the noise level, one per output value."""

    def __init__(self, case: Case, data: BenchmarkSet) -> None:
        super().__init__(case, data)
        self.weights = data.weights(case.timestep)
        self.terms = data.tree(case.timestep).terms

    def arguments(self) -> tuple[Any, ...]:
        """The masks."""
        return (self.weights,)

    def flops(self) -> int:
        """A subtraction, a product and a sum for every term of the native schedule."""
        return 3 * self.terms * self.pairs()

    def neighbours(self) -> int:
        """Inputs of the largest mask."""
        return int(self.weights.dense(torch.bool).sum(1).max())

    def facts(self) -> dict[str, Any]:
        """Masks, schedule and the arithmetic of core and fringe, as shares of D^2."""
        core_fringe = self.data.core_fringe_terms(self.case.timestep)
        return {
            "mask_density": self.weights.density,
            "schedule_terms": self.terms,
            "schedule_share": self.terms / self.values**2,
            "core_fringe_terms": core_fringe,
            "core_fringe_share": core_fringe / self.values**2,
        }

    def _beside_eager(self) -> Yardstick:
        mask = self.weights.dense(torch.float32).T.contiguous()
        note = (
            "published algorithm: einsum of squared differences with the dense mask, batches of "
            f"{baselines.LOADER_BATCH}"
        )
        return self._eager(baselines.masked_einsum, (mask,), note)

    def _beside_matmul_same_terms(self) -> Yardstick:
        return self._matmul(self.terms, "the schedule")

    def _beside_matmul_core_fringe(self) -> Yardstick:
        terms = self.data.core_fringe_terms(self.case.timestep)
        return self._matmul(terms, "core and fringe in tiles of 4x4 outputs")

    def _matmul(self, terms: int, what: str) -> Yardstick:
        """[rows, D] x [D, columns], about as many multiply-adds an image as there are terms."""
        rows = min(_MATMUL_ROWS, self.case.images)
        columns = max(1, round(terms * self.case.batch / self.values))
        generator = torch.Generator().manual_seed(0)
        left = torch.rand(rows, self.values, generator=generator)
        right = torch.rand(self.values, columns, generator=generator)
        out = torch.empty(rows, columns)
        share = rows * self.values * columns / (terms * self.pairs())
        note = (
            f"float32 matmul [{rows}, {self.values}] x [{self.values}, {columns}], scaled to the "
            f"multiply-adds of {what}"
        )
        return Yardstick(lambda: torch.matmul(left, right, out=out), share, note)


class WindowWorkload(PosteriorWorkload):
    """Local score: one posterior per pixel over the window around it."""

    def arguments(self) -> tuple[Any, ...]:
        """The window."""
        return (self.case.window,)

    def flops(self) -> int:
        """Squared differences, 3 a value, and separable box sums, 6 a pixel whatever the window."""
        return (3 * self.values + 6 * self.shape[1] * self.shape[2]) * self.pairs()

    def neighbours(self) -> int:
        """Values of the largest window."""
        channels, height, width = self.shape
        return channels * min(self.case.window, height) * min(self.case.window, width)

    def _beside_eager_patches(self) -> Yardstick:
        return self._eager(
            baselines.window_unfolded_patches, self.arguments(), "eager unfold of all patches"
        )

    def _beside_eager_differences(self) -> Yardstick:
        note = "eager unfold of the squared differences, summed over the channels before"
        return self._eager(baselines.window_unfolded_differences, self.arguments(), note)


class EquivariantWorkload(WindowWorkload):
    """Equivariant local score: one posterior per pixel over the patches at all positions."""

    def flops(self) -> int:
        """As for the local score, for every shift of the images against the noisy image."""
        _, height, width = self.shape
        half = self.case.window // 2
        return super().flops() * (height - 2 * half) * (width - 2 * half)

    def _beside_eager_convolution(self) -> Yardstick:
        note = "published algorithm: convolution with the unfolded patches of each noisy image"
        return self._eager(baselines.equivariant_convolution, self.arguments(), note)


class PatchSetWorkload(WindowWorkload):
    """Square patches that answer themselves: two passes, the second spreads the weights."""

    def flops(self) -> int:
        """Twice the local score's, and a product and a sum more a value."""
        return 2 * super().flops() + 2 * self.values * self.pairs()

    def _beside_window_mean(self) -> Yardstick:
        def run() -> object:
            level = (self.sigma, self.alpha)
            images, options = self.images, {"backend": self.case.backend}
            return ops.window_posterior_mean(self.x, images, self.case.window, *level, **options)

        return Yardstick(run, 1.0, "the local score with the same window: one pass")


class GlobalWorkload(PosteriorWorkload):
    """Optimal denoiser: one posterior over whole images."""

    def arguments(self) -> tuple[Any, ...]:
        """Nothing."""
        return ()

    def flops(self) -> int:
        """A subtraction, a product and a sum for every value."""
        return 3 * self.values * self.pairs()

    def neighbours(self) -> int:
        """All values."""
        return self.values

    def _beside_eager(self) -> Yardstick:
        return self._eager(baselines.global_broadcast, (), "eager broadcasting of all differences")


class TangentsWorkload(PosteriorWorkload):
    """Posterior mean and K Jacobian-vector products in one pass."""

    def __init__(self, case: Case, data: BenchmarkSet) -> None:
        super().__init__(case, data)
        plain = replace(case, op=case.op.removesuffix("_jvp"), tangents=0)
        self.plain = make_workload(plain, data)
        self.tangents = data.directions(case.tangents, case.batch)

    def arguments(self) -> tuple[Any, ...]:
        """As without tangents."""
        return self.plain.arguments()

    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Posterior means [B, C, H, W] and products [K, B, C, H, W]."""
        return self._products(self.x.to(dtype), images, backend)

    def _products(self, x: Tensor, images: Tensor, backend: str) -> tuple[Tensor, ...]:
        products = getattr(ops, self.case.op)
        tangents, level = self.tangents.to(x.dtype), (self.sigma, self.alpha)
        return tuple(products(x, tangents, images, *self.arguments(), *level, backend=backend))

    def flops(self) -> int:
        """The plain pass, and a product and a sum more a term for each tangent."""
        return self.plain.flops() * (3 + 2 * self.case.tangents) // 3

    def bytes(self) -> int:
        """Images, noisy images, tangents, answers and products."""
        return super().bytes() + 2 * self.tangents.nbytes

    def neighbours(self) -> int:
        """As without tangents."""
        return self.plain.neighbours()

    def rounding(self, images: Tensor) -> float:
        """As without tangents, and four times what rounding the noisy images does.

        At small noise derivatives change with the noisy image faster than float32 can tell
        noisy images apart, so that the error is that of the input and not of the sums.
        """
        exact = self.answers(images, "reference", torch.float64)
        x = self.x.double()
        generator = torch.Generator().manual_seed(0)
        signs = torch.rand(x.shape, generator=generator, dtype=x.dtype).round() * 2 - 1
        # Noisy images are rounded in the units of the stored values, from 0 to 255.
        nudged = x + signs * _EPS / 2 * (x.abs() + self.alpha)
        moved = self._products(nudged, images, "reference")
        return super().rounding(images) + 4 * largest_error(moved, exact)

    def _beside_no_tangents(self) -> Yardstick:
        return Yardstick(self.plain.run, 1.0, "the same operation without tangents")


class CovarianceWorkload(Workload):
    """Exact sums behind the covariance."""

    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Upper triangle of the products' sums [D, D], and the sums [D]; exact in any dtype."""
        gram, total = self._sums(images, backend)
        return gram.triu_(), total

    def run(self) -> object:
        """The sums, with what the lower triangle happens to hold."""
        return self._sums(self.images, self.case.backend)

    def flops(self) -> int:
        """A product and a sum for every image and pair of values, each pair once."""
        return self.case.images * self.values * (self.values + 1)

    def bytes(self) -> int:
        """Images, and 64-bit sums read and written."""
        return self.images.nbytes + 16 * (self.values**2 + self.values)

    def rounding(self, images: Tensor) -> float:
        """None: the sums are exact."""
        return 0.0

    def _sums(self, images: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        gram = torch.zeros(self.values, self.values, dtype=torch.int64)
        total = torch.zeros(self.values, dtype=torch.int64)
        ops.accumulate_covariance(images.flatten(1), gram, total, backend=backend)
        return gram, total

    def _beside_torch_cov(self) -> Yardstick:
        values = training_values(self.images, torch.float32).flatten(1).T
        return Yardstick(lambda: torch.cov(values), 1.0, "torch.cov of the float32 values")


_WORKLOADS: dict[str, type[Workload]] = {
    "masked_posterior": MaskedWorkload,
    "window_posterior": WindowWorkload,
    "global_posterior": GlobalWorkload,
    "equivariant_posterior": EquivariantWorkload,
    "patch_set": PatchSetWorkload,
    "covariance": CovarianceWorkload,
    "masked_posterior_jvp": TangentsWorkload,
    "window_posterior_jvp": TangentsWorkload,
    "global_posterior_jvp": TangentsWorkload,
}


def make_workload(case: Case, data: BenchmarkSet) -> Workload:
    """A case with its tensors."""
    return _WORKLOADS[case.op](case, data)
