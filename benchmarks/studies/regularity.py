r"""How the denoising error falls with the noise level on geometrically regular images.

For C^alpha images the optimal mean squared error falls as sigma^(2 alpha / (alpha + 1)): in terms
of the noise variance the slope is alpha / (alpha + 1). A posterior mean over finitely many images
cannot follow it: its error on unseen images levels off at the distance to the nearest image, while
local posteriors, which recombine neighbourhoods, follow it further down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import pyflocality as pf
from pyflocality import synthetic
from pyflocality._support.progress import progress_bar

from ..command import Record
from ..plotting import picture

NEEDS: tuple[str, ...] = ()

_SIZE = 32


def run(*, quick: bool) -> tuple[Record, None]:
    """Errors by model, regularity and noise level, and fitted slopes."""
    count, tested = (300, 4) if quick else (50_000, 32)
    sigmas = (0.2, 0.4) if quick else (0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8)
    curves = []
    models: dict[str, Callable[[pf.TrainingSet], pf.Denoiser]] = {
        "optimal": pf.OptimalDenoiser,
        "local, window 3": partial(pf.LocalDenoiser, window=3),
        "local, window 7": partial(pf.LocalDenoiser, window=7),
        "wiener": pf.WienerDenoiser,
    }
    cases = [(alpha, *model) for alpha in (1.0, 2.0, 4.0) for model in models.items()]
    for alpha, name, make in progress_bar(cases, description="regularity"):
        data = synthetic.c_alpha(count, _SIZE, alpha)
        test = synthetic.c_alpha(tested, _SIZE, alpha, generator=torch.Generator().manual_seed(1))
        clean = test.values()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
        denoiser = make(data)
        errors = [
            float((denoiser(clean + sigma * noise, sigma) - clean).square().mean())
            for sigma in sigmas
        ]
        curves.append(
            {
                "alpha": alpha,
                "model": name,
                "mse": errors,
                "slope": _slope(sigmas, errors),
                "expected_slope": alpha / (alpha + 1),
            }
        )
    return {"images": count, "tested": tested, "sigmas": list(sigmas), "curves": curves}, None


def _slope(sigmas: tuple[float, ...], errors: list[float]) -> float:
    """Slope of the log of the error against the log of the noise variance, least squares."""
    x = torch.tensor(sigmas, dtype=torch.float64).square().log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def draw(results: Record, pictures: None, path: Path) -> None:
    """Error against the noise variance, a panel for each regularity."""

    alphas = sorted({curve["alpha"] for curve in results["curves"]})
    with picture(path, 1, len(alphas), figsize=(4.5 * len(alphas), 4)) as (_, axes):
        variances = [sigma**2 for sigma in results["sigmas"]]
        for alpha, axis in zip(alphas, axes[0], strict=True):
            for curve in results["curves"]:
                if curve["alpha"] == alpha:
                    label = f"{curve['model']} ({curve['slope']:.2f})"
                    axis.loglog(variances, curve["mse"], "o-", ms=3, label=label)
            expected = alpha / (alpha + 1)
            last = min(curve["mse"][-1] for curve in results["curves"] if curve["alpha"] == alpha)
            line = [last * (v / variances[-1]) ** expected for v in variances]
            axis.loglog(variances, line, "k--", lw=1, label=f"slope {expected:.2f}")
            axis.set_title(f"C^{alpha:g} images, N = {results['images']:,}", fontsize=9)
            axis.set_xlabel("noise variance")
            axis.legend(fontsize=7)
        axes[0, 0].set_ylabel("mean squared error (slope in brackets)")
