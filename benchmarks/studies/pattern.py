"""A pattern planted in the data shows in the sensitivity of models fitted to it.

A fixed pattern W is blended into every image of CIFAR-10 in a random colour. It adds a principal
component; the Wiener filter listens along it wherever its signal-to-noise ratio
alpha^2 lambda_W / sigma^2 is high, and so does PCA locality, whose masks are the Wiener filter's.
Networks take part that `python -m benchmarks.oracle.train` made of the same images, planted alike.
For each noise level: the ratio, and how much of the pattern there is in the field of an output on
it, beside the same measure for the data as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import analysis
from pyflocality._support.progress import progress_bar

from ..command import Record
from ..oracle.planted import WEIGHTS, cross, planted
from ..plotting import picture, without_ticks
from ..reproduce.networks import facts_of, load

NEEDS = ("cifar10",)
ACCEPTS = ("network",)

# Ratio from which on the paper marks a pattern as visible.
_VISIBLE = 0.1
_STEPS = range(900, -1, -100)
_THRESHOLD = 0.02
_SIZE = 32
_SHAPE = (3, _SIZE, _SIZE)
# Images whose fields are averaged.
_TESTED = 4


def run(
    *, quick: bool, cifar10: Path | None, network: Sequence[Path]
) -> tuple[list[Record], list[Any]]:
    """A record for each weight gamma and step, and the fields.

    Raises:
        ValueError: The images are not 3x32x32, a network was not made of them, or its weight is
            not of this run, or another's too.
    """
    weights = (0.0, 0.5) if quick else WEIGHTS
    networks = by_weight(network, weights)
    data = pf.TrainingSet.load("photos" if cifar10 is None else cifar10)
    if data.image_shape != _SHAPE:
        shape, expected = ("x".join(map(str, one)) for one in (data.image_shape, _SHAPE))
        raise ValueError(
            f"`cifar10` must be of {expected} images, those of {data.name} are {shape}"
        )
    sets = {gamma: planted(data, gamma) if gamma else data for gamma in weights}
    for gamma, denoiser in networks.items():
        if facts_of(denoiser)["key"] != sets[gamma].content_key():
            raise ValueError(f"`network` of weight {gamma:g} was not trained on {data.name}")
    records: list[Record] = []
    pictures: list[Any] = []
    steps = (500, 100) if quick else _STEPS
    for gamma, chosen in progress_bar(sets.items(), description="patterns"):
        moments = pf.Moments.from_data(chosen)
        models: dict[str, pf.Denoiser] = {
            "wiener": pf.WienerDenoiser(moments),
            "pca_locality": pf.PCALocalityDenoiser(chosen, _THRESHOLD, moments=moments),
        }
        if gamma in networks:
            models["network"] = networks[gamma]
        for t in steps:
            record, fields = _look(models, moments, data.values(0, _TESTED), t)
            records.append({"gamma": gamma, **record})
            pictures += [(gamma, t, name, field) for name, field in fields.items()]
    return records, pictures


def by_weight(paths: Sequence[Path], weights: Sequence[float]) -> dict[float, pf.NetworkDenoiser]:
    """Networks by the weight of the pattern that was planted in their images, 0 for none.

    Raises:
        ValueError: A network's weight is none of `weights`, or there are two networks of one.
    """
    result: dict[float, pf.NetworkDenoiser] = {}
    for path in paths:
        denoiser = load(path)
        gamma = facts_of(denoiser).get("planted", 0.0)
        if gamma not in weights or gamma in result:
            told = ", ".join(f"{weight:g}" for weight in weights)
            raise ValueError(
                f"`network` must be given once at most for each of the weights {told} of this run, "
                f"{path} is of weight {gamma:g}"
            )
        result[gamma] = denoiser
    return result


def _look(
    models: dict[str, pf.Denoiser], moments: pf.Moments, clean: Tensor, t: int
) -> tuple[Record, dict[str, Tensor]]:
    """The ratio at a step, how much of the pattern is in each model's field, and the fields."""
    pattern, output = cross(_SIZE), (1, _SIZE // 4, _SIZE // 4)
    direction = torch.zeros(clean.shape[1:])
    direction[output[0]] = pattern
    alpha, sigma = pf.DDPMSchedule()(t)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    x = alpha * clean + sigma * noise
    ratio = float(analysis.snr_ruler(moments, direction, sigma, alpha))
    record: Record = {"t": t, "snr": ratio, "visible": ratio > _VISIBLE}
    fields = {}
    for name, model in models.items():
        mean = analysis.sensitivity(model, x, sigma, alpha, pixel=output).mean(0)
        fields[name] = mean[output[0]]
        record[name] = share_on_pattern(fields[name], pattern, output[1:])
    return record, fields


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


def draw(records: list[Record], pictures: list[Any], path: Path) -> None:
    """Fields by weight and model, a column for each step; marked where the ratio is high."""

    visible = {(record["gamma"], record["t"]): record["visible"] for record in records}
    rows = list(dict.fromkeys((gamma, name) for gamma, _, name, _ in pictures))
    steps = list(dict.fromkeys(t for _, t, _, _ in pictures))
    size = (1.3 * len(steps), 1.45 * len(rows))
    with picture(path, len(rows), len(steps), dpi=90, figsize=size) as (figure, axes):
        for gamma, t, name, field in pictures:
            axis = axes[rows.index((gamma, name)), steps.index(t)]
            axis.imshow((field / field.max()).sqrt().numpy(), cmap="magma")
            without_ticks(axis)
            mark = " *" if gamma > 0 and visible[gamma, t] else ""
            axis.set_title(f"t = {t}{mark}", fontsize=7)
            if t == steps[0]:
                axis.set_ylabel(f"{name}\ngamma {gamma:g}", fontsize=7)
        figure.suptitle("sensitivity fields (square root); * where the pattern's SNR exceeds 0.1")
