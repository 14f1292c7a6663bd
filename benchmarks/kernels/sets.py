"""What benchmarks run on: images, noise levels, queries and masks.

Without a data set at hand the images are synthetic, with what the speed of the kernels depends
on: 8 bits, and the covariance of small photographs. Power falls as 1 / f^3, steeper than the
1 / f^2 of large photographs, which small ones are averages of: neighbouring pixels then correlate
to 0.95 and PCA-locality masks are as dense as CIFAR-10's at every noise level, within a factor of
1.5 but for the last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality.kernels.cpu.masked_posterior import difference_tree
from pyflocality.masks import pca_locality_weights
from pyflocality.weights import QueryWeights

T = TypeVar("T")

# Published threshold of the masks for CIFAR-10.
MASK_THRESHOLD = 0.05
SCHEDULE = pf.DDPMSchedule()
SYNTHETIC = "synthetic, power 1/f^3"

_SEED = 0
_CHUNK = 1000
# Images of a set for a GPU that are made; the rest are shifted copies.
_DISTINCT = 10_000
_POWER_DECAY = 3
_CHANNEL_CORRELATION = 0.9
# Mean and standard deviation of the bytes.
_BRIGHTNESS, _CONTRAST = 120.0, 60.0


def natural_images(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Synthetic images with the covariance of small photographs: uint8 [count, C, H, W].

    Gaussian fields whose power falls as 1 / f^3 on a torus of twice the image's sides, of which
    the image is a quarter and hence not periodic; any two channels have a correlation of 0.9.
    The same images every time, and the first n do not depend on `count`.
    """
    channels, height, width = shape
    generator = torch.Generator().manual_seed(_SEED)
    rows = torch.fft.fftfreq(2 * height, 1 / (2 * height))[:, None]
    columns = torch.fft.rfftfreq(2 * width, 1 / (2 * width))
    squared = (rows / height) ** 2 + (columns / width) ** 2
    amplitude = torch.where(squared > 0, squared, torch.inf).pow(-_POWER_DECAY / 4)
    # The variance of a field: every frequency but 0 and Nyquist has a mirror image.
    mirrored = torch.full_like(columns, 2.0)
    mirrored[0] = mirrored[-1] = 1.0
    amplitude /= ((amplitude.square() * mirrored).sum() / (4 * height * width)).sqrt()
    mixing = torch.full((channels, channels), _CHANNEL_CORRELATION).fill_diagonal_(1.0)
    mixing = torch.linalg.cholesky(mixing)

    images = torch.empty(count, *shape, dtype=torch.uint8)
    for part in images.split(_CHUNK):
        # A whole chunk of noise whatever the rest needs.
        noise = torch.randn(_CHUNK, channels, 2 * height, 2 * width, generator=generator)
        spectrum = torch.fft.rfft2(noise[: len(part)]) * amplitude
        fields = torch.fft.irfft2(spectrum, s=(2 * height, 2 * width))[..., :height, :width]
        mixed = torch.einsum("dc,nchw->ndhw", mixing, fields)
        part.copy_((_BRIGHTNESS + _CONTRAST * mixed).round_().clamp_(0, 255))
    return images


