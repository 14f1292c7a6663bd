"""The optimal denoiser's Jacobian on a manifold of known dimension.

Disks form a manifold of five dimensions. With a continuum of images the optimal denoiser would
keep the five tangent directions, eigenvalues of about 1, and drop all others. With N images it
does so only where its posterior spans many neighbours; at less noise it recites, and its Jacobian
goes to 0. For each noise level and N: median effective sample size, eigenvalues, and cosines of
the principal angles between the five leading eigenvectors and the tangent space of the true disk.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import analysis, synthetic
from pyflocality._support.progress import progress_bar

from ..command import Record
from ..plotting import picture

NEEDS: tuple[str, ...] = ()

_SIZE = 16
_EIGENVALUES = 10
_DIMENSION = 5


def run(*, quick: bool) -> tuple[list[Record], None]:
    """A record for each set size and noise level."""
    counts = (500,) if quick else (10_000, 100_000, 400_000)
    sigmas = (0.3,) if quick else (0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
    tested = 2 if quick else 8
    parameters = synthetic.draw_disks(tested, _SIZE, torch.Generator().manual_seed(99))
    clean = synthetic.render_disks(parameters, _SIZE)
    tangents = synthetic.disk_tangents(parameters, _SIZE).flatten(2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7)).double()
    records = []
    cases = [(count, sigma) for count in counts for sigma in sigmas]
    data = synthetic.disks(max(counts), _SIZE)
    for count, sigma in progress_bar(cases, description="disks"):
        denoiser = pf.OptimalDenoiser(data.subset(torch.arange(count)))
        x = (clean + sigma * noise).float()
        spectra, cosines = [], []
        for image, tangent in zip(x, tangents, strict=True):
            result = analysis.jacobian_spectrum(denoiser, image, sigma, k=_EIGENVALUES)
            spectra.append(result.values)
            cosines.append(principal_cosines(result.vectors[:_DIMENSION].flatten(1), tangent))
        size = analysis.posterior_concentration(denoiser, x, sigma).effective_sample_size
        error = (denoiser(x, sigma) - clean).square().mean()
        records.append(
            {
                "images": count,
                "sigma": sigma,
                "effective_sample_size": float(size.median()),
                "eigenvalues": torch.stack(spectra).median(0).values.tolist(),
                "principal_cosines": torch.stack(cosines).median(0).values.tolist(),
                "mse": float(error),
            }
        )
    return records, None


def principal_cosines(vectors: Tensor, tangents: Tensor) -> Tensor:
    """Cosines of the principal angles between two spans, largest first.

    Rows of vectors [k, D] are orthonormal, those of tangents [m, D] linearly independent.
    """
    basis = torch.linalg.qr(tangents.T).Q
    return torch.linalg.svdvals(vectors.double() @ basis).clamp(max=1.0)


def draw(records: list[Record], pictures: None, path: Path) -> None:
    """Eigenvalues and cosines against the noise level, a column for each set size."""
    from matplotlib.ticker import NullFormatter

    counts = sorted({record["images"] for record in records})
    with picture(path, 3, len(counts), figsize=(5 * len(counts), 9)) as (_, axes):
        for column, count in enumerate(counts):
            chosen = [record for record in records if record["images"] == count]
            sigmas = [record["sigma"] for record in chosen]
            top, middle, bottom = axes[:, column]
            for k in range(_EIGENVALUES):
                values = [record["eigenvalues"][k] for record in chosen]
                top.plot(sigmas, values, "o-", color="C0" if k < _DIMENSION else "0.7", ms=3)
            top.axhline(1.0, color="k", lw=0.5)
            top.set_title(f"N = {count:,}: ten leading eigenvalues (five in colour)", fontsize=9)
            for k in range(_DIMENSION):
                values = [record["principal_cosines"][k] for record in chosen]
                middle.plot(sigmas, values, "o-", color="C1", ms=3)
            middle.set_ylim(0, 1.05)
            middle.set_title("cosines of principal angles with the tangent space", fontsize=9)
            sizes = [record["effective_sample_size"] for record in chosen]
            bottom.loglog(sigmas, sizes, "o-", color="C2", ms=3)
            bottom.set_title("effective sample size", fontsize=9)
            bottom.set_xlabel("noise level sigma")
            for axis in (top, middle, bottom):
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(NullFormatter())
