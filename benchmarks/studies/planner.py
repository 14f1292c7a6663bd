"""What `pyflocality plan` foresees beside what steps take, at three sizes of the set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import pyflocality as pf
from pyflocality._costs import COSTS, WINDOW, Setting, seconds_of
from pyflocality._progress import progress_bar

NEEDS: tuple[str, ...] = ()

_MODELS = {
    "optimal": lambda data: pf.OptimalDenoiser(data),
    "local": lambda data: pf.LocalDenoiser(data, WINDOW),
    "patch-set": lambda data: pf.PatchSetDenoiser(data, WINDOW),
    "equivariant": lambda data: pf.EquivariantDenoiser(data, WINDOW),
}
# Images, shape and batch; the equivariant model searches all positions and gets fewer images.
_SETTINGS = (
    Setting(60_000, (3, 32, 32), 8),
    Setting(300_000, (1, 28, 28), 4),
    Setting(50_000, (3, 64, 64), 2),
)
_EQUIVARIANT_SHARE = 400


def run(*, quick: bool) -> tuple[list[dict[str, Any]], None]:
    """A record for each model and size."""
    settings = (Setting(400, (1, 12, 12), 2),) if quick else _SETTINGS
    records = []
    for setting, model in progress_bar(
        [(setting, model) for setting in settings for model in _MODELS], description="plans"
    ):
        share = _EQUIVARIANT_SHARE if model == "equivariant" else 1
        part = Setting(max(2, setting.images // share), setting.shape, setting.batch)
        foreseen = seconds_of(model, part)
        generator = torch.Generator().manual_seed(3)
        size = (part.images, *part.shape)
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        denoiser = _MODELS[model](pf.TrainingSet(images))
        x = torch.randn(part.batch, *part.shape, generator=generator)
        times = []
        while len(times) < 3 or sum(times) < 1.5:
            start = time.perf_counter()
            denoiser(x, 1.0)
            times.append(time.perf_counter() - start)
        records.append(
            {
                "model": model,
                "images": part.images,
                "shape": list(part.shape),
                "batch": part.batch,
                "foreseen_seconds": foreseen,
                # The shortest, as in the forecast: what else the machine does slows single runs.
                "measured_seconds": min(times),
                "measured_median_seconds": sorted(times)[len(times) // 2],
                "flops": COSTS[model](part).flops,
            }
        )
    return records, None


def draw(records: list[dict[str, Any]], pictures: None, path: Path) -> None:
    """Foreseen against measured time, with the band of 30%."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 5))
    for model in dict.fromkeys(record["model"] for record in records):
        chosen = [record for record in records if record["model"] == model]
        measured = [record["measured_seconds"] for record in chosen]
        axis.loglog(measured, [record["foreseen_seconds"] for record in chosen], "o", label=model)
    times = [record["measured_seconds"] for record in records]
    ends = [min(times) / 1.5, max(times) * 1.5]
    axis.loglog(ends, ends, "k-", lw=1)
    axis.fill_between(ends, [0.7 * e for e in ends], [1.3 * e for e in ends], alpha=0.2)
    axis.set_xlabel("measured seconds a step")
    axis.set_ylabel("foreseen seconds a step")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
