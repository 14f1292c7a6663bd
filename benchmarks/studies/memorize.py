"""Recitation against generation on MNIST as the training set grows, for three models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import pyflocality as pf
from pyflocality import analysis
from pyflocality.analysis import MemorizationCurve

from ..command import Record
from ..plotting import picture, without_ticks

NEEDS = ("mnist",)

_WINDOW = 7
_THRESHOLD = 0.005


def run(*, quick: bool, mnist: Path | None) -> tuple[list[Record], Record]:
    """A record for each model, and the curves."""
    data = pf.TrainingSet.load("digits" if mnist is None else mnist)
    sizes = [1, 10, 100] if quick else [1, 10, 100, 1_000, 10_000, len(data) // 2]
    threshold = 0.002 if mnist is None else _THRESHOLD
    window = 3 if mnist is None else _WINDOW
    models: dict[str, Callable[[pf.TrainingSet], pf.Denoiser]] = {
        "optimal": pf.OptimalDenoiser,
        f"local, window {window}": partial(pf.LocalDenoiser, window=window),
        f"PCA locality, threshold {threshold:g}": partial(
            pf.PCALocalityDenoiser, mask_threshold=threshold
        ),
    }
    curves, records = {}, []
    for name, make in models.items():
        curve = analysis.memorization_curve(make, data, sizes, n=4 if quick else 16)
        curves[name] = curve
        records.append(
            {
                "model": name,
                "sizes": list(curve.sizes),
                "between_models": curve.between.mean(1).tolist(),
                "to_nearest_training_image": curve.nearest.mean(1).tolist(),
            }
        )
    return records, curves


def draw(records: list[Record], curves: dict[str, MemorizationCurve], path: Path) -> None:
    """Similarities against N, and a sample of either model at every N."""

    with picture(path, 2, len(records), figsize=(4.2 * len(records), 5)) as (_, axes):
        for record, top, bottom in zip(records, *axes, strict=True):
            for key, style, label in (
                ("between_models", "o-", "two models' samples"),
                ("to_nearest_training_image", "s-", "nearest image"),
            ):
                top.semilogx(record["sizes"], record[key], style, label=label)
            top.set_ylim(-0.1, 1.05)
            top.set_title(record["model"], fontsize=9)
            top.set_xlabel("training images N of each model")
            top.legend(fontsize=7)
            # [S, 2, C, H, W] -> two rows of images
            samples = curves[record["model"]].samples[:, :, 0].mean(2)
            sheet = torch.cat([torch.cat(list(column), 0) for column in samples], 1)
            bottom.imshow(sheet.clamp(-1, 1).numpy(), cmap="gray")
            without_ticks(bottom)
            bottom.set_xlabel("one sample of both models, N grows to the right", fontsize=8)
        axes[0, 0].set_ylabel("cosine similarity")
