"""How close runs are to each other and to training images, in figures."""

from __future__ import annotations

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality.analysis.memorization import RECITED_RMS, is_recited, rms_differences
from pyflocality.ops import nearest_images

from ..command import Record


def summary(values: Tensor) -> Record:
    """Mean, its standard error and median of some values [n], which are finite or left out.

    The r2 against an image of one colour is no number; such images are counted as `left_out`.
    None stands for what cannot be told: everything of no values, the error of one.
    """
    kept = values[torch.isfinite(values)].double()
    count = len(kept)
    told: Record = {
        "mean": float(kept.mean()) if count else None,
        "standard_error": float(kept.std(correction=1)) / count**0.5 if count > 1 else None,
        "median": float(kept.quantile(0.5)) if count else None,
    }
    if count < len(values):
        told["left_out"] = len(values) - count
    return told


def paired(values: Tensor, others: Tensor) -> Record:
    """How much larger values are than others of the same images, as far as both have them."""
    count = min(len(values), len(others))
    return summary(values[:count] - others[:count])


def by_image(x0: Tensor, target: Tensor) -> dict[str, Tensor]:
    """MSE and r2 of each step and image, float64 [steps, n], of two runs [steps, n, C, H, W]."""
    pairs = list(zip(x0, target, strict=True))
    return {
        name: torch.stack([measure(u, y) for u, y in pairs])
        for name, measure in (("mse", pf.metrics.mse), ("r2", pf.metrics.r2))
    }


def score(values: dict[str, Tensor]) -> Record:
    """Of what `by_image` tells of a run against a network's:

    for either measure the summaries over the images at the end (`final`), of the means over the
    steps (`all_steps`) and at each step (`steps`).
    """
    return {
        name: {
            "final": summary(one[-1]),
            "all_steps": summary(one.mean(0)),
            "steps": [summary(step) for step in one],
        }
        for name, one in values.items()
    }


def recitation(images: Tensor, data: pf.TrainingSet) -> Record:
    """How far images [n, C, H, W] in [-1, 1] are from the training images nearest to them.

    Returns:
        The summary of the root mean square differences (`rms`), and how many of the images are
        training images (`number`): `within` so small a difference.
    """
    squared = nearest_images(images.to(data.device), data.images).distances[:, 0]
    return {
        "rms": summary(rms_differences(squared, data.num_values).cpu()),
        "number": int(is_recited(squared, data.num_values).sum()),
        "within": RECITED_RMS,
    }


def block_edges(images: Tensor) -> float | None:
    """How much rougher images [n, C, H, W] are on the edges of blocks of 2x2 pixels than inside.

    Mean squared differences of neighbours in different blocks, down and across, over those of
    neighbours in one block: 1 where blocks make no difference. None of constant blocks, and where
    there is one block.
    """
    across, inside = [], []
    for axis in (-2, -1):
        squared = images.double().diff(dim=axis).square().transpose(axis, -1).flatten(0, -2)
        inside.append(squared[:, 0::2].flatten())
        across.append(squared[:, 1::2].flatten())
    between, within = torch.cat(across), torch.cat(inside)
    if len(between) == 0 or float(within.sum()) == 0:
        return None
    return float(between.mean() / within.mean())


def shown(told: Record, digits: int) -> str:
    """A summary as text: mean and standard error."""
    mean, error = told["mean"], told["standard_error"]
    if mean is None:
        return "-"
    text = f"{mean:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
