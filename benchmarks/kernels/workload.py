"""What every case has: what runs, what it must equal, what it costs, what it runs beside."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyflocality import ops
from pyflocality.ops.costs import Size, Work
from pyflocality.ops.operation import OPERATIONS, Kind
from pyflocality.storage.reader import training_values

from ..command import Record
from . import baselines, libraries
from .registry import Case
from .sets import BenchmarkSet

# From noisy images, training values, what the operation takes, sigma and alpha.
Algorithm = Callable[..., Tensor]

# Rounding of a float32 number, relative.
EPS = 1.2e-7
GPU_BACKENDS = ("triton", "cuda")
# Rounding that a kernel of a GPU may add, which multiplies halves of numbers, in pixel units.
_GPU_ROUNDING = 1e-3
# Rows of matmul yardsticks on a CPU, and multiply-adds of one on a GPU at most; their time is
# scaled to the case's.
_MATMUL_ROWS, _MATMUL_TERMS = 2048, 2**40


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


def errors_of(result: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The largest difference of each answer, relative where exact values are larger than 1."""
    errors = []
    for one, other in zip(result, exact, strict=True):
        size = max(1.0, float(other.abs().max())) if other.is_floating_point() else 1.0
        errors.append(float((one - other).abs().max()) / size)
    return errors