class BenchmarkSet:
    """A training set with the noise levels, masks and queries that cases are made of.

    Args:
        images: Training images, uint8 [N, C, H, W]; all else is made on their device.
        name: What the images are.
        threshold: Threshold of the masks.
        backend: What computes the moments: plain torch where masks must not depend on the kernels
            under test.

    Attributes:
        preparation: Seconds that moments, eigenvectors, masks and schedules took to build, each
            once, by name; not part of any case's time.
    """

    def __init__(
        self,
        images: Tensor,
        name: str,
        threshold: float = MASK_THRESHOLD,
        backend: str | None = None,
    ) -> None:
        self.images, self.name = images.contiguous(), name
        self.threshold, self.backend = threshold, backend
        self.preparation: dict[str, float] = {}
        self._weights: dict[tuple[int, float], QueryWeights] = {}
        self._cropped: dict[int, BenchmarkSet] = {}

    @classmethod
    def build(
        cls,
        count: int,
        shape: tuple[int, int, int],
        source: str | os.PathLike[str] | None,
        name: str = "CIFAR-10",
    ) -> BenchmarkSet:
        """The first images, (C, H, W) out of the middle of a zip's or a folder's; or synthetic.

        Raises:
            ValueError: There are fewer or smaller images.
        """
        if source is None:
            return cls(natural_images(count, shape), SYNTHETIC)
        # Out of the memory map, so that no case waits for a disk.
        return cls(_first_of(source, count, shape).clone(), name)

    @classmethod
    def on_gpu(
        cls,
        device: torch.device,
        count: int,
        shape: tuple[int, int, int],
        source: str | os.PathLike[str] | None,
        threshold: float,
    ) -> BenchmarkSet:
        """The same on the device under test, with moments that do not depend on its kernels."""
        if source is not None:
            images = _first_of(source, count, shape)
            return cls(images.to(device, copy=True), "real", threshold, "reference")
        # The covariance matters, not that all images differ: shifted copies save minutes.
        base = natural_images(min(count, _DISTINCT), shape)
        copies = [base.roll(shift, -1) for shift in range(-(-count // len(base)))]
        return cls(torch.cat(copies)[:count].to(device), SYNTHETIC, threshold, "reference")

    def facts(self) -> dict[str, object]:
        """What the images are."""
        return {
            "name": self.name,
            "images": len(self.images),
            "shape": list(self.images.shape[1:]),
            "content_key": pf.TrainingSet(self.images).content_key(),
        }

    def cropped(self, side: int) -> BenchmarkSet:
        """The middle of all images, [N, C, side, side], with masks and queries of its own."""
        if side not in self._cropped:
            self._cropped[side] = BenchmarkSet(middle(self.images, side, side), self.name)
        return self._cropped[side]

    @cached_property
    def moments(self) -> pf.Moments:
        """Moments of all images, with their eigenvectors at hand."""
        data = pf.TrainingSet(self.images)
        moments = self._timed("moments", lambda: pf.Moments.from_data(data, backend=self.backend))
        self._timed("eigenvectors", moments.eigh)
        return moments

    def level(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) at a time of the linear schedule with T = 1000."""
        return SCHEDULE(timestep)

    def weights(self, timestep: int, softness: float = 0.0) -> QueryWeights:
        """Masks of the PCA-locality model, from the moments of all images; or soft weights."""
        key = timestep, softness
        if key not in self._weights:
            alpha, sigma = self.level(timestep)
            moments = self.moments
            name = f"masks t={timestep}" + (f" soft{softness:g}" if softness else "")
            self._weights[key] = self._timed(
                name,
                lambda: pca_locality_weights(moments, sigma, alpha, self.threshold, softness),
            )
        return self._weights[key]

    def square_masks(self, density: float) -> QueryWeights:
        """Masks of square windows, all channels, of about this density on average."""
        channels, height, width = self.images.shape[1:]

        def near(half: int) -> tuple[Tensor, Tensor]:
            places = (torch.arange(side, device=self.images.device) for side in (height, width))
            rows, columns = ((one[:, None] - one).abs() <= half for one in places)
            return rows, columns

        def distance(half: int) -> float:
            rows, columns = near(half)
            return abs(float(rows.double().mean() * columns.double().mean()) - density)

        rows, columns = near(min(range(max(height, width)), key=distance))
        mask = torch.kron(rows.float(), columns.float()).bool()
        return QueryWeights(mask.repeat(channels, channels))

    def tree(self, timestep: int) -> Any:
        """The native kernels' schedule of these masks, which they share."""
        weights, shape = self.weights(timestep), self.images.shape[1:]
        name = f"schedule t={timestep}"
        # Built once and kept: a second time says nothing about building it.
        if name in self.preparation:
            return difference_tree(weights, shape)
        return self._timed(name, lambda: difference_tree(weights, shape))

    def queries(self, timestep: int, batch: int) -> Tensor:
        """Noisy images, float32 [B, C, H, W].

        Clean ones are mirror images of the training set's: they look like it and are not in it.
        A step of a sampling run takes as long as one on such noisy images, within a few percent.
        """
        alpha, sigma = self.level(timestep)
        generator = torch.Generator().manual_seed(_SEED)
        chosen = torch.randperm(len(self.images), generator=generator)[:batch]
        images = self.images[chosen.to(self.images.device)]
        clean = pf.TrainingSet(images).values().flip(-1)
        noise = torch.randn(clean.shape, generator=generator)
        return alpha * clean + sigma * noise.to(clean.device)

    def directions(self, tangents: int, batch: int) -> Tensor:
        """Tangents, float32 [K, B, C, H, W]."""
        generator = torch.Generator().manual_seed(_SEED + 1)
        shape = (tangents, batch, *self.images.shape[1:])
        return torch.randn(shape, generator=generator).to(self.images.device)

    def _timed(self, name: str, build: Callable[[], T]) -> T:
        start = time.perf_counter()
        built = build()
        self.preparation[name] = time.perf_counter() - start
        return built


def middle(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of images, [N, C, height, width]."""
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[..., top : top + height, left : left + width]


def _first_of(source: str | os.PathLike[str], count: int, shape: tuple[int, int, int]) -> Tensor:
    """The middle of the first images of a set."""
    images = pf.TrainingSet.load(source).images
    result = middle(images, *shape[1:])[:count]
    if result.shape != (count, *shape):
        raise ValueError(
            f"{os.fspath(source)}: expected at least {count} images of {shape}, got "
            f"{tuple(result.shape)}"
        )
    return result
