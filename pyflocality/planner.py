"""What one denoising step costs: operations, bytes and memory of every model.

The counts follow the formulas, one multiplication or addition each, exponentials as one: N images
of D = C H W bytes, B noisy images. They serve two ends: numbers for a person who plans a run, and,
divided by a rate measured on a machine, the time that a step takes there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.weights import QueryWeights

# A measurement shall take about so many seconds, on a few images at least.
_SECONDS = 0.4
_FEW = 64
_LARGEST_CALIBRATION_BYTES = 128 * 2**20
# Masks of larger images take long to prepare, matrices of larger ones much memory.
_LARGEST_MASKED, _LARGEST_MATRIX = 4096, 16384
# The least that can be measured may take so many operations.
_MOST_FLOPS = 2e9
WINDOW = 7
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
    def values(self) -> int:
        """Values D of an image."""
        return math.prod(self.shape)

    @property
    def pixels(self) -> int:
        """Pixels of an image, H W."""
        return self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class Cost:
    """What one step of a model costs.

    Attributes:
        flops: Operations.
        bytes: Least memory traffic: the images as often as they are scanned, the noisy images
            and the result.
        scans: How often the images are read.
        working_bytes: Memory beside the images: at most the budget for scans, and the
            covariance with its eigenvectors where a model needs them.
    """

    flops: float
    bytes: float
    scans: int
    working_bytes: int


def _window_flops(setting: Setting) -> float:
    # Differences, squares and their sums over channels; a separable sum over the window; the
    # exponential; the weighted values.
    per_pair = 3 * setting.values + 6 * setting.pixels + 2 * setting.values
    return float(setting.images) * setting.batch * per_pair


def _covariance_bytes(setting: Setting) -> int:
    """Sums, covariance and eigenvectors, in eight bytes a number."""
    return 3 * 8 * setting.values**2


def _scan(
    flops: Callable[[Setting], float], scans: int = 1, *, moments: bool = False
) -> Callable[[Setting], Cost]:
    def cost(setting: Setting) -> Cost:
        working = memory_budget_bytes(setting.memory_budget)
        traffic = scans * setting.images * setting.values + 8 * setting.batch * setting.values
        covariance = _covariance_bytes(setting) if moments else 0
        return Cost(flops(setting), traffic, scans, working + covariance)

    return cost


def _wiener(setting: Setting) -> Cost:
    # Two products with the eigenvectors, in float32.
    flops = 4.0 * setting.batch * setting.values**2
    traffic = 8 * setting.values**2 + 8 * setting.batch * setting.values
    return Cost(flops, traffic, 0, _covariance_bytes(setting))


def _equivariant_flops(setting: Setting) -> float:
    height, width = setting.shape[1:]
    inside = max(height - WINDOW + 1, 1) * max(width - WINDOW + 1, 1)
    return _window_flops(setting) * inside


def _masked_flops(setting: Setting) -> float:
    # Squared differences, the sums over masks, exponential and answer.
    per_output = 3 + setting.mask_share * setting.values
    return float(setting.images) * setting.batch * setting.values * per_output


COSTS: dict[str, Callable[[Setting], Cost]] = {
    "optimal": _scan(lambda s: 5.0 * s.images * s.batch * s.values),
    "local": _scan(_window_flops),
    "patch-set": _scan(lambda s: 2 * _window_flops(s), scans=2),
    "pca-locality": _scan(_masked_flops, moments=True),
    "equivariant": _scan(_equivariant_flops),
    "wiener": _wiener,
}


def cost_of(model: str, setting: Setting) -> Cost:
    """What a step of a model costs."""
    return COSTS[model](setting)


def seconds_of(model: str, setting: Setting) -> float | None:
    """Time of a step on this machine's processor, from a short measurement.

    None where a measurement would not be short, or needs much memory.

    The model runs on random images of the same shape, on two numbers of images; what it takes for
    more of them is taken to lie on the line through both. Of a batch that would take too long a
    part is measured. Images that come from a disk and not from memory may take longer.
    """
    if model == "pca-locality" and setting.values > _LARGEST_MASKED:
        return None
    if model == "wiener":
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
    from pyflocality import ops

    generator = torch.Generator().manual_seed(0)
    largest = min(setting.images, max(2, _LARGEST_CALIBRATION_BYTES // setting.values))
    size = (largest, *setting.shape)
    x = torch.randn(setting.batch, *setting.shape, generator=generator)
    options: Mapping[str, object] = {"memory_budget": setting.memory_budget}
    if model == "wiener":
        vectors = torch.rand(setting.values, setting.values, generator=generator)
        return lambda count: (x.flatten(1) @ vectors) @ vectors.T
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    if model == "optimal":
        return lambda count: ops.global_posterior_mean(x, images[:count], 1.0, **options)
    if model == "pca-locality":
        # Random masks have nothing in common: each is summed as it stands.
        random = torch.rand(setting.values, setting.values, generator=generator)
        weights = QueryWeights(random < setting.mask_share)
        return lambda count: ops.masked_posterior_mean(x, images[:count], weights, 1.0, **options)
    run = {
        "local": ops.window_posterior_mean,
        "patch-set": ops.patch_set_mean,
        "equivariant": ops.equivariant_posterior_mean,
    }[model]
    window = min(WINDOW, *(side - (side + 1) % 2 for side in setting.shape[1:]))
    return lambda count: run(x, images[:count], window, 1.0, **options)
