"""`pyflocality sensitivity | spectrum | memorize`: the figures of the analysis."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.outputs import Outputs
from pyflocality._support.paths import checked_path
from pyflocality._support.record import Stages, peak_memory_bytes, software
from pyflocality._support.streams import answer, listed
from pyflocality.cli import _generate_options as options
from pyflocality.cli import _options as common
from pyflocality.cli._denoisers import DenoiserOptions
from pyflocality.cli._errors import reported
from pyflocality.cli._generate_options import Sampling
from pyflocality.cli._models import complete_moments, given_options
from pyflocality.cli._options import MODEL, SourceOptions, given_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyflocality import Moments, TrainingSet
    from pyflocality.denoisers import Denoiser

_Arrays = dict[str, Any]
_DenoiserChoice = Annotated[
    options.DenoiserName, typer.Option(help="Which model.", rich_help_panel=MODEL)
]
_Levels = Annotated[
    str, typer.Option(help="Times of the schedule to look at, such as 700,500,300.")
]


@reported(mask_threshold="threshold")
def sensitivity(
    source: common.Source,
    out: options.Out,
    pixel: Annotated[
        list[str] | None,
        typer.Option(
            help="Output value to look at: channel,row,column. Several may be given; the centre "
            "if none is."
        ),
    ] = None,
    denoiser: _DenoiserChoice = options.DenoiserName["pca-locality"],
    threshold: options.Threshold = None,
    window: options.Window = None,
    temperature: options.Temperature = None,
    memory_budget: options.MemoryBudget = None,
    moments: options.MomentsFile = None,
    n: options.Count = 8,
    steps: options.Steps = 10,
    schedule: options.Schedule = options.ScheduleName["ddpm"],
    seed: options.Seed = 0,
    resolution: common.Resolution = None,
    channels: common.Channels = None,
    split: common.Split = None,
    layout: common.Layout = None,
    label: common.Label = None,
    force: common.Force = False,
    as_json: common.Json = False,
    progress: common.Progress = True,
) -> None:
    """Draw which inputs an output pixel listens to, over the steps of a sampling run.

    Mean of |d output / d input| over --n samples, beside that of the Wiener filter. Writes
    sensitivity.png, sensitivity.npz (fields [steps, pixels, C, H, W] by model) and run.json.
    """
    import torch

    model = _model(
        denoiser.value,
        window,
        threshold=threshold,
        temperature=temperature,
        memory_budget=memory_budget,
    )
    sampling = Sampling(n, steps, schedule.value, "ddim", seed)
    sampling.check()
    chosen = None if not pixel else [_parse_pixel(text) for text in pixel]

    def work(job: _Job) -> tuple[_Arrays, Figure, dict[str, Any]]:
        from pyflocality import WienerDenoiser, analysis
        from pyflocality.analysis import figures
        from pyflocality.analysis.sensitivity import check_pixel

        depth, height, width = job.data.image_shape
        wanted = chosen or [(depth // 2, height // 2, width // 2)]
        pixels = [check_pixel(place, job.data.image_shape) for place in wanted]
        models = {model.name: job.denoiser(model)}
        if model.name != "wiener":
            models["wiener"] = WienerDenoiser(job.moments())
        noise = torch.randn(
            n, *job.data.image_shape, generator=torch.Generator().manual_seed(sampling.seed)
        )
        schedule = sampling.noise_schedule()
        runs = {}
        for name, found in models.items():
            with job.stages(name, f"fields of {name}"):
                runs[name] = analysis.sensitivity_along_run(
                    found,
                    pixels,
                    steps=steps,
                    schedule=schedule,
                    x_T=schedule.init_noise_sigma * noise,
                    progress=progress,
                )
        run = runs[model.name]
        arrays = {f"fields_{name.replace('-', '_')}": r.fields.numpy() for name, r in runs.items()}
        arrays |= {name: getattr(run, name).numpy() for name in ("timesteps", "alpha", "sigma")}
        told = {"pixels": [list(p) for p in run.pixels], "sampling": asdict(sampling)}
        return arrays, figures.sensitivity_figure(runs), told

    images = SourceOptions(source, resolution, channels, split, label, layout=layout)
    settings = asdict(sampling) | {"pixel": pixel}
    plan = _Plan("sensitivity", images, model, moments, settings, out, force, as_json, progress)
    _run(plan, work)


@reported(mask_threshold="threshold")
def spectrum(
    source: common.Source,
    out: options.Out,
    t: _Levels = "700,500,300",
    k: Annotated[int, typer.Option(help="Number of eigenpairs.")] = 20,
    image: Annotated[int, typer.Option(help="Which image of the set is made noisy.")] = 0,
    denoiser: _DenoiserChoice = options.DenoiserName["optimal"],
    threshold: options.Threshold = None,
    window: options.Window = None,
    temperature: options.Temperature = None,
    memory_budget: options.MemoryBudget = None,
    moments: options.MomentsFile = None,
    schedule: options.Schedule = options.ScheduleName["ddpm"],
    seed: options.Seed = 0,
    resolution: common.Resolution = None,
    channels: common.Channels = None,
    split: common.Split = None,
    layout: common.Layout = None,
    label: common.Label = None,
    force: common.Force = False,
    as_json: common.Json = False,
    progress: common.Progress = True,
) -> None:
    """Draw the basis in which a model shrinks: leading eigenpairs of its Jacobian.

    At one noisy image, for several noise levels. Writes spectrum.png, spectrum.npz (eigenvalues
    [levels, k], eigenvectors [levels, k, C, H, W]) and run.json.
    """
    import torch

    model = _model(
        denoiser.value,
        window,
        threshold=threshold,
        temperature=temperature,
        memory_budget=memory_budget,
    )
    # DDPM's times are whole numbers, those of others are not.
    times = [int(time) if time.is_integer() else time for time in _parse_numbers(t, "t", float)]
    sampling = Sampling(1, 1, schedule.value, "ddim", seed)
    sampling.check()
    names = [f"t = {time:g}" for time in times]
    if len(set(names)) < len(names):
        raise ValueError(f"`t` must hold different times, got {t!r}")
    levels = [sampling.noise_schedule()(time) for time in times]
    if not all(alpha > 0 and sigma > 0 for alpha, sigma in levels):
        raise ValueError(f"`t` must be times with both signal and noise, got {t!r}")
    _need("scipy", "analysis")

    def work(job: _Job) -> tuple[_Arrays, Figure, dict[str, Any]]:
        from pyflocality import analysis
        from pyflocality.analysis import figures

        if not 0 <= image < len(job.data):
            raise ValueError(f"`image` must be from 0 to {len(job.data) - 1}, got {image}")
        found = job.denoiser(model)
        generator = torch.Generator().manual_seed(sampling.seed)
        noise = torch.randn(1, *job.data.image_shape, generator=generator)
        clean = job.data.values(image, image + 1)
        spectra = {}
        for name, (alpha, sigma) in zip(names, levels, strict=True):
            with job.stages(name, f"eigenpairs at {name}"):
                x = alpha * clean + sigma * noise
                spectra[name] = analysis.jacobian_spectrum(found, x, sigma, alpha, k=k)
        arrays = {
            "values": torch.stack([s.values for s in spectra.values()]).numpy(),
            "vectors": torch.stack([s.vectors for s in spectra.values()]).numpy(),
            "alpha": [level[0] for level in levels],
            "sigma": [level[1] for level in levels],
        }
        told = {
            "t": times,
            "image": image,
            "eigenvalues": {name: s.values.tolist() for name, s in spectra.items()},
            "largest_residual": {name: float(s.residuals.max()) for name, s in spectra.items()},
        }
        return arrays, figures.spectrum_figure(spectra), told

    images = SourceOptions(source, resolution, channels, split, label, layout=layout)
    settings = asdict(sampling) | {"t": times, "k": k, "image": image}
    plan = _Plan("spectrum", images, model, moments, settings, out, force, as_json, progress)
    _run(plan, work)


@reported(mask_threshold="threshold")
def memorize(
    source: common.Source,
    out: options.Out,
    sizes: Annotated[
        str, typer.Option(help="Numbers of training images of each model, such as 1,10,100.")
    ] = "1,10,100",
    denoiser: _DenoiserChoice = options.DenoiserName["local"],
    threshold: options.Threshold = None,
    window: options.Window = None,
    temperature: options.Temperature = None,
    memory_budget: options.MemoryBudget = None,
    n: options.Count = 8,
    steps: options.Steps = 10,
    schedule: options.Schedule = options.ScheduleName["ddpm"],
    seed: options.Seed = 0,
    resolution: common.Resolution = None,
    channels: common.Channels = None,
    split: common.Split = None,
    layout: common.Layout = None,
    label: common.Label = None,
    force: common.Force = False,
    as_json: common.Json = False,
    progress: common.Progress = True,
) -> None:
    """Draw how recitation gives way to generation as the training set grows.

    Two models of disjoint halves of the set make samples from the same noise. Writes
    memorize.png, memorize.npz (cosine similarities [sizes, n] and the samples) and run.json.
    """
    import torch

    model = _model(
        denoiser.value,
        window,
        threshold=threshold,
        temperature=temperature,
        memory_budget=memory_budget,
    )
    counts = _parse_numbers(sizes, "sizes", int)
    sampling = Sampling(n, steps, schedule.value, "ddim", seed)
    sampling.check()

    def work(job: _Job) -> tuple[_Arrays, Figure, dict[str, Any]]:
        from pyflocality import Moments, analysis
        from pyflocality.analysis import figures

        def make(part: TrainingSet) -> Denoiser:
            needs = model.entry.needs_moments != "no"
            return model.build(part, Moments.from_data(part) if needs else None)

        with job.stages("samples", f"samples of {2 * len(counts)} models"):
            curve = analysis.memorization_curve(
                make,
                job.data,
                counts,
                n=n,
                steps=steps,
                schedule=sampling.noise_schedule(),
                generator=torch.Generator().manual_seed(sampling.seed),
                progress=progress,
            )
        arrays = {
            "sizes": curve.sizes,
            "between": curve.between.numpy(),
            "nearest": curve.nearest.numpy(),
            "samples": curve.samples.numpy(),
        }
        told = {
            "sizes": list(curve.sizes),
            "between_models": curve.between.mean(1).tolist(),
            "to_nearest_training_image": curve.nearest.mean(1).tolist(),
            "sampling": asdict(sampling),
        }
        return arrays, figures.memorization_figure({model.name: curve}), told

    images = SourceOptions(source, resolution, channels, split, label, layout=layout)
    settings = asdict(sampling) | {"sizes": counts}
    plan = _Plan("memorize", images, model, None, settings, out, force, as_json, progress)
    _run(plan, work)


class _Job:
    """What the work of a command has at hand.

    Attributes:
        data: The training set.
        stages: The stopwatch.
    """

    def __init__(self, data: TrainingSet, moments: Moments | None, stages: Stages) -> None:
        self.data, self.stages = data, stages
        self._moments = moments

    def moments(self) -> Moments:
        """Moments of the set with their eigenvectors, computed once unless they were given."""
        self._moments = complete_moments(self.data, self._moments, self.stages)
        return self._moments

    def denoiser(self, model: DenoiserOptions) -> Denoiser:
        """The model of the set."""
        needs = model.entry.needs_moments != "no"
        return model.build(self.data, self.moments() if needs else None)


@dataclass(frozen=True)
class _Plan:
    """What to read, what to do and where to write."""

    command: str
    source: SourceOptions
    model: DenoiserOptions
    moments: str | None
    settings: dict[str, Any]
    out: str
    force: bool
    as_json: bool
    progress: bool

    @property
    def asked(self) -> dict[str, Any]:
        """What tells one run from another."""
        return asdict(self) | {"force": None, "as_json": None, "progress": None}


def _run(plan: _Plan, work: Callable[[_Job], tuple[_Arrays, Figure, dict[str, Any]]]) -> None:
    """Check, load, work and write: the picture, the arrays and the record."""
    import numpy as np

    from pyflocality import Moments, trace_backends

    _need("matplotlib", "plot")
    plan.source.check()
    plan.model.check()
    command, model = plan.command, plan.model
    folder, moments = checked_path(plan.out, "out"), given_path(plan.moments, "moments")
    picture, arrays_file, record_file = (
        folder / name for name in (f"{command}.png", f"{command}.npz", "run.json")
    )
    start = time.perf_counter()
    stages = Stages(announce=plan.progress)
    files = [picture, arrays_file, record_file]
    with (
        Outputs(files, force=plan.force, folder=folder, run=plan.asked) as outputs,
        trace_backends() as backends,
    ):
        given = None if moments is None else Moments.load(moments)
        with stages("load", f"loading {plan.source.source}"):
            data = plan.source.load(progress=plan.progress)
        job = _Job(data, given, stages)
        arrays, figure, told = work(job)
        figure.savefig(outputs.temporary[picture], dpi=120)
        with open(outputs.temporary[arrays_file], "wb") as file:
            np.savez_compressed(file, **arrays)
        record = {
            "command": command,
            "source": asdict(plan.source),
            "data": {"name": data.name, "images": len(data), "image_shape": [*data.image_shape]},
            "denoiser": {"name": model.name, **model.given},
            **told,
            "backends": sorted({backend for _, backend in backends}),
            "software": software(),
            "seconds": stages.seconds | {"total": round(time.perf_counter() - start, 4)},
            "peak_memory_bytes": peak_memory_bytes(),
            "files": [path.name for path in files],
        }
        text = json.dumps(record, indent=2, allow_nan=False)
        outputs.temporary[record_file].write_text(text + "\n", encoding="utf-8")
        outputs.commit()
    if plan.as_json:
        answer(text, only_here=True)
    else:
        answer(f"{record['seconds']['total']:.1f} s: {listed(files)}", only_here=False)


def _model(name: str, window: str | None, **others: object) -> DenoiserOptions:
    return DenoiserOptions(name, given_options(window, **others))


def _parse_pixel(text: str) -> tuple[int, int, int]:
    if re.fullmatch(r"-?\d+,-?\d+,-?\d+", text) is None:
        raise ValueError(f"`pixel` must be channel,row,column such as 0,16,16, got {text!r}")
    channel, row, column = map(int, text.split(","))
    return channel, row, column


def _parse_numbers(text: str, name: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"`{name}` must be numbers with commas between, got {text!r}") from None


def _need(package: str, extra: str) -> None:
    """Refuse before any work where an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"this needs {package}: pip install 'pyflocality[{extra}]'")
