"""A wavelet pyramid of a training set: global model of low-pass images, local ones of details."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyflocality._support.budget import images_per_chunk, memory_budget_bytes
from pyflocality._support.levels import Levels
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser
from pyflocality.storage.reader import Reader
from pyflocality.wavelets import analyse, synthesise

_BLOCK_BYTES = 64 * 2**20


class ConditionalPyramid(nn.Module):
    """The models of one pyramid of shifted images, with what makes an estimate of them.

    Args:
        low_pass: The denoiser of low-pass images.
        conditionals: The denoiser of each level's details with their condition, the finest first.
        wavelet: Name of the wavelet.
        bandwidth: Standard deviation of the condition, in units of the noise.
        channels: Channels of the images.
        shift: By how many pixels images are rolled down and to the right before.
    """

    def __init__(
        self,
        low_pass: Denoiser,
        conditionals: Sequence[Denoiser],
        wavelet: str,
        bandwidth: float,
        channels: int,
        shift: tuple[int, int],
    ) -> None:
        super().__init__()
        self.low_pass = low_pass
        self._conditionals = nn.ModuleList(conditionals)
        self._levels, self._channels = len(conditionals), channels
        self._wavelet, self._bandwidth, self._shift = wavelet, bandwidth, shift

    def denoise(self, x: Tensor, levels: Levels) -> Tensor:
        """The estimate."""
        low, noisy_details = self._bands(x)
        low = self._answer_of(self.low_pass, low, _at(levels, self._levels))
        for level in range(self._levels, 0, -1):
            stacked = self._conditional(level, noisy_details[level - 1], low, _at(levels, level))
            low = self._finer(low, self._details(stacked))
        return self._back(low).to(x.dtype)

    def jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """The estimate, and what it becomes along tangents [K, B, ..]."""
        count, levels = len(tangents), _divisible(levels)
        noisy_low, noisy_details = self._bands(x)
        low_along, details_along = self._bands(tangents.flatten(0, 1))
        low, low_along = self.low_pass._jvp(
            noisy_low, low_along.unflatten(0, (count, -1)), _at(levels, self._levels)
        )
        for level in range(self._levels, 0, -1):
            along = details_along[level - 1].unflatten(0, (count, -1))
            stacked, stacked_along = self._conditional_model(level)._jvp(
                self._stacked(noisy_details[level - 1], low, levels),
                self._stacked(along, low_along, levels),
                _at(levels, level),
            )
            low = self._finer(low, self._details(stacked))
            details = self._details(stacked_along.flatten(0, 1))
            low_along = self._finer(low_along.flatten(0, 1), details).unflatten(0, (count, -1))
        return self._back(low).to(x.dtype), self._back(low_along).to(x.dtype)

    def vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        """Products of cotangents [K, B, ..] with the Jacobian."""
        levels = _divisible(levels)
        noisy_low, noisy_details = self._bands(x)
        low = self._answer_of(self.low_pass, noisy_low, _at(levels, self._levels))
        inputs: list[Tensor] = []
        for level in range(self._levels, 0, -1):
            stacked = self._stacked(noisy_details[level - 1], low, levels)
            inputs.insert(0, stacked)
            # The finest details are the result; only what they depend on is needed.
            if level > 1:
                model = self._conditional_model(level)
                means = self._answer_of(model, stacked, _at(levels, level))
                low = self._finer(low, self._details(means))
        count, channels = len(cotangents), self._channels
        there = self._there(cotangents.flatten(0, 1))
        low_back, details_back = there.to(noisy_low.dtype), []
        # The inverse transform is the transpose but for the scale of 2 a level.
        for level, stacked in enumerate(inputs, 1):
            low_back, bands_back = (2.0 * part for part in analyse(low_back, self._wavelet))
            padded = torch.cat([bands_back, torch.zeros_like(low_back)], 1)
            back = self._conditional_model(level)._vjp(
                stacked, padded.unflatten(0, (count, -1)), _at(levels, level)
            )
            details_back.append(self._details(back.flatten(0, 1)))
            through = self._condition(back[:, :, 3 * channels :], levels)
            low_back = low_back + through.flatten(0, 1)
        low_back = self.low_pass._vjp(
            noisy_low, low_back.unflatten(0, (count, -1)), _at(levels, self._levels)
        ).flatten(0, 1)
        for bands_back in reversed(details_back):
            low_back = 0.5 * synthesise(low_back, bands_back, self._wavelet)
        return self._back(low_back).unflatten(0, (count, -1)).to(x.dtype)

    def conditional(self, level: int, details: Tensor, low: Tensor, levels: Levels) -> Tensor:
        """Means of the details of a level."""
        return self._details(self._conditional(level, details, low, levels))

    def _conditional(self, level: int, details: Tensor, low: Tensor, levels: Levels) -> Tensor:
        """The same, with means of the low-pass images behind them."""
        stacked = self._stacked(details, low, levels)
        return self._answer_of(self._conditional_model(level), stacked, levels)

    def _conditional_model(self, level: int) -> Denoiser:
        return cast(Denoiser, self._conditionals[level - 1])

    def _answer_of(self, denoiser: Denoiser, x: Tensor, levels: Levels) -> Tensor:
        # Values that nobody has looked at: a small bandwidth may have made them large.
        return denoiser(x, levels.sigma, levels.alpha)

    def _bands(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Low-pass images and details of every level, divided by 2^j, not in half precision."""
        low = self._there(images).to(torch.promote_types(images.dtype, torch.float32))
        details = []
        for _ in range(self._levels):
            low, bands = (0.5 * part for part in analyse(low, self._wavelet))
            details.append(bands)
        return low, details

    def _finer(self, low: Tensor, details: Tensor) -> Tensor:
        """The low-pass images of the next finer level, or the images."""
        return synthesise(2.0 * low, 2.0 * details, self._wavelet)

    def _stacked(self, details: Tensor, low: Tensor, levels: Levels) -> Tensor:
        """Noisy details [.., B, 3 C, h, w] with known low-pass images as further channels."""
        return torch.cat([details, self._condition(low, levels)], -3)

    def _condition(self, low: Tensor, levels: Levels) -> Tensor:
        alpha, _ = levels.columns(3, low.device)
        return (alpha / self._bandwidth).to(low.dtype) * low

    def _details(self, stacked: Tensor) -> Tensor:
        return stacked[:, : 3 * self._channels]

    def _there(self, images: Tensor) -> Tensor:
        """Images as the pyramid sees them."""
        return images if self._shift == (0, 0) else images.roll(self._shift, (-2, -1))

    def _back(self, images: Tensor) -> Tensor:
        """The inverse of that, which is its transpose."""
        down, right = self._shift
        return images if self._shift == (0, 0) else images.roll((-down, -right), (-2, -1))


