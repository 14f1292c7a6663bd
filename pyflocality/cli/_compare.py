"""`pyflocality compare`: several models from the same noise."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyflocality._support.outputs import Outputs
from pyflocality._support.paths import checked_path
from pyflocality._support.record import Stages, software
from pyflocality._support.streams import answer, listed
from pyflocality.cli import _generate_options as options
from pyflocality.cli import _options as common
from pyflocality.cli._denoisers import DENOISERS, DenoiserOptions, split_options
from pyflocality.cli._errors import reported
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
from pyflocality.cli._options import SourceOptions, given_path
from pyflocality.cli._record import ObservedDenoiser

if TYPE_CHECKING:
    from torch import Tensor

_FILES = ("compare.png", "samples.npz", "run.json")


@dataclass(frozen=True)
class Plan:
    """A checked run: what to read, what to compare and where to write."""

    source: SourceOptions
    methods: list[DenoiserOptions]
    against: str
    sampling: Sampling
    flip: bool
    moments: Path | None
    memory_budget: str | None
    files: list[Path]
    progress: bool

    def check(self) -> None:
        """Refuse everything that can be refused without the images."""
        self.source.check()
        for method in self.methods:
            method.check()
        names = [method.name for method in self.methods]
        if self.against not in names:
            raise ValueError(f"`against` must be one of {', '.join(names)}, got {self.against!r}")
        self.sampling.check()
        needed = any(method.entry.needs_moments != "no" for method in self.methods)
        if self.moments is not None and not needed:
            raise ValueError(f"`moments` is of no use to {', '.join(names)}")


@reported(mask_threshold="threshold", batch_size="loader_batch")
def compare(
    source: common.Source,
    out: options.Out,
    methods: options.Methods = "pca-locality,local,wiener,optimal",
    against: options.Against = None,
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
    spacing: options.Spacing = None,
    sampler: options.Sampler = options.SamplerName["ddim"],
    seed: options.Seed = 0,
    resolution: common.Resolution = None,
    channels: common.Channels = None,
    split: common.Split = None,
    layout: common.Layout = None,
    label: common.Label = None,
    flip: options.Flip = False,
    force: common.Force = False,
    as_json: common.Json = False,
    progress: common.Progress = True,
) -> None:
    """Draw what several models make of the same noise, one row for each.

    An option goes to all models that take it. Writes into the folder --out: compare.png (a row
    for each model, with its MSE and r2 against the row of --against; below them the training
    images nearest to that row), samples.npz (the values of each row) and run.json (settings,
    numbers, versions, timings).
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
    names, folder = _names(methods), checked_path(out, "out")
    plan = Plan(
        SourceOptions(source, resolution, channels, split, label, device, layout),
        split_options(names, given),
        names[0] if against is None else against,
        Sampling(
            n,
            steps,
            schedule.value,
            sampler.value,
            seed,
            None if spacing is None else spacing.value,
        ),
        flip,
        given_path(moments, "moments"),
        memory_budget,
        [folder / name for name in _FILES],
        progress,
    )
    plan.check()
    start = time.perf_counter()
    asked = {"command": "compare", **asdict(plan), "progress": None}
    with Outputs(plan.files, force=force, folder=folder, run=asked) as outputs:
        record = _run(plan, outputs)
        text = finished(record, start)
        outputs.temporary[plan.files[-1]].write_text(text + "\n", encoding="utf-8")
        outputs.commit()
    answer(text if as_json else _table(record, plan.files), only_here=as_json)


