"""The cases with their tensors, one class for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyflocality import ops
from pyflocality.storage.reader import training_values

from . import baselines, libraries
from .registry import Case
from .sets import BenchmarkSet
from .workload import EPS, PosteriorWorkload, Workload, Yardstick, largest_error

# Rows of the matmul yardsticks; their time is scaled to all images.
_MATMUL_ROWS = 2048


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

    def _beside_compiled(self) -> Yardstick:
        mask = self.weights.dense(torch.float32).T.contiguous()
        return self._compiled(baselines.masked_einsum, (mask,))

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

    def _beside_compiled_patches(self) -> Yardstick:
        return self._compiled(baselines.window_unfolded_patches, self.arguments())

    def _beside_compiled_differences(self) -> Yardstick:
        return self._compiled(baselines.window_unfolded_differences, self.arguments())


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

    def _beside_compiled_convolution(self) -> Yardstick:
        # It takes one noisy image after the other: a batch would be compiled as many times over.
        return self._compiled(baselines.equivariant_convolution, self.arguments(), rows=1)


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

    def _beside_compiled(self) -> Yardstick:
        return self._compiled(baselines.global_broadcast, ())

    def _beside_attention(self) -> Yardstick:
        note = (
            "scaled_dot_product_attention of torch: noisy images ask, training images are keys "
            "and values, their squared norms, computed beforehand, a bias"
        )
        return self._library(libraries.Attention, note)

    def _beside_keops(self) -> Yardstick:
        return self._library(libraries.KeOps, "KeOps: sumsoftmaxweight of symbolic differences")

    def _library(
        self, model: Callable[[Tensor, float, float], libraries.Model], note: str
    ) -> Yardstick:
        """A model of a library, made of the training values before it is timed."""
        made = model(self._eager_values(), self.sigma, self.alpha)

        def answer(values: Tensor) -> Tensor:
            return model(values, self.sigma, self.alpha)(self.x)

        count = min(self.case.eager_images, self.case.images)
        return self._on_some(lambda: made(self.x), answer, count, note)


class NearestWorkload(PosteriorWorkload):
    """The nearest training image: its position."""

    def arguments(self) -> tuple[Any, ...]:
        """Nothing."""
        return ()

    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Positions, int64 [B, 1]."""
        x = self.x.to(dtype)
        return (ops.nearest_images(x, images, self.alpha, backend=backend).indices,)

    def flops(self) -> int:
        """A subtraction, a product and a sum for every value."""
        return 3 * self.values * self.pairs()

    def bytes(self) -> int:
        """Images, noisy images, and a position each."""
        return self.images.nbytes + self.x.nbytes + 8 * self.case.batch

    def neighbours(self) -> int:
        """All values."""
        return self.values

    def rounding(self, images: Tensor) -> float:
        """None: a position is right or wrong."""
        return 0.0

    def _beside_faiss(self) -> Yardstick:
        index = libraries.Faiss(training_values(self.images, torch.float32), self.alpha)
        return Yardstick(
            lambda: index(self.x),
            1.0,
            "faiss: IndexFlatL2, filled with float32 values beforehand",
            lambda values: libraries.Faiss(values, self.alpha)(self.x),
        )


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
        nudged = x + signs * EPS / 2 * (x.abs() + self.alpha)
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
    "nearest": NearestWorkload,
    "masked_posterior_jvp": TangentsWorkload,
    "window_posterior_jvp": TangentsWorkload,
    "global_posterior_jvp": TangentsWorkload,
}


def make_workload(case: Case, data: BenchmarkSet) -> Workload:
    """A case with its tensors, on the images as large as it wants them."""
    return _WORKLOADS[case.op](case, data if case.side is None else data.cropped(case.side))
