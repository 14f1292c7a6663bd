"""The model of every noise level that held-out images choose: no network is involved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyflocality as pf

from ..command import Record
from .methods import source_order
from .runs import STEPS, KeptRuns


def calibration_of(
    data: pf.TrainingSet, kept: KeptRuns, file: Path | None, *, seed: int, progress: bool
) -> pf.Calibration:
    """The calibration of a file, or that of the images, made unless it is kept.

    The seed is not that of the noise on which models are compared. A file may be of the images in
    the order of their source, as `pyflocality calibrate` has them: it is of the same images then.

    Raises:
        ValueError: The file is of images of another shape, or no calibration.
    """
    if file is not None:
        return _from_file(file, data)
    settings = {"calibration_seed": seed, "calibration_steps": STEPS}
    path = kept.path("calibration", settings, ".json")
    if path.exists():
        return pf.Calibration.load(path)
    result = pf.calibrate(data, steps=STEPS, seed=seed, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path)
    return result


def _from_file(file: Path, data: pf.TrainingSet) -> pf.Calibration:
    result = pf.Calibration.load(file)
    if result.image_shape != data.image_shape:
        raise ValueError(
            f"`calibration` must be of images of shape {data.image_shape}, {file} is of "
            f"{result.image_shape}"
        )
    key = data.content_key()
    if result.content_key != key and result.content_key == source_order(data).content_key():
        return dataclasses.replace(result, content_key=key)
    return result


def told(calibration: pf.Calibration, data: pf.TrainingSet, file: Path | None) -> Record:
    """What a results file tells of a calibration; not where its file lies."""
    levels = zip(calibration.levels, calibration.choices, strict=True)
    return {
        "file": None if file is None else file.name,
        "of_these_images": calibration.content_key == data.content_key(),
        "images": calibration.images,
        "held_out": calibration.held_out,
        "folds": calibration.folds,
        "seed": calibration.seed,
        "versions": dict(calibration.versions),
        "levels": [
            {"time": level.time, "noise_to_signal": level.ratio, "model": str(choice)}
            for level, choice in levels
        ],
    }
