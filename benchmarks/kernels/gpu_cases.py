"""What the GPU suite runs: cases and sizes, one of each kind first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyflocality.ops.operation import OPERATIONS

from .registry import DDIM_STEPS, MIDDLE, Case

# Operations that a case has no noise level for.
_WITHOUT_LEVEL = ("covariance", "ddim")


@dataclass(frozen=True)
class GpuPlan:
    """Sizes of a run.

    Attributes:
        sets: N and (C, H, W) of each set.
        eager_images: Images that eager yardsticks run on.
        check_images: Images that results are checked on.
        covariance_images: Images that exact sums are checked on.
        interpreted: Whether kernels run in Triton's interpreter, on two noisy images at most.
    """

    sets: dict[str, tuple[int, tuple[int, int, int]]]
    eager_images: int
    check_images: int
    covariance_images: int
    interpreted: bool = False

    def sized(self, case: Case) -> Case:
        """A case with the sizes of this plan."""
        count = self.covariance_images if case.op == "covariance" else self.check_images
        case = replace(case, eager_images=self.eager_images, check_images=count)
        if not self.interpreted:
            return case
        # The images are smaller than some windows.
        side = min(self.sets[case.data or ""][1][1:])
        window = case.window and min(case.window, side - 1 + side % 2)
        return replace(case, batch=min(case.batch, 2), window=window)


def _sets(cifar: Any, large: Any, mnist: Any) -> dict[str, tuple[int, tuple[int, int, int]]]:
    return {"cifar": cifar, "64x64": large, "mnist": mnist}


FULL = GpuPlan(
    _sets((50_000, (3, 32, 32)), (15_000, (3, 64, 64)), (60_000, (1, 28, 28))), 512, 131, 5_000
)
QUICK = GpuPlan(
    _sets((4_096, (3, 32, 32)), (1_024, (3, 64, 64)), (4_096, (1, 28, 28))), 256, 67, 1_000
)
DRY = GpuPlan(_sets((19, (3, 6, 5)), (11, (1, 7, 8)), (17, (1, 5, 5))), 8, 19, 19, interpreted=True)


def gpu_cases(few: bool = False) -> list[Case]:
    """All cases, one of each kind first; some of each kind where `few`."""
    masked, uniform, batch_64 = _masked(few)
    whole = [
        _case("global_posterior", data, ("copy", *marks), batch=batch, seconds=2)
        for data, batch, marks in (
            ("cifar", 8, ("eager", "compiled", "keops")),
            ("cifar", 1, ("eager",)),
            ("cifar", 16, ("eager",)),
            ("cifar", 64, ("eager",)),
            ("64x64", 8, ("eager",)),
        )[:: 2 if few else 1]
    ]
    sums = [_case("covariance", data, ("full_matmul",), seconds=4) for data in ("cifar", "64x64")]
    patches = _patches()[:: 3 if few else 1]
    windows = [
        _cuda("window_posterior", ("copy", "eager", *(("compiled",) if k == 7 else ())), window=k)
        for k in (7, 3, 15)
    ]
    patch_set = _cuda("patch_set", ("local_score",), window=7, seconds=2)
    ddim = _case("ddim", "cifar", seconds=8)
    early = 2 * len(uniform) // 3
    by_importance = [
        *masked,
        ddim,
        *_coarser([*masked, ddim]),
        *(sums[0], whole[0], patches[0], windows[0]),
        *_derivatives(),
        *_values(),
        *_digits(),
        *uniform[:early],
        _case("masked_posterior", "cifar", ("matmul",), softness=0.5),
        *patches[1:4],
        *windows[1:],
        patch_set,
        *whole[1:],
        *sums[1:],
        *batch_64,
        *_coarser(patches[:2]),
        *patches[4:],
        *uniform[early:],
    ]
    by_importance += _others({(case.op, case.backend) for case in by_importance})
    # A run that is cut off has seen every kernel.
    first = {case.kind: case for case in reversed(by_importance)}
    return sorted(by_importance, key=lambda case: first[case.kind] is not case)


def _case(
    op: str, data: str, marks: Sequence[str] = (), *, seconds: float = 3, **more: Any
) -> Case:
    """A case of the Triton kernels, unless another backend is named, in the middle of the noise."""
    timestep = None if op in _WITHOUT_LEVEL else MIDDLE
    options = {"backend": "triton", "timestep": timestep} | more
    return Case("", op, data=data, yardsticks=tuple(marks), seconds=seconds, **options)


def _cuda(op: str, marks: Sequence[str], data: str = "cifar", **more: Any) -> Case:
    return _case(op, data, marks, backend="cuda", **more)


def _coarser(cases: Sequence[Case]) -> list[Case]:
    """The same with precision="auto", which takes half of the arithmetic at much noise."""
    return [replace(case, precision="auto", yardsticks=case.yardsticks[:1]) for case in cases]


def _masked(few: bool) -> tuple[list[Case], list[Case], list[Case]]:
    """PCA masks of the DDIM steps at B = 8, uniform densities, and the steps at B = 64."""
    steps, op = DDIM_STEPS[::4] if few else DDIM_STEPS, "masked_posterior"
    by_step = [
        _case(op, "cifar", ("matmul", *(("eager", "compiled") if t == 500 else ())), timestep=t)
        for t in steps
    ]
    uniform = [
        _case(op, data, ("matmul",), batch=batch, density=density)
        for data, batch in (("cifar", 8), ("64x64", 8), ("cifar", 64))
        for density in ((0.33,) if few else (1.0, 0.33, 0.15))
    ]
    batch_64 = [
        _case(op, "cifar", ("matmul",), batch=64, timestep=t)
        for t in (steps[1:2] if few else steps)
    ]
    return by_step, uniform, batch_64


def _patches() -> list[Case]:
    """The equivariant posterior: noise levels, borders, windows."""
    return [
        _case(
            *("equivariant_posterior", "cifar", ("matmul", *eager)),
            timestep=t,
            window=k,
            boundary=border,
            seconds=5,
        )
        for t, k, border, eager in (
            (400, 7, "circular", ("eager",)),
            (900, 7, "circular", ()),
            (0, 7, "circular", ()),
            (400, 7, "broken", ()),
            (400, 3, "circular", ()),
            (400, 5, "circular", ()),
            (400, 15, "circular", ()),
        )
    ]


def _derivatives() -> list[Case]:
    """Tangents, beside the same without them; and transposed products."""
    plain = ("without_tangents",)
    return [
        *(
            _case(f"{op}_posterior_jvp", "cifar", plain, tangents=k)
            for op in ("masked", "global")
            for k in (8, 1)
        ),
        _cuda("window_posterior_jvp", plain, window=7, tangents=8),
        _cuda("window_posterior_vjp", plain, window=7, tangents=1),
    ]


def _values() -> list[Case]:
    """A value image beside each training image, beside the same without it."""
    return [
        _case(f"{op}_posterior", "cifar", ("without_values",), value_images=1)
        for op in ("masked", "global")
    ]


def _digits() -> list[Case]:
    """MNIST, with the published threshold of its masks."""
    return [
        *(_case("masked_posterior", "mnist", ("matmul",), timestep=t) for t in (500, 100)),
        _case("masked_posterior_jvp", "mnist", ("without_tangents",), tangents=3),
        _case("global_posterior", "mnist", ("copy", "eager"), seconds=2),
        _case("equivariant_posterior", "mnist", ("matmul",), window=5),
        _cuda("window_posterior", ("copy",), "mnist", window=5, seconds=2),
    ]


def _others(known: set[tuple[str, str]]) -> list[Case]:
    """Declared kernels that have no case of their own."""
    return [
        _case(
            *(operation.variant_name(kind), "cifar"),
            ("copy",) if kind == "scan" else ("without_tangents",),
            backend=backend,
            window=7 if "window" in operation.parameters else None,
            tangents=0 if kind == "scan" else 8,
        )
        for operation in OPERATIONS.values()
        for kind, variant in operation.variants.items()
        for backend in variant.backends
        if backend in ("triton", "cuda") and (operation.variant_name(kind), backend) not in known
    ]
