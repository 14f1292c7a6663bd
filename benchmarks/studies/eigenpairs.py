"""Twenty eigenpairs by products against the whole Jacobian, at 3x32x32 with 50,000 images.

The whole Jacobian takes as many tangents as there are values; its time is measured on some of
them, eight to a pass, and scaled, saying so.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

import pyflocality as pf
from pyflocality import analysis
from pyflocality._support.progress import progress_bar

from ..command import Record
from ..plotting import picture

NEEDS = ("cifar10",)

_PAIRS = 20
_TANGENTS = 8


def run(*, quick: bool, cifar10: Path | None) -> tuple[list[Record], None]:
    """A record for each model and noise level."""
    data = pf.TrainingSet.load("digits" if cifar10 is None else cifar10)
    alphas = (500,) if quick else (700, 300)
    models = {"optimal": pf.OptimalDenoiser(data), "local, window 3": pf.LocalDenoiser(data, 3)}
    values = data.num_values
    records = []
    cases = [(t, name) for t in alphas for name in models]
    for t, name in progress_bar(cases, description="eigenpairs"):
        denoiser = models[name]
        alpha, sigma = (float(level) for level in pf.DDPMSchedule()(t))
        noise = torch.randn(1, *data.image_shape, generator=torch.Generator().manual_seed(0))
        x = alpha * data.values(0, 1) + sigma * noise
        start = time.perf_counter()
        result = analysis.jacobian_spectrum(denoiser, x, sigma, alpha, k=_PAIRS)
        seconds = time.perf_counter() - start
        tangents = torch.eye(values)[:_TANGENTS].reshape(_TANGENTS, 1, *data.image_shape)
        start = time.perf_counter()
        denoiser.jvp(x, tangents, sigma, alpha)
        whole = (time.perf_counter() - start) * values / _TANGENTS
        records.append(
            {
                "model": name,
                "t": t,
                "images": len(data),
                "values": values,
                "seconds": seconds,
                "products": result.products,
                "largest_residual": float(result.residuals.max()),
                "eigenvalues": result.values.tolist(),
                "whole_jacobian_seconds": whole,
                "whole_jacobian_note": f"{_TANGENTS} tangents measured, scaled to {values}",
                "vectors_bytes": result.vectors.nbytes,
                "whole_jacobian_bytes": 4 * values**2,
            }
        )
    return records, None


def draw(records: list[Record], pictures: None, path: Path) -> None:
    """Eigenvalues by rank, with the times in the legend."""

    with picture(path, figsize=(6, 4)) as (_, [[axis]]):
        for record in records:
            label = (
                f"{record['model']}, t = {record['t']}: {record['seconds']:.1f} s, whole Jacobian "
                f"{record['whole_jacobian_seconds']:.0f} s"
            )
            axis.plot(range(1, _PAIRS + 1), record["eigenvalues"], "o-", ms=3, label=label)
        axis.set_xlabel("rank")
        axis.set_ylabel("eigenvalue")
        axis.legend(fontsize=7)
