"""Noise schedules.

Every noisy image of the library is

    x = alpha * x0 + sigma * noise,        noise ~ N(0, I),

and a schedule is a map from a time `t` to the pair (alpha, sigma), together with the times that
a sampler visits on its way from noise to data:

| schedule | time t | alpha | sigma |
|---|---|---|---|
| `DDPMSchedule` | 0, 1, .., T - 1 | sqrt(prod_{s<=t} (1 - beta_s)) | sqrt(1 - alpha^2) |
| `CosineSchedule` | [0, 1] | cos(pi t / 2.016) | sin(pi t / 2.016) |
| `KarrasSchedule` | the noise level itself | 1 | t |
| `FlowSchedule` | [0, 1], data at 1 | t | 1 - t |
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from pyflocality._support.checks import (
    REAL_DTYPES,
    NoiseLevel,
    check_choice,
    check_positive,
    check_real,
    check_rounds,
    check_tensor,
    describe,
)

# Which times a run of few steps visits, as diffusers has it.
SPACINGS = ("leading", "trailing", "linspace")
_LARGEST = torch.finfo(torch.float64).max
# alpha that stands for none, as at the end of schedules of zero terminal SNR: beside noise of
# standard deviation 1 it is below the rounding of float32.
NO_SIGNAL = 2.0**-24


class NoiseSchedule(ABC):
    """A map from time to (alpha, sigma), and the times a sampler visits.

    Subclasses give `timesteps` and `_levels`, and `_time_at`, its inverse, where networks that
    are told such times are to be denoisers; schedules are immutable and compare by value.
    """

    @overload
    def __call__(self, t: float) -> NoiseLevel[float]: ...

    @overload
    def __call__(self, t: Tensor) -> NoiseLevel[Tensor]: ...

    def __call__(self, t: float | Tensor) -> NoiseLevel[float] | NoiseLevel[Tensor]:
        """The noise level at time t.

        Denoisers take it whole, `denoiser(x, schedule(t))`, or its coefficients in the other
        order.

        Args:
            t: A number, or a tensor of any shape [...] of times.

        Returns:
            The pair (alpha, sigma): Python floats for a number; for a tensor float64 tensors
            [...] on its device.

        Raises:
            TypeError: `t` is not a real number or tensor (a whole one for `DDPMSchedule`).
            ValueError: `t` is outside the schedule's range.
        """
        alpha, sigma = self._levels(t)
        if isinstance(t, Tensor):
            return NoiseLevel(alpha, sigma)
        return NoiseLevel(alpha.item(), sigma.item())

    @property
    def final(self) -> NoiseLevel[float]:
        """The clean end of every sampling run: alpha 1, sigma 0."""
        return NoiseLevel(1.0, 0.0)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a sampler starts from."""
        return 1.0

    @abstractmethod
    def timesteps(self, steps: int) -> Tensor:
        """Times of the denoiser calls, from noise to data.

        The clean end `final` follows the last of them and is not among them.

        Args:
            steps: Number of times, at least 1.

        Returns:
            Times [steps].

        Raises:
            TypeError: `steps` is not a whole number.
            ValueError: `steps` is below 1, or more than the schedule has times.
        """

    @abstractmethod
    def _levels(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Check t; (alpha, sigma) as float64 tensors of its shape."""

    def _time_at(self, ratio: Tensor) -> Tensor:
        """The time whose sigma / alpha is the given one; see `time_at`."""
        raise AttributeError(f"{type(self).__name__} does not define _time_at")


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """The cosine schedule of Kamb & Ganguli (ICML 2025): beta = 1 - cos^2(pi t / (2 * 1.008)).

    alpha = sqrt(1 - beta) = cos(pi t / 2.016) and sigma = sqrt(beta) = sin(pi t / 2.016), for t
    in [0, 1]. alpha stays above 0.012, so that t = 1 is not quite pure noise.

    Attributes:
        spacing: Which times a run visits: "leading", "trailing" or "linspace", see `timesteps`.

    Raises:
        ValueError: `spacing` is none of these.
    """

    spacing: str = "leading"

    def __post_init__(self) -> None:
        """Check the field."""
        check_choice(self.spacing, "spacing", SPACINGS)

    def timesteps(self, steps: int) -> Tensor:
        """Times from noise to data: float64 [steps].

        "leading": i / (steps + 1) for i = steps .. 1. A published run of 20 steps visits the 19
        times 0.95, 0.90, .., 0.05: `steps` 19 here. "trailing": i / steps for i = steps .. 1, from
        1 on. "linspace": from 1 to 1 / (steps + 1) in even steps.

        Raises:
            TypeError: `steps` is not a whole number.
            ValueError: `steps` is below 1.
        """
        steps = check_rounds(steps, "steps")
        if self.spacing == "linspace":
            last = 1 / (steps + 1)
            return torch.linspace(1.0, last, steps, dtype=torch.float64, device="cpu")
        intervals = steps if self.spacing == "trailing" else steps + 1
        return torch.arange(steps, 0, -1, dtype=torch.float64, device="cpu") / intervals

    def _levels(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        angle = check_times(t, 0.0, 1.0) * (math.pi / (2 * 1.008))
        return angle.cos(), angle.sin()

    def _time_at(self, ratio: Tensor) -> Tensor:
        return (ratio.atan() * (2 * 1.008 / math.pi)).clamp(max=1.0)


@dataclass(frozen=True)
class KarrasSchedule(NoiseSchedule):
    """The variance-exploding schedule of EDM (Karras et al. 2022): alpha = 1, sigma = t.

    Attributes:
        sigma_min: Last noise level that a sampler visits, above 0.
        sigma_max: First noise level, above `sigma_min`; also the standard deviation of the
            starting noise.
        rho: Bend of the noise levels, above 0: 1 spaces them evenly, more puts more of them at
            small noise.

    Any time in [0, infinity) has its (alpha, sigma), also outside [sigma_min, sigma_max].

    Raises:
        TypeError: A field is not a number.
        ValueError: A field is out of range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        """Check the fields."""
        low, high, rho = (
            check_positive(getattr(self, name), name) for name in ("sigma_min", "sigma_max", "rho")
        )
        if not low < high:
            raise ValueError(
                f"`sigma_max` must be above `sigma_min` {low!r}, got {describe(self.sigma_max)}"
            )
        # The roots of the ends must be two numbers that float64 can hold.
        ends = [math.log(level) / rho for level in (low, high)]
        if max(map(abs, ends)) > 700 or ends[1] - ends[0] < 1e-12:
            raise ValueError(
                "`rho` must leave `sigma_min` and `sigma_max` apart as powers of 1 / rho, got "
                f"{describe(self.rho)}"
            )
        keep(self, sigma_min=low, sigma_max=high, rho=rho)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the starting noise: `sigma_max`."""
        return float(self.sigma_max)

    def timesteps(self, steps: int) -> Tensor:
        """Noise levels evenly spaced in sigma^(1/rho): float64 [steps].

        sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
        for i = 0 .. steps - 1 (equation 5 of the paper); a single step visits `sigma_max`.

        Raises:
            TypeError: `steps` is not a whole number.
            ValueError: `steps` is below 1.
        """
        steps = check_rounds(steps, "steps")
        ends = float(self.sigma_max), float(self.sigma_min)
        high, low = (level ** (1 / float(self.rho)) for level in ends)
        roots = torch.linspace(high, low, steps, dtype=torch.float64, device="cpu")
        levels = roots ** float(self.rho)
        # The power of the root is off by a rounding error; the ends are known.
        levels[-1], levels[0] = ends[1], ends[0]
        return levels

    def _levels(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        sigma = check_times(t, 0.0, _LARGEST).clone()
        return torch.ones_like(sigma), sigma

    def _time_at(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """The straight path of flow matching (Lipman et al. 2023): alpha = t, sigma = 1 - t.

    Time runs from noise at t = 0 to data at t = 1. At t = 0 alpha is 0 and no denoiser has an
    answer, so sampling starts at `t_min`.

    Attributes:
        t_min: First time that a sampler visits, in (0, 1).

    Raises:
        TypeError: `t_min` is not a number.
        ValueError: `t_min` is not in (0, 1).
    """

    t_min: float = 1e-3

    def __post_init__(self) -> None:
        """Check the field, and keep it as a plain number."""
        t_min = check_real(self.t_min, "t_min", low=0.0, high=1.0, above=True, below=True)
        keep(self, t_min=t_min)

    def timesteps(self, steps: int) -> Tensor:
        """Times t_min + i (1 - t_min) / steps for i = 0 .. steps - 1: float64 [steps].

        Raises:
            TypeError: `steps` is not a whole number.
            ValueError: `steps` is below 1.
        """
        steps = check_rounds(steps, "steps")
        times = torch.linspace(float(self.t_min), 1.0, steps + 1, dtype=torch.float64, device="cpu")
        return times[:-1]

    def _levels(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        alpha = check_times(t, 0.0, 1.0).clone()
        return alpha, 1.0 - alpha

    def _time_at(self, ratio: Tensor) -> Tensor:
        return 1.0 / (1.0 + ratio)


def time_at(schedule: NoiseSchedule, ratio: Tensor) -> Tensor:
    """The time at which a schedule has a given noise level: its inverse.

    Args:
        schedule: A schedule that `check_invertible` lets pass.
        ratio: Noise levels sigma / alpha, at least 0, float64 [B].

    Returns:
        Times [B]: float64; for a table int64, the time with the nearest level in
        log(sigma / alpha), the first or the noisiest where the level lies outside the table; an
        end without signal (alpha 0) counts as one more step beyond the last level. The cosine
        schedule's last time is 1: noisier levels get that, too.
    """
    alpha_squared = getattr(schedule, "alpha_cumprod", None)
    if alpha_squared is None:
        return schedule._time_at(ratio)
    # A clamped end may be less noisy than the times before it.
    alpha_squared = alpha_squared.to(ratio.device)
    table, times = ((1.0 - alpha_squared) / alpha_squared).sqrt().sort()
    # Halfway between two levels in their logarithm.
    halfway = (table[1:] * table[:-1]).sqrt()
    if len(table) > 2:
        last = table[-2] * (table[-2] / table[-3]).sqrt()
        halfway[-1] = torch.where(table[-1].isinf(), last, halfway[-1])
    return times[torch.searchsorted(halfway, ratio.contiguous())]


def check_invertible(schedule: object, name: str) -> NoiseSchedule:
    """A schedule that `time_at` knows."""
    if isinstance(schedule, NoiseSchedule) and (
        hasattr(schedule, "alpha_cumprod") or type(schedule)._time_at is not NoiseSchedule._time_at
    ):
        return schedule
    raise TypeError(
        f"`{name}` must be a schedule of this library or one with a table `alpha_cumprod`, got "
        f"{describe(schedule)}"
    )


def keep(schedule: object, **fields: object) -> None:
    """Set fields of a frozen dataclass."""
    for name, value in fields.items():
        object.__setattr__(schedule, name, value)


def check_times(
    t: float | Tensor, low: float, high: float, *, whole: bool = False, name: str = "t"
) -> Tensor:
    """Times as a float64 tensor (int64 where they are whole), all finite and in [low, high]."""
    dtype = torch.int64 if whole else torch.float64
    if isinstance(t, Tensor):
        is_time = check_tensor(t, name).dtype in REAL_DTYPES and not (
            whole and t.is_floating_point()
        )
    else:
        is_time = isinstance(t, numbers.Integral if whole else numbers.Real)
    if not is_time or isinstance(t, bool):
        kind = "whole number" if whole else "real number"
        raise TypeError(f"`{name}` must be a {kind} or a tensor of them, got {describe(t)}")
    if isinstance(t, Tensor):
        times = t.to(dtype)
        inside = bool(((times >= low) & (times <= high)).all())
    else:
        # Before it becomes a tensor, which could not hold the largest.
        inside = low <= t <= high
    if not inside:
        bounds = f"[{low}, infinity)" if high == _LARGEST else f"[{low}, {high}]"
        raise ValueError(f"`{name}` must lie in {bounds}, got {describe(t)}")
    number = int if whole else float
    return times if isinstance(t, Tensor) else torch.tensor(number(t), dtype=dtype, device="cpu")
