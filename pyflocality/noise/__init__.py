"""Noise levels, their schedules, and conversions between what a network may predict."""

from __future__ import annotations

from pyflocality._support.checks import NoiseLevel
from pyflocality.noise.conversions import (
    noise_from_x0,
    score_from_x0,
    v_from_x0,
    x0_from_noise,
    x0_from_v,
)
from pyflocality.noise.schedules import (
    NO_SIGNAL,
    CosineSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
)
from pyflocality.noise.tables import DDPMSchedule

__all__ = [
    "NO_SIGNAL",
    "CosineSchedule",
    "DDPMSchedule",
    "FlowSchedule",
    "KarrasSchedule",
    "NoiseLevel",
    "NoiseSchedule",
    "noise_from_x0",
    "score_from_x0",
    "v_from_x0",
    "x0_from_noise",
    "x0_from_v",
]
