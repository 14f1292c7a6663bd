"""The models of the table: their settings, and how they are built from them.

A model's settings are all that its answers depend on besides the images and the starting noise,
as plain values: they name its kept run and are told in the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pyflocality as pf

from ..command import Record

# Images a batch of the published code for MNIST and CIFAR-10.
LOADER_BATCH = 512
MULTISCALE_WINDOW = 7
# With two levels its blocks show on images of 28x28.
_MOST_LEVELS = 1
# Of locally linear models, at all noise levels; what is best at each is a calibration's to find.
SLOPE, SLOPE_TEMPERATURE = 0.25, 1.4
# Halfway between the optimal model and the Wiener filter.
GAMMA = 0.5
_ORDER_SEED, _POOL_SEED = 0, 0

Settings = Record
# The order in which folders and zips come.
BY_CLASS = "by class"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        label: What it is called there.
        calibrated: Key of `CALIBRATED`: the model whose windows it uses, or None.
        needs_moments: Whether it is made of moments.
        few: Whether it searches a few of the images only, for a few of the samples.
    """

    label: str
    calibrated: str | None = None
    needs_moments: bool = False
    few: bool = False


METHODS: dict[str, Method] = {
    "optimal": Method("optimal"),
    "gaussian-mixture": Method(f"Gaussian mixture, gamma {GAMMA:g}", needs_moments=True),
    "wiener": Method("Wiener", needs_moments=True),
    "local": Method("local score (LS)", calibrated="local"),
    "equivariant": Method("equivariant (ELS)", calibrated="local", few=True),
    "equivariant-broken": Method(
        "equivariant, broken borders (bbELS)", calibrated="local", few=True
    ),
    "pca-locality": Method("PCA locality, exact", needs_moments=True),
    "pca-locality-linear": Method("PCA locality, locally linear", needs_moments=True),
    "pca-locality-batch-mean": Method(
        f"PCA locality, batch mean of {LOADER_BATCH}", needs_moments=True
    ),
    "golden": Method("PCA locality, golden subset", needs_moments=True),
    "golden-random": Method("PCA locality, golden subset of a random pool", needs_moments=True),
    "patch-set": Method("patch set", calibrated="patch-set"),
    "patch-set-linear": Method(
        "patch set, locally linear", calibrated="patch-set", needs_moments=True
    ),
    "mixture": Method(
        "mean of both, locally linear",
        calibrated="patch-set",
        needs_moments=True,
    ),
    "calibrated": Method("calibrated", needs_moments=True),
    "multiscale": Method("multi-scale"),
    "nearest": Method("nearest training image"),
}

# What windows by noise level are calibrated for.
CALIBRATED = {"local": pf.LocalDenoiser, "patch-set": pf.PatchSetDenoiser}
# Locally linear models, and what each is made of.
_LINEAR = {"pca-locality-linear": "pca-locality", "patch-set-linear": "patch-set"}


def check_methods(names: Sequence[str]) -> list[str]:
    """Names of methods in the order of the table, each known and named once."""
    for name in names:
        if name not in METHODS:
            raise ValueError(f"`methods` must be of {', '.join(METHODS)}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`methods` must name one method or more, each once, got {list(names)}")
    return [name for name in METHODS if name in names]


def settings_of(
    name: str,
    image_shape: tuple[int, int, int],
    threshold: float,
    windows: Mapping[str, pf.WindowTable],
    els_images: int,
    calibration: pf.Calibration | None = None,
) -> Settings:
    """Settings of a key of `METHODS`, but for "nearest", which is no sampler.

    Calibrated windows are by key of `CALIBRATED`, those that the method needs; a calibration is
    what "calibrated" needs.
    """
    settings: Settings = {"model": name}
    if name == "calibrated":
        settings["choices"] = choices_of(_given(calibration))
    calibrated = METHODS[name].calibrated
    if calibrated is not None:
        settings["windows"] = [list(pair) for pair in windows[calibrated]]
    if METHODS[name].few:
        settings["images"] = els_images
    if name in ("golden", "golden-random", "mixture") or name.startswith("pca-locality"):
        settings["threshold"] = threshold
    if name == "mixture" or name in _LINEAR:
        settings |= {"slope": SLOPE, "temperature": SLOPE_TEMPERATURE}
    if name == "gaussian-mixture":
        settings["gamma"] = GAMMA
    if name == "golden-random":
        settings["pool_seed"] = _POOL_SEED
    if name == "pca-locality-batch-mean":
        settings["batch_size"] = LOADER_BATCH
    if name == "multiscale":
        levels = 0
        while levels < _MOST_LEVELS and all(n % 2 ** (levels + 1) == 0 for n in image_shape[1:]):
            levels += 1
        largest = 2 * (max(image_shape[1:]) >> min(levels, 1)) - 1
        settings |= {
            "levels": levels,
            "window": min(MULTISCALE_WINDOW, largest),
            "coarse": "pca_locality",
            "threshold": threshold,
            # All that differ: cycle spinning.
            "shifts": 4**levels,
        }
    return settings


