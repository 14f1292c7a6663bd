r"""Blind stochastic ascent: sampling whose noise level is read off the denoiser's own answers.

With the residual :math:`d = \hat x_0(y) - y`, which is sigma^2 times the score of the noisy
density, each step t goes a share of the way and adds a little noise,

.. math::
    y \leftarrow y + h_t d + \gamma_t z, \qquad h_t = \frac{h_0 t}{1 + h_0 (t - 1)}, \qquad
    \sigma_t^2 = \frac{\lVert d \rVert^2}{D}, \qquad
    \gamma_t^2 = \bigl( (1 - \beta h_t)^2 - (1 - h_t)^2 \bigr) \, \sigma_t^2,

so that the noise left in y falls to about :math:`(1 - \beta h_t) \sigma_t`, until
:math:`\sigma_t` is small. There is no schedule: the noise level is what the residual says. A blind
network needs nothing else; the denoisers of this library are told the level that the step before
left, at first `start_sigma`.

A multi-scale denoiser is sampled coarse to fine: its low-pass image first, then the details of
each level under the condition of the image found so far. There is no way back: a finer level never
changes a coarser one.

References:
    Kadkhodaie and Simoncelli, Stochastic solutions for linear inverse problems using the prior
    implicit in a denoiser, 2021.

    Kadkhodaie, Guth, Mallat and Simoncelli, Learning multi-scale local conditional probability
    models of images, 2023 (coarse to fine).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyflocality._support.checks import (
    check_count,
    check_flag,
    check_generator,
    check_positive,
    check_real,
    check_rounds,
    check_within_memory,
    describe,
)
from pyflocality._support.progress import progress_bar
from pyflocality.denoisers.base import Denoiser
from pyflocality.denoisers.multiscale import MultiscaleDenoiser
from pyflocality.wavelets import synthesise

# Denoisers take no states beyond it.
_LARGEST = 1e9
# Estimates from states [m, ...], noise levels [m] and which of the n images they are [m].
Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class AscentStage:
    r"""One ascent: of the images, of a low-pass image or of the details of a level.

    Attributes:
        images: The denoiser's last answers, [n, c, h, w].
        sigma: Noise level :math:`\sigma_t` at each step, [steps, n]; an image that has arrived
            keeps its last.
        steps: Steps that each image took, int64 [n].
    """

    images: Tensor
    sigma: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class AscentResult:
    """Images made by `ascend`, and the way there.

    Attributes:
        images: Final images [n, C, H, W].
        stages: The ascents: one, or for a multi-scale denoiser the low-pass image first, then
            the details of each level, the coarsest first, divided by 2^j.
    """

    images: Tensor
    stages: tuple[AscentStage, ...]

    def __repr__(self) -> str:
        """Shapes instead of values."""
        steps = [int(stage.steps.max()) for stage in self.stages]
        return f"AscentResult(images={list(self.images.shape)}, steps={steps})"


@dataclass(frozen=True)
class _Rule:
    """The numbers of the method, named as in `ascend`."""

    start_sigma: float
    stop_sigma: float
    step: float
    beta: float
    max_steps: int
    progress: bool


def ascend(
    denoiser: Denoiser,
    n: int = 8,
    *,
    start_sigma: float = 2.0,
    stop_sigma: float = 0.02,
    step: float = 0.01,
    beta: float = 0.01,
    max_steps: int = 5000,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> AscentResult:
    """Generate images by stochastic ascent, coarse to fine for a `MultiscaleDenoiser`.

    The start is noise of `start_sigma` around 0; the result is the denoiser's last answer. The
    defaults are the published ones, whose range [0, 1] is half of ours. No gradients are
    recorded.

    Args:
        denoiser: A denoiser of this library; trained networks are wrapped by `NetworkDenoiser`.
        n: Number of images.
        start_sigma: Noise level of the start.
        stop_sigma: An image has arrived when its noise level is no more than this.
        step: First step size h_0, in (0, 1].
        beta: Share of the noise that a step takes away without giving it back, in (0, 1]: 1 adds
            no noise and climbs straight, small values explore. The number of steps grows as
            1 / beta.
        max_steps: Steps after which to give up.
        generator: Source of all randomness; by default torch's global one of the device.
        progress: Show a progress bar on standard error.

    Returns:
        Images, float32, and the noise levels on the way.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a multi-scale model has several pyramids.

    Warns:
        UserWarning: Some image has not arrived after `max_steps`.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"`denoiser` must be a Denoiser, got {describe(denoiser)}")
    if isinstance(denoiser, MultiscaleDenoiser) and denoiser.shifts > 1:
        raise ValueError(
            "`denoiser` must have one pyramid, whose bands are sampled coarse to fine, got shifts="
            f"{denoiser.shifts}"
        )
    check_generator(generator)
    progress = check_flag(progress, "progress")
    # The states and the answers of all images, and what is made of them.
    n = check_within_memory(check_count(n, "n"), 16 * math.prod(denoiser.image_shape), "n")
    start_sigma = check_real(start_sigma, "start_sigma", low=0.0, high=_LARGEST, above=True)
    stop_sigma = check_positive(stop_sigma, "stop_sigma")
    if stop_sigma >= start_sigma:
        raise ValueError(f"`stop_sigma` must be below `start_sigma`, got {stop_sigma}")
    step = check_real(step, "step", low=0.0, high=1.0, above=True)
    beta = check_real(beta, "beta", low=0.0, high=1.0, above=True)
    max_steps = check_rounds(max_steps, "max_steps")
    rule = _Rule(start_sigma, stop_sigma, step, beta, max_steps, progress)
    with torch.no_grad():
        if isinstance(denoiser, MultiscaleDenoiser):
            return _coarse_to_fine(denoiser, n, rule, generator)
        shape = (n, *denoiser.image_shape)
        stage = _ascent(_of_rows(denoiser), shape, denoiser.device, rule, generator)
    return AscentResult(stage.images, (stage,))


