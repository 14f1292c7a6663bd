"""Gaussian mixtures around the training images, between the optimal model and the Wiener filter."""

from __future__ import annotations

import copy
import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from pyflocality._support.checks import (
    LevelLike,
    NoiseLevel,
    check_flag,
    check_noise,
    check_real,
    check_single_level,
    describe,
)
from pyflocality._support.levels import Levels, Rows
from pyflocality._support.transforms import is_differentiated, outside_transforms
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Asked, Denoiser, DenoiserOptions, check_set
from pyflocality.denoisers.components import check_moments, components_of
from pyflocality.denoisers.levels import Level, join_rows, share_passes, split_levels
from pyflocality.denoisers.optimal import OptimalDenoiser
from pyflocality.denoisers.wiener import gains, spectral
from pyflocality.denoisers.window import level_rule
from pyflocality.moments import Basis, Moments
from pyflocality.moments.linear_images import LinearImages, Whitened, whitening
from pyflocality.moments.undetermined import warn_of_few_images
from pyflocality.ops.global_posterior import GLOBAL_POSTERIOR
from pyflocality.posterior.sharded import ShardedImages, plain, ranks_of
from pyflocality.storage.reader import Reader

if TYPE_CHECKING:
    from typing_extensions import Unpack

Gamma = float | Callable[[float, float], float] | Sequence[tuple[float, float]]


class _Group(NamedTuple):
    """Images of a batch that are compared with the same images.

    Attributes:
        rows: Which images.
        gamma: Their share of the covariance.
        alpha: Signal coefficient of one of them.
        sigma: Its noise level; the ratio of both is that of all.
    """

    rows: Rows
    gamma: float
    alpha: float
    sigma: float


