"""The optimal denoiser of a finite training set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyflocality.denoisers.queries import QueryDenoiser
from pyflocality.ops import global_posterior_jvp, global_posterior_mean


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
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype.
        memory_budget: Working memory, bytes or a string such as "2GB".
        precision: "exact"; or "auto", which permits errors of about 1e-3 in [-1, 1], see
            `pyflocality.ops.PosteriorOptions`.

    References:
        Karras, Aittala, Aila and Laine, Elucidating the design space of diffusion-based
        generative models, 2022, equation 57.

        De Bortoli, Convergence of denoising diffusion models under the manifold hypothesis,
        2022.
    """

    symmetric_jacobian = True

    def _denoise(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        images, options = self.data.images, self._posterior_options
        return global_posterior_mean(x, images, sigma, alpha, **options)

    def _jvp(
        self, x: Tensor, tangents: Tensor, sigma: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        images, options = self.data.images, self._posterior_options
        return global_posterior_jvp(x, tangents, images, sigma, alpha, **options)

    def _vjp(self, x: Tensor, cotangents: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        # The Jacobian is a covariance, and so symmetric.
        return self._jvp(x, cotangents, sigma, alpha)[1]

    def _queries(self, sigma: float, alpha: float) -> dict[str, Any]:
        return {}
