"""Single-step denoising of test images (figure 1 of the paper).

    python -m benchmarks.reproduce.denoising --source TRAIN --test TEST --network A --out FILE.json

Test images with noise, restored in one step by every model and network. The optimal denoiser
jumps to a training image as the noise falls, networks and local models keep the image. For each
noise level: the MSE against the clean test image, and the MSE of the answer against the training
image nearest to it: 0 where a model recites.

The windows of the local model are those that follow the first network; without a network the local
model is left out. They have sides of 3 or more: with hardly any noise the model still pastes the
centres of whole 3 x 3 patches of training images, so its error levels off where others' vanish.

Writes FILE.json and FILE.png; finished models and noise levels are kept in FILE.runs, and an
interrupted command goes on where it ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality._support.progress import progress_bar
from pyflocality.ops import nearest_images

from ..command import Record
from ..plotting import picture, without_ticks
from . import methods, networks
from .draw import line_style
from .methods import Settings
from .runs import KeptRuns, Run, now, starting_noise
from .scores import summary
from .study import Study
from .windows import calibrated_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMES = (0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900)
# Rows of the picture: one test image at these times.
_DRAWN = (50, 100, 200, 300, 400, 500, 600, 700, 800)
_NAMES = ("optimal", "wiener", "local", "pca-locality", "pca-locality-batch-mean")
_MEASURES = ("mse", "mse_to_nearest_training_image")
_SEED = 0
# Smaller errors are rounding.
_FLOOR = 1e-6

Model = Callable[[Tensor, float, float], Tensor]


def models(
    study: Study, windows: pf.WindowTable | None
) -> Iterator[tuple[str, Settings, Callable[[], Model]]]:
    """What restores the images: its name in the figure, its settings, and what makes it.

    The batch mean is there twice: over batches of mixed classes, as published loaders have them,
    and where there are classes over the images sorted by class, as folders and zips come. The
    local model is left out where there are no windows.
    """
    data, threshold = study.data, study.options.threshold

    def build(settings: Settings) -> Model:
        searched = methods.in_order(data, settings.get("order"))
        needed = methods.METHODS[settings["model"]].needs_moments
        return methods.build(settings, searched, study.moments if needed else None)

    for network in study.trained:
        load = functools.partial(networks.load, network.path, study.device)
        yield network.name, network.settings, load
    tables = {} if windows is None else {"local": windows}
    for name in _NAMES:
        if name == "local" and windows is None:
            continue
        settings = methods.settings_of(name, data.image_shape, threshold, tables, len(data))
        label = methods.METHODS[name].label
        yield label, settings, functools.partial(build, settings)
        if name == "pca-locality-batch-mean" and data.labels is not None:
            settings = settings | {"order": methods.BY_CLASS}
            yield f"{label}, sorted by class", settings, functools.partial(build, settings)


def nearest(images: Tensor, data: pf.TrainingSet) -> Tensor:
    """The training images nearest to some images, [n, C, H, W] on the CPU."""
    indices = nearest_images(images.to(data.device), data.images).indices[:, 0]
    return pf.TrainingSet(data.images[indices].cpu()).values()


@torch.no_grad()
def restore_once(
    model: Model, clean: Tensor, noise: Tensor, t: int, data: pf.TrainingSet
) -> tuple[Tensor, Record]:
    """The first image as the model restores it, [1, C, H, W], and the errors of all."""
    clock = now(data.device)
    alpha, sigma = pf.DDPMSchedule()(t)
    noisy = (alpha * clean + sigma * noise).to(data.device)
    answer = model(noisy, sigma, alpha).clamp(-1, 1).cpu()
    seconds = now(data.device) - clock
    errors = (pf.metrics.mse(answer, target).tolist() for target in (clean, nearest(answer, data)))
    return answer[:1], dict(zip(_MEASURES, errors, strict=True)) | {"seconds": round(seconds, 4)}


def restore(
    clean: Tensor,
    listed: Sequence[tuple[str, Settings, Callable[[], Model]]],
    data: pf.TrainingSet,
    kept: KeptRuns,
    *,
    progress: bool,
) -> tuple[list[Record], dict[tuple[str, int], Tensor]]:
    """A record for each model and time, and the first test image as each restores it."""
    # The same at all noise levels.
    noise = starting_noise(data.image_shape, len(clean), _SEED)
    schedule = pf.DDPMSchedule()
    records, drawn = [], {}
    for t in TIMES:
        alpha, sigma = schedule(t)
        drawn["noisy", t] = alpha * clean[:1] + sigma * noise[:1]
    made = {name: functools.cache(make) for name, _, make in listed}
    visits = [(name, settings, t) for name, settings, _ in listed for t in TIMES]
    for name, settings, t in progress_bar(visits, description="denoising", enabled=progress):

        def make(name: str = name, t: int = t) -> Run:
            return Run(*restore_once(made[name](), clean, noise, t, data))

        run, _ = kept.get(settings["model"], settings | {"t": t}, make)
        alpha, sigma = schedule(t)
        record = {"model": name, "t": t, "noise_to_signal": sigma / alpha}
        record |= {measure: summary(torch.tensor(run.facts[measure])) for measure in _MEASURES}
        records.append(record | {"seconds": run.facts["seconds"]})
        drawn[name, t] = run.x0
    return records, drawn


def draw(report: Record, drawn: dict[tuple[str, int], Tensor], pair: Tensor, path: Path) -> None:
    """Errors against the noise level, and one image as every model restores it."""
    names = list(dict.fromkeys(record["model"] for record in report["results"]))
    rows = ["noisy", *names]
    size = (13, 4.8 + 0.9 * len(rows))
    with picture(path, 0, dpi=90, figsize=size, layout="constrained") as (figure, _):
        heights = [4.8, 0.9 * len(rows)]
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        titles = ("the clean test image", "the nearest training image")
        for axis, measure, title in zip(top.subplots(1, 2), _MEASURES, titles, strict=True):
            told = [record[measure] for record in report["results"]]
            floor = max(_FLOOR, 0.5 * min((t["mean"] for t in told if t["mean"] > 0), default=1.0))
            for k, name in enumerate(names):
                of_model = [record for record in report["results"] if record["model"] == name]
                _draw_line(axis, of_model, measure, floor, **line_style(k), label=name)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylim(bottom=0.8 * floor)
            axis.set_xlabel("noise level sigma / alpha")
            axis.set_title(f"MSE against {title}; bars: one standard error", fontsize=10)
            if floor == _FLOOR:
                axis.set_ylabel(f"MSE, anything below {_FLOOR:g} drawn there")
            axis.grid(alpha=0.3)
        top.legend(
            *axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
        )
        axes = bottom.subplots(len(rows), len(_DRAWN) + 1, squeeze=False)
        for line, name in zip(axes, rows, strict=True):
            for axis, t in zip(line[1:], _DRAWN, strict=True):
                _show(axis, drawn[name, t][0])
            line[1].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
            line[0].axis("off")
        for axis, t in zip(axes[0, 1:], _DRAWN, strict=True):
            axis.set_title(f"t = {t}", fontsize=8)
        for axis, image, title in zip(
            axes[:2, 0], pair, ("test image", "nearest training"), strict=True
        ):
            axis.axis("on")
            _show(axis, image)
            axis.set_title(title, fontsize=7)


def _draw_line(
    axis: Axes, records: Sequence[Record], measure: str, floor: float, **style: Any
) -> None:
    """Means and standard errors of a model; bars end at the floor, below which is nothing."""
    means = [max(record[measure]["mean"], floor) for record in records]
    errors = [record[measure]["standard_error"] or 0.0 for record in records]
    below = [min(error, mean - floor) for mean, error in zip(means, errors, strict=True)]
    levels = [record["noise_to_signal"] for record in records]
    axis.errorbar(levels, means, yerr=[below, errors], **style)


def _show(axis: Axes, image: Tensor) -> None:
    shown = (image.clamp(-1, 1) + 1) / 2
    grey = shown.shape[0] != 3
    axis.imshow(
        (shown.mean(0) if grey else shown.permute(1, 2, 0)).numpy(), cmap="gray", vmin=0, vmax=1
    )
    without_ticks(axis)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    study = Study("denoising", 64, "test images", needs_network=False)
    study.parser.add_argument("--test", required=True, help="test images")
    study.start(arguments)
    data, options, progress = study.data, study.options, study.progress
    test = methods.load_mixed(options.test, progress=progress)
    if test.image_shape != data.image_shape:
        study.parser.error(f"--test must be images of {data.image_shape}, got {test.image_shape}")
    clean = test.values(0, options.samples)
    windows = None
    if study.trained:
        follow = ("local", data, study.trained[0], study.kept())
        windows = calibrated_windows(*follow, seed=_SEED + 1, progress=progress)
    listed = list(models(study, windows))
    kept = study.kept(test=test.content_key(), samples=len(clean), seed=_SEED)
    results, drawn = restore(clean, listed, data, kept, progress=progress)
    report = study.write(
        results,
        test={"name": test.name, "images": len(clean)},
        windows=None if windows is None else [window for _, window in windows],
        left_out=[methods.METHODS["local"].label] if windows is None else [],
    )
    path = study.picture()
    draw(report, drawn, torch.cat([clean[:1], nearest(clean[:1], data)]), path)
    print(f"written: {options.out}\nwritten: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
