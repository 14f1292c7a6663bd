"""A pattern planted in the data shows in the sensitivity of models fitted to it.

A fixed pattern W is blended into every image of CIFAR-10 in a random colour. It adds a principal
component; the Wiener filter listens along it wherever its signal-to-noise ratio
alpha^2 lambda_W / sigma^2 is high, and so does PCA locality, whose masks are the Wiener filter's.
For each noise level: the ratio, and how much of the pattern there is in the field of an output on
it, beside the same measure for the data as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import analysis, synthetic
from pyflocality._progress import progress_bar

NEEDS = ("cifar10",)

# Ratio from which on the paper marks a pattern as visible.
_VISIBLE = 0.1
_STEPS = range(900, -1, -100)
_THRESHOLD = 0.02
_SIZE = 32


def run(*, quick: bool, cifar10: Path | None) -> tuple[list[dict[str, Any]], list[Any]]:
    """A record for each weight gamma and step, and the fields."""
    data = pf.TrainingSet.load("photos" if cifar10 is None else cifar10)
    steps = (500, 100) if quick else _STEPS
    pattern = cross(_SIZE)
    output = (1, _SIZE // 4, _SIZE // 4)
    schedule = pf.DDPMSchedule()
    sets = {0.0: data}
    for gamma in (0.1, 0.5):
        sets[gamma] = synthetic.inject_pattern(data, pattern, gamma)
    records, pictures = [], []
    tested = data.values(0, 4)
    for gamma, chosen in progress_bar(sets.items(), description="patterns"):
        moments = pf.Moments.from_data(chosen)
        models = {
            "wiener": pf.WienerDenoiser(moments),
            "pca_locality": pf.PCALocalityDenoiser(chosen, _THRESHOLD, moments=moments),
        }
        direction = torch.zeros(data.image_shape)
        direction[output[0]] = pattern
        for t in steps:
            alpha, sigma = (float(level) for level in schedule(t))
            generator = torch.Generator().manual_seed(3)
            x = alpha * tested + sigma * torch.randn(tested.shape, generator=generator)
            record: dict[str, Any] = {
                "gamma": gamma,
                "t": t,
                "snr": float(analysis.snr_ruler(moments, direction, sigma, alpha)),
            }
            record["visible"] = record["snr"] > _VISIBLE
            for name, model in models.items():
                field = analysis.sensitivity(model, x, sigma, alpha, pixel=output).mean(0)
                record[name] = share_on_pattern(field[output[0]], pattern, output[1:])
                pictures.append((gamma, t, name, field[output[0]]))
            records.append(record)
    return records, pictures


def cross(size: int) -> Tensor:
    """A thin diagonal cross, 1 on two pixels of each row and 0 elsewhere, [size, size]."""
    eye = torch.eye(size)
    return torch.maximum(eye, eye.flip(1))


def share_on_pattern(field: Tensor, pattern: Tensor, output: tuple[int, int]) -> float:
    """Mean of a field on the pattern over its mean elsewhere, away from the output itself.

    1 where the field does not know of the pattern; pixels within 8 of the output, where every
    field is large, do not count.
    """
    rows = torch.arange(field.shape[0])[:, None] - output[0]
    columns = torch.arange(field.shape[1])[None, :] - output[1]
    far = torch.maximum(rows.abs(), columns.abs()) > 8
    on, off = far & (pattern > 0), far & (pattern == 0)
    mean_off = float(field[off].mean())
    return float(field[on].mean()) / mean_off if mean_off > 0 else 0.0


def draw(records: list[dict[str, Any]], pictures: list[Any], path: Path) -> None:
    """Fields by weight and model, a column for each step; marked where the ratio is high."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    visible = {(record["gamma"], record["t"]): record["visible"] for record in records}
    rows = list(dict.fromkeys((gamma, name) for gamma, _, name, _ in pictures))
    steps = list(dict.fromkeys(t for _, t, _, _ in pictures))
    figure, axes = plt.subplots(
        len(rows), len(steps), figsize=(1.3 * len(steps), 1.45 * len(rows)), squeeze=False
    )
    for gamma, t, name, field in pictures:
        axis = axes[rows.index((gamma, name)), steps.index(t)]
        axis.imshow((field / field.max()).sqrt().numpy(), cmap="magma")
        axis.set_xticks([])
        axis.set_yticks([])
        mark = " *" if gamma > 0 and visible[gamma, t] else ""
        axis.set_title(f"t = {t}{mark}", fontsize=7)
        if t == steps[0]:
            axis.set_ylabel(f"{name}\ngamma {gamma:g}", fontsize=7)
    figure.suptitle("sensitivity fields (square root); * where the pattern's SNR exceeds 0.1")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
