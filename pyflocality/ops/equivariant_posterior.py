"""Posterior mean over the patches of all images at all positions: the equivariant model."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._backends import Implementation, register, select
from pyflocality._checks import check_choice
from pyflocality._problem import float32_limits, posterior_problem
from pyflocality.ops.window_posterior import check_window
from pyflocality.reference.state import finalize

BOUNDARIES = ("circular", "broken")

register(
    "equivariant_posterior",
    {
        "cpu": Implementation(
            "pyflocality.native.posterior", "equivariant_posterior_state", float32_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.equivariant_posterior", "equivariant_posterior_state"
        ),
    },
)


def check_patch_window(window: object, height: int, width: int, boundary: str) -> int:
    """A window that the boundary rule allows for images of this size."""
    size = check_window(window, height, width)
    if boundary == "circular" and size > min(height, width):
        raise ValueError(
            f"`window` must be at most {min(height, width)}, so that a patch fits inside a "
            f"{height}x{width} image, got {size}"
        )
    return size


def equivariant_posterior_mean(
    x: Tensor,
    images: Tensor,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    boundary: str = "circular",
    temperature: float = 1.0,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""One posterior per pixel, over the patches of all images at all positions.

    .. math::
        \hat x_0[c, q] = \sum_{i, p} p_{q, (i, p)} \, v_i[c, p], \qquad
        p_q = \operatorname{softmax}_{(i, p)} \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_{c, \delta} (x[c, q + \delta] - \alpha v_i[c, p + \delta])^2 \right)

    with :math:`\delta` over a window x window square.

    `boundary="circular"`: x goes on periodically, and p is every pixel whose window fits inside
    the training image; the answer commutes with circular shifts of x. `boundary="broken"`:
    windows are cut at the border (x and v are zero beyond it), and patches come from positions
    of the same class: for an interior pixel all interior pixels, near one edge all pixels along
    it at the same depth, near a corner the same pixel only.

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        window: Side of the window in pixels, odd; at most min(H, W) for "circular" and
            2 max(H, W) - 1 for "broken".
        sigma: Noise level, a number or [B]; 0 gives the centre of the nearest patch.
        alpha: Signal coefficient, a number or [B], positive.
        boundary: "circular" or "broken".
        temperature: Divides the logits.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in x's own (half precision
            computes in float32).
        memory_budget: Working memory, bytes or a string such as "2GB".
        chunk_size: Training images at a time; None derives it from the budget. The result does
            not depend on it beyond rounding.

    Returns:
        Posterior means in [-1, 1], dtype of x, [B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The backend asked for cannot serve this call.

    References:
        Kamb and Ganguli, An analytic theory of creativity in convolutional diffusion models,
        2025 (the equivariant local score models, ELS and bbELS).
    """
    problem = posterior_problem(
        x,
        images,
        sigma,
        alpha,
        temperature=temperature,
        dtype=dtype,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
    )
    boundary = check_choice(boundary, "boundary", BOUNDARIES)
    window = check_patch_window(window, *x.shape[-2:], boundary)
    run = select("equivariant_posterior", problem.call(), backend)
    state = run(problem, window, boundary == "circular")
    # [B, H W, C] -> [B, C, H, W]
    return finalize(state).transpose(1, 2).reshape(x.shape).to(x.dtype)
