"""`pyflocality generate`: new images from a set of images."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality.cli._denoisers import DENOISERS, DenoiserOptions
from pyflocality.cli._errors import reported
from pyflocality.cli._files import Outputs
from pyflocality.cli._options import (
    OUTPUT,
    Channels,
    Device,
    Force,
    Json,
    Label,
    Progress,
    Resolution,
    Source,
    SourceOptions,
    Split,
    parse_window,
)
from pyflocality.cli._record import ObservedDenoiser, Stages, peak_memory_bytes, software

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import Moments, SampleResult, TrainingSet
    from pyflocality.noise import NoiseSchedule
    from pyflocality.ops.nearest import Neighbours

_SCHEDULES = {
    "ddpm": "DDPMSchedule",
    "cosine": "CosineSchedule",
    "karras": "KarrasSchedule",
    "flow": "FlowSchedule",
}


def _choice(name: str, values: list[str]) -> type[Enum]:
    """A type whose values typer offers and checks."""
    return Enum(name, {value: value for value in values}, type=str)


DenoiserName = _choice("DenoiserName", list(DENOISERS))
ScheduleName = _choice("ScheduleName", list(_SCHEDULES))
SamplerName = _choice("SamplerName", ["ddim", "euler", "heun"])
BackendName = _choice("BackendName", ["auto", "reference", "cpu", "triton", "cuda"])
Aggregation = _choice("Aggregation", ["exact", "batch-mean"])

# Headings of the options in the help.
MODEL, SAMPLING = "Model", "Sampling"

_DENOISERS_HELP = "; ".join(f"{name}: {entry.summary}" for name, entry in DENOISERS.items())

Out = Annotated[
    Path,
    typer.Option(
        help="Folder for the results; it is made if need be.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Denoiser = Annotated[
    DenoiserName, typer.Option(help=f"Which model. {_DENOISERS_HELP}.", rich_help_panel=MODEL)
]
Count = Annotated[
    int, typer.Option("--n", help="How many images to make.", rich_help_panel=SAMPLING)
]
Steps = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=SAMPLING)]
Schedule = Annotated[
    ScheduleName, typer.Option(help="Noise levels of the steps.", rich_help_panel=SAMPLING)
]
Sampler = Annotated[
    SamplerName,
    typer.Option(help="How a step follows from the denoised image.", rich_help_panel=SAMPLING),
]
Seed = Annotated[int, typer.Option(help="Seed of the starting noise.", rich_help_panel=SAMPLING)]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="pca-locality: share of the largest sensitivity that an input needs to count, in "
        "[0, 1). Smaller keeps more of an image together. 0.02 if not given; published: 0.005 "
        "for MNIST, 0.02 for faces, 0.05 for CIFAR-10.",
        rich_help_panel=MODEL,
    ),
]
Window = Annotated[
    str | None,
    typer.Option(
        help="local: side of the window in pixels, odd; or a table of noise level (sigma / alpha) "
        "and side, such as 10:15,1:7,0.1:3. 7 if not given.",
        rich_help_panel=MODEL,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Divides the logits of every posterior. 1 if not given.", rich_help_panel=MODEL
    ),
]
AggregationOption = Annotated[
    Aggregation | None,
    typer.Option(
        help="pca-locality: exact is the posterior over the whole set; batch-mean averages "
        "posteriors over batches, as the published code does. exact if not given.",
        rich_help_panel=MODEL,
    ),
]
LoaderBatch = Annotated[
    int | None,
    typer.Option(
        help="Images a batch of --aggregation batch-mean. 256 if not given.", rich_help_panel=MODEL
    ),
]
MomentsFile = Annotated[
    Path | None,
    typer.Option(
        "--moments",
        help="Moments of the set, as `pyflocality moments` writes them.",
        rich_help_panel=MODEL,
    ),
]
Backend = Annotated[
    BackendName | None,
    typer.Option(
        help="What runs the denoiser; the first that can if not given.", rich_help_panel=MODEL
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        help="Working memory, such as 2GB or 512MB. 1GB if not given.", rich_help_panel=MODEL
    ),
]
Individual = Annotated[
    bool,
    typer.Option(
        "--individual", help="Also write every image to a file of its own.", rich_help_panel=OUTPUT
    ),
]
Trajectory = Annotated[
    bool, typer.Option(help="Draw the way from noise to image.", rich_help_panel=OUTPUT)
]
Nearest = Annotated[
    bool,
    typer.Option(
        help="Draw under each image the training image nearest to it.", rich_help_panel=OUTPUT
    ),
]


@dataclass(frozen=True)
class Sampling:
    """How to sample: number of images, steps, schedule, sampler, seed."""

    n: int
    steps: int
    schedule: str
    sampler: str
    seed: int

    def check(self) -> None:
        """Raise ValueError for what cannot be run."""
        from pyflocality._checks import check_count

        check_count(self.n, "n")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must lie in [0, 2^63), got {self.seed}")
        self.noise_schedule().timesteps(self.steps)

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule itself."""
        from pyflocality import noise

        return getattr(noise, _SCHEDULES[self.schedule])()


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
        self.denoiser.check(self.source.device)
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
    source: Source,
    out: Out,
    denoiser: Denoiser = DenoiserName("pca-locality"),
    n: Count = 8,
    steps: Steps = 10,
    schedule: Schedule = ScheduleName("ddpm"),
    sampler: Sampler = SamplerName("ddim"),
    seed: Seed = 0,
    threshold: Threshold = None,
    window: Window = None,
    temperature: Temperature = None,
    aggregation: AggregationOption = None,
    loader_batch: LoaderBatch = None,
    moments: MomentsFile = None,
    resolution: Resolution = None,
    channels: Channels = None,
    split: Split = None,
    label: Label = None,
    backend: Backend = None,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    individual: Individual = False,
    trajectory: Trajectory = True,
    nearest: Nearest = True,
    as_json: Json = False,
    force: Force = False,
    progress: Progress = True,
) -> None:
    """Make new images from a set of images, without training.

    Writes into the folder --out: samples.png (the images, each above the training image nearest
    to it), samples.npy (their values, float32 in [-1, 1]), trajectory.png (the way from noise to
    image) and run.json (settings, versions, timings).
    """
    given = {
        "threshold": threshold,
        "window": None if window is None else parse_window(window),
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
        return nearest_images(images, data.images, memory_budget=budget)


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
