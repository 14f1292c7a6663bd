"""Models of few images from their components alone, against dense float64 formulas."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from truth import random_images

import pyflocality as pf

SHAPE = (3, 8, 6)
D = 144
FEW, MANY = 20, 200
LEVELS = [(0.0, 1.0), (0.02, 1.0), (0.5, 0.8), (3.0, 0.1)]

pytestmark = pytest.mark.filterwarnings("ignore:.*too few for the Wiener filter")


def images(count: int) -> Tensor:
    return random_images(torch.Generator().manual_seed(count), count, SHAPE, torch.uint8)


def noisy(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64)


def wiener_filter(covariance: Tensor, sigma: float, alpha: float) -> Tensor:
    """alpha S (alpha^2 S + sigma^2)^+, from eigenvectors of the dense covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    values = torch.where(values > 1e-10 * values[-1], values, 0.0)
    gain = alpha * values / torch.where(values > 0, alpha**2 * values + sigma**2, 1.0)
    return (vectors * gain) @ vectors.T


SOURCES = {
    "set": pf.TrainingSet,
    "moments": pf.Moments.from_data,
    "thin": lambda data: pf.Basis.from_data(data, method="gram"),
    "full": lambda data: pf.Basis.from_data(data, method="covariance"),
}


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("source", SOURCES)
def test_wiener_filter_and_its_derivatives(source, count):
    stored, x = images(count), noisy()
    moments = pf.Moments.from_data(stored)
    denoiser = pf.WienerDenoiser(SOURCES[source](stored))
    assert denoiser.eigenvectors.shape == (D, min(D, count - 1))
    mean = moments.mean.flatten()
    tangents = torch.stack([noisy(), noisy().flip(0)])
    for sigma, alpha in LEVELS:
        matrix = wiener_filter(moments.covariance, sigma, alpha)
        expected = mean + (x.flatten(1) - alpha * mean) @ matrix
        # Without noise the smallest variance decides: its relative error is that of the filter.
        bound = 1e-8 if sigma == 0 else 1e-11
        assert (denoiser(x, sigma, alpha).flatten(1) - expected).abs().max() <= bound
        if sigma == 0:
            continue
        products = (tangents.flatten(2) @ matrix).reshape(tangents.shape)
        answer, jvp = denoiser.jvp(x, tangents, sigma, alpha)
        assert (answer.flatten(1) - expected).abs().max() <= bound
        assert (jvp - products).abs().max() <= bound
        assert (denoiser.vjp(x, tangents, sigma, alpha) - products).abs().max() <= bound
        single = denoiser(x.float(), sigma, alpha)
        assert (single.double().flatten(1) - expected).abs().max() <= max(bound, 1e-4)


def test_what_few_images_do_not_show_is_answered_by_the_mean():
    stored = images(FEW)
    denoiser = pf.WienerDenoiser(pf.TrainingSet(stored))
    mean, vectors = denoiser.mean, denoiser.eigenvectors
    outside = noisy(1).flatten(1)
    outside = outside - outside @ vectors @ vectors.T
    x = (mean + 5 * outside).reshape(1, *SHAPE)
    assert (denoiser(x, 0.1).flatten() - mean).abs().max() <= 1e-12


