"""`pyflocality plan`: what a run would cost, before anything is decoded or scanned."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.streams import answer
from pyflocality._support.text import bytes_told, time_told
from pyflocality.cli._denoisers import model_in_force
from pyflocality.cli._errors import reported
from pyflocality.cli._foreseen import jobs_of
from pyflocality.cli._generate import Model
from pyflocality.cli._options import (
    SamplingOptions,
    Source,
    SourceOptions,
    TellingOptions,
    given_path,
)
from pyflocality.cli._quick import Quick

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyflocality import TrainingSet
    from pyflocality.calibration.quick import QuickPlan
    from pyflocality.planner import Job


# What libraries take when they are first used: threads, and buffers of matrix products.
_GROWTH_BYTES = 96 * 2**20
# Of each measurement of a calibration's models.
_CALIBRATING_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class _PlannedSource(SourceOptions):
    """A training set whose run is planned; none where --images and --shape stand for one."""

    source: Source = ""


@reported(mask_threshold="threshold", batch_size="loader_batch")
def plan(
    *,
    source: _PlannedSource,
    model: Model,
    sampling: SamplingOptions,
    nearest: Annotated[
        bool, typer.Option(help="Count the search for the nearest training images.")
    ] = True,
    images: Annotated[int | None, typer.Option(help="In place of SOURCE: training images.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="In place of SOURCE: channels, height and width, such as 3x64x64."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="With --images: images made at a time, 1 if not given.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu measures how long things take here; of a100, h100 and h200 costs are told."
        ),
    ] = "cpu",
    mask_share: Annotated[
        float | None,
        typer.Option(
            help="Share of an image's values that pca-locality adds up for each of them, up to "
            "0.5; masks of neighbours share most of their sums. CIFAR-10's mean, 0.022, if not "
            "given and no masks of the set are at hand."
        ),
    ] = None,
    telling: TellingOptions,
) -> None:
    """Tell what `generate` would cost: operations, time and memory of every stage.

    Takes SOURCE and the options of `generate`, and decodes, computes and writes nothing. With
    --images and --shape in place of SOURCE: what one denoising step of every model costs.
    """
    from pyflocality._support.budget import memory_budget_bytes
    from pyflocality._support.checks import check_choice, check_count
    from pyflocality.moments.basis import stored_source

    memory_budget_bytes(model.memory_budget)
    check_choice(device, "device", ("cpu", "a100", "h100", "h200"))
    share = None if mask_share is None else _checked_share(mask_share)
    if bool(source.source) == (images is not None and shape is not None):
        raise ValueError("give `source`, or both `images` and `shape`")
    if source.source:
        if images is not None or shape is not None or batch is not None:
            raise ValueError("`images`, `shape` and `batch` are in place of `source`")
        denoiser = model_in_force(model.denoiser, model.given)
        for group in (source, denoiser, sampling):
            group.check()
        path = given_path(model.moments, "moments")
        stored = None if path is None else stored_source(path)
        data, decoding = _looked_at(source, flip=model.flip)
        # A share of masks is one of pca-locality.
        is_open = model.is_open and share is None
        quick = Quick(data, denoiser.given, sampling) if is_open else None
        calibrating = None
        if quick is not None and quick.plan is not None:
            # The images themselves tell which calibration is theirs.
            kept = None if decoding > 0 else quick.kept()
            calibrating = quick.plan if kept is None else None
            denoiser = quick.model(kept)
        if quick is not None and calibrating is not None:
            jobs = [_dearest(quick.dearest(is_sketch=decoding > 0), nearest)]
            name = jobs[0].model
        else:
            jobs = jobs_of(
                data,
                denoiser,
                sampling,
                mask_share=share,
                nearest=nearest,
                moments=stored,
                is_sketch=decoding > 0,
                looks_at_masks=True,
            )
            name = denoiser.name
        run = _Run(source.source, jobs, sampling.n, calibrating, name)
        record = _record_of(run, decoding, measures=device == "cpu")
        text = _stages_table(record)
    else:
        assert images is not None and shape is not None
        size = check_count(images, "images"), _parse_shape(shape)
        batch = 1 if batch is None else check_count(batch, "batch")
        record = _models_record(*size, batch, device, model.memory_budget, share, telling.progress)
        text = _models_table(record)
    answer(json.dumps(record, indent=2) if telling.as_json else text, only_here=True)


def _looked_at(source: SourceOptions, *, flip: bool) -> tuple[TrainingSet, float]:
    """The set, its images being left out where they are not decoded, and how long that takes."""
    import time

    import numpy as np
    import torch

    from pyflocality import TrainingSet
    from pyflocality.sources.cache import UndecodedError, nothing_decoded

    start = time.perf_counter()
    try:
        with nothing_decoded():
            data, seconds = source.load_all(progress=False), 0.0
    except UndecodedError as undecoded:
        # Finding the images and looking through their names takes as long again.
        seconds = time.perf_counter() - start - undecoded.spent + undecoded.seconds
        known = undecoded.source
        # One number stands for all.
        images = torch.from_numpy(np.zeros((), undecoded.dtype)).expand(undecoded.shape)
        labels = None if known.labels is None else torch.from_numpy(known.labels)
        data = TrainingSet._of_valid(images, known.name, labels, known.label_names)
    return source.of_label(data.augmented(flip=flip)), seconds


def _dearest(jobs: Sequence[Job], nearest: bool) -> Job:
    """The run of the most operations, of those by models any of which may be chosen."""
    from pyflocality.planner import stages_of

    counted = [sum(stage.flops for stage in stages_of(job, aim=None)) for job in jobs]
    return replace(jobs[counted.index(max(counted))], nearest=nearest)


@dataclass(frozen=True)
class _Run:
    """A run of `generate`.

    Attributes:
        source: The images as they were asked for.
        jobs: Runs by one model each, which share the levels among them.
        samples: Images to be made.
        calibrating: The calibration that has to be made before; None where there is none to make.
        denoiser: Name of the model, before a calibration of the one that it is counted as.
    """

    source: str
    jobs: Sequence[Job]
    samples: int
    calibrating: QuickPlan | None
    denoiser: str

    def stages(self, measures: bool) -> list[dict[str, Any]]:
        """All stages, each with its model where there are several."""
        from dataclasses import asdict

        from pyflocality.planner import Stage, stages_of

        told: list[dict[str, Any]] = []
        if self.calibrating is not None:
            work = self.calibrating.work(self.jobs[0].setting.shape)
            seconds = work.seconds(_CALIBRATING_SECONDS) if measures else None
            made = f"a model by {work.images:,} images"
            told.append(
                asdict(Stage("calibration", made, work.flops, seconds, work.bytes, "counted"))
            )
        for job in self.jobs:
            stages = stages_of(job) if measures else stages_of(job, aim=None)
            told += [
                asdict(stage) | ({"model": job.model} if len(self.jobs) > 1 else {})
                for stage in stages
            ]
        return told


def _record_of(run: _Run, decoding: float, *, measures: bool) -> dict[str, Any]:
    """What is told of a run."""
    from pyflocality._support.memory import available_memory, memory_bytes

    masked = [job for job in run.jobs if job.model == "pca-locality"]
    # The masks are those of one of them.
    job = [*masked, *run.jobs][0]
    setting = job.setting
    set_bytes = setting.images * setting.values * job.image_bytes
    # What the program itself takes, before anything is measured.
    try:
        program = memory_bytes()["VmRSS"] + _GROWTH_BYTES
    except (OSError, KeyError):
        program = 0
    stages = run.stages(measures)
    return {
        "source": run.source,
        "denoiser": run.denoiser,
        "images": setting.images,
        "shape": list(setting.shape),
        "samples": run.samples,
        "calls": sum(one.calls * one.batches for one in run.jobs),
        "way": job.way,
        "mask_share": setting.mask_share if masked else None,
        "set_bytes": set_bytes,
        "program_bytes": program,
        "decoding_seconds": decoding,
        "calibrates": run.calibrating is not None,
        "stages": stages,
        "seconds": _total([decoding, *(stage["seconds"] for stage in stages)]),
        "peak_bytes": program + set_bytes + max(stage["bytes"] for stage in stages),
        "available_bytes": available_memory(),
    }


def _total(seconds: list[float | None]) -> float | None:
    known = [one for one in seconds if one is not None]
    return sum(known) if len(known) == len(seconds) else None


def _stages_table(record: dict[str, Any]) -> str:
    """The stages of a run as text."""
    size = "x".join(map(str, record["shape"]))
    lines = [
        f"{record['images']:,} images {size}: {bytes_told(record['set_bytes'])}; "
        f"{record['samples']:,} samples of {record['denoiser']}",
        f"{'stage':<15}{'operations':>13}{'memory':>10}{'time':>9}  of",
    ]
    decoding = record["decoding_seconds"]
    if decoding:
        lines.append(
            f"{'decoding':<15}{'':>13}{'':>10}{time_told(decoding):>9}  the images (measured)"
        )
    for stage in record["stages"]:
        seconds = stage["seconds"]
        spent = "-" if seconds is None else time_told(seconds)
        of = f", {stage['model']}" if "model" in stage else ""
        lines.append(
            f"{stage['name']:<15}{stage['flops'] / 1e9:>10,.1f} G  {bytes_told(stage['bytes']):>9}"
            f"{spent:>9}  {stage['told']}{of} ({stage['known']})"
        )
    if record["calibrates"]:
        lines.append(
            f"No option names a model: it is calibrated once. Counted as {record['denoiser']} at "
            "all noise levels, the dearest of what may be chosen."
        )
    total = "not measured" if record["seconds"] is None else f"about {time_told(record['seconds'])}"
    there = record["available_bytes"]
    lines.append(
        f"{total}, up to {bytes_told(record['peak_bytes'])} of memory with the images and the "
        "program" + ("" if there is None else f"; {bytes_told(there)} are there")
    )
    lines.append(
        "Memory of a stage is beside these, with what earlier stages leave. Counted: operations by "
        "a rate measured here."
    )
    if any(stage["known"] == "assumed" for stage in record["stages"]):
        lines.append(
            "Assumed: masks whose sums take "
            f"{record['mask_share']:.3g} of an image's values each, as CIFAR-10's do on average "
            "(--mask-share); those of other images may take several times as many."
        )
    return "\n".join(lines)


def _checked_share(share: float) -> float:
    if not 0 < share <= 0.5:
        raise ValueError(f"`mask_share` must be above 0 and at most 0.5, got {share:g}")
    return share


def _parse_shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width of "3x64x64"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"`shape` must be CxHxW such as 3x64x64, got {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def _models_record(
    images: int,
    shape: tuple[int, int, int],
    batch: int,
    device: str,
    memory_budget: str | None,
    share: float | None,
    progress: bool,
) -> dict[str, Any]:
    """What one step of every model costs."""
    from dataclasses import asdict

    from pyflocality._support.progress import progress_bar
    from pyflocality.planner import MASK_SHARE, Setting, cost_of, models, seconds_of

    setting = Setting(images, shape, batch, memory_budget, share or MASK_SHARE)
    measures = device == "cpu"
    planned = progress_bar(models(), description="measuring", enabled=progress and measures)
    return {
        "images": images,
        "shape": list(setting.shape),
        "batch": batch,
        "device": device,
        "mask_share": setting.mask_share,
        "set_bytes": images * setting.values,
        "models": {
            model: asdict(cost_of(model, setting))
            | {"seconds": seconds_of(model, setting) if measures else None}
            for model in planned
        },
    }


def _models_table(record: dict[str, Any]) -> str:
    from pyflocality.planner import WINDOW

    size = "x".join(map(str, record["shape"]))
    lines = [
        f"{record['images']:,} images {size}: {bytes_told(record['set_bytes'])}; "
        f"one step for {record['batch']:,} noisy images",
        f"{'model':<14}{'operations':>13}{'bytes':>11}{'scans':>7}{'memory':>11}{'time':>12}",
    ]
    for model, cost in record["models"].items():
        told = "not measured" if cost["seconds"] is None else f"{cost['seconds']:.3g} s"
        lines.append(
            f"{model:<14}{cost['flops'] / 1e9:>10,.1f} G  {bytes_told(cost['bytes']):>10}"
            f"{cost['scans']:>7}{bytes_told(cost['working_bytes']):>11}{told:>13}"
        )
    lines.append(
        f"Windows of {WINDOW} pixels or of the image; masks of pca-locality whose sums take "
        f"{record['mask_share']:.3g} of an image's values each (--mask-share), where CIFAR-10's "
        "take 0.022 on average over ten steps. Memory is beside the images, at most."
    )
    if record["device"] == "cpu":
        lines.append("Time is measured here on a few images in memory, and extrapolated.")
    else:
        lines.append(f"Time not measured on this device: {record['device']}.")
    return "\n".join(lines)
