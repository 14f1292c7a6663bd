"""The cases: what is run, on how much, beside which yardsticks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pyflocality.backends.selection import OPERATIONS
from pyflocality.ops.operation import OPERATIONS as DECLARATIONS

# The ten steps of the published sampler: DDIM, T = 1000.
DDIM_STEPS = (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)
# A noise level in the middle, where the posterior is neither flat nor a single image.
MIDDLE = 400
THREADS = (1, 2)


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        suite: What the case is there to show; "" in the suite of a GPU.
        op: Operation, as in `pyflocality.backends.selection.OPERATIONS`, or "ddim" for a whole
            generation.
        images: Training images N; None for the whole set.
        batch: Noisy images B.
        timestep: Time of the noise level; None where there is none.
        window: Side of the window.
        side: Side of the middle that images are cut to; None takes them whole.
        tangents: Directions K of a derivative.
        value_images: Value images R of each training image, answered beside it.
        threads: torch threads; None leaves them as they are.
        yardsticks: Names of what runs in turns with it, see `workloads`.
        eager_images: Images that an eager yardstick is timed on; its time is scaled to N.
        check_images: Images that the result is checked on.
        repetitions: Rounds that are timed.
        backend: Backend to ask for, and to assert.
        data: Name of the set, where there are several.
        boundary: Border rule of the equivariant posterior.
        density: Share of inputs in a square mask around each output; None takes PCA masks.
        softness: That of PCA masks.
        precision: "exact", or "auto" to permit coarser arithmetic.
        seconds: Longest time to spend on timing, where the rounds are not counted.
    """

    suite: str
    op: str
    images: int | None = None
    batch: int = 8
    timestep: int | None = None
    window: int | None = None
    side: int | None = None
    tangents: int = 0
    value_images: int = 0
    threads: int | None = None
    yardsticks: tuple[str, ...] = ()
    eager_images: int = 512
    check_images: int = 131
    repetitions: int = 3
    backend: str = "cpu"
    data: str | None = None
    boundary: str = "circular"
    density: float | None = None
    softness: float = 0.0
    precision: Literal["exact", "auto"] = "exact"
    seconds: float = 6.0

    @property
    def kind(self) -> tuple[str, str]:
        """Operation and backend: what one kernel serves."""
        return self.op, self.backend

    @property
    def id(self) -> str:
        """A name that stays the same."""
        words = [f"N{self.images}" if self.data is None else self.data]
        for letter, value in (
            ("B", None if self.op == "covariance" else self.batch),
            ("t", self.timestep),
            ("k", self.window),
            ("S", self.side),
        ):
            words += [] if value is None else [f"{letter}{value}"]
        words += [self.boundary] if self.data and self.op == "equivariant_posterior" else []
        words += [f"density{self.density:g}"] if self.density else []
        words += [f"soft{self.softness:g}"] if self.softness else []
        words += [f"K{self.tangents}"] if self.tangents else []
        words += [f"R{self.value_images}"] if self.value_images else []
        words += [f"T{self.threads}"] if self.threads is not None else []
        words += [self.precision] if self.precision != "exact" else []
        return "/".join([*([self.suite] if self.suite else []), *self.kind, "-".join(words)])


@dataclass(frozen=True)
class Plan:
    """Sizes of a run on a CPU.

    Attributes:
        shape: Images (C, H, W).
        images: Images of the whole set.
        steps: Noise levels of the PCA-locality suite.
        windows: Sides of the local-score suite.
        image_counts: N of the scaling suite.
        batches: B of the scaling suite.
        sides: Sides that the scaling suite cuts images to, beside whole ones.
        scaling_images: N where the scaling suite varies something else.
        equivariant_images: N of the suite that searches all positions.
        tangent_images: N of the tangents suite.
        eager_images: Images that eager yardsticks run on.
        repetitions: Rounds of the long cases; short ones take three times as many.
        compilers: Whether yardsticks run that are compiled at the first call, which takes many
            seconds each.
    """

    shape: tuple[int, int, int]
    images: int
    steps: tuple[int, ...]
    windows: tuple[int, ...]
    image_counts: tuple[int, ...]
    batches: tuple[int, ...]
    sides: tuple[int, ...]
    scaling_images: int
    equivariant_images: int
    tangent_images: int
    eager_images: int
    repetitions: int
    compilers: bool

    def compiled(self, *names: str) -> tuple[str, ...]:
        """Yardsticks that are compiled at the first call, where the plan wants them."""
        return names if self.compilers else ()


FULL = Plan(
    shape=(3, 32, 32),
    images=50_000,
    steps=DDIM_STEPS,
    windows=(3, 5, 7, 9, 15),
    image_counts=(1_000, 2_000, 5_000, 10_000, 20_000, 50_000),
    batches=(1, 2, 4, 8, 16, 32, 64),
    sides=(8, 12, 16, 24),
    scaling_images=5_000,
    equivariant_images=200,
    tangent_images=5_000,
    eager_images=512,
    repetitions=3,
    compilers=True,
)
# Small enough for a look and for the tests; its numbers mean nothing.
QUICK = Plan(
    shape=(3, 12, 12),
    images=1_000,
    steps=(900, 400, 0),
    windows=(3, 7, 15),
    image_counts=(200, 1_000),
    batches=(1, 8),
    sides=(8,),
    scaling_images=500,
    equivariant_images=20,
    tangent_images=200,
    eager_images=64,
    repetitions=1,
    compilers=False,
)


