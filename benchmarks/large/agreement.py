"""Masks by the components of images, by those of the covariance, and by Cholesky factors."""

from __future__ import annotations

import itertools

import numpy as np
import torch

import pyflocality as pf
from pyflocality.moments.marks import NEAR
from pyflocality.moments.mask_tiles import masks_of
from pyflocality.moments.projector import (
    Projector,
    projector_by_cholesky,
    projector_of_components,
)

from ..command import Record
from .crops import crops

STEPS = 10


def agreement(count: int, side: int, threshold: float) -> Record:
    """How many entries of masks differ between ways, beside how many lie near the threshold.

    Entries within 1e-6 relative of the threshold may fall on either side; all others must agree.
    """
    data = pf.TrainingSet(torch.from_numpy(crops(count, side)))
    moments = pf.Moments.from_data(data)
    bases = {"eigenvectors": moments.basis()}
    if count <= data.num_values:
        bases["gram"] = pf.Basis.from_data(data, method="gram")
    schedule = pf.DDPMSchedule()
    levels: list[Record] = []
    for alpha, sigma in map(schedule, schedule.timesteps(STEPS).tolist()):
        ratio = sigma / alpha
        projectors: dict[str, Projector | None] = {
            way: projector_of_components(basis.values, basis.vectors, ratio, threshold)
            for way, basis in bases.items()
        }
        projectors["cholesky"] = projector_by_cholesky(moments.covariance, ratio, threshold)
        levels.append(
            {"alpha": float(alpha), "sigma": float(sigma)} | _compared(projectors, threshold)
        )
    pairs = sorted({pair for level in levels for pair in level["different_entries"]})
    return {
        "images": count,
        "shape": [3, side, side],
        "entries": data.num_values**2,
        "threshold": threshold,
        "near": NEAR,
        "levels": levels,
        "most_different_entries": {
            pair: max(level["different_entries"].get(pair, 0) for level in levels) for pair in pairs
        },
        "agree": all(level["agree"] for level in levels),
    }


def _compared(projectors: dict[str, Projector | None], threshold: float) -> Record:
    """The masks of a level by every way that its rounding errors leave."""
    made = {
        way: masks_of(projector, threshold, name=way)
        for way, projector in projectors.items()
        if projector is not None
    }
    near = {way: int(counted.near) for way, counted in made.items()}
    different = {}
    for one, other in itertools.combinations(sorted(made), 2):
        bits = made[one].weights.bits ^ made[other].weights.bits
        different[f"{one}, {other}"] = int(np.unpackbits(bits).sum(dtype=np.int64))
    return {
        "components_kept": {
            way: projector.factor.shape[1]
            for way, projector in projectors.items()
            if projector is not None
        },
        "entries_near_threshold": near,
        "different_entries": different,
        # Of each different entry at least one way has it near the threshold.
        "agree": max(different.values(), default=0) <= sum(near.values()),
    }
