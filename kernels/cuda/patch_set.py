r"""Posterior means of all windows inside an image on the GPU, laid over one another."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.kernels.cuda._windows import apply_weights, scan_windows, vjp_bytes
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.reference.patch_set import windows_over


def scan(problem: PosteriorProblem, window: int) -> Tensor:
    r"""The posterior means of all windows that fit inside the image, laid over one another.

    .. math::
        \hat x_0[c, d] = \frac{1}{n_d} \sum_{q: d \in \Omega_q} \sum_i p_{q,i} \, v_i[c, d]

    with the k x k windows :math:`\Omega_q` inside the image, and :math:`n_d` of them over pixel d.

    Args:
        problem: x float32 [B, C, H, W] and images uint8 or float32 [N, C, H, W] on one GPU.
        window: Side of the window, odd or even, at most min(H, W).

    Returns:
        Means in [-1, 1], float32 [B, C, H, W].

    Raises:
        ValueError: A window larger than the image, or an image too large for a block's memory.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    height, width = problem.x.shape[2:]
    if window > min(height, width):
        raise ValueError(
            f"`window` must be at most {min(height, width)} to fit inside a {height}x{width} "
            f"image, got {window}"
        )
    stored = StoredProblem(problem)
    parts = stored.parts(vjp_bytes(stored, window))
    sums = [apply_weights(part, scan_windows(part, window), window) for _, part in parts]
    means = torch.cat(sums) / windows_over((height, width), window, sums[0])
    return (means * stored.step + stored.shift).float()
