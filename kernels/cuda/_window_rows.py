r"""Rows of the Jacobian of the window posterior mean on the GPU, for chosen output values.

Kernels: `csrc/cuda/window_rows.cu`. The distances of the chosen windows to every training image
give the weights; a weighted sum of the training images over the window gives the row. Both read
k x k pixels of an image, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from pyflocality.kernels.cuda._launch import Launch, run
from pyflocality.kernels.cuda._windows import merge_sums
from pyflocality.kernels.geometry import ceil_div
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem

_THREADS, _IMAGES_PER_BLOCK = 256, 32
_SPLITS = 64


def window_posterior_rows(
    problem: PosteriorProblem, outputs: Sequence[tuple[int, int, int]], window: int
) -> Tensor:
    r"""The derivatives of chosen values of the posterior mean with respect to the noisy image.

    .. math::
        J[m, d] = \frac{\alpha}{\sigma^2 \tau} \, [d \in \Omega_q] \,
            \mathrm{Cov}_{p_q}(v[m], v[d]), \qquad m = (c, q)

    Args:
        problem: x float32 [B, C, H, W] and images uint8 or float32 [N, C, H, W] on one GPU.
        outputs: The values m as (channel, row, column), R of them.
        window: Odd side of the window.

    Returns:
        Rows, float32 [B, R, C, H, W].

    Raises:
        ValueError: There are no outputs, or one lies outside of the image.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    shape = tuple(problem.images.shape[1:])
    if len(outputs) == 0:
        raise ValueError("`outputs` must be at least one (channel, row, column), got none")
    for output in outputs:
        if len(output) != 3 or not all(
            isinstance(place, Integral) and 0 <= place < size
            for place, size in zip(output, shape, strict=True)
        ):
            raise ValueError(
                f"`outputs` must be (channel, row, column) within {shape}, got {output}"
            )
    stored = StoredProblem(problem)
    # Distances and weights of all images, four times in double precision and twice in single; sums
    # of every split, and the merged ones twice.
    bytes_each = 40 * len(problem.images) + 4 * (_SPLITS + 4) * problem.images[0].numel()
    parts = [part for _, part in stored.parts(bytes_each)]
    rows = [
        torch.cat([_row_of_output(part, output, window) for part in parts]) for output in outputs
    ]
    return (torch.stack(rows, dim=1) * stored.slope[:, None, None, None, None]).float()


def _row_of_output(stored: StoredProblem, output: tuple[int, int, int], window: int) -> Tensor:
    """One output's row for every noisy image, in stored units, float64 [B, C, H, W]."""
    channel, row, column = output
    batch = torch.arange(len(stored.noisy), device=stored.noisy.device)
    where = torch.stack([batch, torch.full_like(batch, row), torch.full_like(batch, column)], 1)
    where = where.contiguous()
    distance = torch.cat(
        [_distances(stored, images, where, window) for images in stored.blocks()], dim=1
    ).double()
    excess = distance - distance.amin(1, keepdim=True)
    weight = torch.exp2(-excess * stored.factor.double()[:, None])
    weight /= weight.sum(1, keepdim=True)
    value = stored.problem.images[:, channel, row, column].double()
    weight *= value - (weight @ value)[:, None]

    result, first = torch.zeros_like(stored.noisy, dtype=torch.float64), 0
    for images in stored.blocks():
        own = weight[:, first : first + len(images)].float().contiguous()
        result += _weighted_sums(stored, images, where, own, window)
        first += len(images)
    return result


def _macros(images: Tensor, window: int) -> dict[str, int]:
    channels, height, width = images.shape[1:]
    return {
        "PYFLOCALITY_BYTES": int(images.dtype == torch.uint8),
        "PYFLOCALITY_CHANNELS": channels,
        "PYFLOCALITY_HEIGHT": height,
        "PYFLOCALITY_WIDTH": width,
        "PYFLOCALITY_WINDOW": window,
    }


def _distances(stored: StoredProblem, images: Tensor, where: Tensor, window: int) -> Tensor:
    """Stored distances of the windows at `where` to every image, float32 [R, n]."""
    distance = stored.noisy.new_empty(len(where), len(images))
    grid = (ceil_div(len(images), _IMAGES_PER_BLOCK), len(where), 1)
    macros = _macros(images, window)
    launch = Launch("window_rows", "window_distances", grid, _THREADS, 4 * _THREADS, macros)
    run(launch, images, len(images), stored.noisy, where, distance)
    return distance


def _weighted_sums(
    stored: StoredProblem, images: Tensor, where: Tensor, weight: Tensor, window: int
) -> Tensor:
    """Sums of the images over the windows, by weights [R, n] of zero sum: float64 [R, C, H, W]."""
    channels, height, width = images.shape[1:]
    per_split = ceil_div(len(images), _SPLITS)
    splits = ceil_div(len(images), per_split)
    partial = stored.noisy.new_zeros(splits, len(where), channels, height, width)
    values = channels * min(window, height) * min(window, width)
    grid = (ceil_div(values, _THREADS), len(where), splits)
    macros = _macros(images, window)
    launch = Launch("window_rows", "window_weighted_sums", grid, _THREADS, 0, macros)
    base = stored.centre
    run(launch, images, len(images), per_split, base, where, weight, partial)
    return merge_sums(partial)
