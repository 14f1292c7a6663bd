"""Sensitivity fields of networks and analytical models along a run (figure 2 of the paper).

    python -m benchmarks.reproduce.fields --source TRAIN --network A --out FILE.json

|d x0[centre] / d x_t| at the states of each model's own DDIM run, mean of the samples; for
networks, PCA locality and the Wiener filter, whose field is the same for all images. For each step
and model: the cosine similarity of its mean field with that of the first network, its radius, the
root of the mean squared distance of the field's mass from the output pixel, and the field itself:
its values in the order channel, row, column with 4 significant digits, separated by spaces. None
stands for what cannot be told, as the radius of a field that is zero everywhere.

The paper's runs have 1000 steps; `--steps` asks for that many where there is time.

Writes FILE.json and FILE.png, where each field is scaled to its largest value; finished models are
kept in FILE.runs, and an interrupted command goes on with the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import analysis
from pyflocality.analysis import figures
from pyflocality.analysis.sensitivity import SensitivityRun

from ..command import Record
from . import networks
from .methods import Settings
from .runs import KeptRuns, Run, now, starting_noise
from .study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 10
_SEED = 0


def radius(field: Tensor, pixel: tuple[int, int]) -> float | None:
    """Root of the mean squared distance of a field [C, H, W] from a pixel, weighted by it."""
    mass = field.double().sum(0)
    rows = torch.arange(mass.shape[0], dtype=torch.float64)[:, None] - pixel[0]
    columns = torch.arange(mass.shape[1], dtype=torch.float64)[None] - pixel[1]
    return _known((((rows**2 + columns**2) * mass).sum() / mass.sum()).sqrt())


def similarity(field: Tensor, other: Tensor) -> float | None:
    """Cosine of the angle between two fields of one shape."""
    u, v = field.double().flatten(), other.double().flatten()
    return _known(u @ v / (u.norm() * v.norm()))


def compare(runs: dict[str, SensitivityRun], reference: str) -> list[Record]:
    """A record for each model and level of its field, and how it is like that of the reference."""
    records = []
    for name, run in runs.items():
        for level, t in enumerate(run.timesteps.tolist()):
            field = run.fields[level, 0]
            records.append(
                {
                    "model": name,
                    "t": t,
                    "largest": _known(field.max()),
                    "radius": radius(field, run.pixels[0][1:]),
                    "similarity": similarity(field, runs[reference].fields[level, 0]),
                    "field": " ".join(f"{value:.4g}" for value in field.flatten().tolist()),
                }
            )
    return records


def make_or_find(
    model: Callable[[], pf.Denoiser],
    settings: Settings,
    pixel: tuple[int, int, int],
    noise: Tensor,
    steps: int,
    kept: KeptRuns,
    *,
    progress: bool,
) -> tuple[SensitivityRun, float]:
    """The mean fields of a model, made unless they are kept, and the seconds that took.

    Settings are all that its answers depend on besides images, noise [n, C, H, W] and steps, of
    which at most `LEVELS` are looked at.
    """

    def make() -> Run:
        clock = time.perf_counter()
        denoiser = model()
        start = noise.to(denoiser.device)
        result = analysis.sensitivity_along_run(
            denoiser, pixel, steps=steps, every=-(-steps // LEVELS), x_T=start, progress=progress
        )
        seconds = round(now(denoiser.device) - clock, 2)
        levels = {name: getattr(result, name).tolist() for name in ("timesteps", "alpha", "sigma")}
        return Run(result.fields.cpu(), levels | {"seconds": seconds})

    run, _ = kept.get(settings["model"], settings | {"pixel": list(pixel)}, make)
    levels = {name: torch.tensor(run.facts[name]) for name in ("timesteps", "alpha", "sigma")}
    return SensitivityRun(run.x0, **levels, pixels=(pixel,)), run.facts["seconds"]


def draw(runs: dict[str, SensitivityRun], records: Sequence[Record]) -> Figure:
    """The fields, each with its radius and similarity below it."""
    figure = figures.sensitivity_figure(runs)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.3 * len(runs))
    # One panel for each record: levels are few enough to be drawn all.
    for axis, record in zip(figure.axes, records, strict=True):
        told = (("r", record["radius"], 1), ("cos", record["similarity"], 2))
        parts = [f"{name} " + ("-" if v is None else f"{v:.{n}f}") for name, v, n in told]
        axis.set_xlabel("  ".join(parts), fontsize=6, labelpad=2)
    figure.suptitle(
        f"r: radius in pixels; cos: similarity with the field of {next(iter(runs))}", fontsize=8
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    study = Study("fields", 32, "samples that are averaged")
    study.parser.add_argument(
        "--steps", type=int, default=50, help=f"steps of the run, at least {LEVELS}"
    )
    study.start(arguments)
    options, data, progress = study.options, study.data, study.progress
    if options.steps < LEVELS:
        study.parser.error(f"--steps must be at least {LEVELS}, got {options.steps}")
    channels, height, width = data.image_shape
    pixel = (channels // 2, height // 2, width // 2)
    noise = starting_noise(data.image_shape, options.samples, _SEED)
    kept = study.kept(samples=options.samples, seed=_SEED, steps=options.steps)
    runs, seconds = {}, {}
    for name, (settings, model) in _models(study).items():
        print(f"fields of {name}", flush=True)
        runs[name], seconds[name] = make_or_find(
            model, settings, pixel, noise, options.steps, kept, progress=progress
        )
    reference = study.trained[0].name
    records = compare(runs, reference)
    study.write(
        records,
        steps=options.steps,
        pixel=list(pixel),
        similarity_with=reference,
        seconds_by_model=seconds,
    )
    path = study.picture()
    draw(runs, records).savefig(path, dpi=110)
    print(f"written: {options.out}\nwritten: {path}")
    return 0


def _models(study: Study) -> dict[str, tuple[Settings, Callable[[], pf.Denoiser]]]:
    """Settings of each model, and what makes it."""
    threshold = study.options.threshold
    result: dict[str, tuple[Settings, Callable[[], pf.Denoiser]]] = {
        network.name: (network.settings, partial(networks.load, network.path, study.device))
        for network in study.trained
    }
    result["PCA locality"] = (
        {"model": "pca-locality", "threshold": threshold},
        lambda: pf.PCALocalityDenoiser(study.data, threshold, moments=study.moments),
    )
    result["Wiener filter"] = ({"model": "wiener"}, lambda: pf.WienerDenoiser(study.moments))
    return result


def _known(value: Tensor) -> float | None:
    """A number, or None where it is none: JSON has no such values."""
    number = float(value)
    return number if math.isfinite(number) else None


if __name__ == "__main__":
    raise SystemExit(main())