def test_eigenvectors_are_copied_in_parts(monkeypatch):
    from pyflocality.denoisers import wiener

    denoiser, x = pf.WienerDenoiser(pf.TrainingSet(images(FEW))), noisy().float()
    whole = denoiser(x, 0.3)
    monkeypatch.setattr(wiener, "_COPIED_BYTES", 4 * D * 7)
    assert (denoiser(x, 0.3) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("count", [FEW, MANY])
def test_shrunk_covariance(count):
    stored, x = images(count), noisy()
    denoiser = pf.LedoitWolfDenoiser(pf.TrainingSet(stored))
    values = stored.double().flatten(1) / 127.5 - 1
    centred = values - values.mean(0)
    sample = centred.T @ centred / count
    level = sample.trace() / D
    identity = torch.eye(D, dtype=torch.float64)
    spread = (sample - level * identity).square().sum()
    fourth = centred.square().sum(1).square().sum()
    share = ((fourth / count - sample.square().sum()) / count / spread).clamp(0, 1)
    assert denoiser.shrinkage == pytest.approx(float(share), rel=1e-12)
    shrunk = (1 - share) * sample + share * level * identity
    mean = values.mean(0)
    for sigma, alpha in LEVELS:
        matrix = wiener_filter(shrunk, sigma, alpha)
        expected = mean + (x.flatten(1) - alpha * mean) @ matrix
        assert (denoiser(x, sigma, alpha).flatten(1) - expected).abs().max() <= 1e-11
        if sigma == 0:
            continue
        _, jvp = denoiser.jvp(x, x[None], sigma, alpha)
        assert (jvp[0].flatten(1) - x.flatten(1) @ matrix).abs().max() <= 1e-11


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("source", SOURCES)
def test_power_spectrum(source, count):
    stored = images(count)
    values = stored.double() / 127.5 - 1
    expected = torch.fft.fft2(values, norm="ortho").abs().square().mean(0)
    spectrum = pf.FourierWienerDenoiser(SOURCES[source](stored)).spectrum
    assert (spectrum - expected).abs().max() <= 1e-12 * expected.max()


@pytest.mark.parametrize("count", [FEW, MANY])
def test_analysis_of_components(count):
    stored = images(count)
    moments, basis = pf.Moments.from_data(stored), pf.Basis.from_data(stored)
    pattern = noisy(1)[0]
    of_pattern = pf.analysis.pattern_variance(moments, pattern)
    assert pf.analysis.pattern_variance(basis, pattern) == pytest.approx(of_pattern, rel=1e-12)
    ruler = pf.analysis.snr_ruler(basis, pattern, torch.tensor([0.1, 2.0]))
    assert torch.allclose(ruler, of_pattern / torch.tensor([0.01, 4.0]).double(), rtol=1e-6)
    for sigma in (0.1, 0.5, 3.0):
        rows = [
            pf.analysis.high_snr_projection(source, sigma, pixel=(1, 2, 3))
            for source in (moments, basis)
        ]
        assert rows[0].shape == SHAPE
        assert (rows[0] - rows[1]).abs().max() <= 1e-11
    with pytest.raises(TypeError, match="`moments` must be Moments or a Basis, got"):
        pf.analysis.pattern_variance(3, pattern)


def test_no_covariance_is_made_of_few_large_images(monkeypatch):
    """Of 3x128x128 it would take 19 GB."""

    def refused(*given: object, **options: object) -> None:
        raise AssertionError("moments were made")

    monkeypatch.setattr(pf.Moments, "from_data", refused)
    shape = (3, 128, 128)
    generator = torch.Generator().manual_seed(0)
    data = pf.TrainingSet(random_images(generator, 12, shape, torch.uint8))
    x = torch.randn(2, *shape, generator=generator)
    values = data.values().double().flatten(1)
    centred = values - values.mean(0)
    noise = x.double().flatten(1) - values.mean(0)
    # The same filter from the other side: S = A^T A / 11.
    inner = centred @ centred.T / 11 + 0.25 * torch.eye(12)
    expected = values.mean(0) + (noise @ centred.T / 11) @ torch.linalg.solve(inner, centred)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        denoiser = pf.WienerDenoiser(data)
    assert denoiser.eigenvectors.shape == (49152, 11)
    assert (denoiser(x, 0.5).double().flatten(1) - expected).abs().max() <= 1e-4
    assert pf.LedoitWolfDenoiser(data)(x, 0.5).isfinite().all()
    spectrum = pf.FourierWienerDenoiser(pf.Basis.from_data(data)).spectrum
    assert torch.allclose(spectrum, pf.FourierWienerDenoiser(data).spectrum, rtol=1e-9)