def choices_of(calibration: pf.Calibration) -> list[list[Any]]:
    """Noise level sigma / alpha and model of each level: all that a calibrated model depends on."""
    levels = zip(calibration.levels, calibration.choices, strict=True)
    return [[level.ratio, choice.as_json()] for level, choice in levels]


def _given(calibration: pf.Calibration | None) -> pf.Calibration:
    if calibration is None:
        raise ValueError("`calibration` must be given for calibrated")
    return calibration


def build(
    settings: Settings,
    data: pf.TrainingSet,
    moments: pf.Moments | None,
    calibration: pf.Calibration | None = None,
) -> pf.Denoiser:
    """The denoiser of some settings, those of PCA locality with a temperature or without.

    A calibration is what "calibrated" needs, whose settings tell its choices alone.
    """
    name = settings["model"]
    if name == "calibrated":
        return pf.CalibratedDenoiser(data, _given(calibration), moments=moments)
    if name == "mixture":
        parts = [build(settings | {"model": part}, data, moments) for part in _LINEAR]
        return pf.MixtureDenoiser(parts, [1 / len(parts)] * len(parts))
    if name in _LINEAR:
        local = build(settings | {"model": _LINEAR[name]}, data, moments)
        assert isinstance(local, (pf.PCALocalityDenoiser, pf.PatchSetDenoiser))
        return pf.LocallyLinearDenoiser(local, settings["slope"], moments=moments)
    if name == "gaussian-mixture":
        return pf.GaussianMixtureDenoiser(data, settings["gamma"], moments=moments)
    return _single(settings, data, moments)


def _single(settings: Settings, data: pf.TrainingSet, moments: pf.Moments | None) -> pf.Denoiser:
    """The same of a model that is not made of others."""
    name = settings["model"]
    windows = [tuple(pair) for pair in settings.get("windows", ())]
    temperature = settings.get("temperature", 1.0)
    if name == "optimal":
        return pf.OptimalDenoiser(data)
    if name == "wiener":
        return pf.WienerDenoiser(data if moments is None else moments)
    if name == "local":
        return pf.LocalDenoiser(data, windows)
    if name in ("equivariant", "equivariant-broken"):
        searched = data.subset(range(min(settings["images"], len(data))))
        boundary = "circular" if name == "equivariant" else "broken"
        return pf.EquivariantDenoiser(searched, windows, boundary)
    if name == "patch-set":
        return pf.PatchSetDenoiser(data, windows, temperature=temperature)
    if name == "multiscale":
        levels, window = settings["levels"], settings["window"]
        coarse = {"coarse": settings["coarse"], "mask_threshold": settings["threshold"]}
        shifts = settings["shifts"]
        return pf.MultiscaleDenoiser(data, levels, window, shifts=shifts, **coarse)
    batches = settings.get("batch_size")
    pca = pf.PCALocalityDenoiser(
        data,
        settings["threshold"],
        temperature,
        aggregation="exact" if batches is None else "batch_mean",
        batch_size=LOADER_BATCH if batches is None else batches,
        moments=moments,
    )
    if name == "golden-random":
        generator = torch.Generator().manual_seed(settings["pool_seed"])
        return pf.GoldenSubset(pca, generator=generator)
    return pf.GoldenSubset(pca) if name == "golden" else pca


def in_order(data: pf.TrainingSet, order: int | str | None) -> pf.TrainingSet:
    """The images in another order: by class, or a random one by its seed; None keeps theirs."""
    if order is None:
        return data
    if isinstance(order, int):
        return data.subset(_permutation(len(data), order))
    if data.labels is None:
        raise ValueError(f"`order` must not be {order!r} where there are no labels")
    return data.subset(data.labels.argsort(stable=True))


def load_mixed(source: str, *, progress: bool) -> pf.TrainingSet:
    """A training set in a random order, always the same, and in memory.

    Folders and zips are read class by class. The batch mean depends on that: batches of one class
    each are another estimator than the published one, whose loaders read the classes mixed. No
    other model knows of the order.
    """
    data = pf.TrainingSet.load(source, progress=progress)
    return in_order(data, _ORDER_SEED)


def source_order(data: pf.TrainingSet) -> pf.TrainingSet:
    """The images of `load_mixed` in the order of their source again."""
    return data.subset(_permutation(len(data), _ORDER_SEED).argsort())


def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
