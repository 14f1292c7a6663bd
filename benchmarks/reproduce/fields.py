"""Sensitivity fields of networks and analytical models along a run (figure 2 of the paper).

    python -m benchmarks.reproduce.fields --source TRAIN --network A --out FILE.json

|d x0[centre] / d x_t| at the states of each model's own DDIM run, mean of the samples, scaled to
[0, 1]; for networks, PCA locality and the Wiener filter, whose field is the same for all images.
For each step and model: the cosine similarity of its mean field with that of the first network,
and its radius, the root of the mean squared distance of the field's mass from the output pixel.

The paper's runs have 1000 steps; `--steps` asks for that many where there is time.

Writes FILE.json and FILE.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import analysis
from pyflocality.analysis import figures
from pyflocality.analysis.sensitivity import SensitivityRun

from ..cpu_suite import write_json
from . import networks
from .runs import starting_noise
from .study import Study

LEVELS = 10


def radius(field: Tensor, pixel: tuple[int, int]) -> float:
    """Root of the mean squared distance of a field [C, H, W] from a pixel, weighted by it."""
    mass = field.double().sum(0)
    rows = torch.arange(mass.shape[0], dtype=torch.float64)[:, None] - pixel[0]
    columns = torch.arange(mass.shape[1], dtype=torch.float64)[None] - pixel[1]
    return float(((rows**2 + columns**2) * mass).sum() / mass.sum()) ** 0.5


def compare(runs: dict[str, SensitivityRun], reference: str) -> list[dict[str, Any]]:
    """A record for each model and level of how its field is like that of the reference."""
    records = []
    for name, run in runs.items():
        for level, t in enumerate(run.timesteps.tolist()):
            field, target = run.fields[level, 0], runs[reference].fields[level, 0]
            cosine = torch.cosine_similarity(field.double().flatten(), target.double().flatten(), 0)
            records.append(
                {
                    "model": name,
                    "t": t,
                    "largest": float(field.max()),
                    "radius": radius(field, run.pixels[0][1:]),
                    "similarity": float(cosine),
                }
            )
    return records


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
    moments = pf.Moments.from_data(data, progress=progress)
    models: dict[str, pf.Denoiser] = {
        network.name: networks.load(network.path) for network in study.trained
    }
    models["PCA locality"] = pf.PCALocalityDenoiser(data, options.threshold, moments=moments)
    models["Wiener filter"] = pf.WienerDenoiser(moments)
    channels, height, width = data.image_shape
    pixel = (channels // 2, height // 2, width // 2)
    noise = starting_noise(data.image_shape, options.samples, 0)
    runs = {}
    for name, model in models.items():
        print(f"fields of {name}", flush=True)
        runs[name] = analysis.sensitivity_along_run(
            model,
            pixel,
            steps=options.steps,
            every=options.steps // LEVELS,
            x_T=noise,
            progress=progress,
        )
    reference = study.trained[0].name
    report = study.report(
        compare(runs, reference), steps=options.steps, pixel=list(pixel), similarity_with=reference
    )
    write_json(report, options.out)
    picture = options.out.with_suffix(".png")
    figures.sensitivity_figure(runs).savefig(picture, dpi=110)
    print(f"written: {options.out}\nwritten: {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
