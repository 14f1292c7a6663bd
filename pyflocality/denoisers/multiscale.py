"""A global model of a small low-pass image, local conditional models of the details."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

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
from pyflocality.denoisers.pyramids import ConditionalPyramid, training_bands
from pyflocality.denoisers.wiener import WienerDenoiser
from pyflocality.masks import check_threshold
from pyflocality.ops.window_posterior import check_window
from pyflocality.wavelets import check_sides, filters

_COARSE = ("optimal", "wiener", "pca_locality")


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
    value of the set and each shift; where they exceed half the memory budget they lie in temporary
    files (in the folder TMPDIR), mapped into memory. They hold the copies of an augmented set, too.

    **Cycle spinning.** A pyramid halves images at fixed places: what its blocks of 2^j pixels
    become depends on where they lie, and their edges may show. With `shifts` the estimate is the
    mean of those by several pyramids, of images that are rolled by a few pixels (all borders are
    periodic) and rolled back. 4^J of them are all that differ; the first four lie at all parities
    of a pixel. Each has bands and a global model of its own, whose windows see other values: they
    share no scan, so time and memory grow with their number.

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
        shifts: Number of shifted pyramids whose mean is taken, 1 to 4^levels.
        backend: Backend of the operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype.
        memory_budget: Working memory, bytes or a string such as "2GB".

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the sides of the images are not divisible.
        ImportError: The wavelet needs PyWavelets.

    References:
        Kadkhodaie, Guth, Mallat and Simoncelli, Learning multi-scale local conditional
        probability models of images, 2023.

        Coifman and Donoho, Translation-invariant de-noising, 1995 (cycle spinning).
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
        shifts: int = 1,
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
        self.shifts = check_count(shifts, "shifts", maximum=4**self.levels)
        mask_threshold = _check_threshold(mask_threshold, coarse)
        options: DenoiserOptions = {
            "backend": backend, "dtype": dtype, "memory_budget": memory_budget
        }  # fmt: skip
        # Checks the options before the bands are made.
        OptimalDenoiser(data, **options)
        self._pyramids = nn.ModuleList()
        for shift in _shifts(self.levels, self.shifts):
            low, stacks = data, list[TrainingSet]()
            if self.levels > 0:
                low, stacks = training_bands(
                    data,
                    self.levels,
                    wavelet,
                    self.bandwidth,
                    shift,
                    self.shifts,
                    memory_budget,
                )
            conditionals = [
                LocalDenoiser(stack, side, **options)
                for stack, side in zip(stacks, self.window, strict=True)
            ]
            low_pass = _low_pass(coarse, low, mask_threshold, options)
            channels = self.image_shape[0]
            self._pyramids.append(
                ConditionalPyramid(low_pass, conditionals, wavelet, self.bandwidth, channels, shift)
            )

    @property
    def low_pass(self) -> Denoiser:
        """The denoiser of low-pass images [C, H / 2^J, W / 2^J], of the pyramid without a shift.

        Like all bands here they are divided by 2^j, so that a constant image keeps its value: for
        "haar" a low-pass image is the image of block means.
        """
        return self._spun[0].low_pass

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
        return self._spun[0].conditional(level, details, low, levels)

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
        return self._mean([one.denoise(x, levels) for one in self._spun])

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        pairs = [one.jvp(x, tangents, levels) for one in self._spun]
        means, products = zip(*pairs, strict=True)
        return self._mean(means), self._mean(products)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        return self._mean([one.vjp(x, cotangents, levels) for one in self._spun])

    @property
    def _spun(self) -> list[ConditionalPyramid]:
        return [cast(ConditionalPyramid, one) for one in self._pyramids]

    @staticmethod
    def _mean(parts: Sequence[Tensor]) -> Tensor:
        # One alone stays what it is to the bit.
        return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(0)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"levels={self.levels}, window={self.window}, wavelet={self.wavelet!r}, "
            f"coarse={self.coarse!r}, bandwidth={self.bandwidth}, shifts={self.shifts}"
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


def _shifts(levels: int, count: int) -> list[tuple[int, int]]:
    """Shifts of pixels, of those that differ for so many levels; all parities of a pixel first."""
    order = ((0, 0), (1, 1), (0, 1), (1, 0))
    found = []
    for number in range(count):
        digits = [order[(number >> (2 * level)) % 4] for level in range(levels)]
        down, right = (sum(d[axis] << i for i, d in enumerate(digits)) for axis in (0, 1))
        found.append((down, right))
    return found


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
