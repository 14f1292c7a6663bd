"""Single-step denoising of test images (figure 1 of the paper).

    python -m benchmarks.reproduce.denoising --source TRAIN --test TEST --network A --out FILE.json

Test images with noise, restored in one step by every model and network. The optimal denoiser
jumps to a training image as the noise falls, networks and local models keep the image. For each
noise level: the MSE against the clean test image, and the MSE of the answer against the training
image nearest to it: 0 where a model recites.

Writes FILE.json and FILE.png; windows of the local model are calibrated by the first network and
kept in FILE.runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality._progress import progress_bar
from pyflocality.ops import nearest_images

from ..cpu_suite import write_json
from . import methods, networks
from .networks import Network
from .runs import KeptRuns, starting_noise
from .scores import summary
from .study import Study
from .windows import calibrated_windows

TIMES = (0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900)
# Rows of the picture: one test image at these times.
_DRAWN = (50, 100, 200, 300, 400, 500, 600, 700, 800)
_NAMES = ("optimal", "wiener", "local", "pca-locality", "pca-locality-batch-mean")
_SEED = 0
# Smaller errors are rounding.
_FLOOR = 1e-6

Model = Callable[[Tensor, float, float], Tensor]


def models(
    data: pf.TrainingSet, trained: Sequence[Network], windows: pf.WindowTable, threshold: float
) -> dict[str, Model]:
    """What restores the images, by its name in the figure."""
    moments = pf.Moments.from_data(data)
    found: dict[str, Model] = {network.name: networks.load(network.path) for network in trained}
    for name in _NAMES:
        settings = methods.settings_of(
            name, data.image_shape, threshold, {"local": windows}, els_images=len(data)
        )
        found[methods.METHODS[name].label] = methods.build(settings, data, moments)
    return found


def nearest(images: Tensor, data: pf.TrainingSet) -> Tensor:
    """The training images nearest to some images, [n, C, H, W]."""
    indices = nearest_images(images, data.images).indices[:, 0]
    return pf.TrainingSet(data.images[indices]).values()


@torch.no_grad()
def restore(
    clean: Tensor, found: dict[str, Model], data: pf.TrainingSet, *, seed: int, progress: bool
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], Tensor]]:
    """A record for each model and time, and the first image as each restores it.

    Args:
        clean: Test images [n, C, H, W].
        found: Models by name.
        data: The training set.
        seed: Seed of the noise, which is the same at all noise levels.
        progress: Whether to show a progress bar.
    """
    noise = starting_noise(tuple(clean.shape[1:]), len(clean), seed)
    schedule = pf.DDPMSchedule()
    records, drawn = [], {}
    visits = [(t, name) for t in TIMES for name in found]
    for t, name in progress_bar(visits, description="denoising", enabled=progress):
        alpha, sigma = schedule(t)
        x = alpha * clean + sigma * noise
        answer = found[name](x, sigma, alpha).clamp(-1, 1)
        close = nearest(answer, data)
        records.append(
            {
                "model": name,
                "t": t,
                "noise_to_signal": sigma / alpha,
                "mse": summary(pf.metrics.mse(answer, clean)),
                "mse_to_nearest_training_image": summary(pf.metrics.mse(answer, close)),
            }
        )
        drawn["noisy", t], drawn[name, t] = x[:1], answer[:1]
    return records, drawn


def draw(
    report: dict[str, Any], drawn: dict[tuple[str, int], Tensor], pair: Tensor, path: Path
) -> None:
    """Errors against the noise level, and one image as every model restores it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(record["model"] for record in report["results"]))
    rows = ["noisy", *names]
    figure = plt.figure(figsize=(13, 4.8 + 0.9 * len(rows)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.8, 0.9 * len(rows)])
    told = (
        ("mse", "MSE against the clean test image"),
        ("mse_to_nearest_training_image", "MSE against the nearest training image"),
    )
    for axis, (measure, title) in zip(top.subplots(1, 2), told, strict=True):
        for k, name in enumerate(names):
            of_model = [record for record in report["results"] if record["model"] == name]
            axis.errorbar(
                [record["noise_to_signal"] for record in of_model],
                [record[measure]["mean"] for record in of_model],
                yerr=[record[measure]["standard_error"] or 0.0 for record in of_model],
                color=f"C{k}",
                marker="o",
                markersize=3,
                linewidth=1,
                label=name,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(_FLOOR, axis.get_ylim()[0]))
        axis.set_xlabel("noise level sigma / alpha")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
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
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _show(axis: Any, image: Tensor) -> None:  # noqa: ANN401
    shown = (image.clamp(-1, 1) + 1) / 2
    grey = shown.shape[0] != 3
    axis.imshow(
        (shown.mean(0) if grey else shown.permute(1, 2, 0)).numpy(), cmap="gray", vmin=0, vmax=1
    )
    axis.set_xticks([])
    axis.set_yticks([])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    study = Study("denoising", 64, "test images")
    study.parser.add_argument("--test", required=True, help="test images")
    study.start(arguments)
    data, options, progress = study.data, study.options, study.progress
    test = methods.load_mixed(options.test, progress=progress)
    if test.image_shape != data.image_shape:
        study.parser.error(f"--test must be images of {data.image_shape}, got {test.image_shape}")
    clean = test.values(0, options.samples)
    kept = KeptRuns(options.out.with_suffix(".runs"), {"images": data.content_key()})
    windows = calibrated_windows(
        "local", data, study.trained[0], kept, seed=_SEED + 1, progress=progress
    )
    found = models(data, study.trained, windows, options.threshold)
    results, drawn = restore(clean, found, data, seed=_SEED, progress=progress)
    report = study.report(
        results,
        test={"name": test.name, "images": len(clean)},
        windows=[window for _, window in windows],
    )
    write_json(report, options.out)
    picture = options.out.with_suffix(".png")
    draw(report, drawn, torch.cat([clean[:1], nearest(clean[:1], data)]), picture)
    print(f"written: {options.out}\nwritten: {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
