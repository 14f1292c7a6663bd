"""A global model of a small low-pass image, local conditional models of the details."""

from __future__ import annotations

import numbers
import os
import tempfile
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyflocality._support.budget import images_per_chunk, memory_budget_bytes
from pyflocality._support.checks import (
    LevelLike,
    check_batch,
    check_choice,
    check_count,
    check_levels,
    check_magnitude,
    check_positive,
    check_sequence,
    describe,
)
from pyflocality._support.levels import Levels
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, DenoiserOptions, check_set
from pyflocality.denoisers.local import LocalDenoiser
from pyflocality.denoisers.optimal import OptimalDenoiser
from pyflocality.denoisers.pca_locality import PCALocalityDenoiser
from pyflocality.denoisers.wiener import WienerDenoiser
from pyflocality.masks import check_threshold
from pyflocality.ops.window_posterior import check_window
from pyflocality.storage.reader import Reader
from pyflocality.wavelets import analyse, check_sides, filters, synthesise

_COARSE = ("optimal", "wiener", "pca_locality")
_BLOCK_BYTES = 64 * 2**20


class MultiscaleDenoiser(Denoiser):
    r"""Local conditional posterior means in an orthonormal wavelet pyramid.

    With :math:`x_j` the low-pass image and :math:`\bar x_j` the details of level j, the model is

    .. math:: p(x) = p(x_J) \prod_{j=J}^{1} p(\bar x_j \mid x_j) .

    The transform is orthonormal: a noisy image has in every band the noise of the image. A noisy
    image is denoised coarse to fine. A global model of the training set's low-pass images gives
    :math:`\hat x_J`. Then, for j = J .. 1, every pixel q of the details has a posterior over the
    training images i, from a window around it, in the noisy details :math:`\bar y_j` and in the
    low-pass image :math:`\hat x_j` that is known by then,

    .. math::
        p_{q,i} = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2} \sum_{d \in \Omega_q}
            (\bar y_j[d] - \alpha \bar v_{i,j}[d])^2 - \frac{\alpha^2}{2 b^2 \sigma^2}
            \sum_{d \in \Omega_q} (\hat x_j[d] - v_{i,j}[d])^2 \right),

    :math:`\hat{\bar x}_j[q] = \sum_i p_{q,i} \bar v_{i,j}[q]`, and details and low-pass image
    together are :math:`\hat x_{j-1}`. The posterior is the one of the window operation, whose
    channels are the details and the low-pass image divided by the bandwidth.

    **The condition.** The first sum is the exact likelihood of the noisy details. The condition on
    a *known* low-pass image has none over a finite set: no training image has just that one. It is
    a Gaussian kernel of standard deviation :math:`b \sigma / \alpha`: the low-pass image counts as
    if it were known up to b times the noise. b = 1 gives each value of both the same weight; with
    the *noisy* low-pass image it would be the exact posterior of all bands. As b falls to 0 the
    training images whose low-pass windows are nearest decide alone, as b grows the condition
    drops out; as the noise falls to 0 the kernel narrows with it, and for large noise details and
    condition both fade into the mean. Where details are sampled from noise under a clean
    condition, a smaller b keeps them to it from the start. It is an estimate of the conditional
    mean, consistent for large sets only; errors of :math:`\hat x_j` are passed on to the details.

    Bands are kept as float32 (float64 where the set is), all levels together 16 / 3 bytes for each
    value of the set; where they exceed half the memory budget they lie in temporary files (in the
    folder TMPDIR), mapped into memory. They hold the copies of an augmented set, too.

    Without levels it is the global model itself. A window that covers a band from each of its
    pixels gives the posterior over whole bands.

    Args:
        data: The training set, with sides divisible by 2^levels.
        levels: Number of levels J, 0 or more.
        window: Side of the windows in pixels of their band, odd; one for all levels, where a band
            that is covered by less takes that, or a sequence with the side of each level, the
            finest first. At most 2 max(H, W) - 1 of the band's sides.
        wavelet: "haar", or another orthogonal wavelet of PyWavelets.
        coarse: Global model of the low-pass images: "optimal", "wiener" or "pca_locality".
        mask_threshold: Threshold of the masks of coarse="pca_locality"; None takes its default.
        bandwidth: Standard deviation b of the condition, in units of the noise.
        backend: Backend of the operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype.
        memory_budget: Working memory, bytes or a string such as "2GB".

    Attributes:
        low_pass: The denoiser of low-pass images [C, H / 2^J, W / 2^J]. Like all bands here they
            are divided by 2^j, so that a constant image keeps its value: for "haar" a low-pass
            image is the image of block means.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the sides of the images are not divisible.
        ImportError: The wavelet needs PyWavelets.

    References:
        Kadkhodaie, Guth, Mallat and Simoncelli, Learning multi-scale local conditional
        probability models of images, 2023.
    """

    def __init__(
        self,
        data: TrainingSet,
        levels: int,
        window: int | Sequence[int],
        *,
        wavelet: str = "haar",
        coarse: str = "optimal",
        mask_threshold: float | None = None,
        bandwidth: float = 1.0,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(check_set(data).image_shape)
        self.levels = check_count(levels, "levels", minimum=0)
        check_sides(self.image_shape, self.levels, "data")
        self.window = _check_windows(window, self.levels, self.image_shape)
        filters(wavelet)
        self.wavelet = wavelet
        self.coarse = check_choice(coarse, "coarse", _COARSE)
        self.bandwidth = check_positive(bandwidth, "bandwidth")
        mask_threshold = _check_threshold(mask_threshold, coarse)
        options: DenoiserOptions = {
            "backend": backend, "dtype": dtype, "memory_budget": memory_budget
        }  # fmt: skip
        # Checks the options before the bands are made.
        OptimalDenoiser(data, **options)
        low, stacks = data, list[TrainingSet]()
        if self.levels > 0:
            low, stacks = _training_bands(data, self.levels, wavelet, self.bandwidth, memory_budget)
        self.low_pass = _low_pass(coarse, low, mask_threshold, options)
        self._conditionals = nn.ModuleList(
            LocalDenoiser(stack, side, **options)
            for stack, side in zip(stacks, self.window, strict=True)
        )

    @property
    def device(self) -> torch.device:
        """Device of the bands, where inputs must be."""
        return self.low_pass.device

    def conditional(
        self,
        level: int,
        details: Tensor,
        low: Tensor,
        sigma: LevelLike,
        alpha: float | Tensor = 1.0,
    ) -> Tensor:
        """Means of the details of one level, given noisy details and the known low-pass image.

        Args:
            level: The level j, 1 (finest) .. J.
            details: Noisy details alpha d + sigma noise, with d the clean details divided by
                2^j, in the order of `pyflocality.wavelets.Pyramid`, [B, 3 C, H / 2^j, W / 2^j].
            low: Known low-pass images, divided by 2^j, [B, C, H / 2^j, W / 2^j].
            sigma: Noise level of `details`, a number or a tensor [B]; or a `NoiseLevel` for both.
            alpha: Signal coefficient, a number or a tensor [B].

        Returns:
            Estimates of d, [B, 3 C, H / 2^j, W / 2^j].

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: An argument has the wrong shape, device or range.
        """
        shape = self.band_shape(level)
        details = check_batch(details, shape, self.device, "details")
        low = check_batch(low, (shape[0] // 3, *shape[1:]), self.device, "low")
        if len(low) != len(details) or low.dtype != details.dtype:
            raise ValueError(
                f"`low` must be as many images and of the dtype of `details`, {describe(details)}, "
                f"got {describe(low)}"
            )
        levels = check_levels(sigma, alpha, len(low))
        check_magnitude(details, levels.alpha, "details")
        return self._details(self._conditional(level, details, low, levels))

    def band_shape(self, level: int) -> tuple[int, int, int]:
        """Shape (3 C, H / 2^j, W / 2^j) of the details of a level j, 1 (finest) .. J.

        Raises:
            TypeError: `level` is not a whole number.
            ValueError: There is no such level.
        """
        level = check_count(level, "level", maximum=self.levels)
        channels, height, width = self.image_shape
        return 3 * channels, height >> level, width >> level

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        low, noisy_details = self._bands(x)
        low = self._answer_of(self.low_pass, low, _at(levels, self.levels))
        for level in range(self.levels, 0, -1):
            stacked = self._conditional(level, noisy_details[level - 1], low, _at(levels, level))
            low = self._finer(low, self._details(stacked))
        return low.to(x.dtype)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        count, levels = len(tangents), _divisible(levels)
        noisy_low, noisy_details = self._bands(x)
        low_along, details_along = self._bands(tangents.flatten(0, 1))
        low, low_along = self.low_pass._jvp(
            noisy_low, low_along.unflatten(0, (count, -1)), _at(levels, self.levels)
        )
        for level in range(self.levels, 0, -1):
            along = details_along[level - 1].unflatten(0, (count, -1))
            stacked, stacked_along = self._conditional_model(level)._jvp(
                self._stacked(noisy_details[level - 1], low, levels),
                self._stacked(along, low_along, levels),
                _at(levels, level),
            )
            low = self._finer(low, self._details(stacked))
            details = self._details(stacked_along.flatten(0, 1))
            low_along = self._finer(low_along.flatten(0, 1), details).unflatten(0, (count, -1))
        return low.to(x.dtype), low_along.to(x.dtype)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        levels = _divisible(levels)
        noisy_low, noisy_details = self._bands(x)
        low = self._answer_of(self.low_pass, noisy_low, _at(levels, self.levels))
        inputs: list[Tensor] = []
        for level in range(self.levels, 0, -1):
            stacked = self._stacked(noisy_details[level - 1], low, levels)
            inputs.insert(0, stacked)
            # The finest details are the result; only what they depend on is needed.
            if level > 1:
                model = self._conditional_model(level)
                means = self._answer_of(model, stacked, _at(levels, level))
                low = self._finer(low, self._details(means))
        count, channels = len(cotangents), self.image_shape[0]
        low_back, details_back = cotangents.flatten(0, 1).to(noisy_low.dtype), []
        # The inverse transform is the transpose but for the scale of 2 a level.
        for level, stacked in enumerate(inputs, 1):
            low_back, bands_back = (2.0 * part for part in analyse(low_back, self.wavelet))
            padded = torch.cat([bands_back, torch.zeros_like(low_back)], 1)
            back = self._conditional_model(level)._vjp(
                stacked, padded.unflatten(0, (count, -1)), _at(levels, level)
            )
            details_back.append(self._details(back.flatten(0, 1)))
            through = self._condition(back[:, :, 3 * channels :], levels)
            low_back = low_back + through.flatten(0, 1)
        low_back = self.low_pass._vjp(
            noisy_low, low_back.unflatten(0, (count, -1)), _at(levels, self.levels)
        ).flatten(0, 1)
        for bands_back in reversed(details_back):
            low_back = 0.5 * synthesise(low_back, bands_back, self.wavelet)
        return low_back.unflatten(0, (count, -1)).to(x.dtype)

    def _conditional(self, level: int, details: Tensor, low: Tensor, levels: Levels) -> Tensor:
        """Means of the details of a level, and of the low-pass images behind them."""
        stacked = self._stacked(details, low, levels)
        return self._answer_of(self._conditional_model(level), stacked, levels)

    def _conditional_model(self, level: int) -> Denoiser:
        return cast(Denoiser, self._conditionals[level - 1])

    def _answer_of(self, denoiser: Denoiser, x: Tensor, levels: Levels) -> Tensor:
        # Values that nobody has looked at: a small bandwidth may have made them large.
        return denoiser(x, levels.sigma, levels.alpha)

    def _bands(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Low-pass images and details of every level, divided by 2^j, not in half precision."""
        low, details = images.to(torch.promote_types(images.dtype, torch.float32)), []
        for _ in range(self.levels):
            low, bands = (0.5 * part for part in analyse(low, self.wavelet))
            details.append(bands)
        return low, details

    def _finer(self, low: Tensor, details: Tensor) -> Tensor:
        """The low-pass images of the next finer level, or the images."""
        return synthesise(2.0 * low, 2.0 * details, self.wavelet)

    def _stacked(self, details: Tensor, low: Tensor, levels: Levels) -> Tensor:
        """Noisy details [.., B, 3 C, h, w] with known low-pass images as further channels."""
        return torch.cat([details, self._condition(low, levels)], -3)

    def _condition(self, low: Tensor, levels: Levels) -> Tensor:
        alpha, _ = levels.columns(3, low.device)
        return (alpha / self.bandwidth).to(low.dtype) * low

    def _details(self, stacked: Tensor) -> Tensor:
        return stacked[:, : 3 * self.image_shape[0]]

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"levels={self.levels}, window={self.window}, wavelet={self.wavelet!r}, "
            f"coarse={self.coarse!r}, bandwidth={self.bandwidth}"
        )


def _low_pass(
    coarse: str, low: TrainingSet, threshold: float | None, options: DenoiserOptions
) -> Denoiser:
    """The global model of low-pass images."""
    if coarse == "optimal":
        return OptimalDenoiser(low, **options)
    if coarse == "wiener":
        return WienerDenoiser(low)
    if threshold is None:
        return PCALocalityDenoiser(low, **options)
    return PCALocalityDenoiser(low, threshold, **options)


def _at(levels: Levels, level: int) -> Levels:
    """The noise levels of bands that are divided by 2^level."""
    return levels._replace(sigma=levels.sigma / 2**level)


def _divisible(levels: Levels) -> Levels:
    """Positive noise levels that are positive at every level of a pyramid, too."""
    sigma, tiny = levels.sigma, torch.finfo(torch.float64).tiny
    least = sigma.clamp(min=tiny) if isinstance(sigma, Tensor) else max(sigma, tiny)
    return levels._replace(sigma=least)


def _check_threshold(mask_threshold: object, coarse: str) -> float | None:
    """A threshold, for the one coarse model that has any."""
    if mask_threshold is None:
        return None
    threshold = check_threshold(mask_threshold, "mask_threshold")
    if coarse != "pca_locality":
        raise ValueError(f"`mask_threshold` is for coarse='pca_locality', got coarse={coarse!r}")
    return threshold


def _check_windows(
    window: object, levels: int, image_shape: tuple[int, int, int]
) -> tuple[int, ...]:
    """The side of the window of each level, the finest first."""
    _, height, width = image_shape
    sides = [(height >> level, width >> level) for level in range(1, levels + 1)]
    if isinstance(window, numbers.Integral):
        # The finest band takes the largest window; without levels there is none to fit.
        checked = check_window(window, *(sides[0] if sides else (height, width)))
        return tuple(min(checked, 2 * max(side) - 1) for side in sides)
    given = check_sequence(window, "window", "a whole number or one for each level")
    if len(given) != levels:
        raise ValueError(f"`window` must have {levels} numbers, one a level, got {len(given)}")
    return tuple(check_window(side, *band) for side, band in zip(given, sides, strict=True))


def _training_bands(
    data: TrainingSet,
    levels: int,
    wavelet: str,
    bandwidth: float,
    memory_budget: int | str | None,
) -> tuple[TrainingSet, list[TrainingSet]]:
    """The low-pass images of a set, and for every level its details with their condition.

    All are divided by 2^j; the condition is the low-pass image of the level divided by the
    bandwidth, behind the details: [N, 4 C, h, w].
    """
    channels, height, width = data.image_shape
    count = len(data) * data.copies
    dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
    bands = range(1, levels + 1)
    shapes = [(count, 4 * channels, height >> level, width >> level) for level in bands]
    shapes.append((count, channels, height >> levels, width >> levels))
    tensors = _room(shapes, dtype, data.device, memory_budget)

    start = 0
    # The bands of a block in double precision, with their temporaries.
    at_once = min(_BLOCK_BYTES, memory_budget_bytes(memory_budget))
    size = images_per_chunk(at_once, 8 * 8 * data.num_values, len(data))
    for low in Reader.of(data).values(size, torch.float64):
        rows = slice(start, start + len(low))
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
    memory_budget: int | str | None,
) -> list[Tensor]:
    """Uninitialised tensors, in a temporary file where they would take half the memory budget."""
    values = sum(int(np.prod(shape)) for shape in shapes)
    small = 2 * values * dtype.itemsize <= memory_budget_bytes(memory_budget)
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
