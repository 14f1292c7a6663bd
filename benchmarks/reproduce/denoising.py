"""Single-step denoising of test images (figure 1 of the paper).

    python -m benchmarks.reproduce.denoising --source TRAIN --test TEST --network A --out FILE.json

Test images with noise, restored in one step by every model and network, answers clipped to [-1, 1].
The optimal denoiser jumps to a training image as the noise falls, networks and local models keep
the image. For each noise level: the MSE against the clean test image, and how much it is above that
of each network, image by image; and the MSE of the answer against the training image nearest to it:
0 where a model recites. The calibrated model, which held-out training images chose, is meant to
come as close to the networks as `bars` tell, of 256 test images or more.

The windows of the local model and of patch sets are those that follow the first network; without a
network these are left out. They have sides of 3 or more: with hardly any noise the local model
still pastes the centres of whole 3 x 3 patches of training images, so its error levels off where
others' vanish.

Writes FILE.json and FILE.png; finished models and noise levels are kept in FILE.runs, and an
interrupted command goes on where it ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality._support.progress import progress_bar
from pyflocality.ops import nearest_images

from ..command import Record, bar, path_option
from ..plotting import picture, without_ticks
from . import calibrated, methods, networks
from .draw import line_style
from .methods import Settings
from .runs import KeptRuns, Run, now, starting_noise
from .scores import paired, summary
from .study import Study
from .windows import calibrated_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMES = (0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900)
# Rows of the picture: one test image at these times.
_DRAWN = (50, 100, 200, 300, 400, 500, 600, 700, 800)
_NAMES = (
    "optimal",
    "gaussian-mixture",
    "wiener",
    "local",
    "pca-locality",
    "pca-locality-linear",
    "pca-locality-batch-mean",
    "patch-set",
    "patch-set-linear",
    "mixture",
    "calibrated",
)
_MEASURES = ("mse", "mse_to_nearest_training_image")
_SEED = 0
# Smaller errors are rounding.
_FLOOR = 1e-6
# What the error of the calibrated model may be of a network's; at noisier times it may exceed it by
# one standard error of the difference. Asked of so many test images at least.
_SHARES = {100: 1.10, 200: 1.03, 300: 1.03}
_FIRST_OF_NOISE, _LEAST_IMAGES = 400, 256

Model = Callable[[Tensor, float, float], Tensor]


def models(
    study: Study, windows: Mapping[str, pf.WindowTable], calibration: pf.Calibration
) -> Iterator[tuple[str, Settings, Callable[[], Model]]]:
    """What restores the images: its name in the figure, its settings, and what makes it.

    The batch mean is there twice: over batches of mixed classes, as published loaders have them,
    and where there are classes over the images sorted by class, as folders and zips come. The
    models whose windows are not among `windows` are left out.
    """
    data, threshold = study.data, study.options.threshold

    def build(settings: Settings) -> Model:
        searched = methods.in_order(data, settings.get("order"))
        needed = methods.METHODS[settings["model"]].needs_moments
        moments = study.moments if needed else None
        return methods.build(settings, searched, moments, calibration)

    for network in study.trained:
        load = functools.partial(networks.load, network.path, study.device)
        yield network.name, network.settings, load
    shape = data.image_shape
    for name in _NAMES:
        if name in left_out(windows):
            continue
        settings = methods.settings_of(name, shape, threshold, windows, len(data), calibration)
        label = methods.METHODS[name].label
        yield label, settings, functools.partial(build, settings)
        if name == "pca-locality-batch-mean" and data.labels is not None:
            settings = settings | {"order": methods.BY_CLASS}
            yield f"{label}, sorted by class", settings, functools.partial(build, settings)


def left_out(windows: Mapping[str, pf.WindowTable]) -> list[str]:
    """Names of the models that need windows which are not there."""
    needed = {name: methods.METHODS[name].calibrated for name in _NAMES}
    return [name for name, model in needed.items() if model is not None and model not in windows]


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
    names: Sequence[str],
    *,
    progress: bool,
) -> tuple[list[Record], dict[tuple[str, int], Tensor]]:
    """A record for each model and time, and the first test image as each restores it.

    `minus` of a record is the error less that of each network of some names, image by image.
    """
    # The same at all noise levels.
    noise = starting_noise(data.image_shape, len(clean), _SEED)
    schedule = pf.DDPMSchedule()
    records, drawn = [], {}
    errors: dict[tuple[str, int], Tensor] = {}
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
        errors[name, t] = torch.tensor(run.facts["mse"], dtype=torch.float64)
        drawn[name, t] = run.x0
    for (name, t), record in zip(errors, records, strict=True):
        record["minus"] = {
            other: paired(errors[name, t], errors[other, t]) for other in names if other != name
        }
    return records, drawn


def bars(records: Sequence[Record], names: Sequence[str], images: int) -> list[Record]:
    """What the calibrated model is meant to reach beside the networks of some names."""
    if images < _LEAST_IMAGES:
        return []
    means = {(one["model"], one["t"]): one["mse"]["mean"] for one in records}
    label = methods.METHODS["calibrated"].label
    result = []
    for one in records:
        t = one["t"]
        if one["model"] != label:
            continue
        for name in names:
            what, less = f"t = {t}: error", one["minus"][name]
            if t in _SHARES:
                share = means[label, t] / means[name, t]
                result.append(bar(f"{what} over that of {name}", share, _SHARES[t]))
            elif t >= _FIRST_OF_NOISE and less["standard_error"]:
                what += f" minus that of {name}, in standard errors of the difference"
                result.append(bar(what, less["mean"] / less["standard_error"], 1.0))
    return result


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
    study = Study("denoising", 256, "test images", needs_network=False)
    add = study.parser.add_argument
    add("--test", required=True, help="test images")
    add("--calibration", type=path_option, help="of the calibrated model, made if not given")
    study.start(arguments)
    data, options, progress = study.data, study.options, study.progress
    test = methods.load_mixed(options.test, progress=progress)
    if test.image_shape != data.image_shape:
        study.parser.error(f"--test must be images of {data.image_shape}, got {test.image_shape}")
    clean = test.values(0, options.samples)
    calibration = _calibration(study)
    windows: dict[str, pf.WindowTable] = {}
    for name in methods.CALIBRATED if study.trained else ():
        follow = (name, data, study.trained[0], study.kept())
        windows[name] = calibrated_windows(*follow, seed=_SEED + 1, progress=progress)
    listed = list(models(study, windows, calibration))
    names = [network.name for network in study.trained]
    kept = study.kept(test=test.content_key(), samples=len(clean), seed=_SEED)
    results, drawn = restore(clean, listed, data, kept, names, progress=progress)
    report = study.write(
        results,
        test={"name": test.name, "images": len(clean)},
        windows={name: [window for _, window in table] for name, table in windows.items()},
        left_out=[methods.METHODS[name].label for name in left_out(windows)],
        calibration=calibrated.told(calibration, data, options.calibration),
        bars=bars(results, names, len(clean)),
    )
    path = study.picture()
    draw(report, drawn, torch.cat([clean[:1], nearest(clean[:1], data)]), path)
    print(f"written: {options.out}\nwritten: {path}")
    return 0


def _calibration(study: Study) -> pf.Calibration:
    """The calibration of the file that was given, or one that is made."""
    file = study.options.calibration
    try:
        return calibrated.calibration_of(
            study.data, study.kept(), file, seed=_SEED + 1, progress=study.progress
        )
    except (ValueError, OSError) as error:
        if file is None:
            raise
        study.parser.error(str(error))


if __name__ == "__main__":
    raise SystemExit(main())
