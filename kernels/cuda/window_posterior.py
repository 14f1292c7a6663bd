"""Posterior means over square windows of odd side on the GPU, and their derivatives (`_windows`).

Noisy images are float32 [B, C, H, W], images uint8 or float32 [N, C, H, W], all on one GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.kernels.cuda._windows import apply_weights, scan_bytes, scan_windows, vjp_bytes
from pyflocality.kernels.geometry import TANGENTS
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, about_means, tangent_values, uncentred


def scan(problem: PosteriorProblem, window: int) -> PosteriorState:
    """Scan with a query per pixel, as the reference.

    Raises:
        ValueError: Images of more than 256 rows or columns.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    stored = StoredProblem(problem)
    parts = stored.parts(scan_bytes(stored, window))
    merged = torch.cat([scan_windows(part, window) for _, part in parts])
    minimum, total, weighted = merged[:, 0], merged[:, 1], merged[:, 2:].transpose(1, 2)
    return PosteriorState(
        stored.distances(minimum).float(), total.float(), stored.values(weighted, total).float()
    )


def jvp(problem: PosteriorProblem, tangents: Tensor, window: int) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W], in float64, as the reference.

    Two tangents cost a pass of about twice the work of none; more are taken two at a time.

    Raises:
        ValueError: Images of more than 256 rows or columns.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    stored = StoredProblem(problem)
    # [B, K, C, H, W], as the kernel reads them.
    directions = tangents.detach().to(torch.float32).transpose(0, 1)
    if len(tangents) == 0:
        # The kernel without tangents does not count values from their centres.
        directions = torch.zeros_like(problem.x)[:, None]
    at_once = min(TANGENTS, directions.shape[1])
    parts = stored.parts(scan_bytes(stored, window, at_once))
    states = [_jvp(part, directions[rows], window) for rows, part in parts]
    minimum, total, weighted = map(torch.cat, zip(*states, strict=True))
    sums = tangent_values(problem.images.shape[1], len(tangents))
    return PosteriorState(minimum, total, weighted[..., :sums])


def _jvp(stored: StoredProblem, tangents: Tensor, window: int) -> PosteriorState:
    channels, step = stored.noisy.shape[1], stored.step
    states = []
    for first in range(0, tangents.shape[1], TANGENTS):
        # New memory: the kernel may read four values at once, and a caller's may start anywhere.
        group = tangents[:, first : first + TANGENTS].clone(memory_format=torch.contiguous_format)
        states.append(scan_windows(stored, window, group))
    # After the minimum: weights and weighted values, then the same of each tangent's products.
    sums = [state[:, 1:].unflatten(1, (-1, 1 + channels)) for state in states]
    minimum, total, values = states[0][:, 0], sums[0][:, 0, 0], sums[0][:, 0, 1:]
    # Each group has a total of its own, rounded in its own way.
    products = torch.cat([s[:, 1:] * (total / s[:, 0, 0])[:, None, None] for s in sums], 1)
    inner, cross = products[:, :, 0], products[:, :, 1:].flatten(1, 2)
    weighted = torch.cat([values * step, inner * step, cross * step**2], 1).transpose(1, 2)
    origin = (stored.centre.double() * step + stored.shift).flatten(2).transpose(1, 2)
    state = PosteriorState(stored.distances(minimum), total, weighted)
    return uncentred(about_means(state, channels), origin)


def vjp(problem: PosteriorProblem, cotangents: Tensor, window: int) -> Tensor:
    r"""The transposed derivatives of the window posterior mean at K cotangents g.

    .. math::
        (J^T g)[c, d] = \frac{\alpha}{\sigma^2 \tau} \sum_{q: d \in \Omega_q} \sum_i p_{q,i}
            \left( \sum_e g[e, q] (v_i[e, q] - \mathrm{E}_q[v_e]) \right) v_i[c, d]

    Returns:
        The derivatives of sum(g * mean) with respect to x, float32 [K, B, C, H, W].

    Raises:
        ValueError: An image too large for a block's memory.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    stored = StoredProblem(problem)
    # New memory: the kernel may read four values at once, and a caller's may start anywhere.
    cotangents = cotangents.detach().float().clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(cotangents)
    for rows, part in stored.parts(vjp_bytes(stored, window)):
        state = scan_windows(part, window)
        mean = (state[:, 2:] / state[:, 1:2]).float().contiguous()
        for g, target in zip(cotangents[:, rows], result[:, rows], strict=True):
            sums = apply_weights(part, state, window, g, mean)
            target.copy_(sums * part.slope[:, None, None, None])
    return result
