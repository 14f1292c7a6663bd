"""Schedules given by a table of alpha^2 at whole times, and which of these a run visits."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.checks import (
    check_choice,
    check_count,
    check_positive,
    check_real,
    check_rounds,
    check_sequence,
    check_text,
    describe,
)
from pyflocality.noise.schedulers import option, table_of
from pyflocality.noise.schedules import SPACINGS, NoiseSchedule, check_times, keep

# The last entry of a table without signal at its end, as some schedulers keep it.
_CLAMPED = 2.0**-24


class Tabulated(NoiseSchedule):
    """A variance-preserving schedule with a table of alpha^2 at the times 0 .. T - 1.

    At whole times alpha_t^2 is the table's entry and sigma_t^2 = 1 - alpha_t^2. Between them
    sigma / alpha is linear in t, as in diffusers' schedulers that visit such times.
    """

    spacing: str
    # Whether there is nothing between the whole times.
    _whole = False

    @property
    @abstractmethod
    def alpha_cumprod(self) -> Tensor:
        """alpha^2 at every time: float64 [T]."""

    def timesteps(self, steps: int) -> Tensor:
        """Times of diffusers' DDIM scheduler with the `spacing` of this schedule: int64 [steps].

        | spacing | times, i = 0 .. steps - 1 | first | last |
        |---|---|---|---|
        | "leading" | (steps - 1 - i) (T // steps) | below T - T // steps | 0 |
        | "trailing" | T - i T / steps, rounded, less 1 | T - 1 | T / steps - 1 |
        | "linspace" | T - 1 .. 0 in even steps, rounded | T - 1 | 0 |

        So ten "leading" steps of T = 1000 visit 900, 800, .., 0, ten "trailing" ones 999, 899, ..,
        99. The first leading time is far from noise where T // steps is much less than T / steps:
        501 steps start at 500. A single step of "linspace" visits 0, as in diffusers.

        Raises:
            TypeError: `steps` is not a whole number.
            ValueError: `steps` is not in 1 .. T.
        """
        count, steps = len(self.alpha_cumprod), check_count(steps, "steps")
        if steps > count:
            raise ValueError(f"`steps` must be at most the schedule's {count} times, got {steps}")
        if self.spacing == "leading":
            return torch.arange(steps - 1, -1, -1, device="cpu") * (count // steps)
        # NumPy's arithmetic, so that halves are rounded as there.
        if self.spacing == "trailing":
            times = np.round(np.arange(count, 0, -count / steps)[:steps]) - 1
        else:
            times = np.linspace(0, count - 1, steps).round()[::-1]
        return torch.from_numpy(times.astype(np.int64))

    def _levels(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        last = len(self.alpha_cumprod) - 1
        times = check_times(t, 0, last if self._whole else float(last), whole=self._whole)
        table = self.alpha_cumprod.to(times.device)
        before = times.floor().long()
        alpha_squared = table[before]
        between = times != before
        if between.any():
            after = (before + 1).clamp(max=last)
            ratios = (1.0 / table - 1.0).sqrt()
            ratio = torch.lerp(ratios[before], ratios[after], times - before)
            alpha_squared = torch.where(between, 1.0 / (1.0 + ratio.square()), alpha_squared)
        return alpha_squared.sqrt(), (1.0 - alpha_squared).sqrt()


@dataclass(frozen=True)
class DDPMSchedule(Tabulated):
    """Variance-preserving schedule with linear beta (Ho, Jain & Abbeel 2020).

    `beta_t` rises linearly from `beta_start` to `beta_end` over t = 0 .. T - 1, and
    alpha_t = sqrt(prod_{s<=t} (1 - beta_s)), sigma_t = sqrt(1 - alpha_t^2), in float64 (public
    codes take the product in float32 and differ by about 1e-6).

    Attributes:
        num_timesteps: T, the number of times; t is a whole number in 0 .. T - 1.
        beta_start: First beta, in (0, 1).
        beta_end: Last beta, in [beta_start, 1).
        spacing: Which times a run of few steps visits: "leading", "trailing" or "linspace", see
            `timesteps`.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range.
    """

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: str = "leading"

    _whole = True

    def __post_init__(self) -> None:
        """Check the fields, and keep them as plain numbers."""
        check_choice(self.spacing, "spacing", SPACINGS)
        count = check_rounds(self.num_timesteps, "num_timesteps")
        start = check_positive(self.beta_start, "beta_start")
        end = check_positive(self.beta_end, "beta_end")
        if not start <= end < 1:
            raise ValueError(
                "`beta_end` must lie in [beta_start, 1), "
                f"got {describe(self.beta_end)} with `beta_start` {describe(self.beta_start)}"
            )
        keep(self, num_timesteps=count, beta_start=start, beta_end=end)

    @cached_property
    def alpha_cumprod(self) -> Tensor:
        """alpha^2 at every time: float64 [T]."""
        ends, count = (self.beta_start, self.beta_end), self.num_timesteps
        betas = torch.linspace(*ends, count, dtype=torch.float64, device="cpu")
        return torch.cumprod(1.0 - betas, dim=0)


@dataclass(frozen=True)
class TableSchedule(Tabulated):
    """A variance-preserving schedule given by its table of alpha^2, as diffusers keeps them.

    Attributes:
        values: alpha^2 at the times 0 .. T - 1, falling, in [0, 1). The last may be 0 (zero
            terminal SNR), or 2^-24 in its place, as some schedulers have it, whatever the entry
            before it is.
        spacing: Which times a run of few steps visits, as for `DDPMSchedule`.

    Raises:
        TypeError: `values` is not a sequence of numbers.
        ValueError: There is no value, or they do not fall within [0, 1); or `spacing` is unknown.
    """

    values: tuple[float, ...]
    spacing: str = "leading"

    def __post_init__(self) -> None:
        """Check the fields."""
        given = check_sequence(self.values, "values", "a sequence of numbers")
        keep(self, values=tuple(check_real(v, "values") for v in given))
        check_choice(self.spacing, "spacing", SPACINGS)
        fault = _table_fault(self.alpha_cumprod)
        if fault is not None:
            raise ValueError(
                f"`values` must fall within [0, 1), got {describe(self.values)}: {fault}"
            )

    @classmethod
    def of(cls, scheduler: object, name: str = "scheduler") -> TableSchedule:
        """The schedule of a diffusers scheduler, or of a schedule of whole times of ours.

        Args:
            scheduler: Anything with the table as `alphas_cumprod` (diffusers) or `alpha_cumprod`;
                the spacing is its `config.timestep_spacing`, or `spacing`.
            name: Name of the argument in error messages.

        Raises:
            TypeError: It has neither.
            ValueError: The table does not fall within [0, 1), or its noise is not that of the
                table (`use_flow_sigmas`).
        """
        table = table_of(scheduler, check_text(name, "name"))
        fault = _table_fault(table)
        if fault is not None:
            raise ValueError(
                f"`{name}` must have a table of alpha^2 that falls within [0, 1), that of this "
                f"{type(scheduler).__name__} does not: {fault}"
            )
        spacing = getattr(scheduler, "spacing", option(scheduler, "timestep_spacing"))
        return cls(tuple(table.tolist()), spacing if spacing in SPACINGS else "leading")

    @cached_property
    def alpha_cumprod(self) -> Tensor:
        """alpha^2 at every time: float64 [T]."""
        return torch.tensor(self.values, dtype=torch.float64, device="cpu")


def _table_fault(values: Tensor) -> str | None:
    """What is wrong with a table of alpha^2, float64 [T], or None.

    The entries fall. The last, where there is no signal, may be clamped to 2^-24, which is more
    than the entries before it may be.
    """
    if values.ndim != 1 or len(values) == 0:
        return "it has no entries"
    if not (values[0] < 1 and values[-1] >= 0):
        return f"it goes from {values[0].item():g} to {values[-1].item():g}"
    falling = values.diff() < 0
    if len(falling) > 0 and values[-1] == _CLAMPED:
        falling[-1] = True
    if not falling.all():
        at = int((~falling).nonzero()[0])
        return (
            f"it does not fall from entry {at} to {at + 1}, which are {values[at].item():g} and "
            f"{values[at + 1].item():g}"
        )
    return None
