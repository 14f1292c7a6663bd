"""What the commands that run denoisers share: from options to samples and records."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

from pyflocality._support.record import Stages
from pyflocality.cli._options import parse_window
from pyflocality.cli._record import ObservedDenoiser

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import Moments, SampleResult, TrainingSet
    from pyflocality.cli._checkpoint import KeptAnswers
    from pyflocality.cli._generate_options import Sampling
    from pyflocality.ops.nearest import Neighbours


def given_options(window: str | None, **others: object) -> dict[str, Any]:
    """The options of models that were given, by name, as the library takes their values."""
    given = {"window": None if window is None else parse_window(window), **others}
    return {
        name: value.value.replace("-", "_") if isinstance(value, Enum) else value
        for name, value in given.items()
        if value is not None
    }


def complete_moments(data: TrainingSet, moments: Moments | None, stages: Stages) -> Moments:
    """Moments of the data, computed unless they are at hand, and their eigenvectors."""
    return with_eigenvectors(moments_of(data, data, moments, stages), stages)


def moments_of(
    data: TrainingSet, part: TrainingSet, moments: Moments | None, stages: Stages
) -> Moments:
    """Moments of the data, computed unless they are at hand.

    Args:
        data: The whole set.
        part: What this rank holds of it, where it is sharded; else the set itself.
        moments: What is at hand.
        stages: Where the time is noted.
    """
    from pyflocality import Moments

    if moments is not None and tuple(moments.image_shape) != data.image_shape:
        raise ValueError(
            f"`moments` must be of images of shape {data.image_shape}, got "
            f"{tuple(moments.image_shape)}"
        )
    count = len(data) * data.copies
    if moments is not None and moments.count != count:
        warnings.warn(
            f"the moments are of {moments.count:,} images, {data.name} has {count:,}",
            stacklevel=2,
        )
    if moments is None:
        with stages("moments", f"covariance of {count:,} images"):
            moments = Moments.from_data(part, progress=stages.announce)
    return moments


def with_eigenvectors(moments: Moments, stages: Stages) -> Moments:
    """The same moments, with the eigenvectors computed."""
    size = math.prod(moments.image_shape)
    with stages("eigenvectors", f"eigenvectors of the covariance ({size:,} x {size:,})"):
        moments.eigh()
    return moments


def draw(
    observed: ObservedDenoiser | KeptAnswers, sampling: Sampling, *, progress: bool
) -> SampleResult:
    """Sample; the same seed starts every denoiser from the same noise."""
    import torch

    from pyflocality import sample

    return sample(
        observed,
        sampling.n,
        schedule=sampling.noise_schedule(),
        steps=sampling.steps,
        sampler=sampling.sampler,
        generator=torch.Generator().manual_seed(sampling.seed),
        progress=progress,
    )


def neighbours_of(
    images: Tensor, data: TrainingSet, memory_budget: str | None, stages: Stages
) -> Neighbours:
    """The training image nearest to each image; `data` may be a part of a sharded set."""
    from pyflocality.ops import nearest_images

    with stages("nearest", "looking for the nearest training images"):
        # Whatever backend was chosen was chosen for the model; this is the caption of a picture.
        return nearest_images(
            images,
            data.images,
            backend="auto",
            memory_budget=memory_budget,
            augmentation=data.augmentation,
        )


def neighbour_values(neighbours: Neighbours, data: TrainingSet) -> Tensor:
    """The nearest training images themselves, on the CPU: [n, C, H, W]."""
    import torch

    from pyflocality.storage.reader import Reader, training_values

    positions = neighbours.indices[:, 0].to(data.device)
    found = Reader.of(data).at(positions)
    return training_values(found, torch.float32).cpu()


def neighbour_record(neighbours: Neighbours, data: TrainingSet) -> dict[str, list[float]]:
    """Positions in the set, and root mean square differences in units of the values."""
    distance = (neighbours.distances[:, 0].double() / data.num_values).sqrt()
    found = neighbours.indices[:, 0]
    return {
        "index": (found % len(data)).tolist(),
        "mirrored": (found >= len(data)).tolist(),
        "rms_difference": distance.tolist(),
    }


def data_record(data: TrainingSet, *, flip: bool) -> dict[str, Any]:
    """What the record of a run tells of the training set."""
    return {
        "name": data.name,
        "images": len(data),
        "flip": flip,
        "image_shape": list(data.image_shape),
        "dtype": str(data.dtype).removeprefix("torch."),
        "content_key": data.content_key(),
    }


def sampling_record(sampling: Sampling, timesteps: Tensor) -> dict[str, Any]:
    """What the record of a run tells of the sampling."""
    return sampling.settings | {"timesteps": timesteps.tolist()}


def backends_record(calls: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Backends that ran, by operation."""
    ran: dict[str, set[str]] = {}
    for operation, backend in calls:
        ran.setdefault(operation, set()).add(backend)
    return {operation: sorted(backends) for operation, backends in ran.items()}


def finished(record: dict[str, Any], start: float) -> str:
    """The record as JSON text, with total time and memory."""
    import json

    from pyflocality._support.record import peak_memory_bytes

    record["seconds"]["total"] = round(time.perf_counter() - start, 4)
    record["peak_memory_bytes"] = peak_memory_bytes()
    return json.dumps(record, indent=2, allow_nan=False)
