"""The optimal denoiser of a finite training set."""

from __future__ import annotations

from torch import Tensor

from pyflocality.denoisers.base import PosteriorDenoiser
from pyflocality.ops import global_posterior_mean


class OptimalDenoiser(PosteriorDenoiser):
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

    References:
        Karras, Aittala, Aila and Laine, Elucidating the design space of diffusion-based
        generative models, 2022, equation 57.

        De Bortoli, Convergence of denoising diffusion models under the manifold hypothesis,
        2022.
    """

    def _denoise(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        return global_posterior_mean(
            x, self.data.images, sigma, alpha, temperature=self.temperature, **self._options
        )
