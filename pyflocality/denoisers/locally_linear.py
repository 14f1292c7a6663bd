"""Posteriors with a slope: means that follow the noisy image as the Wiener filter does."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pyflocality._support.checks import (
    NoiseLevel,
    check_flag,
    check_real,
    check_single_level,
    describe,
)
from pyflocality._support.levels import Levels, Rows
from pyflocality._support.transforms import is_differentiated, outside_transforms
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, PosteriorDenoiser
from pyflocality.denoisers.components import check_moments, components_of
from pyflocality.denoisers.levels import Level, join_rows, share_passes, split_levels
from pyflocality.denoisers.local import LocalDenoiser
from pyflocality.denoisers.patch_set import PatchSetDenoiser
from pyflocality.denoisers.pca_locality import PCALocalityDenoiser
from pyflocality.denoisers.wiener import gains, spectral
from pyflocality.denoisers.window import level_rule
from pyflocality.moments import Basis, Moments
from pyflocality.moments.linear_images import LinearImages
from pyflocality.moments.undetermined import warn_of_few_images
from pyflocality.ops.operation import Kind

Slope = float | Callable[[float, float], float] | Sequence[tuple[float, float]]
_Wrapped = PCALocalityDenoiser | LocalDenoiser | PatchSetDenoiser


class LocallyLinearDenoiser(Denoiser):
    r"""A local model whose posteriors answer along the slope of the Wiener filter.

    .. math::
        \hat x_0[q] = \sum_i p_{q,i} \, v_i[q]
        + s \Bigl( W_q (x - \alpha \mu) - \alpha \sum_i p_{q,i} W_q (v_i - \mu) \Bigr),
        \qquad W = \alpha S (\alpha^2 S + \sigma^2 I)^{-1}

    with the posteriors p of the model that is wrapped, and :math:`\mu` and S the mean and
    covariance of the training set; of a patch set the means over its patches. It is a local linear
    regression with a slope that is the same everywhere: a posterior tells the value at the images
    that it found, and the filter how it changes from these to the noisy one. At s = 0 it is the
    wrapped model, to the bit and at its cost; where posteriors are flat and s = 1 it is the Wiener
    filter. Its values may leave [-1, 1].

    The linear images :math:`\alpha W (v_i - \mu)` are made once for each sigma / alpha and answered
    beside the images, in the same passes (see `pyflocality.moments.linear_images`: 2 N D^2
    operations and 4 N D bytes, float32, kept in the user's cache folder where large). A batch is
    scanned once for each slope and sigma / alpha. Products with W are torch's: an image's bits may
    depend on the others of its batch and on the number of threads, by rounding alone.

    Derivatives by sigma and alpha are refused where the slope is not 0: W changes with them.

    Args:
        denoiser: The model: a `PCALocalityDenoiser` of exact aggregation, a `LocalDenoiser` or a
            `PatchSetDenoiser`. Its options hold for all of it.
        slope: The slope s in [0, 1]; or a function (alpha, sigma) -> s; or a table of pairs
            (sigma / alpha, s), of which the nearest in log(sigma / alpha) counts.
        moments: Moments of the data or its components (`Basis`), where they are at hand; None takes
            those of PCA locality and makes components for any other model.
        progress: Whether to show what is being done where moments and linear images are made.

    Attributes:
        denoiser: The model.
        slope: The slope, as given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `slope` is out of range, the model's aggregation is not exact, or the moments
            are of images of another shape; a given budget is too small for the components and, in
            calls, for linear images that cannot be cached.
        MemoryError: The memory that is there is too small for them.

    Warns:
        UserWarning: There are no more images than values that vary.

    References:
        Cleveland and Devlin, Locally weighted regression: an approach to regression analysis by
        local fitting, 1988.
    """

    def __init__(
        self,
        denoiser: _Wrapped,
        slope: Slope,
        *,
        moments: Moments | Basis | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__(_check_wrapped(denoiser).image_shape)
        moments = check_moments(moments, self.image_shape)
        self.denoiser = denoiser
        self.slope = slope
        self.progress = check_flag(progress, "progress")
        # Refuses a wrong slope at once; what a function answers is checked when it is called.
        self._rule()
        self._basis = self._made(moments)
        warn_of_few_images(self._basis, "the slope of the Wiener filter")
        self._linear = self._linear_images()

    @property
    def data(self) -> TrainingSet:
        """The training set."""
        return self.denoiser.data

    @property
    def device(self) -> torch.device:
        """Device of the training set, where inputs must be."""
        return self.denoiser.device

    def slope_at(self, sigma: float | NoiseLevel, alpha: float = 1.0) -> float:
        """The slope of a noise level.

        Args:
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Raises:
            TypeError: A level is not a number.
            ValueError: A level is out of range.
        """
        return self._rule()(*check_single_level(sigma, alpha))

    def _rule(self) -> Callable[[float, float], float]:
        """The slope as a function (alpha, sigma)."""
        return level_rule(self.slope, "slope", _check_slope, numbers.Real)

    def _made(self, moments: Moments | Basis | None) -> Basis:
        """The components of moments or of the set, on its device."""
        budget = self.denoiser.memory_budget
        if moments is None and isinstance(self.denoiser, PCALocalityDenoiser):
            moments = self.denoiser.moments
        return components_of(self.data, moments, budget, self.progress)

    def _linear_images(self) -> LinearImages:
        budget, progress = self.denoiser.memory_budget, self.progress
        return LinearImages.shared(self.data, self._basis, memory_budget=budget, progress=progress)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        return self._answers("scan", x, levels)[0]

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        estimates, products = self._answers("jvp", x, levels, tangents)
        return estimates, products

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        return self._answers("vjp", x, levels, cotangents)[0]

    def _answers(
        self, kind: Kind, x: Tensor, levels: Levels, *directions: Tensor
    ) -> tuple[Tensor, ...]:
        """What is answered for a batch and its directions."""
        groups, results = [], []
        for rows, slope, level in self._groups(levels, len(x)):
            noisy, of_rows, along = x[rows], levels.of(rows), [part[:, rows] for part in directions]
            groups.append(rows)
            if slope == 0:
                results.append(self.denoiser._answers(kind, noisy, of_rows, *along))
                continue
            with outside_transforms():
                values = self._linear.at(level.alpha, level.sigma)[:, None]
            results.append(self._sloped(kind, slope, values, noisy, of_rows, *along))
        axes = {"scan": (0,), "jvp": (0, 1), "vjp": (1,)}[kind]
        return tuple(map(join_rows, zip(*results, strict=True), itertools.repeat(groups), axes))

    def _groups(self, levels: Levels, batch: int) -> Iterator[tuple[Rows, float, Level]]:
        """Images that share a slope and linear images, the slope, and one of their levels."""
        split = split_levels(levels, batch)
        with outside_transforms():
            rule = self._rule()
            choices = [(rule(level.alpha, level.sigma), level) for level in split]
            # Without a slope all go through the model together.
            keys = [(slope, slope and level.sigma / level.alpha) for slope, level in choices]
            groups, shared = share_passes(split, choices, keys)
        if any(slope > 0 for slope, _ in shared) and is_differentiated(*levels):
            raise NotImplementedError(
                "no derivative by `sigma` or `alpha` where `slope` is not 0: the linear images "
                "themselves change with the noise level"
            )
        for rows, (slope, level) in zip(groups, shared, strict=True):
            yield rows, slope, level

    def _sloped(
        self,
        kind: Kind,
        slope: float,
        values: Tensor,
        x: Tensor,
        levels: Levels,
        *directions: Tensor,
    ) -> tuple[Tensor, ...]:
        """Answers for images of one slope, whose linear images are given, [N, 1, C, H, W]."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        compute = self.denoiser.dtype or wide
        noisy, along = x.to(compute), [part.to(compute) for part in directions]
        if kind == "vjp":
            (cotangents,) = along
            of_both = torch.stack([cotangents, -slope * cotangents], -4)
            (product,) = self.denoiser._answers(kind, noisy, levels, of_both, values=values)
            return ((product + slope * self._filtered(cotangents, levels)).to(x.dtype),)
        alpha, _ = levels.columns(3, x.device)
        mean = self._basis.mean.to(compute)
        filtered = (noisy - alpha.to(compute) * mean, *along)
        answers = self.denoiser._answers(kind, noisy, levels, *along, values=values)
        return tuple(
            # Of the image, and of its linear image.
            (answer.select(-4, 0) + slope * (self._filtered(part, levels) - answer.select(-4, 1)))
            .to(x.dtype)
            for answer, part in zip(answers, filtered, strict=True)
        )  # fmt: skip

    def _filtered(self, images: Tensor, levels: Levels) -> Tensor:
        """W applied to images [.., B, C, H, W]."""
        basis = self._basis
        factors = gains(basis.values, levels)
        return spectral(images.flatten(-3), basis.vectors, factors).reshape(images.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LocallyLinearDenoiser:
        before = self.data
        super()._apply(fn, recurse)
        if self.data is not before:
            self._basis = self._basis.to(self.device)
            self._linear = self._linear_images()
        return self

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"slope={self.slope}"


def _check_slope(slope: object) -> float:
    return check_real(slope, "slope", low=0.0, high=1.0)


def _check_wrapped(denoiser: object) -> _Wrapped:
    """A model whose posteriors answer a value, a pixel or a patch."""
    if not isinstance(denoiser, (PCALocalityDenoiser, LocalDenoiser, PatchSetDenoiser)):
        raise TypeError(
            "`denoiser` must be a PCALocalityDenoiser, a LocalDenoiser or a PatchSetDenoiser, got "
            f"{describe(denoiser)}"
        )
    if isinstance(denoiser, PCALocalityDenoiser) and denoiser.aggregation != "exact":
        raise ValueError(
            f"`denoiser` must have aggregation='exact', got one of {denoiser.aggregation!r}"
        )
    return denoiser


def answers_at_temperatures(
    denoiser: PosteriorDenoiser,
    x: Tensor,
    level: NoiseLevel,
    temperatures: Tensor,
    values: Tensor | None = None,
) -> Tensor:
    """Answers at several temperatures, whatever the denoiser's own, in the passes of one.

    For callers that have checked their arguments.

    Args:
        denoiser: The denoiser.
        x: Noisy images, [B, C, H, W].
        level: Their noise level.
        temperatures: What divides the logits, positive, float64 [T].
        values: Value images that are answered beside the image, [N, R, C, H, W].

    Returns:
        The answers in the dtype of x: [T, B, C, H, W], with value images [T, B, 1 + R, C, H, W].
    """
    asked = denoiser._questions("scan")(level.alpha, level.sigma)
    problem = denoiser._problem(
        x.repeat(len(temperatures), 1, 1, 1),
        Levels(level.alpha, level.sigma),
        denoiser.data.images,
        denoiser.data.augmentation,
        temperature=temperatures.repeat_interleave(len(x)),
        values=values,
    )
    answers = denoiser._run("scan", asked, problem)[0]
    return answers.reshape(len(temperatures), len(x), *answers.shape[1:])