class Workload(ABC):
    """A case on a set of images.

    Args:
        case: What to run.
        data: The set; a case takes its first N images.
        interpreted: Whether this is a dry run, which spends no time on compilers.

    Attributes:
        images: The case's images, uint8 [N, C, H, W].
        x: Noisy images [B, C, H, W]; None where there are none.
        directions: Tangents or cotangents [K, B, C, H, W]; None without derivatives.
        tolerance: Errors of the reference in float32 that a result may have.
    """

    tolerance = 2
    x: Tensor | None = None
    directions: Tensor | None = None

    def __init__(self, case: Case, data: BenchmarkSet, interpreted: bool = False) -> None:
        if (case.images or 0) > len(data.images):
            raise ValueError(f"{case.id}: the set has only {len(data.images)} images")
        self.case, self.data, self.interpreted = case, data, interpreted
        # A tensor of its own: what kernels keep beside a set goes with the case, so that every
        # case has a first call.
        self.images = data.images[: case.images]
        channels, height, width = self.images.shape[1:]
        self.shape, self.values = (channels, height, width), channels * height * width

    @abstractmethod
    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """The operation over some images, on a backend, computed in a dtype."""

    @abstractmethod
    def rounding(self, images: Tensor) -> float:
        """What float32 may cost beyond what it costs the reference; 0 must be exact."""

    def size(self) -> Size:
        """What the operation runs on."""
        case = self.case
        return Size(
            len(self.images),
            self.shape,
            case.batch,
            case.tangents,
            case.window or 1,
            value_images=case.value_images,
            with_image=case.value_images > 0,
        )

    def work(self) -> Work | None:
        """Operations and bytes of one run, as declared; None for what is no single operation."""
        operation = OPERATIONS.get(stem_of(self.case.op))
        return None if operation is None else operation.work(kind_of(self.case.op), self.size())

    @property
    def ran(self) -> str:
        """The operation that must have run."""
        return self.case.op

    def run(self) -> object:
        """One run, as it is timed."""
        return self.answers(self.images, self.case.backend)

    def of_rows(self, rows: slice) -> Workload:
        """The same for some of the noisy images."""
        twin = copy.copy(self)
        twin.x = None if self.x is None else self.x[rows]
        twin.directions = None if self.directions is None else self.directions[:, rows]
        return twin

    def terms(self) -> int | None:
        """Multiply-adds of one run where matmuls would do it; None where nobody counts them."""
        return None

    def facts(self) -> Record:
        """What else a reader of the timing wants to know."""
        return {}

    def yardstick(self, name: str) -> Yardstick:
        """The yardstick of a name: the method `_beside_<name>`."""
        result: Yardstick = getattr(self, f"_beside_{name}")()
        return result

    def _beside_read_bytes(self) -> Yardstick:
        return Yardstick(
            lambda: baselines.read_bytes(self.images), 1.0, "one sequential read of the images"
        )

    def _beside_copy(self) -> Yardstick:
        target = torch.empty_like(self.images)
        # A copy reads and writes what a scan only reads.
        note = "reading the images at the rate of a copy"
        return Yardstick(lambda: target.copy_(self.images), 2.0, note)

    def _beside_matmul(self) -> Yardstick:
        return self._matmul(self.terms() or 1, "the case")

    def _matmul(self, terms: int, what: str) -> Yardstick:
        """[rows, D] x [D, columns], about as many multiply-adds an image as there are terms."""
        device, count, inner = self.images.device, len(self.images), max(16, self.values)
        on_gpu = device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        rows = count if on_gpu else min(_MATMUL_ROWS, count)
        columns = max(1, min(round(terms / (count * inner)), _MATMUL_TERMS // (rows * inner)))
        left = torch.rand(rows, inner, device=device, dtype=dtype)
        right = torch.rand(inner, columns, device=device, dtype=dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        note = (
            f"{'bf16' if on_gpu else 'float32'} matmul [{rows}, {inner}] x [{inner}, {columns}], "
            f"scaled to the multiply-adds of {what}"
        )
        share = rows * inner * columns / terms
        return Yardstick(lambda: torch.matmul(left, right, out=out), share, note)


class PosteriorWorkload(Workload):
    """Posterior means at a noise level, or their derivatives along K directions.

    Attributes:
        eager: The published algorithms in plain torch and what they are, by the names of their
            yardsticks; those through torch.compile are called "compiled" in place of "eager".
        compiled_rows: Noisy images at a time for torch.compile; None for all.
    """

    x: Tensor
    eager: ClassVar[dict[str, tuple[Algorithm, str]]] = {}
    compiled_rows: int | None = None

    def __init__(self, case: Case, data: BenchmarkSet, interpreted: bool = False) -> None:
        super().__init__(case, data, interpreted)
        if case.timestep is None:
            raise ValueError(f"{case.id}: `timestep` must be given")
        self.timestep = case.timestep
        self.alpha, self.sigma = data.level(case.timestep)
        self.x = data.queries(case.timestep, case.batch)
        self.directions = data.directions(case.tangents, case.batch) if case.tangents else None

    def arguments(self) -> tuple[Any, ...]:
        """What the operation takes between the images and the noise level."""
        return ()

    @cached_property
    def value_images(self) -> Tensor:
        """Value images of the training images, float32 [N, R, C, H, W]."""
        device = self.images.device
        generator = torch.Generator(device).manual_seed(0)
        shape = (len(self.images), self.case.value_images, *self.shape)
        return 0.5 * torch.randn(shape, generator=generator, device=device)

    def neighbours(self) -> int:
        """Inputs of the largest neighbourhood."""
        return self.values

    def eager_arguments(self) -> tuple[Any, ...]:
        """What eager algorithms take there."""
        return self.arguments()

    def yardstick(self, name: str) -> Yardstick:
        """The yardstick of a name, eager ones by their table."""
        if name in self.eager:
            return self._eager(name)
        if name.startswith("compiled"):
            return self._compiled(name.replace("compiled", "eager"))
        return super().yardstick(name)

    def options(self) -> Record:
        """Further options of the operation."""
        exact = self.case.precision == "exact"
        return {} if exact else {"precision": self.case.precision}

    def answers(
        self, images: Tensor, backend: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Posterior means [B, C, H, W], then products [K, B, C, H, W] where there are some."""
        return self._answers(self.x.to(dtype), images, backend)

    def _answers(self, x: Tensor, images: Tensor, backend: str) -> tuple[Tensor, ...]:
        name, given = f"{self.case.op}_mean", [x]
        if self.directions is not None:
            name, given = self.case.op, [x, self.directions.to(x.dtype)]
        level, options = (self.sigma, self.alpha), {"backend": backend, **self.options()}
        if self.case.value_images:
            options |= {"values": self.value_images[: len(images)], "with_image": True}
        result = getattr(ops, name)(*given, images, *self.arguments(), *level, **options)
        return result if isinstance(result, tuple) else (result,)

    def plain(self, op: str | None = None) -> PosteriorWorkload:
        """The same without derivatives, or another operation that takes the same."""
        twin = copy.copy(self)
        twin.case = replace(self.case, op=op or stem_of(self.case.op), tangents=0)
        twin.directions = None
        return twin

    def rounding(self, images: Tensor) -> float:
        """Rounding of the logits: a squared distance of that many terms, over 2 sigma^2.

        For derivatives also four times what rounding the noisy images does: at small noise they
        change with the noisy image faster than float32 can tell noisy images apart, so that the
        error is that of the input and not of the sums.
        """
        if self.case.backend in GPU_BACKENDS:
            return _GPU_ROUNDING
        # Where an image fits, a term is about sigma^2; where none does, the data's own spread.
        logit = self.neighbours() * (1 + 1 / max(self.sigma / self.alpha, 0.1))
        if self.directions is None:
            return 4 * EPS * logit
        exact = self.answers(images, "reference", torch.float64)
        x = self.x.double()
        generator = torch.Generator().manual_seed(0)
        signs = torch.rand(x.shape, generator=generator, dtype=x.dtype).round() * 2 - 1
        # Noisy images are rounded in the units of the stored values, from 0 to 255.
        nudged = x + signs * EPS / 2 * (x.abs() + self.alpha)
        moved = self._answers(nudged, images, "reference")
        return 4 * EPS * logit + 4 * max(errors_of(moved, exact))

    def pairs(self) -> int:
        """Pairs of a noisy and a training image."""
        return len(self.images) * self.case.batch

    def terms(self) -> int | None:
        """Those of the scan, and as many for each direction."""
        scan = self.pair_terms()
        return None if scan is None else scan * self.pairs() * (1 + self.case.tangents)

    def pair_terms(self) -> int | None:
        """Multiply-adds for a pair of a noisy and a training image."""
        return None

    def _beside_without_values(self) -> Yardstick:
        twin = copy.copy(self)
        twin.case = replace(self.case, value_images=0)
        return Yardstick(twin.run, 1.0, "the same operation without value images")

    def _beside_no_tangents(self) -> Yardstick:
        return Yardstick(self.plain().run, 1.0, "the same operation without tangents")

    _beside_without_tangents = _beside_no_tangents

    def _eager(self, name: str) -> Yardstick:
        """An eager algorithm, timed on some of the images."""
        function, note = self.eager[name]
        arguments = self.eager_arguments()

        def answer(values: Tensor) -> Tensor:
            return function(self.x, values, *arguments, self.sigma, self.alpha)

        values = self._eager_values()
        return self._on_some(lambda: answer(values), answer, len(values), note)

    def _compiled(self, name: str) -> Yardstick:
        """The same through torch.compile, for exactly these sizes."""
        function, _ = self.eager[name]
        values, level = self._eager_values(), (self.sigma, self.alpha)
        arguments = (*self.eager_arguments(), *level)
        batches = self.x.split(self.compiled_rows or len(self.x))
        compiler = "eager" if self.interpreted else "inductor"
        compiled = libraries.compiled(function, batches[0], values, *arguments, compiler=compiler)

        def answer(values: Tensor) -> Tensor:
            return torch.cat([compiled(batch, values, *arguments) for batch in batches])

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
        whole = len(self.images)
        scaled = f"{note}; timed on {count} images and scaled to {whole}"
        return Yardstick(run, count / whole, scaled, answer)


def kind_of(op: str) -> Kind:
    """Which variant of an operation has a name."""
    return "jvp" if op.endswith("_jvp") else "vjp" if op.endswith("_vjp") else "scan"


def stem_of(op: str) -> str:
    """The operation that a variant is of."""
    return op.removesuffix("_jvp").removesuffix("_vjp")