def _names(methods: str) -> list[str]:
    """The models of a comma-separated list."""
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in DENOISERS:
            raise ValueError(f"`methods` must be of {', '.join(DENOISERS)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"`methods` must name each model once, got {methods!r}")
    return names


def _run(plan: Plan, outputs: Outputs) -> dict[str, Any]:
    """Load, sample with every model and draw; the record of it."""
    from pyflocality import Moments, trace_backends

    stages = Stages(announce=plan.progress)
    moments = None if plan.moments is None else Moments.load(plan.moments)
    with trace_backends() as backends:
        with stages("load", f"loading {plan.source.source}"):
            data = plan.source.load(progress=plan.progress).augmented(flip=plan.flip)
        if any(method.entry.needs_moments != "no" for method in plan.methods):
            moments = complete_moments(data, moments, stages)
        rows, described = {}, []
        for method in plan.methods:
            denoiser = method.build(data, moments)
            observed = ObservedDenoiser(denoiser)
            doing = f"sampling {method.name}"
            with stages(doing, f"{doing}: {plan.sampling.n} images"):
                result = draw(observed, plan.sampling, progress=plan.progress)
            rows[method.name] = result.images.cpu()
            settings = {"name": method.name, **method.in_force(denoiser)}
            described.append(settings | {"calls": observed.calls})
        target = rows[plan.against].to(data.device)
        neighbours = neighbours_of(target, data, plan.memory_budget, stages)
    nearest = neighbour_values(neighbours, data)
    scores = {name: _score(images, rows[plan.against]) for name, images in rows.items()}
    near_score = _score(nearest, rows[plan.against])
    _write(plan, outputs, rows, scores, nearest, near_score)
    return {
        "command": "compare",
        "source": asdict(plan.source),
        "data": data_record(data, flip=plan.flip),
        "against": plan.against,
        "methods": [entry | scores[entry["name"]] for entry in described],
        "nearest": neighbour_record(neighbours, data) | near_score,
        "moments": None if plan.moments is None else str(plan.moments),
        "sampling": sampling_record(plan.sampling, result.timesteps),
        "software": software(),
        "backends": backends_record(backends),
        "seconds": stages.seconds,
        "files": list(_FILES),
    }


def _score(images: Tensor, target: Tensor) -> dict[str, Any]:
    """Mean and values by image of MSE and r2; None for what is no finite number."""
    from pyflocality import metrics

    images = images.to(target.dtype)
    found = {"mse": metrics.mse(images, target), "r2": metrics.r2(images, target)}
    return {
        name: {
            "mean": _finite(float(values.mean())),
            "values": [_finite(value) for value in values.tolist()],
        }
        for name, values in found.items()
    }


def _finite(value: float) -> float | None:
    # The r2 against an image of one colour is no number, and JSON has none for it.
    return value if math.isfinite(value) else None


def _shown(score: dict[str, Any]) -> tuple[str, str]:
    """Mean MSE and r2 as text."""
    mse, r2 = (score[name]["mean"] for name in ("mse", "r2"))
    return f"{mse:.4f}", "-" if r2 is None else f"{r2:.3f}"


def _write(
    plan: Plan,
    outputs: Outputs,
    rows: dict[str, Tensor],
    scores: dict[str, dict[str, Any]],
    nearest: Tensor,
    near_score: dict[str, Any],
) -> None:
    """Write picture and values under their temporary names."""
    import numpy as np

    from pyflocality import pictures

    captioned = []
    for name, images in rows.items():
        mse, r2 = _shown(scores[name])
        told = "" if name == plan.against else f"  MSE {mse}  r2 {r2}"
        captioned.append((name + told, images))
    mse, r2 = _shown(near_score)
    captioned.append((f"nearest training images  MSE {mse}  r2 {r2}", nearest))
    files = {path.name: temporary for path, temporary in outputs.temporary.items()}
    pictures.captioned_rows(captioned).save(files["compare.png"])
    values = {name: images.float().numpy() for name, images in rows.items()}
    np.savez(files["samples.npz"], **values, nearest_training_images=nearest.numpy())


def _table(record: dict[str, Any], files: list[Path]) -> str:
    """The numbers of a run as text."""
    lines = [f"{'model':<24}{'MSE':>9}{'r2':>9}{'seconds':>9}"]
    for method in record["methods"]:
        name = method["name"]
        mse, r2 = ("", "") if name == record["against"] else _shown(method)
        seconds = record["seconds"][f"sampling {name}"]
        lines.append(f"{name:<24}{mse:>9}{r2:>9}{seconds:>9.1f}")
    mse, r2 = _shown(record["nearest"])
    lines.append(f"{'nearest training images':<24}{mse:>9}{r2:>9}")
    lines.append(f"against {record['against']}, means of {record['sampling']['n']} images")
    lines.append(listed(files))
    return "\n".join(lines)
