"""Wavelet pyramids against PyWavelets, and their promises."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from pyflocality import wavelets

pywt = pytest.importorskip("pywt")

NAMES = ["haar", "db2", "db4", "sym4", "coif1"]


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("name", NAMES)
def test_pyramid_equals_pywavelets(name):
    x = images(2, 3, 16, 24)
    low, details = wavelets.decompose(x, 2, name)
    expected = pywt.wavedec2(x.numpy(), name, mode="periodization", level=2)
    np.testing.assert_allclose(low.numpy(), expected[0], rtol=0, atol=1e-12)
    for found, bands in zip(details, expected[:0:-1], strict=True):
        np.testing.assert_allclose(found.numpy(), np.concatenate(bands, 1), rtol=0, atol=1e-12)


def test_filter_longer_than_the_image_wraps_around():
    x = images(1, 1, 4, 2)
    low, details = wavelets.analyse(x, "db4")
    expected_low, bands = pywt.dwt2(x.numpy(), "db4", mode="periodization")
    np.testing.assert_allclose(low.numpy(), expected_low, rtol=0, atol=1e-12)
    np.testing.assert_allclose(details.numpy(), np.concatenate(bands, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "db20"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perfect_reconstruction(name, dtype):
    x = images(2, 2, 32, 16, dtype=dtype)
    found = wavelets.reconstruct(*wavelets.decompose(x, 3, name), name)
    assert found.dtype == dtype
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_the_transform_is_orthogonal(name):
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    low, details = wavelets.decompose(basis, 2, name)
    matrix = torch.cat([part.flatten(1) for part in (low, *details)], 1)
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_synthesis_is_the_transpose_of_analysis():
    x, low, details = images(1, 2, 8, 4), images(2, 2, 4, 2)[1:], images(3, 6, 4, 2)[2:]
    found = wavelets.analyse(x, "db2")
    forward = (found[0] * low).sum() + (found[1] * details).sum()
    backward = (x * wavelets.synthesise(low, details, "db2")).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=0)


def test_constant_images_and_directions_of_the_bands():
    constant = torch.full((1, 1, 8, 8), 0.3, dtype=torch.float64)
    low, details = wavelets.decompose(constant, 2)
    torch.testing.assert_close(low, torch.full_like(low, 4 * 0.3))
    assert all(bands.abs().max() < 1e-14 for bands in details)
    # Horizontal stripes are horizontal detail and nothing else.
    stripes = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)[:, None].expand(8, 8)
    low, bands = wavelets.analyse(stripes[None, None])
    assert low.abs().max() < 1e-14 and bands[:, 1:].abs().max() < 1e-14
    torch.testing.assert_close(bands[:, 0], torch.full((1, 4, 4), 2.0, dtype=torch.float64))


def test_derivatives():
    x = images(1, 1, 4, 8).requires_grad_()

    def transform(x):
        low, details = wavelets.decompose(x, 1, "db2")
        return low, details[0]

    assert torch.autograd.gradcheck(transform, x, check_forward_ad=True)
    assert torch.autograd.gradcheck(
        lambda c: wavelets.synthesise(c[:, :1], c[:, 1:]), images(1, 4, 2, 2).requires_grad_()
    )


def test_zero_levels_are_the_image():
    x = images(1, 1, 5, 3)
    low, details = wavelets.decompose(x, 0)
    assert torch.equal(low, x) and details == []


WRONG = {
    "sides": (lambda: wavelets.decompose(images(1, 1, 8, 12), 3), ValueError, "divisible by 8"),
    "odd": (lambda: wavelets.analyse(images(1, 1, 5, 4)), ValueError, "divisible by 2"),
    "levels": (lambda: wavelets.decompose(images(1, 1, 8, 8), -1), ValueError, "`levels`"),
    "type": (lambda: wavelets.analyse(torch.zeros(1, 1, 4, 4).int()), TypeError, "`images`"),
    "rank": (lambda: wavelets.analyse(images(4, 4)), ValueError, "`images` must have shape"),
    "details": (
        lambda: wavelets.synthesise(images(1, 1, 4, 4), images(1, 2, 4, 4)),
        ValueError,
        r"`details` must have shape \[1, 3, 4, 4\]",
    ),
    "unknown": (lambda: wavelets.filters("db99"), ValueError, "`wavelet` must be one of"),
    "biorthogonal": (lambda: wavelets.filters("bior2.2"), ValueError, "`wavelet` must be orthogon"),
    "empty": (lambda: wavelets.filters(""), ValueError, "`wavelet` must be one of"),
    "nearly": (lambda: wavelets.filters("dmey"), ValueError, "`wavelet` must be orthogonal"),
    "name": (lambda: wavelets.filters(2), TypeError, "`wavelet`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def test_without_pywavelets(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    wavelets._filters.cache_clear()
    with pytest.raises(ImportError, match=r"pyflocality\[wavelets\]"):
        wavelets.filters("db3")
    assert wavelets.filters("haar").low == pytest.approx((0.5**0.5, 0.5**0.5))


def test_haar_needs_no_pywavelets_and_equals_it():
    found, theirs = wavelets.filters("haar"), pywt.Wavelet("haar")
    assert found.low == pytest.approx(theirs.dec_lo) and found.high == pytest.approx(theirs.dec_hi)
