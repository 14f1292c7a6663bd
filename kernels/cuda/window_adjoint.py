r"""Posterior weights spread over whole windows on the GPU: patch sets, and transposed derivatives.

Kernels: `csrc/cuda/window_posterior.cu` for the weights' minimum and total, then
`window_adjoint.cu`, which computes the distances again and applies the weights: two passes over
the training images, and no memory for a weight per image and pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.kernels.cuda.geometry import (
    WindowPlan,
    batch_slices,
    ceil_div,
    images_per_split,
    plan_adjoint,
    window_shape,
)
from pyflocality.kernels.cuda.launch import Launch, run
from pyflocality.kernels.cuda.window_posterior import merge_sums, scan, scan_bytes
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.reference.patch_set import windows_over

_QUAD = 4


def patch_set_mean(problem: PosteriorProblem, window: int) -> Tensor:
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
    slices = batch_slices(len(problem.x), stored.budget // _bytes(stored, window))
    sums = torch.cat([_patch_set_sums(stored.part(rows), window) for rows in slices])
    means = sums / windows_over((height, width), window, sums)
    return (means * stored.step + stored.shift).float()


def window_posterior_vjp(problem: PosteriorProblem, cotangents: Tensor, window: int) -> Tensor:
    r"""The transposed derivatives of the window posterior mean at K cotangents g.

    .. math::
        (J^T g)[c, d] = \frac{\alpha}{\sigma^2 \tau} \sum_{q: d \in \Omega_q} \sum_i p_{q,i}
            \left( \sum_e g[e, q] (v_i[e, q] - \mathrm{E}_q[v_e]) \right) v_i[c, d]

    Args:
        problem: x float32 [B, C, H, W] and images uint8 or float32 [N, C, H, W] on one GPU.
        cotangents: g, [K, B, C, H, W].
        window: Odd side of the window.

    Returns:
        The derivatives of sum(g * mean) by x, float32 [K, B, C, H, W].

    Raises:
        ValueError: An image too large for a block's memory.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    stored = StoredProblem(problem)
    # New memory: the kernel may read four values at once, and a caller's may start anywhere.
    cotangents = cotangents.detach().float().clone(memory_format=torch.contiguous_format)
    pieces = []
    for rows in batch_slices(len(problem.x), stored.budget // _bytes(stored, window)):
        chosen = stored.part(rows)
        merged = scan(chosen, window)
        mean = (merged[:, 2:] / merged[:, 1:2]).float().contiguous()
        slope = chosen.slope[:, None, None, None]
        pieces.append(torch.empty_like(cotangents[:, rows]))
        for g, result in zip(cotangents, pieces[-1], strict=True):
            result.copy_(_adjoint(chosen, merged, window, g[rows], mean) * slope)
    return torch.cat(pieces, 1)


def _bytes(stored: StoredProblem, window: int) -> int:
    images = stored.problem.images
    splits = ceil_div(len(images), images_per_split(len(images)))
    return scan_bytes(stored, window) + 4 * (splits + 2) * images[0].numel()


def _patch_set_sums(stored: StoredProblem, window: int) -> Tensor:
    return _adjoint(stored, scan(stored, window), window, None, None)


def _adjoint(
    stored: StoredProblem,
    merged: Tensor,
    window: int,
    cotangents: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    """Sums over all images in stored units, float64 [B, C, H, W]."""
    minimum = merged[:, 0].float().contiguous()
    inverse = merged[:, 1].reciprocal().float().contiguous()
    # A patch set's kernel is given memory that it does not read.
    slopes = (stored.noisy, stored.noisy) if cotangents is None else (cotangents, mean)
    result: Tensor | None = None
    for images in stored.blocks():
        plan = plan_adjoint(window_shape(images, window))
        launch = adjoint_launch(plan, len(stored.noisy), len(images), cotangents is not None)
        partial = stored.noisy.new_empty(launch.grid[1], *stored.noisy.shape)
        run(
            launch,
            images.device,
            (
                *(images, len(images), images_per_split(len(images))),
                *(stored.noisy, stored.factor, minimum, inverse, *slopes, partial),
            ),
        )
        sums = merge_sums(partial)
        result = sums if result is None else result + sums
    return result


def adjoint_launch(plan: WindowPlan, batch: int, count: int, cotangent: bool) -> Launch:
    """Sizes of the pass over `count` images."""
    quads = plan.shape.height * ceil_div(plan.shape.width, _QUAD)
    splits = ceil_div(count, images_per_split(count))
    return Launch(
        "window_adjoint",
        "window_adjoint",
        (batch, splits, ceil_div(quads, plan.threads) * plan.slices),
        plan.threads,
        plan.shared_bytes,
        plan.macros | {"PYFLOCALITY_COTANGENT": int(cotangent)},
    )
