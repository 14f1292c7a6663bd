"""Posterior means over patches from anywhere, against pair-by-pair float64 truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patch_problems import ALPHA, SIGMA, boundaries, problem
from truth import patch_posterior_mean

import pyflocality as pf
from pyflocality.backends import configuration, machine_reason
from pyflocality.ops import equivariant_posterior_mean, global_posterior_mean

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            machine_reason(name) is not None, reason=str(machine_reason(name))
        ),
    )
    for name in ("reference", "cpu")
]


@pytest.mark.parametrize("backend", BACKENDS)
@boundaries
@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_equals_truth(backend, boundary, window, dtype, rng):
    temperature = 1.0 if dtype == torch.uint8 else 2.0
    x, images = problem(rng, dtype=dtype)
    expected = patch_posterior_mean(
        x, images, window, SIGMA.double().numpy(), ALPHA.double().numpy(), boundary, temperature
    )
    exact = backend == "reference"
    options = {"boundary": boundary, "temperature": temperature, "backend": backend}
    with pf.trace_backends() as calls:
        found = equivariant_posterior_mean(
            x if exact else x.float(), images, window, SIGMA, ALPHA, **options
        )
    assert calls == [("equivariant_posterior", backend)]
    # float32: distances of up to 50 terms near 1, rounded to 1e-7, times 1 / (2 sigma^2) = 50.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11 if exact else 5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@boundaries
def test_chunks_threads_and_batches(backend, boundary, rng):
    x, images = problem(rng, (2, 6, 6), 120)
    x = x.float()
    options = {"boundary": boundary, "backend": backend}
    whole = equivariant_posterior_mean(x, images, 3, SIGMA, ALPHA, **options)
    for chunk_size in (1, 7, 120):
        parts = equivariant_posterior_mean(
            x, images, 3, SIGMA, ALPHA, chunk_size=chunk_size, **options
        )
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    alone = equivariant_posterior_mean(x[1:], images, 3, SIGMA[1:], ALPHA[1:], **options)
    torch.testing.assert_close(alone, whole[1:], rtol=0, atol=0 if backend == "cpu" else 1e-6)
    if backend == "cpu":
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            threaded = equivariant_posterior_mean(x, images, 3, SIGMA, ALPHA, **options)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(threaded, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_circular_model_commutes_with_shifts(backend, rng):
    x, images = problem(rng, (2, 6, 7), 30)
    x = x.float()
    found = equivariant_posterior_mean(x, images, 3, 0.4, backend=backend)
    moved = equivariant_posterior_mean(x.roll((2, -3), (2, 3)), images, 3, 0.4, backend=backend)
    torch.testing.assert_close(moved, found.roll((2, -3), (2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_borders_with_a_window_over_everything_is_the_global_posterior(backend, rng):
    x, images = problem(rng, (2, 5, 5), 30)
    found = equivariant_posterior_mean(
        x.float(), images, 9, SIGMA, ALPHA, boundary="broken", backend=backend
    )
    exact = global_posterior_mean(x, images, SIGMA, ALPHA)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@boundaries
@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-3, 1e3, 1e30])
def test_extreme_noise(backend, boundary, sigma, rng):
    _, images = problem(rng, (1, 6, 6), 20)
    x = pf.TrainingSet(images[3:4]).values()
    found = equivariant_posterior_mean(x, images, 3, sigma, boundary=boundary, backend=backend)
    assert torch.isfinite(found).all()
    if sigma < 1:
        # Every window inside the image is a patch of the set itself.
        inside = slice(1, -1) if boundary == "circular" else slice(None)
        torch.testing.assert_close(
            found[..., inside, inside], x[..., inside, inside], rtol=0, atol=1e-6
        )
    elif boundary == "circular":
        mean = pf.TrainingSet(images).values()[..., 1:-1, 1:-1].mean()
        torch.testing.assert_close(found, mean.expand_as(found), rtol=0, atol=1e-4)


def test_derivative_goes_through_the_reference(rng):
    x, images = problem(rng, (1, 4, 4), 5)
    x = x[:1].clone().requires_grad_()
    torch.autograd.gradcheck(
        lambda z: equivariant_posterior_mean(z, images, 3, 0.7), (x,), eps=1e-6, atol=1e-6
    )


WRONG = {
    "even": ({"window": 2}, "`window` must be odd"),
    "large": ({"window": 7}, "`window` must be at most 5, so that a patch fits inside a 5x6"),
    "large broken": ({"window": 13, "boundary": "broken"}, "`window` must be at most 11"),
    "boundary": ({"boundary": "mirror"}, "`boundary` must be one of 'circular', 'broken'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, rng):
    options, message = WRONG[case]
    x, images = problem(rng)
    with pytest.raises(ValueError, match=message):
        equivariant_posterior_mean(x, images, **({"window": 3, "sigma": 0.5} | options))
    if "window" in options or "boundary" in options:
        with pytest.raises(ValueError, match=message):
            pf.EquivariantDenoiser(pf.TrainingSet(images), **({"window": 3} | options))


def test_both_backends_are_registered():
    assert configuration()["operations"]["equivariant_posterior"] == ["triton", "cpu", "reference"]
