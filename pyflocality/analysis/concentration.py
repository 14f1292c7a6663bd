r"""How many training images a posterior listens to.

With posterior weights :math:`p_i` of a query, the effective sample size
:math:`1 / \sum_i p_i^2` runs from 1 (one image is recited) to N (the plain mean), and the entropy
:math:`-\sum_i p_i \log p_i` from 0 to log N. With the squared distances :math:`e_i` both follow
from the log of the partition sum :math:`L(\kappa) = \log \sum_i e^{-\kappa e_i}` at
:math:`\kappa = 1 / (2 \sigma^2 \tau)`:

.. math:: \log \frac{1}{\sum_i p_i^2} = 2 L(\kappa) - L(2 \kappa), \qquad
    -\sum_i p_i \log p_i = L(\kappa) - \kappa L'(\kappa).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.checks import LevelLike, as_pair, describe
from pyflocality.denoisers.queries import QueryDenoiser

# Relative step of the slope, and the weights of a central difference of sixth order at one, two
# and three steps: its error is below 1e-5 nats for images of some thousand values.
_STEP = 1.0 / 32
_DIFFERENCE = (45 / 60, -9 / 60, 1 / 60)


class Concentration(NamedTuple):
    """How concentrated the posteriors of a denoiser are.

    Attributes:
        effective_sample_size: 1 / sum of squared weights, float64 [B, Q], from 1 to N.
        entropy: Shannon entropy of the weights in nats, float64 [B, Q], from 0 to log N.
    """

    effective_sample_size: Tensor
    entropy: Tensor


def posterior_concentration(
    denoiser: QueryDenoiser, x: Tensor, sigma: LevelLike, alpha: float | Tensor = 1.0
) -> Concentration:
    """Effective sample size and entropy of a denoiser's posteriors.

    Eight scans of the training set at different temperatures.

    Args:
        denoiser: A denoiser with a posterior of its own for each query: `OptimalDenoiser`
            (Q = 1), `LocalDenoiser` (Q = H W) or `PCALocalityDenoiser` with exact aggregation
            (Q = C H W).
        x: Noisy images, [B, C, H, W].
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.

    Raises:
        TypeError: The denoiser has no such posteriors, or an argument has the wrong type.
        ValueError: An argument has the wrong shape, device or range.
    """
    if not isinstance(denoiser, QueryDenoiser):
        raise TypeError(
            "`denoiser` must be an OptimalDenoiser, a LocalDenoiser or a PCALocalityDenoiser, got "
            f"{describe(denoiser)}"
        )
    sigma, alpha = as_pair(sigma, alpha)

    def log_sum(factor: float) -> Tensor:
        temperature = denoiser.temperature / factor
        return denoiser.log_sum_exp(x, sigma, alpha, temperature=temperature)

    plain, doubled = log_sum(1.0), log_sum(2.0)
    slope = torch.zeros_like(plain)
    for steps, weight in enumerate(_DIFFERENCE, start=1):
        apart = log_sum(1 + steps * _STEP) - log_sum(1 - steps * _STEP)
        slope += weight / _STEP * apart
    # Rounding may leave the ends of the ranges.
    return Concentration((2 * plain - doubled).exp().clamp(min=1), (plain - slope).clamp(min=0))
