"""What one denoising step costs: operations, bytes and memory of every model.

The counts are those of the operations' declarations, for N images of D = C H W bytes and B noisy
images. They serve two ends: numbers for a person who plans a run, and,
divided by a rate measured on a machine, the time that a step takes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.rates import shortest
from pyflocality.moments.basis import basis_bytes
from pyflocality.ops.costs import Size, Work
from pyflocality.ops.operation import OPERATIONS, Operation
from pyflocality.posterior.problem import PosteriorOptions

# A measurement shall take about so many seconds, on a few images at least.
MEASURED_SECONDS = 0.4
_FEW = 64
_LARGEST_CALIBRATION_BYTES = 128 * 2**20
# Masks of larger images take long to prepare, matrices of larger ones much memory: masks are
# measured on smaller images, whose operations take as long each.
_LARGEST_MASKED, _LARGEST_MATRIX = 3072, 8192
# The least that can be measured may take so many operations.
_MOST_FLOPS = 2e9
WINDOW = 7
# The model of masks, and the one that is no operation: products with eigenvectors alone.
_MASKED, _WIENER = "pca-locality", "wiener"
# Mean over the ten steps of a sampling run on CIFAR-10, whose masks keep 0.33 of the inputs.
MASK_SHARE = 0.022


@dataclass(frozen=True)
class Setting:
    """A step that is planned: N images [C, H, W] stored as bytes, B noisy images.

    Attributes:
        images: N.
        shape: C, H and W.
        batch: B.
        memory_budget: Working memory, bytes or a string such as "2GB".
        mask_share: Share of the D inputs that the kernel for masks adds up for an output, in
            (0, 0.5]. Masks of neighbours are nearly alike and most of a sum is taken from one of
            them, so it is far less than the share of ones in the masks.
        window: Side of the window or of the patches of models that have them.
    """

    images: int
    shape: tuple[int, int, int]
    batch: int
    memory_budget: int | str | None = None
    mask_share: float = MASK_SHARE
    window: int = WINDOW

    @property
    def size(self) -> Size:
        """The same, as operations count it."""
        values = math.prod(self.shape)
        terms = self.mask_share * values**2
        return Size(self.images, self.shape, self.batch, window=self.window, terms=terms)

    @property
    def values(self) -> int:
        """Values D of an image."""
        return self.size.values


@dataclass(frozen=True)
class Cost(Work):
    """What one step of a model costs.

    Attributes:
        working_bytes: Memory beside the images: at most the budget for scans, and what the making
            of components takes where a model needs them.
    """

    working_bytes: int


def models() -> list[str]:
    """The models whose steps can be planned: those of an operation, the least work first."""
    planned = {one.model: one for one in OPERATIONS.values() if one.model is not None}
    nominal = Setting(1, (3, 32, 32), 1).size
    return [*sorted(planned, key=lambda model: planned[model].work("scan", nominal).flops), _WIENER]


def _operation(model: str) -> Operation:
    return next(one for one in OPERATIONS.values() if one.model == model)


def cost_of(model: str, setting: Setting) -> Cost:
    """What a step of a model costs."""
    values, batch = setting.values, setting.batch
    made = model in (_MASKED, _WIENER)
    components = basis_bytes(setting.images, values) if made else 0
    if model == _WIENER:
        rank = components_of(setting)
        # Two products with the components, which are cast to float32 for them.
        flops = 4.0 * batch * values * rank
        return Cost(flops, 12 * values * rank + 8 * batch * values, 0, components)
    work = _operation(model).work("scan", setting.size)
    working = memory_budget_bytes(setting.memory_budget) + components
    return Cost(float(work.flops), work.bytes, work.scans, working)


def components_of(setting: Setting) -> int:
    """Components of a set at most: one fewer than images, or as many as values."""
    return max(1, min(setting.images - 1, setting.values))


def seconds_of(model: str, setting: Setting, seconds: float = MEASURED_SECONDS) -> float | None:
    """Time of a step on this machine's processor, from a short measurement.

    None where a measurement would not be short, or needs much memory.

    The model runs on random images of the same shape, on two numbers of images; what it takes for
    more of them is taken to lie on the line through both. Of a batch that would take too long a
    part is measured. Images that come from a disk and not from memory may take longer.

    Args:
        model: The model.
        setting: The step.
        seconds: About how long a run of the measurement may take.
    """
    if model == _MASKED and setting.values > _LARGEST_MASKED:
        smaller = replace(setting, shape=_shrunk(setting.shape))
        measured = seconds_of(model, smaller, seconds)
        shares = [cost_of(model, one).flops for one in (setting, smaller)]
        return None if measured is None else measured * shares[0] / shares[1]
    if model == _WIENER:
        large = setting.values * components_of(setting) > _LARGEST_MATRIX**2
        return None if large else _timed(_step(model, setting, 0), 0)
    largest = _most_measured(setting, seconds)
    counts = [min(largest, _FEW), min(largest, 2)]
    shortest = [cost_of(model, replace(setting, images=n, batch=1)).flops for n in counts]
    if shortest[1] > _MOST_FLOPS:
        return None
    count = counts[shortest[0] > _MOST_FLOPS]
    one = _step(model, replace(setting, batch=1), largest)
    # Prepares what a model keeps, and wakes threads.
    one(count)
    batch = min(setting.batch, max(1, int(seconds / _timed(one, count))))
    step = _step(model, replace(setting, batch=batch), largest)
    taken = _timed(step, count)
    while taken < seconds and count < largest:
        count = min(largest, int(count * min(4.0, max(2.0, 1.2 * seconds / taken))))
        taken = _timed(step, count)
    half = max(1, count // 2)
    # Noise may put the line far from both measurements.
    shorter = _timed(step, half)
    slope = (taken - shorter) / max(count - half, 1)
    slope = min(max(slope, 0.7 * taken / count), taken / count)
    return (taken + slope * (setting.images - count)) * setting.batch / batch


def _shrunk(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """A shape of the same channels and likeness whose masks are made in a moment."""
    channels, height, width = shape
    factor = (_LARGEST_MASKED / math.prod(shape)) ** 0.5
    return channels, max(1, int(factor * height)), max(1, int(factor * width))


def _timed(step: Callable[[int], object], count: int) -> float:
    """The shortest of three runs."""
    return shortest(lambda: step(count))


def _most_measured(setting: Setting, seconds: float) -> int:
    """Images of a measurement at most: those of a glance are made in a moment, too."""
    most = int(_LARGEST_CALIBRATION_BYTES * min(1.0, seconds / MEASURED_SECONDS))
    return min(setting.images, max(2, most // setting.values))


def _step(model: str, setting: Setting, images: int) -> Callable[[int], object]:
    """One step of a model on the first of so many random images, by their number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, *setting.shape, generator=generator)
    if model == _WIENER:
        rank = components_of(setting)
        vectors = torch.rand(setting.values, rank, generator=generator, dtype=torch.float64)
        return lambda count: _filtered(x.flatten(1), vectors.to(x.dtype))
    size = (images, *setting.shape)
    stored = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    operation, options = _operation(model), PosteriorOptions(memory_budget=setting.memory_budget)
    # Random masks have nothing in common: each is summed as it stands.
    given = operation.example(setting.size, generator)
    return lambda count: operation.mean(x, stored[:count], given, 1.0, 1.0, None, options)


def _filtered(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (x @ vectors) @ vectors.T
