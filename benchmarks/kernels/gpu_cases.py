"""What the GPU suite runs: cases and sizes, one of each kind first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .registry import DDIM_STEPS


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
        tangents: Tangents K of a derivative.
        precision: "exact", or "auto" to permit coarser arithmetic.
        yardsticks: Names of what runs in turns with it.
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
    tangents: int | None = None
    precision: str = "exact"
    yardsticks: tuple[str, ...] = ()
    seconds: float = 6.0

    @property
    def kind(self) -> tuple[str, str]:
        """Operation and backend: what one kernel serves."""
        return self.op, self.backend

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
        parts += [f"K{self.tangents}"] if self.tangents else []
        parts += [self.precision] if self.precision != "exact" else []
        return f"{self.op}/{self.backend}/{'-'.join(parts)}"


@dataclass(frozen=True)
class GpuPlan:
    """Sizes of a run.

    Attributes:
        small: N and (C, H, W) of the set named "cifar".
        large: The same of the set named "64x64".
        digits: The same of the set named "mnist".
        eager_images: Images that eager yardsticks run on.
        check_images: Images that results are checked on.
        covariance_images: Images that exact sums are checked on.
    """

    small: tuple[int, tuple[int, int, int]]
    large: tuple[int, tuple[int, int, int]]
    digits: tuple[int, tuple[int, int, int]]
    eager_images: int
    check_images: int
    covariance_images: int


FULL = GpuPlan((50_000, (3, 32, 32)), (15_000, (3, 64, 64)), (60_000, (1, 28, 28)), 512, 131, 5_000)
QUICK = GpuPlan((4_096, (3, 32, 32)), (1_024, (3, 64, 64)), (4_096, (1, 28, 28)), 256, 67, 1_000)
DRY = GpuPlan((19, (3, 6, 5)), (11, (1, 7, 8)), (17, (1, 5, 5)), 8, 19, 19)


def gpu_cases(few: bool = False) -> list[GpuCase]:
    """All cases, one of each kind first; some of each kind where `few`."""
    masked, uniform, batch_64 = _masked(few)
    whole = [
        _triton("global_posterior", data, batch, marks=("copy", *marks), seconds=2)
        for data, batch, marks in (
            ("cifar", 8, ("eager", "compiled", "keops")),
            ("cifar", 1, ("eager",)),
            ("cifar", 16, ("eager",)),
            ("cifar", 64, ("eager",)),
            ("64x64", 8, ("eager",)),
        )[:: 2 if few else 1]
    ]
    sums = [
        _triton("covariance", data, marks=("full_matmul",), seconds=4)
        for data in ("cifar", "64x64")
    ]
    patches = _patches()[:: 3 if few else 1]
    windows = [
        GpuCase(
            *("window_posterior", "cuda", "cifar"),
            window=k,
            yardsticks=("copy", "eager", "compiled") if k == 7 else ("copy", "eager"),
            seconds=3,
        )
        for k in (7, 3, 15)
    ]
    patch_set = GpuCase(
        "patch_set", "cuda", "cifar", window=7, yardsticks=("local_score",), seconds=2
    )
    ddim = _triton("ddim", "cifar", seconds=8)
    by_importance = [
        *masked,
        ddim,
        *_coarser([*masked, ddim]),
        *sums[:1],
        *whole[:1],
        *patches[:1],
        *windows[:1],
        *_derivatives(),
        *_digits(),
        *uniform[: 2 * len(uniform) // 3],
        *patches[1:4],
        *windows[1:],
        patch_set,
        *whole[1:],
        *sums[1:],
        *batch_64,
        *_coarser(patches[:2]),
        *patches[4:],
        *uniform[2 * len(uniform) // 3 :],
    ]
    # A run that is cut off has seen every kernel.
    first = {case.kind: case for case in reversed(by_importance)}
    return sorted(by_importance, key=lambda case: first[case.kind] is not case)


def _triton(
    op: str,
    data: str,
    batch: int = 8,
    timestep: int = 400,
    *,
    marks: tuple[str, ...] = (),
    seconds: float = 3,
    **more: Any,
) -> GpuCase:
    return GpuCase(op, "triton", data, batch, timestep, yardsticks=marks, seconds=seconds, **more)


def _coarser(cases: list[GpuCase]) -> list[GpuCase]:
    """The same with precision="auto", which takes half of the arithmetic at much noise."""
    return [replace(case, precision="auto", yardsticks=case.yardsticks[:1]) for case in cases]


def _masked(few: bool) -> tuple[list[GpuCase], list[GpuCase], list[GpuCase]]:
    """PCA masks of the DDIM steps at B = 8, uniform densities, and the steps at B = 64."""
    steps = DDIM_STEPS[::4] if few else DDIM_STEPS
    eager = ("matmul", "eager", "compiled")
    by_step = [
        _triton("masked_posterior", "cifar", 8, t, marks=eager if t == 500 else ("matmul",))
        for t in steps
    ]
    uniform = [
        _triton("masked_posterior", data, batch, density=d, marks=("matmul",))
        for data, batch in (("cifar", 8), ("64x64", 8), ("cifar", 64))
        for d in ((0.33,) if few else (1.0, 0.33, 0.15))
    ]
    batch_64 = [
        _triton("masked_posterior", "cifar", 64, t, marks=("matmul",))
        for t in (steps[1:2] if few else steps)
    ]
    return by_step, uniform, batch_64


def _patches() -> list[GpuCase]:
    """The equivariant posterior: noise levels, borders, windows."""
    return [
        _triton(
            "equivariant_posterior",
            "cifar",
            8,
            t,
            window=k,
            boundary=border,
            marks=marks,
            seconds=5,
        )
        for t, k, border, marks in (
            (400, 7, "circular", ("matmul", "eager")),
            (900, 7, "circular", ("matmul",)),
            (0, 7, "circular", ("matmul",)),
            (400, 7, "broken", ("matmul",)),
            (400, 3, "circular", ("matmul",)),
            (400, 5, "circular", ("matmul",)),
            (400, 15, "circular", ("matmul",)),
        )
    ]


def _derivatives() -> list[GpuCase]:
    """Tangents, beside the same without them; and transposed products."""
    plain = ("without_tangents",)
    return [
        *(_triton("masked_posterior_jvp", "cifar", tangents=k, marks=plain) for k in (8, 1)),
        *(_triton("global_posterior_jvp", "cifar", tangents=k, marks=plain) for k in (8, 1)),
        *(
            GpuCase(op, "cuda", "cifar", window=7, tangents=k, yardsticks=plain, seconds=3)
            for op, k in (("window_posterior_jvp", 8), ("window_posterior_vjp", 1))
        ),
    ]


def _digits() -> list[GpuCase]:
    """MNIST, with the published threshold of its masks."""
    return [
        *(_triton("masked_posterior", "mnist", 8, t, marks=("matmul",)) for t in (500, 100)),
        _triton("masked_posterior_jvp", "mnist", tangents=3, marks=("without_tangents",)),
        _triton("global_posterior", "mnist", marks=("copy", "eager"), seconds=2),
        _triton(
            *("equivariant_posterior", "mnist"),
            *(8, 400),
            window=5,
            boundary="circular",
            marks=("matmul",),
        ),
        GpuCase("window_posterior", "cuda", "mnist", window=5, yardsticks=("copy",), seconds=2),
    ]
