"""Filtered posteriors: every published model is one, and free weights give the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from truth import random_images, softmax, values_of

import pyflocality as pf

SHAPE = (3, 5, 6)
VALUES, PIXELS = 90, 30
LEVELS = [(0.05, 1.0), (0.4, 0.8), (3.0, 1.0)]
each_level = pytest.mark.parametrize(("sigma", "alpha"), LEVELS)


@pytest.fixture(scope="module")
def data() -> pf.TrainingSet:
    images = random_images(torch.Generator().manual_seed(4), 60, SHAPE, torch.uint8)
    return pf.TrainingSet(images)


def noisy(data: pf.TrainingSet, sigma: float, alpha: float) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    return alpha * data.values(7, 9, dtype=torch.float64) + sigma * noise


def places() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every pixel."""
    return np.divmod(np.arange(PIXELS), SHAPE[2])


def in_all_channels(pixels: np.ndarray) -> Tensor:
    """Weights of pixels [Q, H W] as weights of values [Q, D]."""
    return torch.from_numpy(np.tile(pixels, (1, SHAPE[0])))


def windows_around(window: int) -> np.ndarray:
    """The pixels around each pixel, bool [H W, H W]."""
    rows, columns = places()
    half = window // 2
    near = np.abs(rows[:, None] - rows) <= half
    return near & (np.abs(columns[:, None] - columns) <= half)


def windows_inside(window: int) -> np.ndarray:
    """The pixels of each window inside the image, bool [Q, H W]."""
    rows, columns = places()
    return np.stack(
        [
            (rows >= y) & (rows < y + window) & (columns >= x) & (columns < x + window)
            for y in range(SHAPE[1] - window + 1)
            for x in range(SHAPE[2] - window + 1)
        ]
    )


def assert_the_same(data, model, weights, responses, sigma, alpha, temperature=1.0):
    """A model and its weights answer alike."""
    x = noisy(data, sigma, alpha)
    filtered = pf.FilteredPosteriorDenoiser(data, weights, responses, temperature=temperature)
    torch.testing.assert_close(
        filtered(x, sigma, alpha), model(x, sigma, alpha), rtol=0, atol=1e-10
    )


@each_level
def test_optimal_is_one_query_that_weighs_and_answers_all(sigma, alpha, data):
    whole = torch.ones(1, VALUES)
    model = pf.OptimalDenoiser(data, temperature=1.5)
    assert_the_same(data, model, whole, whole, sigma, alpha, 1.5)


@each_level
@pytest.mark.parametrize("window", [1, 3, 11])
def test_local_score_is_windows_that_answer_their_centre(window, sigma, alpha, data):
    weights = in_all_channels(windows_around(window))
    centres = in_all_channels(np.eye(PIXELS, dtype=bool))
    assert_the_same(data, pf.LocalDenoiser(data, window), weights, centres, sigma, alpha)


@each_level
def test_pca_locality_is_masks_that_answer_their_value(sigma, alpha, data):
    model = pf.PCALocalityDenoiser(data, 0.1)
    weights = model.weights_at(sigma, alpha).dense(torch.bool)
    for responses in (None, torch.eye(VALUES)):
        assert_the_same(data, model, weights, responses, sigma, alpha)


@each_level
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_square_patch_set_is_windows_that_answer_themselves(window, sigma, alpha, data):
    patches = in_all_channels(windows_inside(window))
    assert_the_same(data, pf.PatchSetDenoiser(data, window), patches, patches, sigma, alpha)


@each_level
def test_flexible_patch_set_is_masks_that_answer_themselves(sigma, alpha, data):
    masks = np.random.default_rng(6).random((PIXELS, PIXELS)) < 0.2
    # A pixel that lies in no patch gets the plain mean.
    masks[:, 3] = False
    model = pf.PatchSetDenoiser(data, masks=torch.from_numpy(masks.reshape(SHAPE[1:] + SHAPE[1:])))
    patches = in_all_channels(masks)
    assert_the_same(data, model, patches, patches, sigma, alpha)
    mean = data.values(dtype=torch.float64).mean(0)
    found = model(noisy(data, sigma, alpha), sigma, alpha)
    torch.testing.assert_close(found[:, :, 0, 3], mean[:, 0, 3].expand(2, -1))


def soft_truth(
    x: Tensor, data: pf.TrainingSet, weights: np.ndarray, responses: np.ndarray, sigma, alpha
) -> np.ndarray:
    """The formula, query by query."""
    values = values_of(data.images).reshape(len(data), -1)
    result = []
    for noisy in x.numpy().reshape(len(x), -1):
        squares = (noisy - alpha * values) ** 2
        blend = np.zeros(VALUES)
        for w, r in zip(weights, responses, strict=True):
            blend += r * (softmax(-(squares @ w) / (2 * sigma**2)) @ values)
        result.append(blend / responses.sum(0))
    return np.stack(result).reshape(x.shape)


@each_level
@pytest.mark.parametrize("narrower", [1.0, 0.5])
def test_gaussian_windows(narrower, sigma, alpha, data):
    rows, columns = places()
    squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    weights = in_all_channels(np.exp(-squared / (2 * 1.2**2)))
    responses = in_all_channels(np.exp(-squared / (2 * (1.2 * narrower) ** 2)))
    x = noisy(data, sigma, alpha)
    exact = soft_truth(x, data, weights.numpy(), responses.numpy(), sigma, alpha)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        denoiser = pf.FilteredPosteriorDenoiser(
            data, weights.to(dtype), responses.to(dtype), dtype=dtype
        )
        found = denoiser(x.to(dtype), sigma, alpha)
        np.testing.assert_allclose(found.double().numpy(), exact, atol=tolerance)


@each_level
def test_gaussian_windows_that_answer_their_value(sigma, alpha, data):
    rows, columns = places()
    squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    weights = np.tile(np.exp(-squared / (2 * 1.2**2)), (3, 3))
    x = noisy(data, sigma, alpha)
    exact = soft_truth(x, data, weights, np.eye(VALUES), sigma, alpha)
    found = pf.FilteredPosteriorDenoiser(data, torch.from_numpy(weights))(x, sigma, alpha)
    np.testing.assert_allclose(found.numpy(), exact, atol=1e-12)


def test_flipped_and_shifted_sources(data):
    rows, columns = places()
    squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    weights = in_all_channels(np.exp(-squared / (2 * 1.2**2)))
    images = torch.cat([data.images, data.images.flip(-1)])
    x = noisy(data, 0.4, 0.8).flip(-1)
    exact = soft_truth(x, pf.TrainingSet(images), weights.numpy(), weights.numpy(), 0.4, 0.8)
    flipped = pf.FilteredPosteriorDenoiser(data.augmented(flip=True), weights, weights)
    np.testing.assert_allclose(flipped(x, 0.4, 0.8).numpy(), exact, atol=1e-12)
    # And a shift by one pixel is found again, which the set without copies does not know.
    moved = torch.cat([data.images[7:8, ..., :1], data.images[7:8, ..., :-1]], -1)
    x = moved.double() / 127.5 - 1
    shifted = pf.FilteredPosteriorDenoiser(data.augmented(shifts=1), weights, weights)
    plain = pf.FilteredPosteriorDenoiser(data, weights, weights)
    assert (shifted(x, 0.02) - x).abs().max() < 1e-3 < (plain(x, 0.02) - x).abs().max()
