"""`pyflocality generate`: new images from a set of images."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pyflocality.cli import _generate_options as options
from pyflocality.cli import _options as common
from pyflocality.cli._denoisers import DenoiserOptions
from pyflocality.cli._errors import reported
from pyflocality.cli._files import Outputs
from pyflocality.cli._generate_options import Sampling
from pyflocality.cli._options import SourceOptions, parse_window
from pyflocality.cli._record import ObservedDenoiser, Stages, peak_memory_bytes, software

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import Moments, SampleResult, TrainingSet
    from pyflocality.ops.nearest import Neighbours


@dataclass(frozen=True)
class Plan:
    """A checked run: what to read, what to do and what to write."""

    source: SourceOptions
    denoiser: DenoiserOptions
    sampling: Sampling
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
        self.sampling.check()
        if self.moments is not None and self.denoiser.entry.needs_moments == "no":
            raise ValueError(f"`moments` is of no use to the denoiser {self.denoiser.name}")

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
    image) and run.json (settings, versions, timings).
    """
    given = {
        "threshold": threshold,
        "window": None if window is None else parse_window(window),
        "boundary": None if boundary is None else boundary.value,
        "temperature": temperature,
        "aggregation": None if aggregation is None else aggregation.value.replace("-", "_"),
        "loader_batch": loader_batch,
        "backend": None if backend is None else backend.value,
        "memory_budget": memory_budget,
    }
    plan = Plan(
        SourceOptions(source, resolution, channels, split, label, device),
        DenoiserOptions(
            denoiser.value, {name: value for name, value in given.items() if value is not None}
        ),
        Sampling(n, steps, schedule.value, sampler.value, seed),
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
        record = _run(plan, outputs)
        record["seconds"]["total"] = round(time.perf_counter() - start, 4)
        record["peak_memory_bytes"] = peak_memory_bytes()
        text = json.dumps(record, indent=2, allow_nan=False)
        outputs.temporary[plan.files[-1]].write_text(text + "\n", encoding="utf-8")
        outputs.commit()
    if as_json:
        typer.echo(text)
    else:
        listed = ", ".join(str(path) for path in plan.files if path not in plan.singles)
        typer.echo(f"{n} images in {record['seconds']['total']:.1f} s: {listed}")


def _run(plan: Plan, outputs: Outputs) -> dict[str, Any]:
    """Load, sample and draw; the record of it."""
    import torch

    from pyflocality import Moments, sample, trace_backends

    stages = Stages(announce=plan.progress)
    moments = None if plan.moments is None else Moments.load(plan.moments)
    with trace_backends() as backends:
        with stages("load", f"loading {plan.source.source}"):
            data = plan.source.load(progress=plan.progress)
        if plan.denoiser.entry.needs_moments != "no":
            moments = _moments(data, moments, stages)
        denoiser = plan.denoiser.build(data, moments)
        observed = ObservedDenoiser(denoiser)
        sampling = plan.sampling
        with stages("sampling", f"sampling {sampling.n} images in {sampling.steps} steps"):
            result = sample(
                observed,
                sampling.n,
                schedule=sampling.noise_schedule(),
                steps=sampling.steps,
                sampler=sampling.sampler,
                generator=torch.Generator().manual_seed(sampling.seed),
                progress=plan.progress,
            )
        neighbours = _neighbours(result.images, data, plan, stages)
    _write(plan, outputs, result, data, neighbours)
    return {
        "command": "generate",
        "source": asdict(plan.source),
        "data": {
            "name": data.name,
            "images": len(data),
            "image_shape": list(data.image_shape),
            "dtype": str(data.dtype).removeprefix("torch."),
            "content_key": data.content_key(),
        },
        "denoiser": {"name": plan.denoiser.name, **plan.denoiser.in_force(denoiser)},
        "moments": None if plan.moments is None else str(plan.moments),
        "sampling": asdict(sampling) | {"timesteps": result.timesteps.tolist()},
        "software": software(),
        "backends": {
            op: sorted({backend for name, backend in backends if name == op})
            for op in dict.fromkeys(name for name, _ in backends)
        },
        "seconds": stages.seconds,
        "calls": observed.calls,
        "nearest": None if neighbours is None else _described(neighbours, data),
        "files": [path.name for path in plan.files],
    }


def _moments(data: TrainingSet, moments: Moments | None, stages: Stages) -> Moments:
    """Moments of the data, computed unless they are at hand, and their eigenvectors."""
    from pyflocality import Moments

    if moments is not None and tuple(moments.image_shape) != data.image_shape:
        raise ValueError(
            f"`moments` must be of images of shape {data.image_shape}, got "
            f"{tuple(moments.image_shape)}"
        )
    if moments is not None and moments.count != len(data):
        warnings.warn(
            f"the moments are of {moments.count:,} images, {data.name} has {len(data):,}",
            stacklevel=2,
        )
    if moments is None:
        with stages("moments", f"covariance of {len(data):,} images"):
            moments = Moments.from_data(data, progress=stages.announce)
    size = data.num_values
    with stages("eigenvectors", f"eigenvectors of the covariance ({size:,} x {size:,})"):
        moments.eigh()
    return moments


def _neighbours(images: Tensor, data: TrainingSet, plan: Plan, stages: Stages) -> Neighbours | None:
    """The training image nearest to each sample."""
    from pyflocality.ops import nearest_images

    if not plan.nearest:
        return None
    with stages("nearest", "looking for the nearest training images"):
        budget = plan.denoiser.given.get("memory_budget")
        # Whatever backend was chosen was chosen for the model; this is the caption of a picture.
        return nearest_images(images, data.images, backend="auto", memory_budget=budget)


def _described(neighbours: Neighbours, data: TrainingSet) -> dict[str, list[float]]:
    """Positions in the set, and root mean square differences in units of the values."""
    distance = (neighbours.distances[:, 0].double() / data.num_values).sqrt()
    return {"index": neighbours.indices[:, 0].tolist(), "rms_difference": distance.tolist()}


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
    nearest = None
    if neighbours is not None:
        nearest = data.subset(neighbours.indices[:, 0]).values().cpu()
    pictures.sample_sheet(images, nearest).save(files["samples.png"])
    np.save(files["samples.npy"], images.float().numpy())
    if plan.trajectory:
        strip = pictures.trajectory_strip(result.x_t, result.x0, result.timesteps)
        strip.save(files["trajectory.png"])
    for path, image in zip(plan.singles, images, strict=False):
        pictures.image_grid(image[None], pad=0, scale=1).save(files[path.name])
