"""Operations: argument checks, choice of the backend, results.

Each operation has one file here, and a file of the same name for every backend that serves it:
`pyflocality/reference`, `pyflocality/native` (CPU), `pyflocality/kernels` (Triton).
"""

from __future__ import annotations

from pyflocality.ops.covariance import accumulate_covariance
from pyflocality.ops.equivariant_posterior import equivariant_posterior_mean
from pyflocality.ops.filtered_posterior import filtered_posterior_mean
from pyflocality.ops.global_posterior import global_posterior_jvp, global_posterior_mean
from pyflocality.ops.masked_posterior import masked_posterior_jvp, masked_posterior_mean
from pyflocality.ops.nearest import nearest_images
from pyflocality.ops.window_posterior import window_posterior_jvp, window_posterior_mean

__all__ = [
    "accumulate_covariance",
    "equivariant_posterior_mean",
    "filtered_posterior_mean",
    "global_posterior_jvp",
    "global_posterior_mean",
    "masked_posterior_jvp",
    "masked_posterior_mean",
    "nearest_images",
    "window_posterior_jvp",
    "window_posterior_mean",
]
