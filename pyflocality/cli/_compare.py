"""`pyflocality compare`: several models from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.memory import ignoring_memory
from pyflocality._support.paths import checked_path
from pyflocality._support.streams import answer, listed
from pyflocality.cli._denoisers import DENOISERS, DenoiserOptions, split_options
from pyflocality.cli._errors import reported
from pyflocality.cli._foreseen import hold, jobs_of
from pyflocality.cli._options import (
    DENOISERS_HELP,
    DeviceSourceOptions,
    EveryModelOptions,
    FolderOptions,
    SamplingOptions,
    given_path,
)
from pyflocality.cli._recited import recited_line, recited_record, recited_samples
from pyflocality.cli._recorded import RecordedDenoiser
from pyflocality.cli._samples import draw, starting_noise
from pyflocality.cli._work import (
    Work,
    check_stored,
    data_record,
    foretell_few_images,
    neighbour_record,
    neighbour_values,
    neighbours_of,
    text_of,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import Basis, Moments, TrainingSet
    from pyflocality.ops.nearest import Neighbours

_FILES = ("compare.png", "samples.npz", "run.json")


@dataclass(frozen=True, kw_only=True)
class _Models(EveryModelOptions):
    """Several models, and the one that the others are measured against."""

    methods: Annotated[
        str,
        typer.Option(
            help=f"Which models, in the order of the rows, as in local,optimal. {DENOISERS_HELP}."
        ),
    ] = "pca-locality,local,wiener,optimal"
    against: Annotated[
        str | None,
        typer.Option(
            help="The model that the others are measured against; the first if not given."
        ),
    ] = None


@reported(mask_threshold="threshold", batch_size="loader_batch")
def compare(
    *,
    results: FolderOptions,
    models: _Models,
    sampling: SamplingOptions,
    source: DeviceSourceOptions,
) -> None:
    """Draw what several models make of the same noise, one row for each.

    An option goes to all models that take it. Writes into the folder --out: compare.png (a row
    for each model, with its MSE and r2 against the row of --against; below them the training
    images nearest to that row; samples that are training images are framed), samples.npz (the
    values of each row) and run.json (settings, numbers, versions, timings).
    """
    from pyflocality.moments.basis import stored_source

    names, folder = _names(models.methods), checked_path(results.out, "out")
    methods = split_options(names, models.given)
    against = names[0] if models.against is None else models.against
    stored = given_path(models.moments, "moments")
    source.check()
    for method in methods:
        method.check()
    if against not in names:
        raise ValueError(f"`against` must be one of {', '.join(names)}, got {against!r}")
    sampling.check()
    needs_moments = any(method.needs_moments for method in methods)
    if stored is not None and not needs_moments:
        raise ValueError(f"`moments` is of no use to {', '.join(names)}")
    files = [folder / name for name in _FILES]
    asked = asdict(source), asdict(models), asdict(sampling)
    with (
        ignoring_memory(models.ignore_memory),
        working("compare", files, results, asked, folder=folder) as work,
    ):
        moments = None if stored is None else stored_source(stored)
        with work.stages("load", f"loading {source.source}"):
            data = source.load(progress=results.progress).augmented(flip=models.flip)
        check_stored(data, moments)
        foretell_few_images(data if moments is None else moments, methods)
        jobs = [
            job for method in methods for job in jobs_of(data, method, sampling, moments=moments)
        ]
        hold(jobs, announce=results.progress)
        runs, described = _sampled(work, data, moments, methods, sampling, results.progress)
        record = _scored(work, files, data, runs, described, against, models.memory_budget) | {
            "data": data_record(data, flip=models.flip),
            "moments": None if stored is None else str(stored),
            "sampling": sampling.settings | {"timesteps": sampling.timesteps.tolist()},
            "backends": work.backends_by_operation(),
        }
        record = work.finish(source, record)
    shown = text_of(record) if results.as_json else _table(record, files)
    answer(shown, only_here=results.as_json)


def _names(methods: str) -> list[str]:
    """The models of a comma-separated list."""
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in DENOISERS:
            raise ValueError(f"`methods` must be of {', '.join(DENOISERS)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"`methods` must name each model once, got {methods!r}")
    return names


def _sampled(
    work: Work,
    data: TrainingSet,
    moments: Moments | Basis | None,
    methods: Sequence[DenoiserOptions],
    sampling: SamplingOptions,
    progress: bool,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What every model makes, by name, and what is told of it."""
    runs, described = {}, []
    for method in methods:
        denoiser = method.build(data, moments, work.stages)
        recorded = RecordedDenoiser(denoiser)
        doing = f"sampling {method.name}"
        with work.stages(doing, f"{doing}: {sampling.n} images"):
            start = starting_noise(recorded, sampling)
            runs[method.name] = draw(recorded, sampling, start.to(data.device), progress=progress)
        settings = {"name": method.name, **method.in_force(denoiser)}
        described.append(settings | {"calls": recorded.calls})
    return runs, described