def _at(levels: Levels, level: int) -> Levels:
    """The noise levels of bands that are divided by 2^level."""
    return levels._replace(sigma=levels.sigma / 2**level)


def _divisible(levels: Levels) -> Levels:
    """Positive noise levels that are positive at every level of a pyramid, too."""
    sigma, tiny = levels.sigma, torch.finfo(torch.float64).tiny
    least = sigma.clamp(min=tiny) if isinstance(sigma, Tensor) else max(sigma, tiny)
    return levels._replace(sigma=least)


def training_bands(
    data: TrainingSet,
    levels: int,
    wavelet: str,
    bandwidth: float,
    shift: tuple[int, int],
    pyramids: int,
    memory_budget: int | str | None,
) -> tuple[TrainingSet, list[TrainingSet]]:
    """The low-pass images of a shifted set, and for every level its details with their condition.

    All are divided by 2^j; the condition is the low-pass image of the level divided by the
    bandwidth, behind the details: [N, 4 C, h, w].
    """
    channels, height, width = data.image_shape
    count = len(data) * data.copies
    dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
    bands = range(1, levels + 1)
    shapes = [(count, 4 * channels, height >> level, width >> level) for level in bands]
    shapes.append((count, channels, height >> levels, width >> levels))
    tensors = _room(shapes, dtype, data.device, pyramids, memory_budget)

    start = 0
    # The bands of a block in double precision, with their temporaries.
    at_once = min(_BLOCK_BYTES, memory_budget_bytes(memory_budget))
    size = images_per_chunk(at_once, 8 * 8 * data.num_values, len(data))
    for low in Reader.of(data).values(size, torch.float64):
        rows = slice(start, start + len(low))
        low = low.roll(shift, (-2, -1))
        for stack in tensors[:-1]:
            low, details = (0.5 * part for part in analyse(low, wavelet))
            stack[rows, : 3 * channels] = details.to(dtype)
            stack[rows, 3 * channels :] = (low / bandwidth).to(dtype)
        tensors[-1][rows] = low.to(dtype)
        start += len(low)
    # Their values may leave [-1, 1] a little, unlike those of images.
    *stacks, low_pass = (TrainingSet._of_valid(t, f"bands of {data.name}") for t in tensors)
    return low_pass, stacks


def _room(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    pyramids: int,
    memory_budget: int | str | None,
) -> list[Tensor]:
    """Uninitialised tensors, in files where those of all pyramids take half the memory budget."""
    values = sum(int(np.prod(shape)) for shape in shapes)
    small = 2 * pyramids * values * dtype.itemsize <= memory_budget_bytes(memory_budget)
    if small or device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    kind: Any = np.float64 if dtype == torch.float64 else np.float32
    tensors = []
    for shape in shapes:
        # The file has no name, and goes with the last tensor that shows it.
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                # A full disk is an error here, and would be a crash when the map is written.
                os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * dtype.itemsize)
            tensors.append(torch.from_numpy(np.memmap(file, kind, "w+", shape=shape)))
    return tensors