class GaussianMixtureDenoiser(Denoiser):
    r"""Posterior mean of a mixture of Gaussians, one around each training image.

    With m and S the mean and covariance of the training set and a share :math:`\gamma` in [0, 1],
    clean images are distributed as

    .. math::
        x_0 \sim \frac1N \sum_i \mathcal N(\mu_i, \gamma S), \qquad
        \mu_i = m + \sqrt{1 - \gamma} \, (v_i - m),

    which has mean m and covariance S for every :math:`\gamma` (but for the factor N / (N - 1) that
    S has beside the mean of squares). The posterior mean is exact:

    .. math::
        \hat x_0(x) = \sum_i p_i \left[ \mu_i + \alpha \gamma S \, C^{-1} (x - \alpha \mu_i)
            \right], \qquad
        p = \operatorname{softmax}_i \left( -\frac{1}{2 \tau}
            (x - \alpha \mu_i)^\top C^{-1} (x - \alpha \mu_i) \right), \qquad
        C = \alpha^2 \gamma S + \sigma^2 I .

    :math:`\gamma = 0` is the optimal denoiser, to the bit; :math:`\gamma = 1` the Wiener filter.

    **How it is computed.** With :math:`T = \sigma C^{-1/2}`, which depends on
    :math:`\sigma / \alpha` alone and shortens what it is applied to, the posterior is that of the
    optimal denoiser for :math:`x' = T (x - \alpha m)` over the whitened images
    :math:`y_i = \sqrt{1 - \gamma} \, T (v_i - m)`, and

    .. math::
        \hat x_0(x) = m + \alpha \gamma S \, C^{-1} (x - \alpha m) + T \sum_i p_i y_i .

    The whitened images of a level are made at its first use, in float64 products rounded once to
    float32 (kept in float64 for computations in float64), and lie in the user's cache folder where
    they are large (see `pyflocality.moments.linear_images`): a level takes 2 N D^2 operations, a
    call as long as one of the optimal denoiser. torch multiplies what is done to a noisy image,
    in float64: its bits may depend on the others of its batch, by that rounding alone.

    Args:
        data: The training set.
        gamma: Share :math:`\gamma` of the covariance, in [0, 1]; or a function (alpha, sigma) ->
            share; or a table of pairs (sigma / alpha, share), of which the nearest in
            log(sigma / alpha) counts.
        temperature: Divides the logits.
        moments: Moments of the data or its components (`Basis`), where they are at hand; None makes
            components. What is left out of them counts as without variance.
        progress: Whether to show what is being done where components and whitened images are made.
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.

    Attributes:
        gamma: The share, as given.
        optimal: The optimal denoiser of the set.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the moments are of images of another shape; a
            given budget is too small for the components and, in calls, for whitened images that
            cannot be cached.
        MemoryError: The memory that is there is too small for them.

    Warns:
        UserWarning: There are no more images than values that vary.

    References:
        Parzen, On estimation of a probability density function and mode, 1962.

        Jones, On correcting for variance inflation in kernel density estimation, 1991 (means drawn
        together so that the covariance stays).
    """

    symmetric_jacobian = True

    def __init__(
        self,
        data: TrainingSet,
        gamma: Gamma,
        temperature: float = 1.0,
        *,
        moments: Moments | Basis | None = None,
        progress: bool = False,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        super().__init__(check_set(data).image_shape)
        given = check_moments(moments, self.image_shape)
        self.gamma = gamma
        self.progress = check_flag(progress, "progress")
        # Refuses a wrong share at once; what a function answers is checked when it is called.
        self._rule()
        self.optimal = OptimalDenoiser(data, temperature, **options)
        self._basis = components_of(data, given, self.optimal.memory_budget, self.progress)
        warn_of_few_images(
            self._basis if given is None else given, "the covariance of a Gaussian mixture"
        )
        self._images = self._linear_images()

    @property
    def data(self) -> TrainingSet:
        """The training set."""
        return self.optimal.data

    @property
    def device(self) -> torch.device:
        """Device of the training set, where inputs must be."""
        return self.optimal.device

    def gamma_at(self, sigma: float | NoiseLevel, alpha: float = 1.0) -> float:
        """The share of the covariance at a noise level.

        Args:
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Raises:
            TypeError: A level is not a number.
            ValueError: A level is out of range.
        """
        return self._rule()(*check_single_level(sigma, alpha))

    def log_sum_exp(
        self,
        x: Tensor,
        sigma: LevelLike,
        alpha: float | Tensor = 1.0,
        *,
        temperature: float | None = None,
    ) -> Tensor:
        r"""Log of the sum that normalises the posterior, as `OptimalDenoiser.log_sum_exp`.

        At temperature 1 it is the log-density of x but for a constant of the noise level.

        Args:
            x: Noisy images, [B, C, H, W].
            sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
            alpha: Signal coefficient, a number or [B], positive.
            temperature: Divides the logits; by default the denoiser's own.

        Returns:
            Float64 [B, 1].

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument has the wrong shape, device or range; there is no image.
        """
        x, levels, _, _ = self._checked(x, sigma, alpha)
        if len(x) == 0:
            raise ValueError(f"`x` must hold at least one image, got {describe(x)}")
        groups, results = [], []
        for group in self._groups(levels, len(x)):
            noisy, of_rows, model = x[group.rows], levels.of(group.rows), self.optimal
            if group.gamma > 0:
                dtype = self._compute(noisy)
                whitened = self._whitened(self._centred(noisy, of_rows), group.gamma, of_rows)
                noisy = whitened.reshape(noisy.shape).to(dtype)
                model = copy.copy(self.optimal)
                images = self._whitened_images(group, of_rows, dtype)
                model.data = TrainingSet._of_valid(images, f"whitened images of {self.data.name}")
            level = of_rows.sigma, of_rows.alpha
            groups.append(group.rows)
            results.append(model.log_sum_exp(noisy, *level, temperature=temperature))
        return join_rows(results, groups)

    def _rule(self) -> Callable[[float, float], float]:
        """The share of the covariance as a function (alpha, sigma)."""
        return level_rule(self.gamma, "gamma", _check_gamma, numbers.Real)

    def _linear_images(self) -> LinearImages:
        budget, progress = self.optimal.memory_budget, self.progress
        return LinearImages.shared(self.data, self._basis, memory_budget=budget, progress=progress)

    def _groups(self, levels: Levels, batch: int) -> Iterator[_Group]:
        """The images of a batch that one pass serves."""
        # Derivatives by a level are those of its own whitened images, too.
        own = is_differentiated(*levels)
        with outside_transforms():
            rule = self._rule()
            split = split_levels(levels, batch)
            if own:
                pairs = levels.pairs(batch)
                split = [Level(*pair, torch.tensor([b])) for b, pair in enumerate(pairs)]
            choices = [(rule(level.alpha, level.sigma), level) for level in split]
            # The optimal denoiser serves all levels in one pass.
            keys = [
                (gamma, gamma and (number if own else level.sigma / level.alpha))
                for number, (gamma, level) in enumerate(choices)
            ]
            groups, shared = share_passes(split, choices, keys)
        for rows, (gamma, level) in zip(groups, shared, strict=True):
            yield _Group(rows, gamma, level.alpha, level.sigma)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        return self._answers("scan", x, levels)[0]

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        check_noise(levels)
        means, products = self._answers("jvp", x, levels, tangents)
        return means, products

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        # The Jacobian is symmetric.
        return self._jvp(x, cotangents, levels)[1]

    def _answers(
        self, kind: Literal["scan", "jvp"], x: Tensor, levels: Levels, *tangents: Tensor
    ) -> tuple[Tensor, ...]:
        """Estimates, and derivatives where there are tangents [K, B, C, H, W]."""
        groups, results = [], []
        for group in self._groups(levels, len(x)):
            rows = group.rows
            noisy, of_rows = x[rows], levels.of(rows)
            along = [part[:, rows] for part in tangents]
            groups.append(rows)
            if group.gamma == 0:
                results.append(self.optimal._answers(kind, noisy, of_rows, *along))
            else:
                results.append(self._of_mixture(kind, group, noisy, of_rows, *along))
        return tuple(map(join_rows, zip(*results, strict=True), itertools.repeat(groups), (0, 1)))

    def _of_mixture(
        self,
        kind: Literal["scan", "jvp"],
        group: _Group,
        x: Tensor,
        levels: Levels,
        *tangents: Tensor,
    ) -> tuple[Tensor, ...]:
        """The same for images that are compared with the same whitened images."""
        gamma, dtype = group.gamma, self._compute(x)
        given = [self._centred(x, levels), *(part.double().flatten(2) for part in tangents)]
        factors = gains(gamma * self._basis.values, levels)
        answers = [spectral(part, self._basis.vectors, factors) for part in given]
        # With all of the covariance there is one Gaussian.
        if gamma < 1:
            noisy, *along = (
                self._whitened(part, gamma, levels).reshape(like.shape).to(dtype)
                for part, like in zip(given, (x, *tangents), strict=True)
            )
            images = self._whitened_images(group, levels, dtype)
            problem = self.optimal._problem(noisy, levels, images, None)
            found = self.optimal._run(kind, Asked(GLOBAL_POSTERIOR), problem, *along)
            answers = [
                answer + self._whitened(part.double().flatten(-3), gamma, levels)
                for answer, part in zip(answers, found, strict=True)
            ]
        answers[0] = answers[0] + self._basis.mean.flatten()
        return tuple(
            answer.reshape(like.shape).to(like.dtype)
            for answer, like in zip(answers, (x, *tangents), strict=True)
        )

    def _compute(self, x: Tensor) -> torch.dtype:
        """The dtype in which noisy images are compared."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.optimal.dtype or wide

    def _centred(self, x: Tensor, levels: Levels) -> Tensor:
        """Noisy images about their mean, float64 [B, D]."""
        alpha, _ = levels.columns(1, x.device)
        return x.double().flatten(1) - alpha * self._basis.mean.flatten()

    def _whitened(self, values: Tensor, gamma: float, levels: Levels) -> Tensor:
        """T applied to values, float64 [B, D] or [K, B, D]."""
        alpha, sigma = levels.columns(1, values.device)
        factors = whitening(gamma * self._basis.values, sigma / alpha)
        return spectral(values, self._basis.vectors, factors, 1.0)

    def _whitened_images(self, group: _Group, levels: Levels, dtype: torch.dtype) -> Tensor:
        """The whitened images of a group, [N, C, H, W]."""
        gamma, ranks = group.gamma, ranks_of(self.data.images)
        if is_differentiated(*levels):
            images = self._whitened_by(levels, gamma).to(dtype)
        else:
            with outside_transforms():
                images = self._images.at(group.alpha, group.sigma, Whitened(gamma), dtype)
        return images if ranks is None else ShardedImages.of(images, ranks)

    def _whitened_by(self, levels: Levels, gamma: float) -> Tensor:
        """The whitened images of one level, as torch differentiates them by it."""
        reader = Reader(plain(self.data.images), self.data.augmentation)
        with outside_transforms():
            mean = self._basis.mean
            centred = torch.cat([v - mean for v in reader.values(len(reader), torch.float64)])
        whitened = math.sqrt(1.0 - gamma) * self._whitened(centred.flatten(1), gamma, levels)
        return whitened.reshape(centred.shape)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> GaussianMixtureDenoiser:
        before = self.data
        super()._apply(fn, recurse)
        if self.data is not before:
            self._basis = self._basis.to(self.device)
            self._images = self._linear_images()
        return self

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"gamma={self.gamma}"


def _check_gamma(gamma: object) -> float:
    return check_real(gamma, "gamma", low=0.0, high=1.0)