def _coarse_to_fine(
    denoiser: MultiscaleDenoiser, n: int, rule: _Rule, generator: torch.Generator | None
) -> AscentResult:
    """Low-pass images, then details level by level, all divided by 2^j: one range for all."""
    run = partial(_ascent, device=denoiser.device, rule=rule, generator=generator)
    stages = [run(_of_rows(denoiser.low_pass), (n, *denoiser.low_pass.image_shape))]
    low = stages[0].images
    for level in range(denoiser.levels, 0, -1):

        def details(
            y: Tensor, sigma: Tensor, rows: Tensor, level: int = level, low: Tensor = low
        ) -> Tensor:
            return denoiser.conditional(level, y, low[rows], sigma)

        stages.append(run(details, (n, *denoiser.band_shape(level))))
        low = synthesise(2.0 * low, 2.0 * stages[-1].images, denoiser.wavelet)
    return AscentResult(low, tuple(stages))


def _of_rows(denoiser: Denoiser) -> Answer:
    """A denoiser to which all images are alike."""
    return lambda y, sigma, rows: denoiser(y, sigma)


def _ascent(
    denoise: Answer,
    shape: tuple[int, ...],
    device: torch.device,
    rule: _Rule,
    generator: torch.Generator | None,
) -> AscentStage:
    """Ascents from noise, one for each image, which go on until the last has arrived."""

    def normal() -> Tensor:
        source = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(
            device
        )

    y = rule.start_sigma * normal()
    images = torch.empty_like(y)
    known = torch.full(shape[:1], rule.start_sigma, dtype=torch.float64, device=device)
    sigma = known.clone()
    steps = torch.zeros(shape[0], dtype=torch.int64, device=device)
    moving, history = torch.ones_like(steps, dtype=torch.bool), []
    for t in progress_bar(
        range(1, rule.max_steps + 1), description="ascent", enabled=rule.progress
    ):
        h = rule.step * t / (1.0 + rule.step * (t - 1))
        images[moving] = denoise(y[moving], known[moving], moving.nonzero()[:, 0])
        residual = images - y
        sigma[moving] = residual[moving].double().square().flatten(1).mean(1).sqrt()
        history.append(sigma.clone())
        moving = moving & (sigma > rule.stop_sigma)
        if not moving.any():
            break
        steps += moving
        fresh = ((1.0 - rule.beta * h) ** 2 - (1.0 - h) ** 2) ** 0.5 * sigma
        stride = h * residual + fresh.to(y.dtype)[:, None, None, None] * normal()
        y = torch.where(moving[:, None, None, None], y + stride, y)
        known = torch.where(moving, (1.0 - rule.beta * h) * sigma, known)
    else:
        warnings.warn(
            f"{int(moving.sum())} of {shape[0]} images have not arrived at `stop_sigma` "
            f"{rule.stop_sigma} after {rule.max_steps} steps; the largest noise level is "
            f"{float(sigma.max()):.3g}",
            stacklevel=4,
        )
    return AscentStage(images, torch.stack(history), steps)
