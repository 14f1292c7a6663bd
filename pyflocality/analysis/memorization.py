r"""From recitation to generation: what samples share with training images and with each other.

Two models of disjoint halves A and B of a set, started from the same noise: where each recites,
its sample is one of its own training images and the two samples differ; where both have learned
the distribution they make the same image, which is in neither half.

Similarities are cosines of images from a common mean,
:math:`\langle a - m, b - m \rangle / (|a - m| \, |b - m|)`: what all images share counts for
nothing.

References:
    Kadkhodaie, Guth, Simoncelli and Mallat, Generalization in diffusion models arises from
    geometry-adaptive harmonic representations, ICLR 2024 (figure 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._support.checks import (
    check_batch,
    check_callable,
    check_count,
    check_flag,
    check_float_tensor,
    check_generator,
    check_magnitude,
    check_rounds,
    check_sequence,
    check_within_memory,
    describe,
)
from pyflocality._support.progress import progress_bar
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, check_set
from pyflocality.metrics import cosine_similarity
from pyflocality.noise import DDPMSchedule, NoiseSchedule
from pyflocality.ops import nearest_images
from pyflocality.sampling import sample
from pyflocality.storage.reader import Reader, training_values

# A sample is a training image, and was recited, where it lies this near to one, as the root mean
# square difference of their values: half a step of 8-bit images.
RECITED_RMS = 1.0 / 255.0
# Values of the training set that are summed at a time.
_BLOCK = 2**22


@dataclass(frozen=True, eq=False)
class Memorization:
    """How near samples are to a training set.

    Attributes:
        indices: Nearest training image of each sample, int64 [n]; image i of copy k of an
            augmented set of N images is k N + i.
        distances: Distances |s - v|, [n].
        similarity: Cosines of sample and nearest image from the mean image, float64 [n].
        ratio: Distance to the nearest over that to the second nearest image, [n]: near 0 for a
            recited image, near 1 for one that is no closer to any training image than to the
            next. 0 where the nearest is at distance 0, NaN for a set of one image.
        recited: Whether a sample is a training image: within a root mean square difference of
            1/255, half a step of 8-bit images, of the nearest; bool [n].
    """

    indices: Tensor
    distances: Tensor
    similarity: Tensor
    ratio: Tensor
    recited: Tensor


def rms_differences(squared_distances: Tensor, values: int) -> Tensor:
    """Root mean square differences of images of so many values, float64 [n]."""
    return (squared_distances.double() / values).sqrt()


def is_recited(squared_distances: Tensor, values: int) -> Tensor:
    """Which samples are training images, bool [n], by the distances to their nearest ones."""
    return rms_differences(squared_distances, values) <= RECITED_RMS


def memorization(samples: Tensor, data: TrainingSet, *, mean: Tensor | None = None) -> Memorization:
    """Compare samples with their nearest training images.

    Args:
        samples: Images in [-1, 1], floating point, [n, C, H, W].
        data: The training set.
        mean: Image that similarities are counted from, [C, H, W]; by default the set's mean.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape or device.
    """
    check_set(data)
    samples = check_batch(samples, data.image_shape, data.device, "samples")
    if len(samples) == 0:
        raise ValueError(f"`samples` must hold at least one image, got {describe(samples)}")
    check_magnitude(samples, 1.0, "samples")
    if mean is not None and tuple(check_float_tensor(mean, "mean").shape) != data.image_shape:
        raise ValueError(f"`mean` must have shape {list(data.image_shape)}, got {describe(mean)}")
    k = min(2, len(data) * data.copies)
    neighbours = nearest_images(samples, data.images, k=k, augmentation=data.augmentation)
    distances = neighbours.distances.sqrt()
    nearest = Reader.of(data).at(neighbours.indices[:, 0])
    mean = _mean_image(data) if mean is None else mean
    similarity = cosine_similarity(samples, training_values(nearest, samples.dtype), mean)
    first, second = distances[:, 0], distances[:, -1]
    ratio = torch.where(first == 0, 0.0, first / second)
    if k == 1:
        ratio = torch.full_like(first, torch.nan)
    recited = is_recited(neighbours.distances[:, 0], data.num_values)
    return Memorization(neighbours.indices[:, 0], first, similarity, ratio, recited)


@dataclass(frozen=True, eq=False)
class MemorizationCurve:
    """Similarities of samples of two models of disjoint sets of N images, as N grows.

    Attributes:
        sizes: Numbers N of training images of each model.
        between: Cosines of the samples of the two models, float64 [S, n].
        nearest: Cosines of the first model's samples and their nearest images of its own
            training set, float64 [S, n].
        samples: Samples of both models, [S, 2, n, C, H, W].
    """

    sizes: tuple[int, ...]
    between: Tensor
    nearest: Tensor
    samples: Tensor


def memorization_curve(
    make_denoiser: Callable[[TrainingSet], Denoiser],
    data: TrainingSet,
    sizes: Sequence[int],
    *,
    n: int = 8,
    steps: int = 10,
    schedule: NoiseSchedule | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> MemorizationCurve:
    """Sample from two models of disjoint halves with the same noise, for growing sets.

    The set is put in random order once; the sets of size N are the first N images of either
    half, so smaller sets lie in larger ones. Similarities are counted from the mean of all data.

    Args:
        make_denoiser: Makes the model of a set, such as `pf.LocalDenoiser`.
        data: The images to split.
        sizes: Numbers of training images of each model, at most half of the images.
        n: Samples of each model.
        steps: Steps of the sampling runs.
        schedule: Noise schedule; by default `DDPMSchedule()`.
        generator: Source of randomness, for the split and the noise; by default a fixed seed.
        progress: Show a progress bar.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is out of range.
    """
    check_set(data)
    check_callable(make_denoiser, "make_denoiser")
    half = len(data) // 2
    check_sequence(sizes, "sizes", "numbers of images")
    sizes = tuple(check_count(size, "sizes") for size in sizes)
    if not sizes or max(sizes) > half:
        raise ValueError(f"`sizes` must hold numbers from 1 to {half}, half the set, got {sizes}")
    steps, progress = check_rounds(steps, "steps"), check_flag(progress, "progress")
    # The samples of all models, and the two states of a run.
    kept = 2 * len(sizes) + 2
    n = check_within_memory(check_count(n, "n"), 4 * kept * data.num_values, "n")
    generator = check_generator(generator) or torch.Generator().manual_seed(0)
    order = torch.randperm(len(data), generator=generator, device=generator.device).cpu()
    schedule = DDPMSchedule() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"`schedule` must be a NoiseSchedule, got {describe(schedule)}")
    noise = torch.randn(
        (n, *data.image_shape),
        generator=generator,
        device=generator.device,
        dtype=torch.float32,
    )
    start = schedule.init_noise_sigma * noise.to(data.device)
    mean = _mean_image(data)

    between, nearest, samples = [], [], []
    for size in progress_bar(sizes, description="sizes", enabled=progress):
        pair, models = [], []
        for members in (order[:size], order[half : half + size]):
            models.append(data.subset(members))
            out = sample(
                make_denoiser(models[-1]),
                schedule=schedule,
                steps=steps,
                x_T=start,
                progress=False,
                trajectory=False,
            )
            pair.append(out.images)
        between.append(cosine_similarity(pair[0], pair[1], mean))
        nearest.append(memorization(pair[0], models[0], mean=mean).similarity)
        samples.append(torch.stack(pair))
    return MemorizationCurve(
        sizes, torch.stack(between), torch.stack(nearest), torch.stack(samples)
    )


def _mean_image(data: TrainingSet) -> Tensor:
    """Mean of the images and their copies, float64 [C, H, W], without `Moments`' D^2 products."""
    size = max(1, _BLOCK // data.num_values)
    total = torch.zeros(data.image_shape, dtype=torch.float64, device=data.device)
    for values in Reader.of(data).values(size, torch.float64):
        total += values.sum(0)
    return total / (len(data) * data.copies)
