"""Builtin and synthetic sets: their values and their geometry."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from source_files import (
    assert_images,
    load,
)

import pyflocality as pf
from pyflocality import synthetic
from pyflocality.sources import builtin, drawn


def test_digits():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    bunch = sklearn_datasets.load_digits()
    data = load("digits")
    # Halves are rounded to even, which concerns level 8 only: 127.5 becomes 128.
    levels = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    expected = np.array(levels, np.uint8)[bunch.images.astype(int)]
    assert_images(data, expected[:, None])
    assert data.labels.tolist() == bunch.target.tolist()
    assert data.label_names == tuple("0123456789")
    assert load("digits", channels=3, resolution=16).image_shape == (3, 16, 16)


def test_photos():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    china, flower = sklearn_datasets.load_sample_images().images
    data = load("photos")
    assert (len(data), data.image_shape, data.dtype) == (4906, (3, 32, 32), torch.uint8)
    assert data.label_names == ("china", "flower")
    assert data.labels.bincount().tolist() == [2453, 2453]
    # 25 x 39 patches at full size, 23 x 37 at half and 19 x 33 at a quarter of it.
    pixels = data.images.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels[40], china[16:48, 16:48])
    np.testing.assert_array_equal(pixels[2453 + 974], flower[384:416, 608:640])
    half = flower[:64, 16:80].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(pixels[2453 + 975 + 1], np.floor(half + 0.5))
    quarter = china[:128, :128].reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(pixels[975 + 851], np.floor(quarter + 0.5))
    assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) > 4800


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_missing_scikit_learn_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=rf"'{name}'.*pip install 'pyflocality\[sets\]'"):
        load(name)


@pytest.mark.parametrize("name", ["disks", "c_alpha"])
def test_synthetic_sets_are_the_same_every_time(name, monkeypatch):
    data = load(name)
    assert (len(data), data.image_shape, data.dtype) == (4096, (1, 32, 32), torch.float32)
    assert data.images.abs().max() <= 1.0
    monkeypatch.setattr(builtin, "SYNTHETIC_IMAGES", 50)
    data = load(name)
    assert data.content_key() == load(name).content_key()
    small = load(name, resolution=12)
    make = getattr(synthetic, name)
    np.testing.assert_array_equal(small.images.numpy(), make(50, 12).images.numpy())
    assert load(name, resolution=(8, 16), channels=3).image_shape == (3, 8, 16)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (make(5, 9, generator=generator) for generator in generators)
    assert first.content_key() == again.content_key() != other.content_key()


@contextmanager
def other_defaults():
    """Defaults of torch that the library's results must not follow."""
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["digits", "disks", "c_alpha"])
def test_torch_defaults_change_no_builtin_set(name, monkeypatch):
    if name == "digits":
        pytest.importorskip("sklearn.datasets")
    monkeypatch.setattr(builtin, "SYNTHETIC_IMAGES", 20)
    expected = load(name, resolution=(8, 16), channels=3)
    with other_defaults():
        data = load(name, resolution=(8, 16), channels=3)
    assert data.dtype == expected.dtype
    assert data.content_key() == expected.content_key()


@pytest.mark.parametrize(
    "schedule", [pf.DDPMSchedule, pf.CosineSchedule, pf.KarrasSchedule, pf.FlowSchedule]
)
def test_torch_defaults_change_no_samples(schedule):
    denoiser = pf.WienerDenoiser(pf.Moments.from_data(synthetic.disks(5, 4)))

    def run():
        # Made anew: a schedule keeps its table.
        noise = schedule()
        generator = torch.Generator("cpu").manual_seed(3)
        options = {"schedule": noise, "steps": 3, "generator": generator, "progress": False}
        result = pf.sample(lambda x, sigma, alpha: 0.5 * x, x_T=state, **options)
        drawn = pf.sample(denoiser, 2, **options)
        time = noise.timesteps(3)[1].item()
        return noise(time), result.timesteps, result.images, drawn.images

    state = torch.linspace(-1, 1, 32, dtype=torch.float32).reshape(2, 1, 4, 4)
    level, *expected = run()
    with other_defaults():
        again, *found = run()
    assert again == level
    for tensor, same in zip(found, expected, strict=True):
        assert tensor.dtype == same.dtype
        assert torch.equal(tensor, same)


def test_disks_have_the_value_and_the_area_of_their_parameters():
    size = 32
    parameters = synthetic.draw_disks(50, size, torch.Generator().manual_seed(0))
    images = synthetic.render_disks(parameters, size)[:, 0].numpy()
    np.testing.assert_array_equal(
        synthetic.disks(50, size).images[:, 0].numpy(), images.astype(np.float32)
    )
    foreground, background = parameters.foreground.numpy(), parameters.background.numpy()
    rows, columns = (parameters.y.long(), parameters.x.long())
    np.testing.assert_allclose(images[range(50), rows, columns], foreground, atol=1e-12)
    np.testing.assert_allclose(images[:, 0, 0], background, atol=1e-12)
    share = (images - background[:, None, None]) / (foreground - background)[:, None, None]
    area = np.pi * parameters.radius.numpy() ** 2
    np.testing.assert_allclose(share.sum(axis=(1, 2)), area, rtol=0.02)
    centres = np.arange(size) + 0.5
    across = (share.sum(axis=1) * centres).sum(axis=1) / share.sum(axis=(1, 2))
    down = (share.sum(axis=2) * centres).sum(axis=1) / share.sum(axis=(1, 2))
    np.testing.assert_allclose(across, parameters.x.numpy(), atol=0.05)
    np.testing.assert_allclose(down, parameters.y.numpy(), atol=0.05)


@pytest.mark.parametrize("alpha", [0.3, 0.6])
def test_c_alpha_backgrounds_are_as_regular_as_asked(alpha):
    """Below 1, alpha is the exponent at which differences grow with their distance."""
    generator = torch.Generator().manual_seed(3)
    field = drawn._regular((30, 256, 256), alpha + 1.0, generator).numpy()
    near, far = (np.std(field[:, :, step:] - field[:, :, :-step]) for step in (4, 16))
    # Frequencies beyond the grid are missing, which makes short differences smaller.
    assert np.log(far / near) / np.log(4) == pytest.approx(alpha, abs=0.08)


def test_c_alpha_images_have_two_sides():
    images = synthetic.c_alpha(100, 32, alpha=4.0).images[:, 0]
    jumps = (images[:, 1:] - images[:, :-1]).abs()
    middle = jumps[:, 7:24].amax(dim=1).mean()
    # The backgrounds are smooth and the contour keeps to the middle half.
    assert jumps[:, :6].amax(dim=1).mean() < 0.3 * middle
    assert jumps[:, 25:].amax(dim=1).mean() < 0.3 * middle


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: synthetic.disks(0), "`n` must be at least 1"),
        (lambda: synthetic.disks(1, 0), "`size` must be at least 1"),
        (lambda: synthetic.c_alpha(0), "`n` must be at least 1"),
        (lambda: synthetic.c_alpha(1, alpha=0.0), r"`alpha` must be in \(0, 100\]"),
    ],
)
def test_wrong_arguments_of_synthetic_sets_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_synthetic_sets_are_not_suspected_of_a_wrong_range():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            synthetic.disks(1, 8, generator=torch.Generator().manual_seed(seed))
