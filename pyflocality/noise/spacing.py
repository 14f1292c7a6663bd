"""Which times of a schedule a run of few steps visits: the three ways of diffusers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.checks import check_count

SPACINGS = ("leading", "trailing", "linspace")


def spaced_times(count: int, steps: int, spacing: str) -> Tensor:
    """Some of the whole times 0 .. T - 1, from noise to data, as diffusers' DDIM scheduler has it.

    | spacing | times, i = 0 .. steps - 1 | first | last |
    |---|---|---|---|
    | "leading" | (steps - 1 - i) (T // steps) | below T - T // steps | 0 |
    | "trailing" | T - i T / steps, rounded, less 1 | T - 1 | T / steps - 1 |
    | "linspace" | T - 1 .. 0 in even steps, rounded | T - 1 | 0 |

    A single step of "linspace" visits 0, as in diffusers.

    Args:
        count: Number of times T.
        steps: Number of times to visit.
        spacing: One of `SPACINGS`.

    Returns:
        Times int64 [steps].

    Raises:
        TypeError: `steps` is not a whole number.
        ValueError: `steps` is not in 1 .. T.
    """
    steps = check_count(steps, "steps")
    if steps > count:
        raise ValueError(f"`steps` must be at most the schedule's {count} times, got {steps}")
    if spacing == "leading":
        return torch.arange(steps - 1, -1, -1, device="cpu") * (count // steps)
    # NumPy's arithmetic, so that halves are rounded as there.
    if spacing == "trailing":
        times = np.round(np.arange(count, 0, -count / steps)[:steps]) - 1
    else:
        times = np.linspace(0, count - 1, steps).round()[::-1]
    return torch.from_numpy(times.astype(np.int64))
