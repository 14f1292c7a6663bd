"""Noise schedules, and conversions between what a denoiser may predict; see `schedules`."""

from __future__ import annotations

from pyflocality.noise.schedules import (
    NO_SIGNAL,
    CosineSchedule,
    DDPMSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
    noise_from_x0,
    score_from_x0,
    v_from_x0,
    x0_from_noise,
    x0_from_v,
)

__all__ = [
    "NO_SIGNAL",
    "CosineSchedule",
    "DDPMSchedule",
    "FlowSchedule",
    "KarrasSchedule",
    "NoiseSchedule",
    "noise_from_x0",
    "score_from_x0",
    "v_from_x0",
    "x0_from_noise",
    "x0_from_v",
]
