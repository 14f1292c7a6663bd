"""The optimal denoiser of a finite training set."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyflocality._support.levels import Levels
from pyflocality.denoisers.base import Asked
from pyflocality.denoisers.queries import QueryDenoiser
from pyflocality.ops.global_posterior import GLOBAL_POSTERIOR
from pyflocality.ops.operation import Kind


class OptimalDenoiser(QueryDenoiser):
    r"""Posterior mean over all training images: the minimiser of the training objective.

    .. math::
        \hat x_0(x) = \sum_i p_i(x) \, v_i, \qquad
        p(x) = \operatorname{softmax}_i \left(
            -\frac{\lVert x - \alpha v_i \rVert^2}{2 \sigma^2 \tau} \right)

    As sigma goes to 0 it returns the nearest training image, as sigma grows the data mean;
    sampling with it recites training images.

    Args:
        data: The training set.
        temperature: Divides the logits; values above 1 smooth the posterior.
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.

    References:
        Karras, Aittala, Aila and Laine, Elucidating the design space of diffusion-based
        generative models, 2022, equation 57.

        De Bortoli, Convergence of denoising diffusion models under the manifold hypothesis,
        2022.
    """

    symmetric_jacobian = True

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        # The Jacobian is a covariance, and so symmetric.
        return self._jvp(x, cotangents, levels)[1]

    def _questions(self, kind: Kind) -> Callable[[float, float], Asked]:
        return lambda alpha, sigma: Asked(GLOBAL_POSTERIOR)
