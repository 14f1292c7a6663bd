r"""Why batch means differ from exact posteriors: how many images they average, how sharp they are.

A batch mean is a posterior, too: with K batches and posteriors :math:`p_{k,i}` within each, image
i has the weight :math:`p_{k,i} / K`. No weight exceeds 1 / K, whatever the noise: the *effective
sample size* is

.. math:: \frac{1}{\sum_i p_i^2} = \frac{K^2}{\sum_k 1 / ESS_k} \ge K .

Where the exact posterior has settled on a few images, the batch mean still averages the best of
every batch, and what they do not agree on is blurred away. The theory says no more than that.
Whether it brings the answer closer to a network's depends on the step: it can help where the exact
answer is sharper than the network's, and harm where that is right already.

It depends on the order, too. Batches of mixed classes can each find similar images. Where the
images are sorted by class most batches hold one class only, and every class keeps its share of the
weight whatever the noisy image shows: the answer is a mean over classes.

To see that and nothing else, all answer the same noisy images, the states of a network's run, and
are held against the network's answer to them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality._support.progress import progress_bar

from ..command import Record
from .runs import STEPS
from .scores import summary

# Changes when the figures below change their meaning.
VERSION = 3
SAMPLES = 16
SHARES = (0.1, 0.5, 0.9)


def effective_sizes(model: pf.PCALocalityDenoiser, x: Tensor, sigma: float, alpha: float) -> Tensor:
    """Effective sample sizes of the posteriors of every output, float64 [B, Q].

    The batches of a batch mean are those of the model's set.
    """
    if model.aggregation == "exact":
        return _sizes(model, x, sigma, alpha)
    # The masks are those of the whole set; the twins share them.
    model.weights_at(sigma, alpha)
    inverse = torch.zeros((), dtype=torch.float64)
    size, images = model.batch_size, len(model.data)
    for start in range(0, images, size):
        twin = copy.copy(model)
        twin.aggregation = "exact"
        twin.data = model.data.subset(range(start, min(start + size, images)))
        inverse = inverse + 1 / _sizes(twin, x, sigma, alpha)
    return math.ceil(images / size) ** 2 / inverse


def _sizes(denoiser: pf.PCALocalityDenoiser, x: Tensor, sigma: float, alpha: float) -> Tensor:
    once = denoiser.log_sum_exp(x, sigma, alpha, temperature=denoiser.temperature)
    twice = denoiser.log_sum_exp(x, sigma, alpha, temperature=denoiser.temperature / 2)
    return (2 * once.double() - twice.double()).exp().clamp(1, len(denoiser.data))


def diagnose(
    data: pf.TrainingSet,
    moments: pf.Moments,
    network: pf.Denoiser,
    noise: Tensor,
    threshold: float,
    batch_means: Sequence[tuple[str, pf.TrainingSet, int]],
    *,
    progress: bool,
) -> Record:
    """Figures at the states of a network's run.

    Args:
        data: The training set, on the device that is to be used.
        moments: Its moments, there as well.
        network: The network, there as well.
        noise: Starting noise [n, C, H, W].
        threshold: Threshold of PCA locality.
        batch_means: Name, images in their order and images a batch of each batch mean.
        progress: Whether to show progress bars.

    Returns:
        `timesteps`, `batches`, the number of batches of each batch mean, and for each of the
        `models` a list over the steps: MSE and r2 of its answer against the network's, this r2
        less that of the exact model, image by image, gradient energy and variance of it, and
        10th, 50th and 90th percentile of the effective sample sizes over outputs and samples; an
        output counts by the variance of its training values, so that empty margins, whose
        posteriors are uniform, do not tell.
    """
    schedule = pf.DDPMSchedule()
    start = noise.to(data.device)
    run = pf.sample(network, x_T=start, schedule=schedule, steps=STEPS, progress=progress)
    models = {"exact": pf.PCALocalityDenoiser(data, threshold, moments=moments)}
    for name, images, size in batch_means:
        models[name] = pf.PCALocalityDenoiser(
            images, threshold, aggregation="batch_mean", batch_size=size, moments=moments
        )
    variance = moments.covariance.diagonal().cpu()
    result: dict[str, list[Record]] = {name: [] for name in ("network", *models)}
    visits = list(enumerate(run.timesteps.tolist()))
    for step, t in progress_bar(visits, description="diagnosis", enabled=progress):
        alpha, sigma = schedule(t)
        x, target = run.x_t[step], run.x0[step].clamp(-1, 1)
        result["network"].append(_sharpness(target))
        r2: dict[str, Tensor] = {}
        for name, model in models.items():
            answer = model(x, sigma, alpha).clamp(-1, 1)
            r2[name] = pf.metrics.r2(answer, target)
            sizes = effective_sizes(model, x, sigma, alpha).cpu()
            result[name].append(
                {
                    "mse": summary(pf.metrics.mse(answer, target)),
                    "r2": summary(r2[name]),
                    "r2_minus_exact": summary(r2[name] - r2["exact"]),
                    **_sharpness(answer),
                    "effective_sample_size": weighted_quantiles(sizes, variance),
                }
            )
    return {
        "samples": len(noise),
        "timesteps": run.timesteps.tolist(),
        "batches": {name: math.ceil(len(images) / size) for name, images, size in batch_means},
        "models": result,
    }


def weighted_quantiles(sizes: Tensor, weights: Tensor) -> list[float]:
    """The 10th, 50th and 90th percentile of values [B, Q] with the weights [Q] of the outputs.

    Each is the smallest value that, with all below it, holds the share of the weight.
    """
    values, order = sizes.flatten().sort()
    held = weights.expand_as(sizes).flatten()[order].cumsum(0)
    places = torch.searchsorted(held, held[-1] * torch.tensor(SHARES, dtype=held.dtype))
    return values[places.clamp(max=len(values) - 1)].tolist()


def _sharpness(images: Tensor) -> Record:
    """Gradient energy, and variance of an image's values."""
    return {
        "gradient_energy": summary(pf.metrics.gradient_energy(images)),
        "variance": summary(images.double().flatten(1).var(1)),
    }
