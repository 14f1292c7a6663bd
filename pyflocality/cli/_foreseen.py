"""What a command is about to do, held against the memory there is, and told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pyflocality._support.streams import tell
from pyflocality._support.text import bytes_told, time_told

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pyflocality import Basis, Candidate, Moments, TrainingSet
    from pyflocality.cli._denoisers import DenoiserOptions
    from pyflocality.cli._options import NoiseOptions
    from pyflocality.moments.mask_source import MaskSource
    from pyflocality.noise import NoiseLevel
    from pyflocality.planner import Job, Stage

# Runs of less are quick: nothing is told of them, and of few operations nothing is measured.
_LONG_SECONDS, _LONG_FLOPS = 10.0, 2e11
# Of a measurement for a line that is told before a run.
_GLANCE_SECONDS = 0.03
# Masks of more bytes take more than a moment to be looked at.
_LARGEST_MASKS = 2**25
_INSTEAD = (
    "--denoiser local or patch-set would run, a smaller --resolution or fewer images; "
    "--ignore-memory tries it all the same"
)
_SMALLER = "a smaller --resolution would run; --ignore-memory tries it all the same"


class _Listener:
    """A denoiser of single values that notes the levels it is asked for."""

    image_shape = (1, 1, 1)

    def __init__(self) -> None:
        from torch import device

        self.device: torch.device = device("cpu")
        self.levels: list[NoiseLevel] = []

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        from pyflocality.noise import NoiseLevel

        self.levels.append(NoiseLevel(alpha, sigma))
        return x * 0.0


def levels_of(sampling: NoiseOptions) -> list[NoiseLevel]:
    """The noise levels of a run, one for each time that it asks a denoiser."""
    import torch

    from pyflocality import sample

    listener = _Listener()
    # What is odd about the levels the run itself tells.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(
            listener,
            1,
            schedule=sampling.noise_schedule(),
            steps=sampling.steps,
            sampler=sampling.sampler,
            generator=torch.Generator(),
            progress=False,
        )
    return listener.levels


def jobs_of(
    data: TrainingSet,
    model: DenoiserOptions,
    sampling: NoiseOptions,
    *,
    mask_share: float | None = None,
    nearest: bool = True,
    moments: Moments | Basis | None = None,
    of_moments: bool = False,
    is_sketch: bool = False,
    looks_at_masks: bool = False,
) -> list[Job]:
    """The runs that make samples of a set by a model: one for each model of a calibration."""
    planned = partial(
        job_of,
        data,
        sampling=sampling,
        mask_share=mask_share,
        moments=moments,
        of_moments=of_moments,
        is_sketch=is_sketch,
        looks_at_masks=looks_at_masks,
    )
    calibration = model.given.get("calibration")
    if calibration is None:
        return [planned(model, nearest=nearest)]
    chosen: dict[Candidate, list[NoiseLevel]] = {}
    for level in levels_of(sampling):
        for leaf in calibration.at(level).leaves:
            chosen.setdefault(leaf, []).append(level)
    jobs: list[Job] = []
    for candidate, levels in chosen.items():
        settings: dict[str, Any] = {**candidate.as_json(), **model.given}
        names = ("threshold", "window", "memory_budget")
        given = {name: settings[name] for name in names if name in settings}
        one = replace(model, name=candidate.model, given=given)
        # The samples' neighbours are looked for once, and moments are made once.
        made = any(job.makes_moments for job in jobs)
        job = planned(one, nearest=nearest and not jobs, levels=levels)
        jobs.append(replace(job, has_moments=job.has_moments or made))
    return jobs


def job_of(
    data: TrainingSet,
    model: DenoiserOptions,
    sampling: NoiseOptions,
    *,
    mask_share: float | None = None,
    nearest: bool = True,
    moments: Moments | Basis | None = None,
    of_moments: bool = False,
    is_sketch: bool = False,
    looks_at_masks: bool = False,
    levels: Sequence[NoiseLevel] | None = None,
) -> Job:
    """The run that makes samples of a set by a model.

    A sketch of a set has no images. Levels are given where they are some of the run's. Where
    masks are looked at, those of the set that are cached, or made in a moment, tell what their
    sums take.
    """
    from pyflocality import Moments
    from pyflocality.cli._samples import batch_size
    from pyflocality.moments.mask_source import CACHED_INPUTS, has_components
    from pyflocality.planner import MASK_SHARE, Job, Setting

    levels = levels_of(sampling) if levels is None else levels
    missing = None
    if model.name == "pca-locality" and not (is_sketch or of_moments):
        masks, threshold, softness = _masks_of(data, model, moments)
        kept = [one for one in dict.fromkeys(levels) if masks.has_masks(*one, threshold, softness)]
        missing = len(set(levels)) - len(kept)
        if mask_share is None and softness > 0:
            # Every sum is formed afresh: the most that a share of the inputs may be.
            mask_share = 0.5
        elif mask_share is None and looks_at_masks:
            quick = list(dict.fromkeys(levels)) if data.num_values < CACHED_INPUTS else kept
            mask_share = _share_of(masks, threshold, quick, data.image_shape)
    batches = -(-sampling.n // batch_size(data.image_shape, sampling.steps))
    setting = Setting(
        len(data) * data.copies,
        data.image_shape,
        -(-sampling.n // batches),
        model.given.get("memory_budget"),
        MASK_SHARE if mask_share is None else mask_share,
        _window_of(model),
    )
    return Job(
        setting,
        model.name,
        levels=len(set(levels)),
        calls=len(levels),
        batches=batches,
        missing=missing,
        has_components=has_components(moments),
        has_moments=isinstance(moments, Moments),
        of_moments=of_moments,
        knows_masks=mask_share is not None,
        image_bytes=data.images.element_size(),
        nearest=nearest,
    )


def _masks_of(
    data: TrainingSet, model: DenoiserOptions, moments: Moments | Basis | None
) -> tuple[MaskSource, float, float]:
    """What masks of a model are made of, their threshold and softness; nothing is made yet."""
    from pyflocality.denoisers import PCALocalityDenoiser
    from pyflocality.moments.mask_source import MaskSource

    denoiser = model.build(data, moments)
    assert isinstance(denoiser, PCALocalityDenoiser)
    source = MaskSource(data if moments is None else moments)
    return source, denoiser.mask_threshold, denoiser.softness


def _share_of(
    masks: MaskSource, threshold: float, levels: Sequence[NoiseLevel], shape: tuple[int, int, int]
) -> float | None:
    """What sums over the masks of some levels take on average; None where nobody can tell soon."""
    import math

    import torch

    from pyflocality.backends.selection import machine_reason
    from pyflocality.moments.mask_source import mask_bytes

    values = math.prod(shape)
    is_large = mask_bytes(values) > _LARGEST_MASKS
    if not levels or threshold == 0 or is_large or machine_reason("cpu") is not None:
        return None
    from pyflocality.kernels.cpu.masked_posterior import difference_tree

    terms = 0
    for level in levels:
        weights = masks.masks(*level, threshold).weights
        terms += difference_tree(weights, torch.Size(shape)).terms
    # A schedule of nothing but empty masks takes nothing.
    return min(0.5, max(terms / len(levels) / values**2, 1e-9))


def _window_of(model: DenoiserOptions) -> int:
    """The largest side of a model's windows, which take most."""
    from pyflocality.planner import WINDOW

    window = model.given.get("window", WINDOW)
    return window if isinstance(window, int) else max(side for _, side in window)


