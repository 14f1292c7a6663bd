"""Samplers: from noise to images by repeated denoising.

A denoiser gives x0 = denoiser(x, sigma, alpha), its estimate of the clean image in
x = alpha x0 + sigma noise. A sampler moves x from one noise level (alpha, sigma) to the next,
cleaner one (alpha', sigma'), along the schedule's times down to the clean end (1, 0). With

    eps = (x - alpha x0) / sigma

the noise that x0 implies, all samplers are variations of x' = alpha' x0 + sigma' eps:

| sampler | step | source |
|---|---|---|
| `DDIM` | part of eps replaced by fresh noise (eta); keeps eps of the unclipped x0 | Song 2021 |
| `Euler` | one Euler step of the probability-flow equation | Song 2021, Karras 2022 |
| `Heun` | the same with a second-order correction: two denoiser calls | Karras 2022 |

In the scaled state y = x / alpha and the scaled noise level s = sigma / alpha the
probability-flow equation is dy/ds = (y - x0) / s = eps for every schedule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.checks import (
    NoiseLevel,
    as_pair,
    check_batch,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_float_tensor,
    check_generator,
    check_magnitude,
    check_one_level,
    check_real,
    check_sequence,
    check_tensor,
    check_within_memory,
    describe,
)
from pyflocality._support.progress import progress_bar
from pyflocality.noise import NO_SIGNAL, DDPMSchedule, NoiseSchedule

DenoiserFunction = Callable[[Tensor, float, float], Tensor]
Level = NoiseLevel[float] | tuple[float, float]
Prediction = Callable[[Tensor, Level], tuple[Tensor, Tensor]]

# Share of signal in the variance from which on a starting state is more than noise.
_MOST_SIGNAL = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class SampleResult:
    """Images made by `sample`, and the way there.

    Attributes:
        images: Final images [n, C, H, W].
        x_t: States [steps, n, C, H, W]: the x at the start of each step; [0, n, C, H, W] where no
            trajectory was kept.
        x0: The denoiser's answers to them, of the same shape, never clipped.
        timesteps: Time of each step [steps], from noise to data.
    """

    images: Tensor
    x_t: Tensor
    x0: Tensor
    timesteps: Tensor

    def __repr__(self) -> str:
        """Shapes instead of values."""
        return f"SampleResult(images={list(self.images.shape)}, steps={len(self.timesteps)})"


class Sampler:
    """One step from a noise level to the next, cleaner one; a subclass defines `_step`."""

    @property
    def stochastic(self) -> bool:
        """Whether `step` needs fresh noise."""
        return False

    def step(
        self,
        denoiser: DenoiserFunction,
        x: Tensor,
        level: Level,
        next_level: Level,
        *,
        clip: bool = True,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Move x from `level` to `next_level`.

        Args:
            denoiser: Function (x, sigma, alpha) -> x0.
            x: State [B, C, H, W] at `level`.
            level: The level (alpha, sigma) of x, alpha above 0.
            next_level: The level (alpha', sigma') to go to, sigma' / alpha' at most sigma / alpha.
            clip: Clip the denoiser's answers to [-1, 1] before they are used.
            noise: Standard normal noise [B, C, H, W]; needed where the sampler is `stochastic`.

        Returns:
            The state at `next_level` [B, C, H, W], and the denoiser's answer at x as it came.

        Raises:
            TypeError: The denoiser returned no tensor, or a level is (sigma, alpha).
            ValueError: The denoiser returned another shape than that of x.
        """
        clip = _check_step(denoiser, x, level, next_level, clip, noise)

        def predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            x0 = _predict(denoiser, x, level)
            return x0, x0.clamp(-1.0, 1.0) if clip else x0

        return self._step(predict, x, level, next_level, noise)

    def _step(
        self, predict: Prediction, x: Tensor, level: Level, next_level: Level, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A step with checked arguments.

        `predict(x, level)` is the denoiser's answer, as it came and as it is to be used.
        """
        raise AttributeError(f"{type(self).__name__} does not define _step")


@dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models (Song, Meng & Ermon 2021), as in diffusers.

        x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise
        s  = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)

    With `clip`, x0 is clipped to [-1, 1] but eps stays that of the unclipped x0. The general s
    is that of variance-preserving schedules in the paper and holds for all others: s^2 / eta^2
    is the variance of x' given x and x0. With eta = 0 and without clipping a step is that of
    `Euler`.

    Attributes:
        eta: Share of fresh noise in [0, 1]: 0 deterministic, 1 ancestral sampling (DDPM).

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is not in [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        """Check the field."""
        object.__setattr__(self, "eta", check_real(self.eta, "eta", low=0.0, high=1.0))

    @property
    def stochastic(self) -> bool:
        """Whether `step` needs fresh noise: eta above 0."""
        return self.eta > 0

    def _step(
        self, predict: Prediction, x: Tensor, level: Level, next_level: Level, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.stochastic and noise is None:
            raise ValueError(f"`noise` must be given for eta {self.eta!r}, got None")
        (alpha, sigma), (next_alpha, next_sigma) = level, next_level
        x0, used = predict(x, level)
        eps = _implied_noise(x, x0, level)
        mean = next_alpha * used
        if noise is None or not self.stochastic or next_sigma == 0:
            return mean + next_sigma * eps, x0
        # Levels a rounding error apart must not give a negative share.
        fresh = self.eta**2 * max(0.0, 1 - (alpha * next_sigma / (next_alpha * sigma)) ** 2)
        return mean + next_sigma * ((1 - fresh) ** 0.5 * eps + fresh**0.5 * noise), x0


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler steps of the probability-flow equation dy/ds = (y - x0) / s.

    y' = y + (s' - s) (y - x0) / s with y = x / alpha and s = sigma / alpha, which is
    x' = alpha' x0 + sigma' eps. With `clip`, the clipped x0 stands in eps as well: that is where
    it differs from `DDIM` with eta = 0. No fresh noise is used.
    """

    def _step(
        self, predict: Prediction, x: Tensor, level: Level, next_level: Level, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x0, used = predict(x, level)
        next_alpha, next_sigma = next_level
        return next_alpha * used + next_sigma * _implied_noise(x, used, level), x0


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun steps of the probability-flow equation (Karras et al. 2022, algorithm 1).

    An Euler step to x', then y' = y + (s' - s) (eps + eps') / 2 with eps' the slope found at x'
    by a second denoiser call. The step to sigma' = 0 stays an Euler step, so `steps` steps cost
    2 * steps - 1 denoiser calls. With `clip`, both answers are clipped wherever they are used.
    The error of a run falls with the square of the step size. No fresh noise is used.
    """

    def _step(
        self, predict: Prediction, x: Tensor, level: Level, next_level: Level, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x0, used = predict(x, level)
        eps = _implied_noise(x, used, level)
        (alpha, sigma), (next_alpha, next_sigma) = level, next_level
        euler = next_alpha * used + next_sigma * eps
        if next_sigma == 0:
            return euler, x0
        next_eps = _implied_noise(euler, predict(euler, next_level)[1], next_level)
        # alpha' (s' - s), the factor of a slope of y in x'.
        stride = next_sigma - next_alpha * sigma / alpha
        return euler + 0.5 * stride * (next_eps - eps), x0


SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIM, "euler": Euler, "heun": Heun}


def sample(
    denoiser: DenoiserFunction,
    n: int | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    steps: int = 10,
    sampler: str | Sampler = "ddim",
    x_T: Tensor | None = None,  # noqa: N803  (the field's name for the starting noise)
    generator: torch.Generator | None = None,
    clip: bool = True,
    progress: bool = True,
    batch_size: int | None = None,
    trajectory: bool = True,
) -> SampleResult:
    """Generate images from noise.

    The last step goes to the clean end (1, 0), where DDIM and Euler give the last x0 itself
    (clipped if `clip`). The result does not depend on `batch_size` as far as the denoiser's
    answers do not. No gradients are recorded.

    Args:
        denoiser: Any function (x, sigma, alpha) -> x0 of x [B, C, H, W] and two numbers, such as
            the denoisers of this library. Its attributes `image_shape` (C, H, W) and `device`
            are needed where `x_T` is not given.
        n: Number of images: by default those of `x_T`, or 8.
        schedule: Noise schedule; by default `DDPMSchedule()`.
        steps: Number of steps; each calls the denoiser once (`Heun` twice, but for the last).
        sampler: `"ddim"`, `"euler"`, `"heun"` or an instance such as `DDIM(eta=1.0)`.
        x_T: State [n, C, H, W] at the schedule's first time. By default
            `schedule.init_noise_sigma` times standard normal noise in float32.
        generator: Source of all randomness; drawn on its own device, in float32 whatever the
            dtype, so that a seed means the same noise everywhere. By default torch's global
            generator of the denoiser's device.
        clip: Clip x0 to [-1, 1] where a step uses it; see the samplers.
        progress: Show a progress bar on standard error.
        batch_size: Images per denoiser call; by default all n. A denoiser of this library reads
            its training set anew in every call, so larger batches share passes over it.
        trajectory: Keep the states and answers of all steps. Without, a run holds two states
            [n, C, H, W], fresh noise where the sampler takes any, and what a step of one batch
            takes, whatever the number of steps. The images are the same.

    Returns:
        Images, states, answers and times; float64 if `x_T` or the denoiser's answers are, else
        float32.

    Raises:
        TypeError: An argument has the wrong type, or the denoiser returned no tensor.
        ValueError: An argument has a wrong shape or value, `steps` is more than the schedule
            has, or the denoiser returned a wrong shape.

    Warns:
        UserWarning: The schedule's first time is not near pure noise, which the state drawn for
            it is; with leading spacing also where `x_T` is given.
    """
    schedule, sampler = _check_method(denoiser, schedule, sampler, generator)
    clip, progress = check_flag(clip, "clip"), check_flag(progress, "progress")
    trajectory = check_flag(trajectory, "trajectory")
    if batch_size is not None:
        batch_size = check_count(batch_size, "batch_size")
    timesteps, levels = levels_of_run(schedule, steps)
    state = _starting_state(denoiser, n, schedule, x_T, generator)
    check_magnitude(state, float(levels[0][0]), "x_T")
    if x_T is None or getattr(schedule, "spacing", None) == "leading":
        _warn_of_signal(schedule, timesteps, levels[0])
    n, steps = len(state), len(timesteps)
    batch_size = n if batch_size is None else min(batch_size, n)
    # The state and the one that follows; the states and the answers of all steps.
    check_within_memory(n, 2 * state[:1].nbytes, "n", state.device)
    if trajectory:
        check_within_memory(steps, 2 * state.nbytes, "steps", state.device)

    states = state.new_empty((steps if trajectory else 0, *state.shape))
    answers, following, noise = torch.empty_like(states), state, None
    visits = [(i, slice(k, k + batch_size)) for i in range(steps) for k in range(0, n, batch_size)]
    with torch.no_grad():
        for i, rows in progress_bar(visits, description="sampling", enabled=progress):
            if rows.start == 0:
                # What the denoiser was given stays as it is: it may have taken hold of it.
                state = following
                following, noise = torch.empty_like(state), None
                if sampler.stochastic:
                    # For all images at once: the batches must not change it.
                    noise = _normal(state.shape, generator, state.device)
            own = None if noise is None else noise[rows]
            result, x0 = sampler.step(
                denoiser, state[rows], levels[i], levels[i + 1], clip=clip, noise=own
            )
            # A denoiser that answers in float64 makes it a float64 run.
            state, following = state.to(result.dtype), following.to(result.dtype)
            states, answers = states.to(result.dtype), answers.to(result.dtype)
            following[rows] = result
            if trajectory:
                states[i, rows], answers[i, rows] = state[rows], x0
    return SampleResult(following, states, answers, timesteps)


def _check_method(
    denoiser: object, schedule: object, sampler: object, generator: object
) -> tuple[NoiseSchedule, Sampler]:
    """Check who does the work; the schedule and the sampler, with defaults filled in."""
    check_callable(denoiser, "denoiser")
    schedule = DDPMSchedule() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"`schedule` must be a NoiseSchedule, got {describe(schedule)}")
    if isinstance(sampler, str):
        sampler = SAMPLERS[check_choice(sampler, "sampler", tuple(SAMPLERS))]()
    if not isinstance(sampler, Sampler):
        raise TypeError(f"`sampler` must be a name or a Sampler, got {describe(sampler)}")
    check_generator(generator)
    return schedule, sampler


def levels_of_run(schedule: NoiseSchedule, steps: int) -> tuple[Tensor, list[Level]]:
    """Times [steps] of a run and its steps + 1 levels, from the first time to the clean end.

    Raises:
        TypeError: `steps` is not a whole number.
        ValueError: It is out of range, or a level has no signal.
    """
    timesteps = schedule.timesteps(steps)
    alpha, sigma = schedule(timesteps)
    if alpha[0] == 0 and sigma[0] > 0:
        # Zero terminal SNR: a run starts at the limit, where denoisers have an answer.
        alpha = torch.cat([alpha.new_tensor([NO_SIGNAL * sigma[0].item()]), alpha[1:]])
    if not (alpha > 0).all():
        raise ValueError(f"`schedule` must have alpha above 0 at its timesteps, got {alpha}")
    levels = map(NoiseLevel, alpha.tolist(), sigma.tolist())
    return timesteps, [*levels, schedule.final]


def _warn_of_signal(schedule: NoiseSchedule, timesteps: Tensor, level: Level) -> None:
    """Say so where a run starts at a noise level whose images are more than noise."""
    alpha, sigma = level
    share = alpha * alpha / (alpha * alpha + sigma * sigma)
    if share <= _MOST_SIGNAL:
        return
    cure = "choose a schedule that starts at more noise"
    if getattr(schedule, "spacing", None) == "leading":
        name = type(schedule).__name__
        cure = (
            f'choose the spacing "trailing" or "linspace": {name}(.., spacing="trailing"), on the '
            "command line --spacing trailing"
        )
    elif hasattr(schedule, "sigma_max"):
        cure = f"choose a larger `sigma_max` than {schedule.sigma_max:g}"
    warnings.warn(
        f"the first of {len(timesteps)} times, {timesteps[0].item():g}, is not near pure noise: "
        f"alpha is {alpha:.3g} and sigma {sigma:.3g} there, so that {share:.0%} of the variance "
        f"is signal, which starting noise has none of, and the images will be off; {cure}",
        stacklevel=3,
    )


def _starting_state(
    denoiser: DenoiserFunction,
    n: int | None,
    schedule: NoiseSchedule,
    x_T: Tensor | None,  # noqa: N803
    generator: torch.Generator | None,
) -> Tensor:
    """The state at the first time [n, C, H, W]: x_T checked, or drawn."""
    if n is not None:
        n = check_count(n, "n")
    shape, device = getattr(denoiser, "image_shape", None), getattr(denoiser, "device", None)
    if x_T is None:
        if shape is None or device is None:
            raise ValueError(
                "`x_T` must be given for a denoiser without the attributes `image_shape` and "
                f"`device`, got None with {describe(denoiser)}"
            )
        n = check_within_memory(8 if n is None else n, 4 * math.prod(shape), "n", device)
        noise = _normal((n, *shape), generator, device)
        return schedule.init_noise_sigma * noise
    if check_tensor(x_T, "x_T").ndim != 4 or len(x_T) == 0:
        raise ValueError(f"`x_T` must have shape [n, C, H, W] with n >= 1, got {describe(x_T)}")
    x_T = check_float_tensor(x_T, "x_T")  # noqa: N806
    if shape is not None:
        check_batch(x_T, shape, x_T.device if device is None else torch.device(device), "x_T")
    if n is not None and n != len(x_T):
        raise ValueError(f"`n` must be the number of images in `x_T`, {len(x_T)}, got {n}")
    # The caller's own stays as it is.
    return x_T.to(torch.promote_types(x_T.dtype, torch.float32), copy=True)


def _normal(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """Standard normal noise in float32 on `device`, drawn where the generator lives."""
    source = device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=source, dtype=torch.float32)
    return noise.to(device)


def _check_step(
    denoiser: object, x: Tensor, level: object, next_level: object, clip: object, noise: object
) -> bool:
    """Check the arguments of a step, but for the values of the images; `clip`."""
    check_callable(denoiser, "denoiser")
    if check_float_tensor(x, "x", finite=False).ndim < 1:
        raise ValueError(f"`x` must have shape [B, C, H, W], got {describe(x)}")
    for name, pair in (("level", level), ("next_level", next_level)):
        alpha, sigma = check_sequence(pair, name, "a pair (alpha, sigma)", length=2)
        check_one_level(alpha, name, allow_zero=False)
        check_one_level(sigma, name, allow_zero=True)
        as_pair(sigma, alpha)
    if noise is not None and check_float_tensor(noise, "noise", finite=False).shape != x.shape:
        raise ValueError(
            f"`noise` must have the shape of `x`, {list(x.shape)}, got {describe(noise)}"
        )
    return check_flag(clip, "clip")


def _predict(denoiser: DenoiserFunction, x: Tensor, level: Level) -> Tensor:
    """The denoiser's answer at x, of x's shape."""
    alpha, sigma = level
    # One-element tensors, too, as they come.
    plain: tuple[Any, Any] = as_pair(sigma, alpha)
    x0 = denoiser(x, *plain)
    if not isinstance(x0, Tensor):
        raise TypeError(f"`denoiser` must return a tensor, got {describe(x0)}")
    if x0.shape != x.shape:
        raise ValueError(
            f"`denoiser` must return images of shape {list(x.shape)}, got {describe(x0)}"
        )
    return x0


def _implied_noise(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """(x - alpha x0) / sigma; none where x is clean already."""
    alpha, sigma = level
    difference = x - alpha * x0
    return difference / sigma if sigma > 0 else torch.zeros_like(difference)
