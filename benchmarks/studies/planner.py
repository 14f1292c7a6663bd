"""What `pyflocality plan` foresees beside what steps take, at three sizes of the set.

The masks of PCA locality follow images like photographs, whose spectrum falls as 1 / f, and the
plan is told what their sums take. Larger images get masks of a smaller size, which are made in
seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import pyflocality as pf
from pyflocality._support.progress import progress_bar
from pyflocality.kernels.cpu.masked_posterior import difference_tree
from pyflocality.planner import WINDOW, Setting, cost_of, seconds_of

from ..command import Record
from ..plotting import picture

NEEDS: tuple[str, ...] = ()

_THRESHOLD, _SIGMA = 0.05, 1.0
_MODELS: dict[str, Callable[[pf.TrainingSet], pf.Denoiser]] = {
    "optimal": pf.OptimalDenoiser,
    "local": lambda data: pf.LocalDenoiser(data, WINDOW),
    "patch-set": lambda data: pf.PatchSetDenoiser(data, WINDOW),
    "equivariant": lambda data: pf.EquivariantDenoiser(data, WINDOW),
    "pca-locality": lambda data: pf.PCALocalityDenoiser(
        data, _THRESHOLD, moments=photograph_moments(data.image_shape)
    ),
}
# Images, shape and batch; the equivariant model searches all positions and gets fewer images.
_SETTINGS = (
    Setting(60_000, (3, 32, 32), 8),
    Setting(300_000, (1, 28, 28), 4),
    Setting(50_000, (3, 64, 64), 2),
)
_EQUIVARIANT_SHARE = 400
_MASKED_SHAPE = (1, 48, 48)


def run(*, quick: bool) -> tuple[list[Record], None]:
    """A record for each model and size."""
    settings = (Setting(400, (1, 12, 12), 2),) if quick else _SETTINGS
    records = []
    for setting, model in progress_bar(
        [(setting, model) for setting in settings for model in _MODELS], description="plans"
    ):
        share = _EQUIVARIANT_SHARE if model == "equivariant" else 1
        part = Setting(max(2, setting.images // share), setting.shape, setting.batch)
        if model == "pca-locality" and part.values > 4096:
            part = replace(part, shape=_MASKED_SHAPE)
        generator = torch.Generator().manual_seed(3)
        size = (part.images, *part.shape)
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        denoiser = _MODELS[model](pf.TrainingSet(images))
        if isinstance(denoiser, pf.PCALocalityDenoiser):
            tree = difference_tree(denoiser.weights_at(_SIGMA), images.shape[1:])
            part = replace(part, mask_share=tree.terms / part.values**2)
        foreseen = seconds_of(model, part)
        x = torch.randn(part.batch, *part.shape, generator=generator)
        times: list[float] = []
        while len(times) < 3 or sum(times) < 1.5:
            start = time.perf_counter()
            denoiser(x, _SIGMA)
            times.append(time.perf_counter() - start)
        records.append(
            {
                "model": model,
                "images": part.images,
                "shape": list(part.shape),
                "batch": part.batch,
                "mask_share": part.mask_share if model == "pca-locality" else None,
                "foreseen_seconds": foreseen,
                # The shortest, as in the forecast: what else the machine does slows single runs.
                "measured_seconds": min(times),
                "measured_median_seconds": sorted(times)[len(times) // 2],
                "flops": cost_of(model, part).flops,
            }
        )
    return records, None


def photograph_moments(shape: tuple[int, int, int]) -> pf.Moments:
    """Moments of random fields with the spectrum and the likeness of channels of photographs."""
    channels, height, width = shape
    generator = torch.Generator().manual_seed(5)
    count = 2 * channels * height * width
    fields = torch.randn(count, channels, height, width, generator=generator)
    fields[:, 1:] = fields[:, :1] + 0.3 * fields[:, 1:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=0.5 / max(height, width))
    images = torch.fft.irfft2(torch.fft.rfft2(fields) / frequency, s=(height, width))
    return pf.Moments.from_data((0.4 * images / images.std()).clamp(-1.0, 1.0))


def draw(records: list[Record], pictures: None, path: Path) -> None:
    """Foreseen against measured time, with the band of 30%."""

    with picture(path, figsize=(6, 5)) as (_, [[axis]]):
        for model in dict.fromkeys(record["model"] for record in records):
            chosen = [record for record in records if record["model"] == model]
            measured = [record["measured_seconds"] for record in chosen]
            foreseen = [record["foreseen_seconds"] for record in chosen]
            axis.loglog(measured, foreseen, "o", label=model)
        times = [record["measured_seconds"] for record in records]
        ends = [min(times) / 1.5, max(times) * 1.5]
        axis.loglog(ends, ends, "k-", lw=1)
        axis.fill_between(ends, [0.7 * e for e in ends], [1.3 * e for e in ends], alpha=0.2)
        axis.set_xlabel("measured seconds a step")
        axis.set_ylabel("foreseen seconds a step")
        axis.legend(fontsize=8)
