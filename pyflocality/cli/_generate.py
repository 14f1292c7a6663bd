"""`pyflocality generate`: new images from a set of images."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pyflocality.cli import _generate_options as options
from pyflocality.cli import _options as common
from pyflocality.cli._checkpoint import KeptAnswers
from pyflocality.cli._denoisers import DenoiserOptions, SubsetOptions
from pyflocality.cli._errors import reported
from pyflocality.cli._files import Outputs
from pyflocality.cli._generate_options import Sampling
from pyflocality.cli._models import (
    backends_record,
    complete_moments,
    data_record,
    draw,
    finished,
    given_options,
    neighbour_record,
    neighbour_values,
    neighbours_of,
    sampling_record,
)
from pyflocality.cli._options import SourceOptions
from pyflocality.cli._record import ObservedDenoiser, Stages, software

if TYPE_CHECKING:
    from pyflocality import SampleResult, TrainingSet
    from pyflocality.ops.nearest import Neighbours


@dataclass(frozen=True)
class Plan:
    """A checked run: what to read, what to do and what to write."""

    source: SourceOptions
    denoiser: DenoiserOptions
    subset: SubsetOptions | None
    sampling: Sampling
    flip: bool
    moments: Path | None
    out: Path
    individual: bool
    trajectory: bool
    nearest: bool
    progress: bool

    def check(self) -> None:
        """Refuse everything that can be refused without the images."""
        self.source.check()
        self.denoiser.check()
        if self.subset is not None:
            self.subset.check(self.denoiser, flip=self.flip)
        self.sampling.check()
        if self.moments is not None and not self.needs_moments:
            raise ValueError(f"`moments` is of no use to the denoiser {self.denoiser.name}")

    @property
    def needs_moments(self) -> bool:
        """Whether anything is made of moments."""
        by_subset = self.subset is not None and self.subset.needs_moments
        return self.denoiser.entry.needs_moments != "no" or by_subset

    @property
    def singles(self) -> list[Path]:
        """Files of the single images."""
        number = self.sampling.n if self.individual else 0
        return [self.out / f"sample-{index:03d}.png" for index in range(number)]

    @property
    def files(self) -> list[Path]:
        """Everything that is written, the record last."""
        names = ["samples.png", "samples.npy", *["trajectory.png"] * self.trajectory]
        return [*(self.out / name for name in names), *self.singles, self.out / "run.json"]


@reported(mask_threshold="threshold", batch_size="loader_batch")
def generate(
    source: common.Source,
    out: options.Out,
    denoiser: options.Denoiser = options.DenoiserName["pca-locality"],
    threshold: options.Threshold = None,
    window: options.Window = None,
    boundary: options.Boundary = None,
    temperature: options.Temperature = None,
    aggregation: options.Aggregation = None,
    loader_batch: options.LoaderBatch = None,
    subset: options.Subset = None,
    moments: options.MomentsFile = None,
    backend: options.Backend = None,
    memory_budget: options.MemoryBudget = None,
    device: common.Device = "cpu",
    n: options.Count = 8,
    steps: options.Steps = 10,
    schedule: options.Schedule = options.ScheduleName["ddpm"],
    sampler: options.Sampler = options.SamplerName["ddim"],
    seed: options.Seed = 0,
    resolution: common.Resolution = None,
    channels: common.Channels = None,
    split: common.Split = None,
    label: common.Label = None,
    flip: options.Flip = False,
    nearest: options.Nearest = True,
    trajectory: options.Trajectory = True,
    individual: options.Individual = False,
    force: common.Force = False,
    as_json: common.Json = False,
    progress: common.Progress = True,
) -> None:
    """Make new images from a set of images, without training.

    Writes into the folder --out: samples.png (the images, each above the training image nearest
    to it), samples.npy (their values, float32 in [-1, 1]), trajectory.png (the way from noise to
    image) and run.json (settings, versions, timings). A run that was interrupted goes on behind
    its last finished step when it is started again with the same options.
    """
    given = given_options(
        window,
        threshold=threshold,
        boundary=boundary,
        temperature=temperature,
        aggregation=aggregation,
        loader_batch=loader_batch,
        backend=backend,
        memory_budget=memory_budget,
    )
    plan = Plan(
        SourceOptions(source, resolution, channels, split, label, device),
        DenoiserOptions(denoiser.value, given),
        None if subset is None else SubsetOptions(subset.value),
        Sampling(n, steps, schedule.value, sampler.value, seed),
        flip,
        moments,
        out,
        individual,
        trajectory,
        nearest,
        progress,
    )
    plan.check()
    start = time.perf_counter()
    with Outputs(plan.files, force=force) as outputs:
        record, kept = _run(plan, outputs)
        text = finished(record, start)
        outputs.temporary[plan.files[-1]].write_text(text + "\n", encoding="utf-8")
        outputs.commit()
    kept.forget()
    if as_json:
        typer.echo(text)
    else:
        listed = ", ".join(str(path) for path in plan.files if path not in plan.singles)
        typer.echo(f"{n} images in {time.perf_counter() - start:.1f} s: {listed}")


def _run(plan: Plan, outputs: Outputs) -> tuple[dict[str, Any], KeptAnswers]:
    """Load, sample and draw; the record of it, and the answers that were kept on the way."""
    from pyflocality import Moments, trace_backends
    from pyflocality._backends import requested_backend

    stages = Stages(announce=plan.progress)
    moments = None if plan.moments is None else Moments.load(plan.moments)
    with trace_backends() as backends:
        with stages("load", f"loading {plan.source.source}"):
            data = plan.source.load(progress=plan.progress).augmented(flip=plan.flip)
        if plan.needs_moments:
            moments = complete_moments(data, moments, stages)
        denoiser = plan.denoiser.build(data, moments)
        searched = denoiser if plan.subset is None else plan.subset.build(denoiser, moments)
        observed = ObservedDenoiser(searched)
        sampling = plan.sampling
        settings = {
            "data": data_record(data, flip=plan.flip),
            "denoiser": {"name": plan.denoiser.name, **plan.denoiser.in_force(denoiser)},
            "subset": None if plan.subset is None else plan.subset.in_force(searched),
            "software": software(),
        }
        others = {
            "moments": None if plan.moments is None else moments.content_key(),
            "sampling": asdict(sampling),
            "backend": requested_backend(None),
        }
        kept = KeptAnswers(observed, plan.out, settings | others)
        with stages("sampling", f"sampling {sampling.n} images in {sampling.steps} steps"):
            result = draw(kept, sampling, progress=plan.progress)
        neighbours = None
        if plan.nearest:
            budget = plan.denoiser.given.get("memory_budget")
            neighbours = neighbours_of(result.images, data, budget, stages)
    _write(plan, outputs, result, data, neighbours)
    record = {
        "command": "generate",
        "source": asdict(plan.source),
        **settings,
        "moments": None if plan.moments is None else str(plan.moments),
        "sampling": sampling_record(sampling, result.timesteps),
        "backends": backends_record(backends),
        "seconds": stages.seconds,
        "calls": observed.calls,
        "resumed_calls": kept.found,
        "nearest": None if neighbours is None else neighbour_record(neighbours, data),
        "files": [path.name for path in plan.files],
    }
    return record, kept


def _write(
    plan: Plan,
    outputs: Outputs,
    result: SampleResult,
    data: TrainingSet,
    neighbours: Neighbours | None,
) -> None:
    """Write values and pictures under their temporary names."""
    import numpy as np

    from pyflocality import pictures

    files = {path.name: temporary for path, temporary in outputs.temporary.items()}
    images = result.images.cpu()
    nearest = None if neighbours is None else neighbour_values(neighbours, data)
    pictures.sample_sheet(images, nearest).save(files["samples.png"])
    np.save(files["samples.npy"], images.float().numpy())
    if plan.trajectory:
        strip = pictures.trajectory_strip(result.x_t, result.x0, result.timesteps)
        strip.save(files["trajectory.png"])
    for path, image in zip(plan.singles, images, strict=False):
        pictures.image_grid(image[None], pad=0, scale=1).save(files[path.name])
