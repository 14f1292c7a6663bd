r"""How candidates are told apart on the same images: errors, sharpness, and their uncertainty.

All candidates see the same images with the same noise, and what is compared is the difference from
the best of them. Its standard error is that of the jackknife: with :math:`d_{(i)}` the difference
without image i of n and :math:`\bar d` the mean of these,

.. math::
    s = \sqrt{ \frac{n - 1}{n} \sum_i (d_{(i)} - \bar d)^2 } ,

which for a difference of means is the usual one. A candidate that is more complicated has to win by
more than one standard error: of all that lie within one of the best, the simplest is chosen.

The criterion of restored images is the logarithm of their mean squared error. Alone it prefers what
is too smooth: the mean of all images that are possible has half the error of any one of them. So
the gradient energy is bounded: it may be a quarter off that of the simplest, which is a posterior
as it stands where nothing else was asked for; as far as it goes beyond, its logarithm counts like
that of the error. Restored images have less gradient energy than the images themselves even where a
trained network restores them, so these are no measure. How criteria rank whole runs beside trained
networks tells `python -m benchmarks.reproduce.criteria`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Gradient energies as a share of the simplest's that cost nothing: this, and one over this.
LEAST_SHARPNESS = 0.75
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Comparison:
    """A statistic of C candidates that saw the same images.

    Attributes:
        values: The statistic, the less the better, float64 [C].
        excess: How far it lies above the least, float64 [C].
        deviation: Standard error of that difference, float64 [C].
    """

    values: Tensor
    excess: Tensor
    deviation: Tensor


def compared(statistic: Callable[..., Tensor], *numbers: Tensor) -> Comparison:
    """Compare a function of means over images.

    Args:
        statistic: Makes of means [C, ..] of each of the numbers one value for each candidate.
        numbers: Numbers of each candidate and image, float64 [C, n] with n at least 2.
    """
    values = statistic(*(part.mean(1) for part in numbers))
    count = numbers[0].shape[1]
    without = [(part.sum(1, keepdim=True) - part) / (count - 1) for part in numbers]
    others = statistic(*without)
    best = int(values.argmin())
    differences = others - others[best]
    spread = (differences - differences.mean(1, keepdim=True)).square().sum(1)
    deviation = ((count - 1) / count * spread).sqrt()
    return Comparison(values, values - values[best], deviation)


def mean_error(errors: Tensor) -> Tensor:
    """The statistic of single steps: the mean squared error itself."""
    return errors


def restoration(errors: Tensor, energies: Tensor) -> Tensor:
    """The criterion of restored images, from means over images; the first are the simplest.

    Args:
        errors: Mean squared errors [C, ..].
        energies: Gradient energies of what was restored, [C, ..].
    """
    distance = sharpness(energies, energies[:1]).log().abs()
    beyond = (distance + math.log(LEAST_SHARPNESS)).clamp(min=0)
    return errors.clamp(min=_TINY).log() + beyond


def sharpness(energies: Tensor, others: Tensor) -> Tensor:
    """Gradient energies as a share of others; 1 where both are 0."""
    return (energies + _TINY) / (others + _TINY)