def hold_moments(data: TrainingSet) -> None:
    """Refuse moments with their components that the memory cannot hold.

    Raises:
        MemoryError: The memory that is there is less.
    """
    from pyflocality.planner import Job, Setting, check_fits

    setting = Setting(len(data) * data.copies, data.image_shape, 1)
    size = data.images.element_size()
    job = Job(setting, "wiener", of_moments=True, image_bytes=size, nearest=False)
    check_fits(job, _SMALLER)


def hold(jobs: Sequence[Job], *, announce: bool) -> None:
    """Refuse runs that the memory cannot hold, and tell beforehand how long and large others are.

    Args:
        jobs: The runs, one after the other.
        announce: Whether to tell; of what is quick nothing is told.

    Raises:
        MemoryError: The memory that is there is less.
    """
    from pyflocality.planner import check_fits, stages_of

    for job in jobs:
        check_fits(job, _INSTEAD)
    for job in jobs if announce else ():
        if sum(stage.flops for stage in stages_of(job, aim=None)) > _LONG_FLOPS:
            told = foreseen(job.model, stages_of(job, aim=_GLANCE_SECONDS))
            if told is not None:
                tell(told)


def foreseen(model: str, stages: Sequence[Stage]) -> str | None:
    """A line on a run: how long, most of it with what, and how large; None of a quick one."""
    from pyflocality.planner import peak_of

    seconds = [stage.seconds or 0.0 for stage in stages]
    if sum(seconds) < _LONG_SECONDS:
        return None
    parts = [
        f"{stage.name} {time_told(spent)}"
        for stage, spent in zip(stages, seconds, strict=True)
        if spent > 0.05 * sum(seconds)
    ]
    unknown = " at least" if any(stage.seconds is None for stage in stages) else ""
    return (
        f"{model}: about {time_told(sum(seconds))}{unknown} ({', '.join(parts)}), up to "
        f"{bytes_told(peak_of(stages))} of memory beside the images"
    )
