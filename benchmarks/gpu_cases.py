"""What the GPU suite runs: cases, their tensors, and the yardsticks that run beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import pyflocality as pf
from benchmarks import baselines
from benchmarks.registry import DDIM_STEPS
from benchmarks.sets import BenchmarkSet, natural_images
from pyflocality import ops
from pyflocality._problem import training_values
from pyflocality.weights import QueryWeights

# Multiply-adds of one matmul yardstick at most; its time is scaled to the case's.
_MATMUL_TERMS = 2**40
# Rounding that a kernel may add where the reference has none to speak of, in pixel units.
_PIXEL_ERROR = 1e-3


@dataclass(frozen=True)
class GpuCase:
    """One thing to run.

    Attributes:
        op: Operation, or "ddim" for a whole generation.
        backend: Backend to ask for, and to assert.
        data: Name of the set.
        batch: Noisy images B.
        timestep: Time of the noise level.
        window: Side of the window.
        boundary: Border rule of the equivariant posterior.
        density: Share of inputs in a square mask around each output; None takes PCA masks.
        yardsticks: Names of what runs in turns with it.
        check_images: Images the result is checked on.
        seconds: Longest time to spend on timing.
    """

    op: str
    backend: str
    data: str
    batch: int = 8
    timestep: int = 400
    window: int | None = None
    boundary: str | None = None
    density: float | None = None
    yardsticks: tuple[str, ...] = ()
    check_images: int = 131
    seconds: float = 6.0

    @property
    def id(self) -> str:
        """A name that stays the same."""
        parts = [self.data]
        if self.op != "covariance":
            parts.append(f"B{self.batch}")
        if self.op not in ("covariance", "ddim"):
            parts.append(f"t{self.timestep}")
        parts += [f"k{self.window}"] if self.window else []
        parts += [self.boundary] if self.boundary else []
        parts += [f"density{self.density:g}"] if self.density else []
        return f"{self.op}/{self.backend}/{'-'.join(parts)}"


@dataclass(frozen=True)
class GpuPlan:
    """Sizes of a run.

    Attributes:
        small: N and (C, H, W) of the set named "cifar".
        large: The same of the set named "64x64".
        eager_images: Images that eager yardsticks run on.
        check_images: Images that results are checked on.
        covariance_images: Images that exact sums are checked on.
    """

    small: tuple[int, tuple[int, int, int]]
    large: tuple[int, tuple[int, int, int]]
    eager_images: int
    check_images: int
    covariance_images: int


FULL = GpuPlan((50_000, (3, 32, 32)), (15_000, (3, 64, 64)), 512, 131, 5_000)
QUICK = GpuPlan((4_096, (3, 32, 32)), (1_024, (3, 64, 64)), 256, 67, 1_000)
DRY = GpuPlan((19, (3, 6, 5)), (11, (1, 7, 8)), 8, 19, 19)


def gpu_cases(few: bool = False) -> list[GpuCase]:
    """All cases, the most important first; some of each kind where `few`."""
    steps = DDIM_STEPS[::4] if few else DDIM_STEPS
    matmul = ("matmul",)
    masked = [
        GpuCase(
            "masked_posterior",
            "triton",
            "cifar",
            timestep=t,
            yardsticks=("matmul", "eager", "compiled") if t == 500 else matmul,
            seconds=3,
        )
        for t in steps
    ]
    uniform = [
        GpuCase("masked_posterior", "triton", data, batch, density=d, yardsticks=matmul, seconds=3)
        for data, batch in (("cifar", 8), ("64x64", 8), ("cifar", 64))
        for d in (1.0, 0.33, 0.15)[few:]
    ]
    batch_64 = [
        GpuCase("masked_posterior", "triton", "cifar", 64, t, yardsticks=matmul, seconds=3)
        for t in steps
    ]
    whole = [
        GpuCase("global_posterior", "triton", data, batch, yardsticks=("copy", "eager"), seconds=2)
        for data, batch in (("cifar", 8), ("cifar", 1), ("cifar", 16), ("cifar", 64), ("64x64", 8))
    ]
    sums = [
        GpuCase("covariance", "triton", data, yardsticks=("full_matmul",), seconds=4)
        for data in ("cifar", "64x64")
    ]
    patches = [
        GpuCase(
            "equivariant_posterior", "triton", "cifar", 8, t, k, border, yardsticks=marks, seconds=5
        )
        for t, k, border, marks in (
            (400, 7, "circular", ("matmul", "eager")),
            (900, 7, "circular", matmul),
            (0, 7, "circular", matmul),
            (400, 7, "broken", matmul),
            (400, 3, "circular", matmul),
            (400, 5, "circular", matmul),
            (400, 15, "circular", matmul),
        )
    ]
    windows = [
        GpuCase(
            "window_posterior", "cuda", "cifar", 8, 400, k, yardsticks=("copy", *marks), seconds=3
        )
        for k, marks in ((7, ("eager", "compiled")), (3, ("eager",)), (15, ("eager",)))
    ]
    ddim = [GpuCase("ddim", "triton", "cifar", seconds=8)]
    return [
        *masked,
        *ddim,
        *sums[:1],
        *whole[:1],
        *patches[:1],
        *windows[:1],
        *uniform[: 2 * len(uniform) // 3],
        *patches[1:4],
        *windows[1:],
        *whole[1:],
        *sums[1:],
        *batch_64,
        *patches[4:],
        *uniform[2 * len(uniform) // 3 :],
    ]


class GpuSet(BenchmarkSet):
    """Images on the device under test, with masks, levels and queries."""

    @classmethod
    def on(
        cls,
        device: torch.device,
        count: int,
        shape: tuple[int, int, int],
        source: str | None = None,
    ) -> GpuSet:
        """Synthetic images, or the first of a folder or zip that `TrainingSet.load` reads."""
        if source is not None:
            images = pf.TrainingSet.load(source).images[:count]
            return cls(images.to(device), "real")
        # The covariance matters, not that all images differ: shifted copies save minutes.
        base = natural_images(min(count, 10_000), shape)
        copies = [base.roll(shift, -1) for shift in range(-(-count // len(base)))]
        return cls(torch.cat(copies)[:count].to(device), "synthetic, power 1/f^2")

    @cached_property
    def moments(self) -> pf.Moments:
        """Moments from the plain-torch sums, so that masks do not depend on what is tested."""

        def build() -> pf.Moments:
            moments = pf.Moments.from_data(self.images, backend="reference")
            moments.eigh()
            return moments

        return self._timed("moments and eigenvectors", build)

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
        self.images = data.images
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

    def answers(self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32) -> Any:
        """The operation over some images, on a backend, computed in a dtype."""
        op = self.case.op
        if op == "covariance":
            flat = images.flatten(1)
            gram = torch.zeros(self.values, self.values, dtype=torch.int64, device=images.device)
            total = gram.new_zeros(self.values)
            ops.accumulate_covariance(flat, gram, total, backend=backend)
            return gram, total
        x, level = self.x.to(dtype), (self.sigma, self.alpha)
        if op == "masked_posterior":
            return ops.masked_posterior_mean(x, images, self.weights, *level, backend=backend)
        if op == "window_posterior":
            return ops.window_posterior_mean(x, images, self.window, *level, backend=backend)
        if op == "equivariant_posterior":
            from pyflocality.ops.equivariant_posterior import equivariant_posterior_mean

            return equivariant_posterior_mean(
                x, images, self.window, *level, boundary=self.case.boundary, backend=backend
            )
        return ops.global_posterior_mean(x, images, *level, backend=backend)

    def run(self) -> object:
        """One run, as it is timed."""
        if self.case.op == "ddim":
            return self.generate()
        return self.answers(self.images, self.case.backend)

    @cached_property
    def denoiser(self) -> pf.PCALocalityDenoiser:
        """The PCA-locality model of the whole set."""
        return pf.PCALocalityDenoiser(
            pf.TrainingSet(self.images),
            mask_threshold=0.05,
            moments=self.data.moments,
            backend=self.case.backend,
        )

    def generate(self) -> Tensor:
        """Ten DDIM steps from fixed noise: [B, C, H, W]."""
        noise = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(1))
        steps = 2 if self.interpreted else len(DDIM_STEPS)
        noise = noise.to(self.images.device)
        return pf.sample(self.denoiser, x_T=noise, steps=steps, progress=False).images

    def check(self) -> dict[str, Any]:
        """Compare with the reference in float64 on some of the images.

        Raises:
            ArithmeticError: The result is wrong by more than its budget.
        """
        if self.case.op == "ddim":
            if not torch.isfinite(self.generate()).all():
                raise ArithmeticError("a generated image is not finite")
            return {"finite": True}
        if self.case.op == "covariance":
            return self._check_exact()
        images = self.images[: self.plan.check_images]
        found = self.answers(images, self.case.backend)
        exact = self.answers(images, "reference", torch.float64)
        plain = self.answers(images, "reference")
        error = float((found.double() - exact).abs().max())
        budget = 2 * float((plain.double() - exact).abs().max()) + _PIXEL_ERROR
        # Turned round, so that NaN fails.
        if not error <= budget:
            raise ArithmeticError(f"wrong by {error:.3g}, expected at most {budget:.3g}")
        return {"images": len(images), "error": error, "budget": budget}

    def _check_exact(self) -> dict[str, Any]:
        images = self.images[: self.plan.covariance_images]
        for found, exact in zip(
            self.answers(images, self.case.backend),
            self.answers(images, "reference"),
            strict=True,
        ):
            if not torch.equal(found.triu() if found.ndim == 2 else found, exact):
                raise ArithmeticError("the sums are not exact")
        return {"images": len(images), "error": 0, "budget": 0}

    def terms(self) -> int | None:
        """Multiply-adds of the case; None where nobody counts them."""
        case, pairs = self.case, len(self.images) * self.batch
        if case.op == "masked_posterior":
            mask = self.weights.dense(torch.bool, self.images.device)
            return baselines.core_fringe_terms(mask, tuple(self.images.shape[1:])) * pairs
        if case.op == "covariance":
            return len(self.images) * self.values * (self.values + 1) // 2
        if case.op == "global_posterior":
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
        backend = "eager" if self.interpreted else "inductor"
        note = f"torch.compile of the published algorithm on {count} images, scaled"
        return torch.compile(function, backend=backend), count / len(self.images), note

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
