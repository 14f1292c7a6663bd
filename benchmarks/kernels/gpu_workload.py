"""The GPU suite's tensors: sets on the device, what a case runs, and what runs beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import ops
from pyflocality.masks import pca_locality_weights
from pyflocality.storage.reader import training_values
from pyflocality.weights import QueryWeights

from . import baselines
from .gpu_cases import GpuCase, GpuPlan
from .libraries import KeOps, compiled
from .registry import DDIM_STEPS
from .sets import MASK_THRESHOLD, BenchmarkSet, natural_images

# Multiply-adds of one matmul yardstick at most; its time is scaled to the case's.
_MATMUL_TERMS = 2**40
# Rounding that a kernel may add where the reference has none to speak of, in pixel units.
_PIXEL_ERROR = 1e-3
# The same for images that ten steps lead to: a step passes on the errors of those before it.
_GENERATED_ERROR = 1e-2
# Noisy images of a batch: all, and those compared on the whole set.
_ALL, _WHOLE_ROWS = slice(None), slice(2)
# The time of a reference is estimated on one image of so many.
_PROBED_SHARE = 16


class GpuSet(BenchmarkSet):
    """Images on the device under test, with masks, levels and queries.

    Args:
        images: Training images, uint8 [N, C, H, W].
        name: What the images are.
        threshold: Threshold of the masks.
    """

    def __init__(self, images: Tensor, name: str, threshold: float) -> None:
        super().__init__(images, name)
        self.threshold = threshold

    @classmethod
    def on(
        cls,
        device: torch.device,
        count: int,
        shape: tuple[int, int, int],
        source: str | None = None,
        threshold: float = MASK_THRESHOLD,
    ) -> GpuSet:
        """Synthetic images, or the first of a folder or zip that `TrainingSet.load` reads."""
        if source is not None:
            # To the device whole: a mapped file is read once.
            images = pf.TrainingSet.load(source).images[:count].to(device, copy=True)
            if tuple(images.shape[1:]) != shape:
                raise ValueError(
                    f"{source}: expected images {shape}, got {tuple(images.shape[1:])}"
                )
            return cls(images, "real", threshold)
        # The covariance matters, not that all images differ: shifted copies save minutes.
        base = natural_images(min(count, 10_000), shape)
        copies = [base.roll(shift, -1) for shift in range(-(-count // len(base)))]
        return cls(torch.cat(copies)[:count].to(device), "synthetic, power 1/f^3", threshold)

    @cached_property
    def moments(self) -> pf.Moments:
        """Moments from the plain-torch sums, so that masks do not depend on what is tested."""

        def build() -> pf.Moments:
            moments = pf.Moments.from_data(self.images, backend="reference")
            moments.eigh()
            return moments

        return self._timed("moments and eigenvectors", build)

    def weights(self, timestep: int) -> QueryWeights:
        """Masks of the PCA-locality model, from the moments of all images."""
        if timestep not in self._weights:
            alpha, sigma = self.level(timestep)
            self._weights[timestep] = self._timed(
                f"masks t={timestep}",
                lambda: pca_locality_weights(self.moments, sigma, alpha, self.threshold),
            )
        return self._weights[timestep]

    def queries(self, timestep: int, batch: int) -> Tensor:
        """Noisy images, float32 [B, C, H, W]: mirror images of training images, and noise."""
        alpha, sigma = self.level(timestep)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(len(self.images), (batch,), generator=generator)
        clean = training_values(self.images[chosen.to(self.images.device)], torch.float32).flip(-1)
        noise = torch.randn(clean.shape, generator=generator)
        return alpha * clean + sigma * noise.to(clean.device)

    def square_masks(self, density: float) -> QueryWeights:
        """Masks of square windows, all channels, of about this density on average."""
        channels, height, width = self.images.shape[1:]
        device = self.images.device
        rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        best = None
        for half in range(max(height, width)):
            near_rows = (rows[:, None] - rows).abs() <= half
            near_columns = (columns[:, None] - columns).abs() <= half
            found = float(near_rows.double().mean() * near_columns.double().mean())
            if best is None or abs(found - density) < abs(best[0] - density):
                best = (found, near_rows, near_columns)
        _, near_rows, near_columns = best
        near = torch.kron(near_rows.float(), near_columns.float()).bool()
        return QueryWeights(near.repeat(channels, channels))


class GpuWorkload:
    """A case with its tensors.

    Args:
        case: What to run.
        data: Its set.
        plan: Sizes.
        interpreted: Whether this is a dry run.
    """

    def __init__(self, case: GpuCase, data: GpuSet, plan: GpuPlan, interpreted: bool) -> None:
        self.case, self.data, self.plan, self.interpreted = case, data, plan, interpreted
        # A tensor of its own: what kernels keep beside a set goes with the case, so that every
        # case has a first call.
        self.images = data.images.detach()
        self.values = self.images[0].numel()
        self.alpha, self.sigma = data.level(case.timestep)
        self.batch = min(case.batch, 2) if interpreted else case.batch
        self.x = data.queries(case.timestep, self.batch)
        height, width = self.images.shape[2:]
        # Dry runs are on images smaller than some windows.
        limit = min(height, width) - 1 + min(height, width) % 2
        self.window = case.window and min(case.window, limit)

    @cached_property
    def weights(self) -> QueryWeights:
        """Masks of the case."""
        if self.case.density is not None:
            return self.data.square_masks(self.case.density)
        return self.data.weights(self.case.timestep)

    @cached_property
    def directions(self) -> Tensor:
        """Tangents or cotangents of the case, float32 [K, B, C, H, W]."""
        return self.data.directions(self.case.tangents, self.batch).to(self.images.device)

    def prepare(self) -> None:
        """Make what is there before a first call: masks and tangents."""
        if self.case.op.startswith("masked_posterior"):
            self.weights  # noqa: B018  (kept by the property)
        if self.case.op == "ddim":
            self.data.moments.eigh()
        if self.case.tangents is not None:
            self.directions  # noqa: B018

    def answers(
        self,
        images: Tensor,
        backend: str,
        dtype: torch.dtype = torch.float32,
        rows: slice = _ALL,
    ) -> tuple[Tensor, ...]:
        """The case over some images, for some noisy images, on a backend, computed in a dtype."""
        op = self.case.op
        if op == "ddim":
            return (self._generated(images, backend, dtype, rows),)
        if op == "covariance":
            flat = images.flatten(1)
            gram = torch.zeros(self.values, self.values, dtype=torch.int64, device=images.device)
            total = gram.new_zeros(self.values)
            ops.accumulate_covariance(flat, gram, total, backend=backend)
            return gram, total
        if self.case.tangents is None:
            return (self._means(op, images, backend, dtype, rows),)
        function = getattr(ops, op)
        found = function(
            self.x[rows].to(dtype),
            self.directions[:, rows].to(dtype),
            *self._searched(op, images),
            self.sigma,
            self.alpha,
            backend=backend,
        )
        return found if isinstance(found, tuple) else (found,)

    def _means(
        self, op: str, images: Tensor, backend: str, dtype: torch.dtype, rows: slice = _ALL
    ) -> Tensor:
        """The posterior means of an operation, without tangents."""
        options = {"backend": backend, "precision": self.case.precision}
        if op == "equivariant_posterior":
            options["boundary"] = self.case.boundary
        function = getattr(ops, f"{op}_mean")
        level = (self.sigma, self.alpha)
        return function(self.x[rows].to(dtype), *self._searched(op, images), *level, **options)

    def _searched(self, op: str, images: Tensor) -> tuple[object, ...]:
        """Arguments of an operation that tell what is searched, and where."""
        if op.startswith("masked_posterior"):
            return images, self.weights
        return (images,) if self.window is None else (images, self.window)

    def run(self) -> tuple[Tensor, ...]:
        """One run, as it is timed."""
        return self.answers(self.images, self.case.backend)

    @cached_property
    def _denoiser(self) -> pf.PCALocalityDenoiser:
        return self._denoiser_of(self.images, self.case.backend)

    def _denoiser_of(self, images: Tensor, backend: str) -> pf.PCALocalityDenoiser:
        """The PCA-locality model of some images, with the masks of the whole set."""
        return pf.PCALocalityDenoiser(
            pf.TrainingSet(images),
            mask_threshold=self.data.threshold,
            moments=self.data.moments,
            backend=backend,
            precision=self.case.precision,
        )

    def _generated(self, images: Tensor, backend: str, dtype: torch.dtype, rows: slice) -> Tensor:
        """Ten DDIM steps from fixed noise: [B, C, H, W]."""
        timed = images is self.images and backend == self.case.backend
        denoiser = self._denoiser if timed else self._denoiser_of(images, backend)
        noise = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(1))
        noise = noise[rows].to(images.device, dtype)
        steps = 2 if self.interpreted else len(DDIM_STEPS)
        return pf.sample(denoiser, x_T=noise, steps=steps, progress=False).images

    def check(self) -> dict[str, Any]:
        """Compare with the reference in float64 on some of the images, for all noisy ones.

        Raises:
            ArithmeticError: The result is wrong by more than its budget.
        """
        covariance = self.case.op == "covariance"
        count = self.plan.covariance_images if covariance else self.plan.check_images
        return self._compare(self.images[:count], _ALL)

    def check_whole(self, limit: float) -> dict[str, Any]:
        """Compare the run that is timed with the reference, for the first noisy images.

        What a noisy image gets does not depend on its batch, so that few of them tell of all.

        Args:
            limit: Longest time for the reference, seconds; beyond it nothing is compared.

        Raises:
            ArithmeticError: The result is wrong by more than its budget.
        """
        few = self.images[: max(1, len(self.images) // _PROBED_SHARE)]
        try:
            start = time.perf_counter()
            for one in self.answers(few, "reference", torch.float64, _WHOLE_ROWS):
                # The copy waits for the GPU.
                one.cpu()
            # Once in float64, and again in float32.
            needed = 2 * (time.perf_counter() - start) * len(self.images) / len(few)
            if needed > limit:
                return {"unchecked": f"the reference would take {needed:.0f} s"}
            return self._compare(self.images, _WHOLE_ROWS)
        except torch.OutOfMemoryError as error:
            return {"unchecked": str(error)[:200]}

    def _compare(self, images: Tensor, rows: slice) -> dict[str, Any]:
        answers = self.answers(images, self.case.backend)
        if self.case.op == "covariance":
            return self._compare_exactly(images, answers)
        # [B, C, H, W], or [K, B, C, H, W].
        found = [one[rows] if one.ndim == 4 else one[:, rows] for one in answers]
        exact = self.answers(images, "reference", torch.float64, rows)
        plain = self.answers(images, "reference", torch.float32, rows)
        factor, rounding = (10, _GENERATED_ERROR) if self.case.op == "ddim" else (2, _PIXEL_ERROR)
        errors, budgets = [], []
        for one, true, single in zip(found, exact, plain, strict=True):
            errors.append(float((one.double() - true).abs().max()))
            # Derivatives may be larger than pixels.
            size = max(1.0, float(true.abs().max()))
            budgets.append(factor * float((single.double() - true).abs().max()) + rounding * size)
            # Turned round, so that NaN fails.
            if not errors[-1] <= budgets[-1]:
                raise ArithmeticError(
                    f"wrong by {errors[-1]:.3g}, expected at most {budgets[-1]:.3g}, "
                    f"on {len(images)} images"
                )
        # Of several results the one nearest to its budget.
        error, budget = max(zip(errors, budgets, strict=True), key=lambda pair: pair[0] / pair[1])
        return {
            "images": len(images),
            "noisy_images": found[0].shape[-4],
            "error": error,
            "budget": budget,
        }

    def _compare_exactly(self, images: Tensor, answers: tuple[Tensor, ...]) -> dict[str, Any]:
        for found, exact in zip(answers, self.answers(images, "reference"), strict=True):
            if not torch.equal(found.triu() if found.ndim == 2 else found, exact):
                raise ArithmeticError(f"the sums of {len(images)} images are not exact")
        return {"images": len(images), "error": 0, "budget": 0}

    def terms(self) -> int | None:
        """Multiply-adds of the case; None where nobody counts them."""
        case, pairs = self.case, len(self.images) * self.batch
        pairs *= 1 + (case.tangents or 0)
        if case.op.startswith("masked_posterior"):
            mask = self.weights.dense(torch.bool, self.images.device)
            return baselines.core_fringe_terms(mask, tuple(self.images.shape[1:])) * pairs
        if case.op == "covariance":
            return len(self.images) * self.values * (self.values + 1) // 2
        if case.op.startswith("global_posterior"):
            return self.values * pairs
        if case.op == "equivariant_posterior":
            channels, height, width = self.images.shape[1:]
            patches = (height - self.window + 1) * (width - self.window + 1)
            return channels * self.window**2 * patches * height * width * pairs
        return None

    def yardstick(self, name: str) -> tuple[Callable[[], object], float, str]:
        """What runs beside the case, the share of the case's work it does, and a note."""
        return getattr(self, f"_{name}_yardstick")()

    def _matmul_yardstick(self) -> tuple[Callable[[], object], float, str]:
        terms = self.terms()
        inner = max(16, self.values)
        rows = len(self.images)
        columns = max(1, min(round(terms / (rows * inner)), _MATMUL_TERMS // (rows * inner)))
        left = self._random(rows, inner)
        right = self._random(inner, columns)
        note = f"bf16 matmul [{rows}, {inner}] x [{inner}, {columns}], scaled to the same terms"
        return lambda: left @ right, rows * inner * columns / terms, note

    def _full_matmul_yardstick(self) -> tuple[Callable[[], object], float, str]:
        values = self._random(len(self.images), self.values)
        return lambda: values.T @ values, 1.0, "bf16 matmul of all values with themselves, whole"

    def _copy_yardstick(self) -> tuple[Callable[[], object], float, str]:
        target = torch.empty_like(self.images)
        # A copy reads and writes what a scan only reads.
        return lambda: target.copy_(self.images), 2.0, "reading the images at the rate of a copy"

    def _eager_yardstick(self) -> tuple[Callable[[], object], float, str]:
        function, count = self._eager()
        note = f"the published algorithm in plain torch on {count} images, scaled"
        return function, count / len(self.images), note

    def _compiled_yardstick(self) -> tuple[Callable[[], object], float, str]:
        function, count = self._eager()
        note = f"torch.compile of the published algorithm on {count} images, scaled"
        # A dry run spends no time on a compiler.
        fast = torch.compile(function, backend="eager") if self.interpreted else compiled(function)
        return fast, count / len(self.images), note

    def _keops_yardstick(self) -> tuple[Callable[[], object], float, str]:
        values = training_values(self.images, torch.float32)
        model = KeOps(values, self.sigma, self.alpha)
        return lambda: model(self.x), 1.0, "a reduction of KeOps over all images, float32"

    def _without_tangents_yardstick(self) -> tuple[Callable[[], object], float, str]:
        op = self.case.op.rpartition("_")[0]
        note = f"{op} of the same noisy images, without derivatives"
        backend, dtype = self.case.backend, torch.float32
        return lambda: self._means(op, self.images, backend, dtype), 1.0, note

    def _local_score_yardstick(self) -> tuple[Callable[[], object], float, str]:
        backend, dtype = self.case.backend, torch.float32
        return (
            lambda: self._means("window_posterior", self.images, backend, dtype),
            1.0,
            "the local score with the same window",
        )

    def _eager(self) -> tuple[Callable[[], Tensor], int]:
        count = min(self.plan.eager_images, len(self.images))
        if self.case.op == "equivariant_posterior":
            # One displacement at a time, as the reference; its cost per image is high.
            few = self.images[: min(32, count)]
            return lambda: self.answers(few, "reference"), len(few)
        values = training_values(self.images[:count], torch.float32)
        level = (self.sigma, self.alpha)
        if self.case.op == "masked_posterior":
            mask = self.weights.dense(torch.float32, self.images.device).T.contiguous()
            return lambda: baselines.masked_einsum(self.x, values, mask, *level), count
        if self.case.op == "window_posterior":
            return (
                lambda: baselines.window_unfolded_patches(self.x, values, self.window, *level),
                count,
            )
        return lambda: baselines.global_broadcast(self.x, values, *level), count

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.images.device, dtype=torch.bfloat16)
