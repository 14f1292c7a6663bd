"""Operations: argument checks, choice of the backend, results.

Each operation has one file here, with its declaration, and a file of the same name for every
backend that serves it, in `pyflocality/reference` and `kernels/<backend>`.
"""

from __future__ import annotations

from pyflocality.ops.covariance import accumulate_covariance
from pyflocality.ops.equivariant_posterior import (
    equivariant_posterior_jvp,
    equivariant_posterior_mean,
    equivariant_posterior_vjp,
)
from pyflocality.ops.filtered_posterior import (
    filtered_posterior_jvp,
    filtered_posterior_mean,
    filtered_posterior_vjp,
)
from pyflocality.ops.global_posterior import global_posterior_jvp, global_posterior_mean
from pyflocality.ops.log_sum_exp import posterior_log_sum_exp
from pyflocality.ops.masked_posterior import (
    masked_posterior_jvp,
    masked_posterior_mean,
    masked_posterior_vjp,
)
from pyflocality.ops.nearest import nearest_images
from pyflocality.ops.patch_set import patch_set_mean
from pyflocality.ops.window_posterior import (
    window_posterior_jvp,
    window_posterior_mean,
    window_posterior_vjp,
)
from pyflocality.posterior.problem import PosteriorOptions

__all__ = [
    "PosteriorOptions",
    "accumulate_covariance",
    "equivariant_posterior_jvp",
    "equivariant_posterior_mean",
    "equivariant_posterior_vjp",
    "filtered_posterior_jvp",
    "filtered_posterior_mean",
    "filtered_posterior_vjp",
    "global_posterior_jvp",
    "global_posterior_mean",
    "masked_posterior_jvp",
    "masked_posterior_mean",
    "masked_posterior_vjp",
    "nearest_images",
    "patch_set_mean",
    "posterior_log_sum_exp",
    "window_posterior_jvp",
    "window_posterior_mean",
    "window_posterior_vjp",
]
