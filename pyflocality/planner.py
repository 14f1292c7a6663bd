"""What one denoising step costs: operations, bytes and memory of every model.

The counts are those of the operations' declarations, for N images of D = C H W bytes and B noisy
images. They serve two ends: numbers for a person who plans a run, and,
divided by a rate measured on a machine, the time that a step takes there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.ops.costs import Size, Work
from pyflocality.ops.operation import OPERATIONS, Operation
from pyflocality.posterior.problem import PosteriorOptions

# A measurement shall take about so many seconds, on a few images at least.
_SECONDS = 0.4
_FEW = 64
_LARGEST_CALIBRATION_BYTES = 128 * 2**20
# Masks of larger images take long to prepare, matrices of larger ones much memory.
_LARGEST_MASKED, _LARGEST_MATRIX = 4096, 16384
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
    """

    images: int
    shape: tuple[int, int, int]
    batch: int
    memory_budget: int | str | None = None
    mask_share: float = MASK_SHARE

    @property
    def size(self) -> Size:
        """The same, as operations count it."""
        values = math.prod(self.shape)
        terms = self.mask_share * values**2
        return Size(self.images, self.shape, self.batch, window=WINDOW, terms=terms)

    @property
    def values(self) -> int:
        """Values D of an image."""
        return self.size.values


@dataclass(frozen=True)
class Cost(Work):
    """What one step of a model costs.

    Attributes:
        working_bytes: Memory beside the images: at most the budget for scans, and the
            covariance with its eigenvectors where a model needs them.
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
    values = setting.values
    # Sums, covariance and eigenvectors, in eight bytes a number.
    covariance = 3 * 8 * values**2 if model in (_MASKED, _WIENER) else 0
    if model == _WIENER:
        # Two products with the eigenvectors, in float32.
        flops = 4.0 * setting.batch * values**2
        return Cost(flops, 8 * values**2 + 8 * setting.batch * values, 0, covariance)
    work = _operation(model).work("scan", setting.size)
    working = memory_budget_bytes(setting.memory_budget) + covariance
    return Cost(float(work.flops), work.bytes, work.scans, working)


def seconds_of(model: str, setting: Setting) -> float | None:
    """Time of a step on this machine's processor, from a short measurement.

    None where a measurement would not be short, or needs much memory.

    The model runs on random images of the same shape, on two numbers of images; what it takes for
    more of them is taken to lie on the line through both. Of a batch that would take too long a
    part is measured. Images that come from a disk and not from memory may take longer.
    """
    if model == _MASKED and setting.values > _LARGEST_MASKED:
        return None
    if model == _WIENER:
        large = setting.values > _LARGEST_MATRIX
        return None if large else _timed(_step(model, setting), 0)
    largest = min(setting.images, max(2, _LARGEST_CALIBRATION_BYTES // setting.values))
    counts = [min(largest, _FEW), min(largest, 2)]
    shortest = [cost_of(model, replace(setting, images=n, batch=1)).flops for n in counts]
    if shortest[1] > _MOST_FLOPS:
        return None
    count = counts[shortest[0] > _MOST_FLOPS]
    one = _step(model, replace(setting, batch=1))
    # Prepares what a model keeps, and wakes threads.
    one(count)
    batch = min(setting.batch, max(1, int(_SECONDS / _timed(one, count))))
    step = _step(model, replace(setting, batch=batch))
    seconds = _timed(step, count)
    while seconds < _SECONDS and count < largest:
        count = min(largest, int(count * min(4.0, max(2.0, 1.2 * _SECONDS / seconds))))
        seconds = _timed(step, count)
    half = max(1, count // 2)
    # Noise may put the line far from both measurements.
    shorter = _timed(step, half)
    slope = (seconds - shorter) / max(count - half, 1)
    slope = min(max(slope, 0.7 * seconds / count), seconds / count)
    return (seconds + slope * (setting.images - count)) * setting.batch / batch


def _timed(step: Callable[[int], object], count: int) -> float:
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step(count)
        times.append(time.perf_counter() - start)
    return min(times)


def _step(model: str, setting: Setting) -> Callable[[int], object]:
    """One step of a model on the first images of a random set, by their number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, *setting.shape, generator=generator)
    if model == _WIENER:
        vectors = torch.rand(setting.values, setting.values, generator=generator)
        return lambda count: (x.flatten(1) @ vectors) @ vectors.T
    largest = min(setting.images, max(2, _LARGEST_CALIBRATION_BYTES // setting.values))
    size = (largest, *setting.shape)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    operation, options = _operation(model), PosteriorOptions(memory_budget=setting.memory_budget)
    # Random masks have nothing in common: each is summed as it stands.
    given = operation.example(setting.size, generator)
    return lambda count: operation.mean(x, images[:count], given, 1.0, 1.0, None, options)
