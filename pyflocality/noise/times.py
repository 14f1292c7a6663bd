"""The time at which a schedule has a given noise level: the inverse of a schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflocality._support.checks import describe
from pyflocality.noise.schedules import (
    CosineSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
)


def time_at(schedule: NoiseSchedule, ratio: Tensor) -> Tensor:
    """The time whose sigma / alpha is the given one.

    Args:
        schedule: A `CosineSchedule`, `KarrasSchedule` or `FlowSchedule`, or a schedule of whole
            times with a table `alpha_cumprod` of alpha^2, such as `DDPMSchedule`.
        ratio: Noise levels sigma / alpha, at least 0, float64 [B].

    Returns:
        Times [B]: float64; for a table int64, the time with the nearest level in
        log(sigma / alpha), the first or the noisiest where the level lies outside the table; an
        end without signal (alpha 0) counts as one more step beyond the last level. The cosine
        schedule's last time is 1: noisier levels get that, too.
    """
    if isinstance(schedule, CosineSchedule):
        return (ratio.atan() * (2 * 1.008 / math.pi)).clamp(max=1.0)
    if isinstance(schedule, KarrasSchedule):
        return ratio
    if isinstance(schedule, FlowSchedule):
        return 1.0 / (1.0 + ratio)
    alpha_squared = schedule.alpha_cumprod.to(ratio.device)
    # A clamped end may be less noisy than the times before it.
    table, times = ((1.0 - alpha_squared) / alpha_squared).sqrt().sort()
    # Halfway between two levels in their logarithm.
    halfway = (table[1:] * table[:-1]).sqrt()
    if len(table) > 2:
        last = table[-2] * (table[-2] / table[-3]).sqrt()
        halfway[-1] = torch.where(table[-1].isinf(), last, halfway[-1])
    return times[torch.searchsorted(halfway, ratio.contiguous())]


def check_invertible(schedule: object, name: str) -> NoiseSchedule:
    """A schedule that `time_at` knows."""
    known = isinstance(schedule, (CosineSchedule, KarrasSchedule, FlowSchedule))
    if known or (isinstance(schedule, NoiseSchedule) and hasattr(schedule, "alpha_cumprod")):
        return schedule
    raise TypeError(
        f"`{name}` must be a schedule of this library or one with a table `alpha_cumprod`, got "
        f"{describe(schedule)}"
    )