def cases(plan: Plan) -> list[Case]:
    """All cases of a plan on a CPU, those of operations that are not there left out."""
    listed = [*_pca_locality(plan), *_local_score(plan), *_single(plan), *_optimal(plan)]
    listed += [*_tangents(plan), *_scaling(plan)]
    listed += _others(plan, {case.op for case in listed})
    return [case for case in listed if case.op in OPERATIONS]


def _case(plan: Plan, suite: str, op: str, images: int, **more: Any) -> Case:
    """A case in the middle of the noise, with the rounds of long ones."""
    options = {"timestep": MIDDLE, "repetitions": plan.repetitions} | more
    return Case(suite, op, images, **options)


def _pca_locality(plan: Plan) -> Iterable[Case]:
    # Each noise level would be compiled again: one of them tells.
    compiled = {MIDDLE: plan.compiled("compiled")}
    for timestep in plan.steps:
        marks = ("eager", "matmul_same_terms", "matmul_core_fringe", *compiled.get(timestep, ()))
        yield _case(
            *(plan, "pca_locality", "masked_posterior", plan.images),
            timestep=timestep,
            yardsticks=marks,
            eager_images=plan.eager_images,
        )


def _local_score(plan: Plan) -> Iterable[Case]:
    compiled = {7: plan.compiled("compiled_patches", "compiled_differences")}
    for window in plan.windows:
        yield _case(
            *(plan, "local_score", "window_posterior", plan.images),
            window=window,
            yardsticks=("eager_patches", "eager_differences", *compiled.get(window, ())),
            # Unfolded patches grow with the window's area.
            eager_images=max(8, min(plan.eager_images // 4, 8_192 // window**2)),
        )


def _single(plan: Plan) -> list[Case]:
    """Suites of one case."""
    return [
        _case(
            *(plan, "equivariant", "equivariant_posterior", plan.equivariant_images),
            window=7,
            yardsticks=("eager_convolution", *plan.compiled("compiled_convolution")),
            eager_images=max(4, plan.equivariant_images // 20),
            check_images=3,
        ),
        _case(
            *(plan, "patch_set", "patch_set", plan.tangent_images),
            window=7,
            yardsticks=("window_mean",),
            check_images=67,
        ),
        _case(
            *(plan, "covariance", "covariance", plan.images),
            timestep=None,
            yardsticks=("torch_cov",),
            check_images=plan.images,
        ),
    ]


def _optimal(plan: Plan) -> list[Case]:
    """The optimal denoiser, and the nearest image."""
    marks = ("eager", "attention", *plan.compiled("compiled", "keops"), "read_bytes")
    return [
        *(
            _case(
                *(plan, "optimal", "global_posterior", plan.images),
                batch=batch,
                yardsticks=marks,
                eager_images=4 * plan.eager_images,
                repetitions=3 * plan.repetitions,
            )
            for batch in (1, 8)
        ),
        _case(
            *(plan, "nearest", "nearest", plan.tangent_images),
            yardsticks=("faiss", "read_bytes"),
            repetitions=3 * plan.repetitions,
        ),
    ]


def _tangents(plan: Plan) -> Iterable[Case]:
    for op in ("masked_posterior_jvp", "window_posterior_jvp", "global_posterior_jvp"):
        for timestep in (plan.steps[0], MIDDLE, plan.steps[-1]):
            yield _case(
                *(plan, "tangents", op, plan.tangent_images),
                timestep=timestep,
                window=7 if op.startswith("window") else None,
                tangents=8,
                yardsticks=("no_tangents",),
                check_images=67,
            )


def _scaling(plan: Plan) -> list[Case]:
    most, some = THREADS[-1], plan.scaling_images
    points: list[tuple[int, int, int, int | None]]
    points = [(count, 8, most, None) for count in plan.image_counts]
    points += [(some, batch, most, None) for batch in plan.batches]
    points += [(some, 8, threads, None) for threads in THREADS]
    points += [(some, 8, most, side) for side in plan.sides]
    result = [
        _case(
            *(plan, "scaling", op, images),
            # There are no noisy images in a covariance.
            batch=8 if op == "covariance" else batch,
            timestep=None if op == "covariance" else MIDDLE,
            window=7 if op.startswith("window") else None,
            side=side,
            threads=threads,
            yardsticks=("matmul_same_terms" if op.startswith("masked") else "read_bytes",),
            check_images=max(19, 131 // batch),
        )
        for op in ("masked_posterior", "window_posterior", "global_posterior", "covariance")
        for images, batch, threads, side in points
    ]
    return list({case.id: case for case in result}.values())


def _others(plan: Plan, known: set[str]) -> Iterable[Case]:
    """Declared operations that have no case of their own; derivatives where a kernel has them."""
    for operation in DECLARATIONS.values():
        for kind, variant in operation.variants.items():
            op, served = operation.variant_name(kind), variant.backends
            backend = next((name for name in ("cpu", "reference") if name in served), None)
            if op in known or backend is None or (kind != "scan" and backend == "reference"):
                continue
            yield _case(
                *(plan, "others", op, plan.tangent_images),
                window=7 if "window" in operation.parameters else None,
                tangents=0 if kind == "scan" else 8,
                yardsticks=("read_bytes" if kind == "scan" else "no_tangents",),
                check_images=67,
                backend=backend,
            )
