"""The noise level of a noisy image as a pair whose two numbers are not mistaken for each other."""

from __future__ import annotations

import numbers
from typing import Generic, TypeAlias, cast

import torch
from torch import Tensor
from typing_extensions import TypeVar

from pyflocality._support.checks.describing import describe
from pyflocality._support.checks.numeric import check_real
from pyflocality._support.checks.tensors import REAL_DTYPES, check_tensor
from pyflocality._support.transforms import has_readable_values

Coefficient = TypeVar("Coefficient", bound="float | Tensor", covariant=True, default=float)


class _Number(float):
    """A number that knows which coefficient it is; what is computed of it is a plain float."""

    __slots__ = ()
    _coefficient = ""

    def __reduce_ex__(self, protocol: object) -> tuple[type[float], tuple[float]]:
        """Copies and pickles are plain floats."""
        return float, (float(self),)


class _Alpha(_Number):
    __slots__ = ()
    _coefficient = "alpha"


class _Sigma(_Number):
    __slots__ = ()
    _coefficient = "sigma"


class NoiseLevel(tuple[Coefficient, Coefficient], Generic[Coefficient]):
    """The pair (alpha, sigma) of noisy images x = alpha x0 + sigma noise, as schedules answer it.

    Whatever takes `sigma` and `alpha` takes a level whole in place of the first of them:
    `denoiser(x, schedule(t))`. It unpacks as any pair, `alpha, sigma = schedule(t)`, into floats
    and tensors that know which of the two they are, so that `denoiser(x, *schedule(t))`, which
    would take one for the other, raises a TypeError. Arithmetic, copies and `float(level.sigma)`
    give plain ones, for which alone `torch.compile` leaves a number open in functions of one's own.
    A graph takes levels; with `fullgraph=True` those of numbers are made outside of it.

    Args:
        alpha: Signal coefficient, not negative, a number or a tensor of any shape.
        sigma: Noise coefficient, likewise.

    Raises:
        TypeError: A coefficient is neither a number nor a tensor, or is the other one.
        ValueError: A coefficient is negative or not finite.
    """

    __slots__ = ()

    def __new__(cls, alpha: Coefficient, sigma: Coefficient) -> NoiseLevel[Coefficient]:
        """Mark the coefficients."""
        _refuse_swapped(sigma, alpha)
        pair = (_marked(alpha, "alpha"), _marked(sigma, "sigma"))
        return super().__new__(cls, cast("tuple[Coefficient, Coefficient]", pair))

    def __getnewargs__(self) -> tuple[Coefficient, Coefficient]:
        """What a copy is made of."""
        return self.alpha, self.sigma

    def __repr__(self) -> str:
        """Both by name."""
        return f"NoiseLevel(alpha={self.alpha!r}, sigma={self.sigma!r})"

    @property
    def alpha(self) -> Coefficient:
        """Signal coefficient."""
        return self[0]

    @property
    def sigma(self) -> Coefficient:
        """Noise coefficient."""
        return self[1]


# What `torch.save` writes of levels and their coefficients is read as safely as pairs and floats.
torch.serialization.add_safe_globals([NoiseLevel, float])

# What a public function takes in place of the first of its two coefficients.
LevelLike: TypeAlias = "float | Tensor | NoiseLevel[float | Tensor]"


def as_pair(sigma: LevelLike, alpha: float | Tensor = 1.0) -> tuple[float | Tensor, float | Tensor]:
    """(sigma, alpha) of a call that may have a level whole in place of sigma, checked no further.

    Numbers are plain ones from here on.

    Args:
        sigma: The noise level, or the pair of both.
        alpha: The signal coefficient; 1, as where it is left out, beside a pair.

    Raises:
        TypeError: There is an alpha beside a pair, or sigma and alpha are each other's.
    """
    # Plain numbers, as most are.
    if type(sigma) is float and type(alpha) is float:
        return sigma, alpha
    if isinstance(sigma, NoiseLevel):
        if not (isinstance(alpha, numbers.Real) and alpha == 1):
            raise TypeError(
                "`alpha` must be left out beside a NoiseLevel, which holds it, got "
                f"{describe(alpha)} beside {describe(sigma)}"
            )
        alpha, sigma = sigma
    _refuse_swapped(sigma, alpha)
    return _plain(sigma), _plain(alpha)


def _refuse_swapped(sigma: object, alpha: object) -> None:
    if _coefficient_of(sigma) == "alpha" or _coefficient_of(alpha) == "sigma":
        raise TypeError(
            "`sigma` and `alpha` must not be taken for each other, got sigma "
            f"{_named(sigma)} and alpha {_named(alpha)}: a schedule answers (alpha, sigma), so "
            "pass its level whole, as in denoiser(x, schedule(t)), or level.sigma, level.alpha"
        )


def _plain(value: float | Tensor) -> float | Tensor:
    return float(value) if isinstance(value, _Number) else value


def _coefficient_of(value: object) -> str | None:
    """Which coefficient of a level a value is known to be."""
    # Not asked of all numbers alike: compilers take some for symbols.
    if isinstance(value, _Number):
        return value._coefficient
    return getattr(value, "_coefficient", None) if isinstance(value, Tensor) else None


def _named(value: object) -> str:
    known = _coefficient_of(value)
    return describe(value) if known is None else f"{describe(value)} (the {known} of a level)"


def _marked(value: float | Tensor, name: str) -> float | Tensor:
    if not isinstance(value, Tensor):
        number = check_real(value, name, low=0.0)
        return _Alpha(number) if name == "alpha" else _Sigma(number)
    # The caller's own tensor stays as it is.
    if check_tensor(value, name).dtype not in REAL_DTYPES:
        raise TypeError(f"`{name}` must be real, got {describe(value)}")
    if has_readable_values(value) and not ((value >= 0) & value.isfinite()).all():
        raise ValueError(f"`{name}` must be finite and not negative, got {describe(value)}")
    marked = value.view_as(value)
    marked._coefficient = name  # type: ignore[attr-defined]  # torch lets every tensor have some
    return marked
