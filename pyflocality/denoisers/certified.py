"""The optimal denoiser from part of the training set, with a proven bound on the error."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.checks import (
    LevelLike,
    NoiseLevel,
    check_real,
    check_single_level,
    describe,
)
from pyflocality._support.levels import Levels
from pyflocality._support.threads import Lock
from pyflocality._support.transforms import is_differentiated
from pyflocality.denoisers.base import Denoiser
from pyflocality.denoisers.bounds import ComponentIndex, build_index
from pyflocality.denoisers.certificate import (
    Reading,
    SubsetPlan,
    plan_level,
    read_certified,
    subset_stages,
)
from pyflocality.denoisers.components import check_moments
from pyflocality.denoisers.golden import refuse_augmented
from pyflocality.denoisers.optimal import OptimalDenoiser
from pyflocality.moments import Basis, Moments, check_moments_fit
from pyflocality.storage.reader import Reader

# Plans kept: a schedule has fewer noise levels.
_KEPT_PLANS = 1024


class CertifiedResult(NamedTuple):
    """Answers of `CertifiedSubset.certify`.

    Attributes:
        x0: Estimates of the clean images, dtype of x, [B, C, H, W].
        error_bound: No value of x0 is farther than this from the exact posterior mean over the
            whole set, skipped images and rounding together; float64 [B].
        share_read: Share of the training images that were read, float64 [B].
    """

    x0: Tensor
    error_bound: Tensor
    share_read: Tensor


class CertifiedSubset(Denoiser):
    r"""The optimal denoiser over the images that can matter, certified.

    For each noisy image the training images are read in order of a lower bound on their distance
    until those unread hold, provably, at most a share `tol` of the posterior:

    .. math::
        \lVert y - v \rVert^2 \ge \lVert Py - Pv \rVert^2
        + \bigl( \lVert y_\perp \rVert - \lVert v_\perp \rVert \bigr)^2, \qquad y = x / \alpha,

    with P the projection on leading principal components of the data, whose coefficients are
    computed once for all images (`pyflocality.denoisers.bounds` has the proof, rounding
    included). With q the bound on the unread share of the posterior and r the largest difference
    of two training images in one value, no value of the answer is off by more than q r, and
    rounding.

    **What is read.** Bounds come in stages of D / 48, D / 12 and D / 4 components: each stage is
    computed only for images that the one before leaves in doubt. At each noise level a pilot
    among the coefficients alone predicts how many images every stage would leave to be read,
    and the stages are used up to the one with the lowest cost

        N (400 + 12 k_1) + 50 sum_j n_{j-1} (k_j - k_{j-1}) + 120 n D

    (n_j images in doubt after stage j, n read; the factors are the times of looking at a bound,
    of a coefficient in order, of one that is gathered and of a value read in float64, over that
    of a value in a scan of the whole set that eight noisy images share). Where even that exceeds
    a scan's N D, `forward` calls the wrapped denoiser, and so it does for single noisy images
    that turn out to need more. Small images in memory seldom gain time by it.

    Derivatives are the wrapped denoiser's own, over the whole set.

    The bounds take 4 N (K + J + 1) bytes for K components in J stages, no more than half of the
    wrapped denoiser's memory budget: fewer components are kept where N is large. They are
    computed at first use. The components of the set take what `Basis.from_data` tells, 450 MB at
    N > D = 3,072: a budget that is given, by argument or environment variable, must hold them,
    and the default of 1 GB has them on top. A `Basis`, and moments that have been asked for their
    eigenvectors, need no more.

    Args:
        denoiser: An `OptimalDenoiser`; no other denoiser has a certificate.
        tol: Largest share of the posterior to skip, in [0, 1). 0 skips only what a number of
            the dtype of x cannot show.
        moments: Moments or components of the training set, where they are at hand; None computes
            the latter.

    Raises:
        TypeError: `denoiser` is no OptimalDenoiser, or an option has the wrong type.
        ValueError: `tol` is out of range, the moments are of images of another shape, or the set
            is augmented; in calls, a given budget is too small for the moments.
    """

    symmetric_jacobian = True

    def __init__(
        self,
        denoiser: OptimalDenoiser,
        tol: float = 1e-3,
        *,
        moments: Moments | Basis | None = None,
    ) -> None:
        if not isinstance(denoiser, OptimalDenoiser):
            raise TypeError(
                "`denoiser` must be an OptimalDenoiser, the only one with a certificate, got "
                f"{describe(denoiser)}"
            )
        refuse_augmented(denoiser)
        tol = check_real(tol, "tol", low=0.0, high=1.0, below=True)
        moments = check_moments(moments, denoiser.image_shape)
        super().__init__(denoiser.image_shape)
        self.denoiser = denoiser
        self.tol = tol
        self._moments = moments
        # Of the index and the plans: a batch of threads builds them once.
        self._keeping = Lock()
        self._forget()

    def _forget(self) -> None:
        self._index: ComponentIndex | None = None
        self._plans: OrderedDict[tuple[float, float], SubsetPlan] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Device of the training set, where inputs must be."""
        return self.denoiser.device

    @property
    def index(self) -> ComponentIndex:
        """Coefficients of all training images, computed at first use."""
        with self._keeping:
            if self._index is None or self._index.device != self.device:
                self._forget()
                data, budget = self.denoiser.data, self.denoiser.memory_budget
                if self._moments is None:
                    self._moments = Basis.from_data(data, memory_budget=budget)
                basis = self._moments
                if isinstance(basis, Moments):
                    check_moments_fit(budget, basis)
                    basis = basis.basis()
                stages = subset_stages(data, memory_budget_bytes(budget) // 2)
                self._index = build_index(data, basis, budget, stages)
            return self._index

    def plan(self, sigma: float | NoiseLevel, alpha: float = 1.0) -> SubsetPlan:
        """What is done at a noise level; see the description of the class.

        Args:
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Raises:
            TypeError: A level is not a number.
            ValueError: A level is out of range.
        """
        level = check_single_level(sigma, alpha)
        with self._keeping:
            if level not in self._plans:
                index, scale = self.index, self._scale(*level)
                self._plans[level] = plan_level(index, scale, self._tolerance(torch.float32))
                if len(self._plans) > _KEPT_PLANS:
                    self._plans.popitem(last=False)
            return self._plans[level]

    def certify(self, x: Tensor, sigma: LevelLike, alpha: float | Tensor = 1.0) -> CertifiedResult:
        """Estimates of the clean images with a proven bound on their error.

        Images are read in float64 here, as many as the bounds leave in doubt, also where a scan
        of the whole set would take less time.

        Args:
            x: Noisy images, [B, C, H, W].
            sigma: Noise level, a number or [B], or a `NoiseLevel` for both; near 0 a tie, of equal
                images too, cannot be certified, and the bound is the range of the data.
            alpha: Signal coefficient, a number or [B], positive.

        Returns:
            Estimates, bounds and shares read.

        Raises:
            TypeError: x is not a floating-point tensor, or a level is not a number.
            ValueError: x has the wrong shape or device or holds NaN, or a level is out of range.
        """
        x, levels, _, _ = self._checked(x, sigma, alpha)
        # Without a limit none gives up.
        readings = [
            cast(Reading, self._read(noisy, *level, limit=None))
            for noisy, level in zip(x, levels.pairs(len(x)), strict=True)
        ]
        # What rounding to the dtype of x may move a value in [-1, 1].
        rounding = torch.finfo(x.dtype).eps
        x0 = torch.zeros_like(x)
        for answer, reading in zip(x0, readings, strict=True):
            answer.copy_(reading.mean.reshape(answer.shape))
        return CertifiedResult(
            x0,
            x.new_tensor([r.error_bound + rounding for r in readings], dtype=torch.float64),
            x.new_tensor([r.read / len(self.denoiser.data) for r in readings], dtype=torch.float64),
        )

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        if is_differentiated(x, *levels):
            return self.denoiser._denoise(x, levels)
        result = torch.zeros_like(x)
        whole = []
        for b, (noisy, level) in enumerate(zip(x, levels.pairs(len(x)), strict=True)):
            plan = self.plan(NoiseLevel(*level))
            reading = self._read(noisy, *level, plan.limit) if plan.pays else None
            if reading is None:
                whole.append(b)
            else:
                result[b] = reading.mean.reshape(noisy.shape).to(x.dtype)
        if whole:
            result[whole] = self.denoiser._denoise(x[whole], levels.of(torch.tensor(whole)))
        return result

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        return self.denoiser._jvp(x, tangents, levels)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        return self.denoiser._vjp(x, cotangents, levels)

    def _read(self, noisy: Tensor, alpha: float, sigma: float, limit: int | None) -> Reading | None:
        """One certified answer; None where more than `limit` images would have to be read."""
        read = functools.partial(
            read_certified,
            self.denoiser.data,
            self.index,
            noisy.detach().double().flatten() / alpha,
            self._scale(alpha, sigma),
            self._tolerance(noisy.dtype),
            stages=self.plan(NoiseLevel(alpha, sigma)).stages,
            limit=limit,
            memory_budget=self.denoiser.memory_budget,
        )
        return Reader(self.denoiser.data.images).checked(read)

    def _scale(self, alpha: float, sigma: float) -> float:
        """Factor of the squared distances of x / alpha in the exponent."""
        ratio = sigma / alpha
        variance = 2.0 * ratio * ratio * self.denoiser.temperature
        return 1.0 / variance if variance > 0 else math.inf

    def _tolerance(self, dtype: torch.dtype) -> float:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return max(self.tol, torch.finfo(compute).eps / 4)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: not the bounds, which are computed again."""
        return self.__dict__ | {"_index": None, "_plans": OrderedDict()}

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"tol={self.tol}"
