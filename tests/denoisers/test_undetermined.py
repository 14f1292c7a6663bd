"""Warnings of models that a set determines in part only: few images, and masks without inputs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import pyflocality as pf

SHAPE = (1, 4, 4)


def images(count: int, constant: int = 0, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random images whose first values are the same in all of them."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(256, (count, 16), generator=generator)
    drawn[:, :constant] = 37
    drawn = drawn.reshape(count, *SHAPE)
    return drawn.to(torch.uint8) if dtype == torch.uint8 else drawn.to(dtype) / 127.5 - 1


def told(make) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make()
    return [str(one.message) for one in found if issubclass(one.category, UserWarning)]


def three_calls(denoiser: pf.Denoiser) -> None:
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for sigma in (0.1, 0.3, 0.1):
        denoiser(x, sigma)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("count", "constant", "few"),
    [(16, 0, True), (17, 0, False), (5, 0, True), (13, 4, False), (12, 4, True), (1, 0, False)],
)
def test_sets_of_no_more_images_than_varying_values_are_told_once(count, constant, few, dtype):
    data = pf.TrainingSet(images(count, constant, dtype))
    # A threshold that keeps inputs wherever there are any.
    for make, what in (
        (lambda: pf.WienerDenoiser(data), "the Wiener filter"),
        (lambda: three_calls(pf.PCALocalityDenoiser(data, 1e-6)), "PCA locality"),
    ):
        found = told(make)
        assert len(found) == few
        if few:
            varying = 16 - constant
            start = f"{count} images are too few for {what} of {varying} values that vary"
            assert found[0].startswith(start) and f" {count - 1} directions" in found[0]


def test_what_has_another_covariance_is_not_told():
    few, many = pf.TrainingSet(images(10)), pf.Moments.from_data(images(60))
    blend = pf.Moments.from_data(few).blended(many, 0.5)
    assert told(lambda: pf.WienerDenoiser(blend)) == []
    assert told(lambda: three_calls(pf.PCALocalityDenoiser(few, 1e-6, moments=blend))) == []
    assert told(lambda: three_calls(pf.PCALocalityDenoiser(few, 1e-6, moments=many))) == []
    assert told(lambda: pf.LedoitWolfDenoiser(few)) == []
    assert told(lambda: pf.WienerDenoiser(few, rank=9)) == []
    assert len(told(lambda: pf.WienerDenoiser(few, rank=10))) == 1
    assert told(lambda: pf.OptimalDenoiser(few)) == []


def test_copies_count_as_images():
    few = pf.TrainingSet(images(10))
    assert told(lambda: pf.WienerDenoiser(few.augmented(flip=True))) == []


def without_inputs(denoiser: pf.PCALocalityDenoiser, sigma: float, least: float = 0.0) -> int:
    """How many values that vary by more than `least` have an empty row in the masks."""
    weights = denoiser.weights_at(sigma).dense(torch.bool)
    varying = denoiser.data.values().flatten(1).std(0) > least
    return int((~weights.any(1) & varying).sum())


def test_masks_that_keep_no_inputs_are_told_once_with_their_number():
    # One value hardly varies: divided by its own, its row is far above all others, which the
    # threshold then leaves without inputs.
    drawn = images(60, 3).reshape(60, 16)
    drawn[:, 3] = 100
    drawn[0, 3] = 103
    data = pf.TrainingSet(drawn.reshape(60, *SHAPE))
    denoiser = pf.PCALocalityDenoiser(data, 0.9)
    found = told(lambda: three_calls(denoiser))
    # Itself it varies by less than half a step: its mean is the answer.
    number = without_inputs(denoiser, 0.1, 1 / 255)
    assert 0 < number < 14
    assert len(found) == 1
    start = f"{number} of 16 values vary in the set and have no input at sigma 0.1 and alpha 1"
    assert found[0].startswith(start) and "`mask_threshold` 0.9" in found[0]
    # Values that are the same in all images have none and need none.
    keeps = pf.PCALocalityDenoiser(pf.TrainingSet(images(60, 3)), 1e-6)
    assert keeps.weights_at(0.1).empty.sum() == 3
    assert told(lambda: three_calls(keeps)) == []


def test_values_that_noise_hides_are_not_told():
    """Corners of digits hardly vary: in much noise their answer is the mean, to an 8-bit step."""
    data = pf.TrainingSet.load("digits")
    denoiser = pf.PCALocalityDenoiser(data)
    assert without_inputs(denoiser, 80.0) == 7
    x = torch.zeros(1, 1, 8, 8)
    assert told(lambda: [denoiser(x, sigma) for sigma in (80.0, 10.0, 1.0, 0.1, 0.0)]) == []
    wiener = pf.WienerDenoiser(data)
    noisy = data.values(0, 50) + 80.0 * torch.randn(50, 1, 8, 8)
    moved = (wiener(noisy, 80.0) - wiener.mean.reshape(1, 8, 8).float()).abs().flatten(1).amax(0)
    assert moved[denoiser.weights_at(80.0).empty].max() < 1 / 255


def test_query_weights_that_leave_values_without_inputs_are_told():
    drawn = images(60, 3)
    data = pf.TrainingSet(drawn)
    weights = torch.eye(16)
    weights[[0, 5, 9]] = 0
    # The first is the same in all images.
    found = told(lambda: pf.FilteredPosteriorDenoiser(data, weights))
    assert len(found) == 1 and found[0].startswith("2 of 16 values vary")
    assert "`query_weights`" in found[0]
    # Another query answers one of the two.
    responses = torch.eye(16)
    responses[6, 5] = 1
    found = told(lambda: pf.FilteredPosteriorDenoiser(data, weights, responses))
    assert len(found) == 1 and found[0].startswith("1 of 16 values vary")
    assert told(lambda: pf.FilteredPosteriorDenoiser(data, torch.eye(16))) == []
    assert told(lambda: pf.FilteredPosteriorDenoiser(data, weights > 0, responses > 0)) == found


def test_threads_tell_it_once():
    from concurrent.futures import ThreadPoolExecutor

    denoiser = pf.PCALocalityDenoiser(pf.TrainingSet(images(10)), 1e-6)

    def call() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda k: denoiser.weights_at(0.1 + 0.1 * (k % 4)), range(32)))

    assert len(told(call)) == 1
