"""Where one image holds a posterior, its mean does not move: derivatives are 0, not what rounding
leaves of a difference of large numbers times a factor that grows as the noise falls."""

from __future__ import annotations

import pytest
import torch
from every_denoiser import MAKERS, SLOPED
from native_cpu import needs_cpu
from truth import random_images

import pyflocality as pf
from pyflocality import ops

SHAPE = (2, 6, 6)
# Weights below 0 have no nearest image, and what is linear in an image has a derivative of its own.
LINEAR = {"wiener", "gaussian_mixture"} | SLOPED
NAMES = [name for name in MAKERS if name not in {"nearest", "pca_signed"} | LINEAR]


def case(stored: torch.dtype, alpha: float) -> tuple[pf.TrainingSet, torch.Tensor, torch.Tensor]:
    """A set with twins, noisy copies of three of its images in single precision, directions."""
    generator = torch.Generator().manual_seed(3)
    images = random_images(generator, 90, SHAPE, torch.uint8)
    if stored != torch.uint8:
        # Values that differ do so by far more than the noise.
        images = images.to(stored) / 127.5 - 1.0
    # Thrice each: a mean of three equal numbers need not be that number.
    images[30:34], images[60:64] = images[:4], images[:4]
    data = pf.TrainingSet(images)
    noise = torch.randn(3, *SHAPE, generator=generator)
    x = alpha * data.values(0, 3) + 1e-6 * noise
    return data, x, torch.randn(4, 3, *SHAPE, generator=generator)


@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_cpu)])
@pytest.mark.parametrize("name", NAMES)
def test_one_image_and_its_twins_have_no_derivative(name, backend, stored):
    data, x, directions = case(stored, 0.8)
    model = MAKERS[name](data)
    with pf.use_backend(backend):
        mean, derivative = model.jvp(x, directions, 1e-6, 0.8)
        if name not in ("pca_batch_mean", "equivariant"):
            torch.testing.assert_close(mean, data.values(0, 3), rtol=0, atol=2e-6)
        assert not derivative.any()
        assert not model.vjp(x, directions, 1e-6, 0.8).any()


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_cpu)])
@pytest.mark.parametrize("name", sorted(SLOPED))
def test_of_one_image_and_its_twins_the_slope_alone_is_left(name, backend):
    """The posteriors of the images and of their linear images do not move."""
    data, x, directions = case(torch.uint8, 0.8)
    model = MAKERS[name](data)
    with pf.use_backend(backend):
        mean, derivative = model.jvp(x, directions, 1e-6, 0.8)
        transposed = model.vjp(x, directions, 1e-6, 0.8)
    torch.testing.assert_close(mean, data.values(0, 3), rtol=0, atol=4e-6)
    along = 0.4 * pf.WienerDenoiser(data).jvp(x, directions, 1e-6, 0.8)[1]
    # What is left of a posterior's own part would be multiplied by 1e12.
    torch.testing.assert_close(derivative, along, rtol=0, atol=1e-5)
    torch.testing.assert_close(transposed, along, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_parts_of_a_set_are_joined_without_a_remainder(backend, chunk_size):
    data, x, directions = case(torch.uint8, 0.8)
    weights = torch.rand(72, 72, generator=torch.Generator().manual_seed(1)) < 0.3
    options = {"backend": backend, "chunk_size": chunk_size}
    given = x, directions, data.images
    for found in (
        ops.global_posterior_jvp(*given, 1e-6, 0.8, **options),
        ops.window_posterior_jvp(*given, 3, 1e-6, 0.8, **options),
        ops.masked_posterior_jvp(*given, weights | torch.eye(72, dtype=bool), 1e-6, 0.8, **options),
    ):
        assert not found[1].any()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_little_weight_beside_the_nearest_image(backend):
    """The derivative is small, and right to the digits of single precision."""
    generator = torch.Generator().manual_seed(5)
    images = random_images(generator, 40, SHAPE, torch.uint8)
    images[1] = images[0]
    # A neighbour of the first image at squared distance 3 / 127.5^2.
    places = torch.tensor([0, 17, 40])
    images.flatten(1)[1, places] ^= 1
    data = pf.TrainingSet(images)
    x = data.values(0, 1)
    directions = torch.randn(2, 1, *SHAPE, generator=generator)
    for sigma in (0.003, 0.005, 0.02):
        given = directions, data.images
        exact = ops.global_posterior_jvp(x.double(), given[0].double(), given[1], sigma)[1]
        found = ops.global_posterior_jvp(x, *given, sigma, backend=backend)[1]
        assert exact.abs().max() > 0
        scale = float(exact.abs().max())
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_cpu)])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "wiener"])
def test_noise_whose_square_or_factor_is_beyond_the_numbers(name, backend):
    data, x, directions = case(torch.uint8, 0.8)
    model = MAKERS[name](data)
    with pf.use_backend(backend):
        # The least is 0 where it is divided, as the levels of a pyramid do.
        for sigma in (1e-30, 1e-150, 1e-160, 5e-324):
            mean, derivative = model.jvp(x, directions, sigma, 0.8)
            torch.testing.assert_close(mean, model(x, sigma, 0.8), rtol=0, atol=1e-5)
            assert torch.isfinite(derivative).all()
            assert torch.isfinite(model.vjp(x, directions, sigma, 0.8)).all()
            if name in NAMES:
                assert not derivative.any()


@pytest.mark.parametrize("name", MAKERS)
def test_no_noise_is_refused_before_work(name):
    data, x, directions = case(torch.uint8, 0.8)
    model = MAKERS[name](data)
    for derivative in (model.jvp, model.vjp):
        with (
            pf.trace_backends() as trace,
            pytest.raises(ValueError, match="`sigma` must be positive for derivatives.*got 0.0"),
        ):
            derivative(x, directions, 0.0, 0.8)
        assert not trace
