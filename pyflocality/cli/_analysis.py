"""`pyflocality sensitivity | spectrum | memorize`: the figures of the analysis."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pyflocality._support.memory import ignoring_memory
from pyflocality._support.paths import checked_path
from pyflocality._support.record import Stages
from pyflocality._support.streams import answer, listed
from pyflocality.cli._denoisers import DENOISERS, DenoiserOptions
from pyflocality.cli._errors import reported
from pyflocality.cli._foreseen import hold, jobs_of
from pyflocality.cli._groups import MODEL, OneOf
from pyflocality.cli._options import (
    FolderOptions,
    ModelOptions,
    MomentsModelOptions,
    NoiseOptions,
    SourceOptions,
    StepsOptions,
    given_path,
)
from pyflocality.cli._work import check_stored, components_of, text_of, working

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyflocality import Basis, Moments, TrainingSet
    from pyflocality.denoisers import Denoiser

N = TypeVar("N", int, float)
# What the work of a command comes to: arrays, their figure and what the record tells of it.
_Result = tuple[dict[str, Any], "Figure", dict[str, Any]]
_DenoiserName = Annotated[
    str, typer.Option(help="Which model.", rich_help_panel=MODEL), OneOf(*DENOISERS)
]


@reported(mask_threshold="threshold")
def sensitivity(
    *,
    results: FolderOptions,
    pixel: Annotated[
        list[str] | None,
        typer.Option(
            help="Output value to look at: channel,row,column. Several may be given; the centre "
            "if none is."
        ),
    ] = None,
    denoiser: _DenoiserName = "pca-locality",
    options: MomentsModelOptions,
    sampling: StepsOptions,
    source: SourceOptions,
) -> None:
    """Draw which inputs an output pixel listens to, over the steps of a sampling run.

    Mean of |d output / d input| over --n samples, beside that of the Wiener filter. Writes
    sensitivity.png, sensitivity.npz (fields [steps, pixels, C, H, W] by model) and run.json.
    """
    import torch

    model = DenoiserOptions(denoiser, options.given)
    sampling.check()
    chosen = None if not pixel else [_parse_pixel(text) for text in pixel]

    def work(job: _Job) -> _Result:
        from pyflocality import WienerDenoiser, analysis
        from pyflocality._support.checks import check_pixel
        from pyflocality.analysis import figures

        depth, height, width = job.data.image_shape
        wanted = chosen or [(depth // 2, height // 2, width // 2)]
        pixels = [check_pixel(place, job.data.image_shape) for place in wanted]
        components = job.components()
        models = {model.name: job.denoiser()}
        if model.name != "wiener":
            models["wiener"] = WienerDenoiser(components)
        generator = torch.Generator().manual_seed(sampling.seed)
        noise = torch.randn(sampling.n, *job.data.image_shape, generator=generator)
        schedule = sampling.noise_schedule()
        runs = {}
        for name, one in models.items():
            with job.stages(name, f"fields of {name}"):
                runs[name] = analysis.sensitivity_along_run(
                    one,
                    pixels,
                    steps=sampling.steps,
                    schedule=schedule,
                    x_T=schedule.init_noise_sigma * noise,
                    progress=results.progress,
                )
        run = runs[model.name]
        arrays = {f"fields_{name.replace('-', '_')}": r.fields.numpy() for name, r in runs.items()}
        arrays |= {name: getattr(run, name).numpy() for name in ("timesteps", "alpha", "sigma")}
        told = {"pixels": [list(p) for p in run.pixels], "sampling": asdict(sampling)}
        return arrays, figures.sensitivity_figure(runs), told

    _run("sensitivity", source, model, options, results, work, asdict(sampling), pixel)


@reported(mask_threshold="threshold")
def spectrum(
    *,
    results: FolderOptions,
    t: Annotated[
        str, typer.Option(help="Times of the schedule to look at, such as 700,500,300.")
    ] = "700,500,300",
    k: Annotated[int, typer.Option(help="Number of eigenpairs.")] = 20,
    image: Annotated[int, typer.Option(help="Which image of the set is made noisy.")] = 0,
    denoiser: _DenoiserName = "optimal",
    options: MomentsModelOptions,
    sampling: NoiseOptions,
    source: SourceOptions,
) -> None:
    """Draw the basis in which a model shrinks: leading eigenpairs of its Jacobian.

    At one noisy image, for several noise levels. Writes spectrum.png, spectrum.npz (eigenvalues
    [levels, k], eigenvectors [levels, k, C, H, W]) and run.json.
    """
    import torch

    model = DenoiserOptions(denoiser, options.given)
    # DDPM's times are whole numbers, those of others are not.
    times = [int(time) if time.is_integer() else time for time in _parse_numbers(t, "t", float)]
    sampling.check()
    names = [f"t = {time:g}" for time in times]
    if len(set(names)) < len(names):
        raise ValueError(f"`t` must hold different times, got {t!r}")
    levels = [sampling.noise_schedule()(time) for time in times]
    if not all(alpha > 0 and sigma > 0 for alpha, sigma in levels):
        raise ValueError(f"`t` must be times with both signal and noise, got {t!r}")
    _need("scipy", "analysis")

    def work(job: _Job) -> _Result:
        from pyflocality import analysis
        from pyflocality.analysis import figures

        if not 0 <= image < len(job.data):
            raise ValueError(f"`image` must be from 0 to {len(job.data) - 1}, got {image}")
        one = job.denoiser()
        generator = torch.Generator().manual_seed(sampling.seed)
        noise = torch.randn(1, *job.data.image_shape, generator=generator)
        clean = job.data.values(image, image + 1)
        spectra = {}
        for name, level in zip(names, levels, strict=True):
            with job.stages(name, f"eigenpairs at {name}"):
                x = level.alpha * clean + level.sigma * noise
                spectra[name] = analysis.jacobian_spectrum(one, x, level, k=k)
        arrays = {
            "values": torch.stack([s.values for s in spectra.values()]).numpy(),
            "vectors": torch.stack([s.vectors for s in spectra.values()]).numpy(),
            "alpha": [level.alpha for level in levels],
            "sigma": [level.sigma for level in levels],
        }
        told = {
            "t": times,
            "image": image,
            "eigenvalues": {name: s.values.tolist() for name, s in spectra.items()},
            "largest_residual": {name: float(s.residuals.max()) for name, s in spectra.items()},
        }
        return arrays, figures.spectrum_figure(spectra), told

    _run("spectrum", source, model, options, results, work, asdict(sampling), times, k, image)


@reported(mask_threshold="threshold")
def memorize(
    *,
    results: FolderOptions,
    sizes: Annotated[
        str, typer.Option(help="Numbers of training images of each model, such as 1,10,100.")
    ] = "1,10,100",
    denoiser: _DenoiserName = "local",
    options: ModelOptions,
    sampling: StepsOptions,
    source: SourceOptions,
) -> None:
    """Draw how recitation gives way to generation as the training set grows.

    Two models of disjoint halves of the set make samples from the same noise. Writes
    memorize.png, memorize.npz (cosine similarities [sizes, n] and the samples) and run.json.
    """
    import torch

    model = DenoiserOptions(denoiser, options.given)
    counts = _parse_numbers(sizes, "sizes", int)
    sampling.check()

    def work(job: _Job) -> _Result:
        from pyflocality import analysis
        from pyflocality.analysis import figures

        def make(part: TrainingSet) -> Denoiser:
            return model.build(part, None)

        with job.stages("samples", f"samples of {2 * len(counts)} models"):
            curve = analysis.memorization_curve(
                make,
                job.data,
                counts,
                n=sampling.n,
                steps=sampling.steps,
                schedule=sampling.noise_schedule(),
                generator=torch.Generator().manual_seed(sampling.seed),
                progress=results.progress,
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

    _run("memorize", source, model, options, results, work, asdict(sampling), counts)


class _Job:
    """What the work of a command has at hand.

    Attributes:
        data: The training set.
        stages: The stopwatch.
    """

    def __init__(
        self,
        model: DenoiserOptions,
        data: TrainingSet,
        moments: Moments | Basis | None,
        stages: Stages,
    ) -> None:
        self.data, self.stages = data, stages
        self._model, self._moments = model, moments

    def components(self) -> Basis:
        """Principal components of the set, computed once unless they were given."""
        source = self.data if self._moments is None else self._moments
        self._moments = components_of(source, self.stages)
        return self._moments

    def denoiser(self) -> Denoiser:
        """The model of the set."""
        return self._model.build(self.data, self._moments, self.stages)


def _run(
    command: str,
    source: SourceOptions,
    model: DenoiserOptions,
    options: ModelOptions,
    results: FolderOptions,
    work: Callable[[_Job], _Result],
    *asked: object,
) -> None:
    """Check, load, work and write: the picture, the arrays and the record."""
    import numpy as np

    from pyflocality.moments.basis import stored_source

    _need("matplotlib", "plot")
    source.check()
    model.check()
    folder = checked_path(results.out, "out")
    stored = given_path(getattr(options, "moments", None), "moments")
    picture, arrays_file, record_file = (
        folder / name for name in (f"{command}.png", f"{command}.npz", "run.json")
    )
    files = [picture, arrays_file, record_file]
    told = asdict(source), asdict(model), asdict(options), asked
    with (
        ignoring_memory(options.ignore_memory),
        working(command, files, results, told, folder=folder) as at_work,
    ):
        moments = None if stored is None else stored_source(stored)
        with at_work.stages("load", f"loading {source.source}"):
            data = source.load(progress=results.progress)
        check_stored(data, moments)
        # Of one sample: how many derivatives are taken at a time follows the budget.
        sampling = NoiseOptions()
        jobs = jobs_of(data, model, sampling, nearest=False, moments=moments)
        hold(jobs, announce=False)
        arrays, figure, facts = work(_Job(model, data, moments, at_work.stages))
        figure.savefig(at_work.temporary(picture), dpi=120)
        with open(at_work.temporary(arrays_file), "wb") as file:
            np.savez_compressed(file, **arrays)
        record = at_work.finish(
            source,
            {
                "data": {
                    "name": data.name,
                    "images": len(data),
                    "image_shape": [*data.image_shape],
                },
                "denoiser": {"name": model.name, **model.given},
                **facts,
                "backends": sorted({backend for _, backend in at_work.backends}),
            },
        )
    if results.as_json:
        answer(text_of(record), only_here=True)
    else:
        answer(f"{record['seconds']['total']:.1f} s: {listed(files)}", only_here=False)


def _parse_pixel(text: str) -> tuple[int, int, int]:
    if re.fullmatch(r"-?\d+,-?\d+,-?\d+", text) is None:
        raise ValueError(f"`pixel` must be channel,row,column such as 0,16,16, got {text!r}")
    channel, row, column = map(int, text.split(","))
    return channel, row, column


def _parse_numbers(text: str, name: str, kind: type[N]) -> list[N]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"`{name}` must be numbers with commas between, got {text!r}") from None


def _need(package: str, extra: str) -> None:
    """Refuse before any work where an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"this needs {package}: pip install 'pyflocality[{extra}]'")
