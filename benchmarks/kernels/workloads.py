"""The cases with their tensors, one class for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import ops
from pyflocality.ops.costs import Size
from pyflocality.ops.operation import OPERATIONS
from pyflocality.posterior.problem import PosteriorOptions
from pyflocality.storage.reader import training_values

from ..command import Record
from . import baselines, libraries
from .registry import DDIM_STEPS, Case
from .sets import BenchmarkSet
from .workload import PosteriorWorkload, Workload, Yardstick, kind_of, stem_of

# Images of the equivariant yardstick that takes one displacement at a time: it costs much.
_FEW = 32
# Share of inputs in the masks of examples.
_DENSITY = 0.05


class MaskedWorkload(PosteriorWorkload):
    """PCA locality: masks of the noise level, one per output value."""

    eager = {
        "eager": (
            baselines.masked_einsum,
            "published algorithm: einsum of squared differences with the dense mask, batches of "
            f"{baselines.LOADER_BATCH}",
        )
    }

    def __init__(self, case: Case, data: BenchmarkSet, interpreted: bool = False) -> None:
        super().__init__(case, data, interpreted)
        if case.density is None:
            self.weights = data.weights(self.timestep, case.softness)
        else:
            self.weights = data.square_masks(case.density)
        on_cpu = case.backend == "cpu"
        self.schedule_terms = data.tree(self.timestep).terms if on_cpu else self.core_fringe

    @cached_property
    def core_fringe(self) -> int:
        """Multiply-adds a pair of core and fringe in tiles of 4 x 4 outputs."""
        mask = self.weights.dense(torch.bool, self.images.device)
        return baselines.core_fringe_terms(mask, self.shape)

    def size(self) -> Size:
        """With the terms of the schedule."""
        return replace(super().size(), terms=self.schedule_terms)

    def arguments(self) -> tuple[Any, ...]:
        """The masks."""
        return (self.weights,)

    def pair_terms(self) -> int:
        """Those of core and fringe."""
        return self.core_fringe

    def neighbours(self) -> int:
        """Inputs of the largest mask."""
        return int(self.weights.dense(torch.bool).sum(1).max())

    def facts(self) -> Record:
        """Masks, schedule and the arithmetic of core and fringe, as shares of D^2."""
        return {
            "mask_density": self.weights.density,
            "schedule_terms": self.schedule_terms,
            "schedule_share": self.schedule_terms / self.values**2,
            "core_fringe_terms": self.core_fringe,
            "core_fringe_share": self.core_fringe / self.values**2,
        }

    def eager_arguments(self) -> tuple[Any, ...]:
        """Inputs in the row, outputs in the column."""
        return (self.weights.dense(torch.float32, self.images.device).T.contiguous(),)

    def _beside_matmul_same_terms(self) -> Yardstick:
        return self._matmul(self.schedule_terms * self.pairs(), "the schedule")

    def _beside_matmul_core_fringe(self) -> Yardstick:
        terms = self.core_fringe * self.pairs()
        return self._matmul(terms, "core and fringe in tiles of 4x4 outputs")


class WindowWorkload(PosteriorWorkload):
    """Local score: one posterior per pixel over the window around it."""

    eager = {
        "eager": (baselines.window_unfolded_patches, "eager unfold of all patches"),
        "eager_patches": (baselines.window_unfolded_patches, "eager unfold of all patches"),
        "eager_differences": (
            baselines.window_unfolded_differences,
            "eager unfold of the squared differences, summed over the channels before",
        ),
    }

    @property
    def window(self) -> int:
        """Side of the window."""
        if self.case.window is None:
            raise ValueError(f"{self.case.id}: `window` must be given")
        return self.case.window

    def arguments(self) -> tuple[Any, ...]:
        """The window."""
        return (self.window,)

    def neighbours(self) -> int:
        """Values of the largest window."""
        channels, height, width = self.shape
        return channels * min(self.window, height) * min(self.window, width)


class EquivariantWorkload(WindowWorkload):
    """Equivariant local score: one posterior per pixel over the patches at all positions."""

    eager = {
        "eager_convolution": (
            baselines.equivariant_convolution,
            "published algorithm: convolution with the unfolded patches of each noisy image",
        )
    }
    # It takes one noisy image after the other: a batch would be compiled as many times over.
    compiled_rows = 1

    @property
    def positions(self) -> int:
        """Places where a patch fits."""
        _, height, width = self.shape
        return (height - self.window + 1) * (width - self.window + 1)

    def options(self) -> Record:
        """The border rule, too."""
        return super().options() | {"boundary": self.case.boundary}

    def pair_terms(self) -> int:
        """Every patch with every patch."""
        channels, height, width = self.shape
        return channels * self.window**2 * self.positions * height * width

    def _beside_eager(self) -> Yardstick:
        few = self.images[: min(_FEW, self.case.eager_images)]
        share, note = len(few) / len(self.images), "one displacement at a time in plain torch"
        note += f"; timed on {len(few)} images and scaled to {len(self.images)}"
        return Yardstick(lambda: self.answers(few, "reference"), share, note)


class PatchSetWorkload(WindowWorkload):
    """Square patches that answer themselves: two passes, the second sums the weights."""

    def _beside_window_mean(self) -> Yardstick:
        note = "the local score with the same window: one pass"
        return Yardstick(self.plain("window_posterior").run, 1.0, note)

    _beside_local_score = _beside_window_mean


class GlobalWorkload(PosteriorWorkload):
    """Optimal denoiser: one posterior over whole images."""

    eager = {"eager": (baselines.global_broadcast, "eager broadcasting of all differences")}

    def pair_terms(self) -> int:
        """One a value."""
        return self.values

    def _beside_attention(self) -> Yardstick:
        note = (
            "scaled_dot_product_attention of torch: noisy images ask, training images are keys "
            "and values, their squared norms, computed beforehand, a bias"
        )
        return self._library(libraries.Attention, self._eager_values(), note)

    def _beside_keops(self) -> Yardstick:
        # On a GPU a few images would time its launches.
        on_gpu = self.images.is_cuda
        values = training_values(self.images, torch.float32) if on_gpu else self._eager_values()
        note = "KeOps: sumsoftmaxweight of symbolic differences"
        return self._library(libraries.KeOps, values, note)

    def _library(
        self, model: Callable[[Tensor, float, float], libraries.Model], values: Tensor, note: str
    ) -> Yardstick:
        """A model of a library, made of the training values before it is timed."""
        made = model(values, self.sigma, self.alpha)

        def answer(values: Tensor) -> Tensor:
            return model(values, self.sigma, self.alpha)(self.x)

        return self._on_some(lambda: made(self.x), answer, len(values), note)


class NearestWorkload(GlobalWorkload):
    """The nearest training image: its position."""

    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Positions, int64 [B, 1]."""
        x = self.x.to(dtype)
        return (ops.nearest_images(x, images, self.alpha, backend=backend).indices,)

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

    def terms(self) -> int:
        """One for every image and pair of values."""
        return len(self.images) * self.values * (self.values + 1) // 2

    def rounding(self, images: Tensor) -> float:
        """None: the sums are exact."""
        return 0.0

    def _sums(self, images: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        options: Record = {"dtype": torch.int64, "device": images.device}
        gram = torch.zeros(self.values, self.values, **options)
        total = torch.zeros(self.values, **options)
        ops.accumulate_covariance(images.flatten(1), gram, total, backend=backend)
        return gram, total

    def _beside_torch_cov(self) -> Yardstick:
        values = training_values(self.images, torch.float32).flatten(1).T
        return Yardstick(lambda: torch.cov(values), 1.0, "torch.cov of the float32 values")

    def _beside_full_matmul(self) -> Yardstick:
        values = training_values(self.images, torch.bfloat16).flatten(1)
        note = "bf16 matmul of all values with themselves, whole"
        return Yardstick(lambda: values.T @ values, 1.0, note)


class GenerationWorkload(Workload):
    """Ten DDIM steps of the PCA-locality model from fixed noise."""

    # A step passes on the errors of those before it.
    tolerance = 10
    x: Tensor

    def __init__(self, case: Case, data: BenchmarkSet, interpreted: bool = False) -> None:
        super().__init__(case, data, interpreted)
        shape, generator = (case.batch, *self.shape), torch.Generator().manual_seed(1)
        self.x = torch.randn(shape, generator=generator).to(self.images.device)
        self._timed = self._denoiser(self.images, case.backend)

    @property
    def ran(self) -> str:
        """The operation of each step."""
        return "masked_posterior"

    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """The images that are made, [B, C, H, W]."""
        timed = images is self.images and backend == self.case.backend
        denoiser = self._timed if timed else self._denoiser(images, backend)
        steps = 2 if self.interpreted else len(DDIM_STEPS)
        return (pf.sample(denoiser, x_T=self.x.to(dtype), steps=steps, progress=False).images,)

    def _denoiser(self, images: Tensor, backend: str) -> pf.PCALocalityDenoiser:
        """The PCA-locality model of some images, with the masks of the whole set."""
        return pf.PCALocalityDenoiser(
            pf.TrainingSet(images),
            mask_threshold=self.data.threshold,
            moments=self.data.moments,
            backend=backend,
            precision=self.case.precision,
        )

    def rounding(self, images: Tensor) -> float:
        """Ten times that of a step."""
        return 1e-2


class ExampleWorkload(PosteriorWorkload):
    """An operation that has no class here, on the example of its declaration."""

    def __init__(self, case: Case, data: BenchmarkSet, interpreted: bool = False) -> None:
        super().__init__(case, data, interpreted)
        self.operation = OPERATIONS[stem_of(case.op)]
        self.given = self.operation.example(self.size(), torch.Generator().manual_seed(0))

    def size(self) -> Size:
        """With masks like those of images, should it have some."""
        return replace(super().size(), terms=_DENSITY * self.values**2)

    def _answers(self, x: Tensor, images: Tensor, backend: str) -> tuple[Tensor, ...]:
        level = (self.sigma, self.alpha, backend, PosteriorOptions())
        if self.directions is None:
            return (self.operation.mean(x, images, self.given, *level),)
        products = getattr(self.operation, kind_of(self.case.op))
        result = products(x, self.directions.to(x.dtype), images, self.given, *level)
        return result if isinstance(result, tuple) else (result,)


_WORKLOADS: dict[str, Callable[..., Workload]] = {
    "masked_posterior": MaskedWorkload,
    "window_posterior": WindowWorkload,
    "global_posterior": GlobalWorkload,
    "equivariant_posterior": EquivariantWorkload,
    "patch_set": PatchSetWorkload,
    "covariance": CovarianceWorkload,
    "nearest": NearestWorkload,
    "ddim": GenerationWorkload,
}


def make_workload(case: Case, data: BenchmarkSet, interpreted: bool = False) -> Workload:
    """A case with its tensors, on the images as large as it wants them."""
    data = data if case.side is None else data.cropped(case.side)
    kind = _WORKLOADS.get(stem_of(case.op), ExampleWorkload)
    return kind(case, data, interpreted)