def _scored(
    work: Work,
    files: Sequence[Path],
    data: TrainingSet,
    runs: dict[str, Tensor],
    described: Sequence[dict[str, Any]],
    against: str,
    memory_budget: str | None,
) -> dict[str, Any]:
    """Write picture and values under their temporary names; the agreements, for the record."""
    import numpy as np

    from pyflocality import pictures

    near = _neighbours(work, data, runs, memory_budget)
    recited = {name: recited_samples(one, data) for name, one in near.items()}
    told = {name: recited_record(which) for name, which in recited.items()}
    rows = {name: images.cpu() for name, images in runs.items()}
    nearest = neighbour_values(near[against], data, len(rows[against]))
    agreements = {name: _agreement(images, rows[against]) for name, images in rows.items()}
    nearest_agreement = _agreement(nearest, rows[against])
    captioned = []
    for name, images in rows.items():
        caption = name if name == against else f"{name}  {_caption(agreements[name])}"
        number = told[name]["number"]
        captioned.append((f"{caption}  {number} recited" if number else caption, images))
    captioned.append((f"nearest training images  {_caption(nearest_agreement)}", nearest))
    picture, values, _ = map(work.temporary, files)
    pictures.captioned_rows(captioned, marked=[*recited.values(), None]).save(picture)
    arrays: dict[str, Any] = {name: images.float().numpy() for name, images in rows.items()}
    np.savez(values, **arrays, nearest_training_images=nearest.numpy())
    return {
        "against": against,
        "methods": [
            entry | agreements[entry["name"]] | {"recited": told[entry["name"]]}
            for entry in described
        ],
        "nearest": neighbour_record(near[against], data) | nearest_agreement,
    }


def _neighbours(
    work: Work, data: TrainingSet, runs: dict[str, Tensor], memory_budget: str | None
) -> dict[str, Neighbours]:
    """The training images nearest to the samples of each model, looked for at once."""
    import torch

    from pyflocality.ops.nearest import Neighbours

    images = torch.cat(list(runs.values()))
    every = neighbours_of(images, data, memory_budget, work.stages)
    parts = zip(*(part.chunk(len(runs)) for part in every), strict=True)
    return {name: Neighbours(*part) for name, part in zip(runs, parts, strict=True)}


def _agreement(images: Tensor, target: Tensor) -> dict[str, Any]:
    """Mean and values by image of MSE and r2; None for what is no finite number."""
    from pyflocality import metrics

    images = images.to(target.dtype)
    measures = {"mse": metrics.mse(images, target), "r2": metrics.r2(images, target)}
    return {
        name: {
            "mean": _finite(float(values.mean())),
            "values": [_finite(value) for value in values.tolist()],
        }
        for name, values in measures.items()
    }


def _finite(value: float) -> float | None:
    # The r2 against an image of one colour is no number, and JSON has none for it.
    return value if math.isfinite(value) else None


def _shown(agreement: dict[str, Any]) -> tuple[str, str]:
    """Mean MSE and r2 as text."""
    mse, r2 = (agreement[name]["mean"] for name in ("mse", "r2"))
    return f"{mse:.4f}", "-" if r2 is None else f"{r2:.3f}"


def _caption(agreement: dict[str, Any]) -> str:
    mse, r2 = _shown(agreement)
    return f"MSE {mse}  r2 {r2}"


def _table(record: dict[str, Any], files: list[Path]) -> str:
    """The numbers of a run as text."""
    lines = [f"{'model':<24}{'MSE':>9}{'r2':>9}{'seconds':>9}{'recited':>9}"]
    number, recited = record["sampling"]["n"], []
    for method in record["methods"]:
        name = method["name"]
        mse, r2 = ("", "") if name == record["against"] else _shown(method)
        seconds = record["seconds"][f"sampling {name}"]
        found = method["recited"]["number"]
        lines.append(f"{name:<24}{mse:>9}{r2:>9}{seconds:>9.1f}{found:>9}")
        if found:
            instead = DENOISERS[name].instead
            told = recited_line(method["recited"], number, instead, "compare.png")
            recited.append(f"{name}: {told}")
    mse, r2 = _shown(record["nearest"])
    lines.append(f"{'nearest training images':<24}{mse:>9}{r2:>9}")
    lines.append(f"against {record['against']}, means of {number} images")
    lines += recited
    lines.append(listed(files))
    return "\n".join(lines)
