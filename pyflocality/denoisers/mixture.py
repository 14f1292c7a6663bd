"""Convex mixtures of denoisers, with weights for each noise level."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pyflocality._support.checks import (
    NoiseLevel,
    check_float_tensor,
    check_real,
    check_sequence,
    check_single_level,
    describe,
)
from pyflocality._support.levels import Levels, Rows
from pyflocality._support.transforms import outside_transforms
from pyflocality.denoisers.base import Denoiser
from pyflocality.denoisers.levels import split_levels
from pyflocality.denoisers.window import level_rule

# What the sum of weights that mean 1 may miss it by: they may have been written in few digits.
_MISSED = 1e-5

WeightSet = Sequence[float] | Tensor
MixtureWeights = WeightSet | Callable[[float, float], WeightSet] | Sequence[tuple[float, WeightSet]]


class _Part(NamedTuple):
    """What a denoiser is asked in a batch.

    Attributes:
        denoiser: The denoiser.
        rows: Images of which it has a share.
        shares: Their weights, float64 [b].
    """

    denoiser: Denoiser
    rows: Rows
    shares: Tensor


class MixtureDenoiser(Denoiser):
    r"""Convex mixture of denoisers, with weights that depend on the noise level.

    .. math::
        \hat x_0(x) = \sum_m w_m \, \hat x_0^{(m)}(x), \qquad w_m \ge 0, \quad \sum_m w_m = 1

    The mean square error of a mixture is at most the mean of those of its denoisers, and lower
    where their errors differ. Its derivatives are the mixtures of theirs.

    A denoiser is not called for images of which it has no share; where it has all of it, the answer
    is its own to the bit: weights of 0 and 1 choose a model for each noise level. One call asks a
    denoiser about all images of a batch of which it has a share, whatever their noise levels. Each
    denoiser reads the training set by itself, since a pass serves one window, mask or patch; what
    they take beside it is computed once where all are given the same set and `Basis`: components,
    and the linear images of a level.

    With a network among the denoisers torch sees all operations, as it does of a network alone;
    `torch.compile` then breaks its graph here, and raises an error where it may not.

    Args:
        denoisers: The denoisers, for images of one shape on one device.
        weights: A number for each of them; or a function (alpha, sigma) -> numbers; or a table of
            pairs (sigma / alpha, numbers), of which the nearest in log(sigma / alpha) counts. They
            are not negative, and sum to 1 to five digits; they are divided by their sum.

    Attributes:
        denoisers: The denoisers.
        weights: The weights, as given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no denoiser, their shapes or devices differ, or weights are not as many
            as denoisers, negative or do not sum to 1.
    """

    def __init__(self, denoisers: Sequence[Denoiser], weights: MixtureWeights) -> None:
        members = _check_denoisers(denoisers)
        super().__init__(members[0].image_shape)
        self.denoisers = nn.ModuleList(members)
        self.weights = weights
        self.symmetric_jacobian = all(member.symmetric_jacobian for member in members)
        # Refuses wrong weights at once; what a function answers is checked when it is called.
        self._rule()

    @property
    def device(self) -> torch.device:
        """Device of the denoisers, where inputs must be."""
        return self._members[0].device

    def weights_at(self, sigma: float | NoiseLevel, alpha: float = 1.0) -> tuple[float, ...]:
        """The weight of each denoiser at a noise level.

        Args:
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Raises:
            TypeError: A level is not a number.
            ValueError: A level is out of range.
        """
        return self._rule()(*check_single_level(sigma, alpha))

    @property
    def _members(self) -> list[Denoiser]:
        return cast("list[Denoiser]", list(self.denoisers))

    def _rule(self) -> Callable[[float, float], tuple[float, ...]]:
        """The weights as a function (alpha, sigma)."""
        if _is_one_set(self.weights):
            weights = self._check_weights(self.weights)
            return lambda alpha, sigma: weights
        return level_rule(self.weights, "weights", self._check_weights, Tensor)

    def _check_weights(self, weights: object) -> tuple[float, ...]:
        """One set of weights, that sum to 1."""
        count = len(self.denoisers)
        expected = f"{count} numbers, one for each denoiser"
        if isinstance(weights, Tensor):
            if check_float_tensor(weights, "weights").ndim != 1:
                raise ValueError(f"`weights` must be {expected}, got {describe(weights)}")
            weights = weights.tolist()
        given = check_sequence(weights, "weights", expected, length=count)
        checked = [check_real(weight, "weights", low=0.0, high=1 + _MISSED) for weight in given]
        total = math.fsum(checked)
        if abs(total - 1.0) > _MISSED:
            raise ValueError(f"`weights` must sum to 1, got {describe(weights)}")
        return tuple(weight / total for weight in checked)

    def _parts(self, levels: Levels, batch: int) -> list[_Part]:
        """Who is asked about which images of a batch."""
        with outside_transforms():
            rule, shares = self._rule(), torch.empty(batch, len(self.denoisers)).double()
            for level in split_levels(levels, batch):
                weights = rule(level.alpha, level.sigma)
                shares[level.rows] = torch.tensor(weights, dtype=torch.float64)
            parts = []
            for member, share in zip(self._members, shares.unbind(1), strict=True):
                asked = share > 0
                if asked.all():
                    parts.append(_Part(member, slice(None), share))
                elif asked.any():
                    parts.append(_Part(member, asked.nonzero()[:, 0], share[asked]))
            return parts

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        parts = self._parts(levels, len(x))
        answers = [
            member(x[rows], *reversed(levels.of(rows))) for member, rows, _ in parts
        ]  # fmt: skip
        return _mixed(parts, answers, x)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        parts = self._parts(levels, len(x))
        answers = [
            member.jvp(x[rows], tangents[:, rows], *reversed(levels.of(rows)))
            for member, rows, _ in parts
        ]
        estimates, products = zip(*answers, strict=True)
        return _mixed(parts, estimates, x), _mixed(parts, products, tangents)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        parts = self._parts(levels, len(x))
        answers = [
            member.vjp(x[rows], cotangents[:, rows], *reversed(levels.of(rows)))
            for member, rows, _ in parts
        ]
        return _mixed(parts, answers, cotangents)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"weights={self.weights}"


def _check_denoisers(denoisers: object) -> list[Denoiser]:
    """Denoisers that can be asked about the same images."""
    members = check_sequence(denoisers, "denoisers", "a sequence of denoisers")
    if len(members) == 0:
        raise ValueError("`denoisers` must hold at least one denoiser, got none")
    for member in members:
        if not isinstance(member, Denoiser):
            raise TypeError(f"`denoisers` must hold denoisers, got {describe(member)}")
    first = members[0]
    for member in members[1:]:
        if member.image_shape != first.image_shape:
            raise ValueError(
                "`denoisers` must be for images of one shape, got "
                f"{first.image_shape} and {member.image_shape}"
            )
        if member.device != first.device:
            raise ValueError(
                f"`denoisers` must be on one device, got {first.device} and {member.device}"
            )
    return list(members)


def _is_one_set(weights: object) -> bool:
    """Whether weights are those of all levels: numbers, where a table holds pairs."""
    if not isinstance(weights, Sequence) or isinstance(weights, (str, bytes, bytearray)):
        return False
    return len(weights) > 0 and all(isinstance(weight, numbers.Real) for weight in weights)


def _mixed(parts: Sequence[_Part], answers: Sequence[Tensor], like: Tensor) -> Tensor:
    """The mixture of answers [.., b, C, H, W] of each part, in the shape and dtype of a batch."""
    compute = torch.promote_types(like.dtype, torch.float32)
    axis = like.ndim - 4
    # Nothing is lost of a number that is added to -0.
    total = torch.full_like(like, -0.0, dtype=compute)
    for (_, rows, shares), answer in zip(parts, answers, strict=True):
        weighted = shares.to(like.device, compute)[:, None, None, None] * answer
        if isinstance(rows, slice):
            total = total + weighted
        else:
            rows = rows.to(like.device)
            total = total.index_copy(axis, rows, total.index_select(axis, rows) + weighted)
    return total.to(like.dtype)
