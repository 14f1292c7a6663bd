"""Posteriors with a slope, against the formula in float64 and its derivatives by torch."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import numpy as np
import pytest
import torch
from every_denoiser import near_masks
from torch import Tensor
from truth import random_images, window_weights

import pyflocality as pf
from pyflocality.backends import trace_backends
from pyflocality.masks import pca_locality_weights

SHAPE = (2, 5, 4)
D = 40
LEVELS = [(0.1, 0.9), (0.5, 0.8), (1.5, 0.6)]


@pytest.fixture(scope="module")
def data() -> pf.TrainingSet:
    return pf.TrainingSet(random_images(torch.Generator().manual_seed(1), 90, SHAPE, torch.uint8))


def pca(data: pf.TrainingSet, **options: object) -> pf.PCALocalityDenoiser:
    return pf.PCALocalityDenoiser(data, 0.1, **options)


MODELS = {
    "pca": pca,
    "local": lambda data, **o: pf.LocalDenoiser(data, 3, **o),
    "patch_set": lambda data, **o: pf.PatchSetDenoiser(data, 3, **o),
    "patch_set_masks": lambda data, **o: pf.PatchSetDenoiser(
        data, masks=near_masks(*SHAPE[1:]), **o
    ),
}
each = pytest.mark.parametrize("name", MODELS)


@functools.cache
def queries(name: str, data: pf.TrainingSet, sigma: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Which inputs each query weighs, and which values it answers, float64 [Q, D]."""
    if name == "pca":
        moments = pf.Moments.from_data(data)
        weights = pca_locality_weights(moments, sigma, alpha, 0.1).dense(torch.float64)
        return weights, torch.eye(D, dtype=torch.float64)
    if name == "local":
        weights, answers = window_weights(SHAPE, 3)
        answered = np.zeros_like(weights)
        for query, values in enumerate(answers):
            answered[query, values] = 1.0
        return torch.from_numpy(weights), torch.from_numpy(answered)
    _, height, width = SHAPE
    if name == "patch_set":
        patches = torch.zeros(height - 2, width - 2, height, width)
        for top in range(height - 2):
            for left in range(width - 2):
                patches[top, left, top : top + 3, left : left + 3] = 1
    else:
        patches = near_masks(height, width)
    flat = patches.reshape(-1, 1, height * width).expand(-1, SHAPE[0], -1).flatten(1).double()
    return flat, flat


def truth(
    name: str,
    data: pf.TrainingSet,
    x: Tensor,
    sigma: float,
    alpha: float,
    slope: float,
    temperature: float = 1.0,
) -> Tensor:
    """The formula of the class, of every posterior the whole image, in torch's float64."""
    weights, answers = queries(name, data, sigma, alpha)
    values = (data.images.double() / 127.5 - 1).flatten(1)
    if data.augmentation is not None:
        values = torch.cat([values, (data.images.flip(-1).double() / 127.5 - 1).flatten(1)])
    mean, covariance = values.mean(0), torch.cov(values.T)
    noise = sigma**2 * torch.eye(D, dtype=torch.float64)
    matrix = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + noise)
    noisy = x.flatten(1)
    squares = (noisy[:, None] - alpha * values).square()
    posterior = (-(squares @ weights.T) / (2 * sigma**2 * temperature)).softmax(1)
    # [B, Q, D]
    means = posterior.transpose(1, 2) @ values
    linear = posterior.transpose(1, 2) @ ((values - mean) @ matrix.T)
    shift = ((noisy - alpha * mean) @ matrix.T)[:, None] - alpha * linear
    answered = (answers * (means + slope * shift)).sum(1) / answers.sum(0)
    return answered.reshape(x.shape)


def noisy(data: pf.TrainingSet, sigma: float, alpha: float, batch: int = 3) -> Tensor:
    noise = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(2))
    return alpha * data.values(5, 5 + batch, dtype=torch.float64) + sigma * noise.double()


def directions(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SHAPE, generator=torch.Generator().manual_seed(3)).double()


# Linear images are float32: sums of 40 products of numbers up to 1.
LINEAR = 40 * 2.0**-24


@each
@pytest.mark.parametrize("slope", [0.25, 1.0])
def test_answers_and_derivatives_are_those_of_the_formula(name, slope, data):
    denoiser = pf.LocallyLinearDenoiser(MODELS[name](data), slope)
    for sigma, alpha in LEVELS:
        x, u = noisy(data, sigma, alpha), directions()
        # Kept, as moments are not made inside torch's transforms.
        queries(name, data, sigma, alpha)

        def formula(z, level=(sigma, alpha)):
            return truth(name, data, z, *level, slope)

        expected = formula(x)
        found, products = denoiser.jvp(x, u, sigma, alpha)
        assert (denoiser(x, sigma, alpha) - expected).abs().max() <= LINEAR
        assert (found - expected).abs().max() <= LINEAR
        # Derivatives are covariances with sums of up to 40 inputs, times alpha / sigma^2.
        amplified = LINEAR * (1 + 40 * alpha / sigma**2)
        along = torch.stack([torch.func.jvp(formula, (x,), (one,))[1] for one in u])
        assert (products - along).abs().max() <= amplified
        back = torch.func.vjp(formula, x)[1]
        transposed = torch.stack([back(one)[0] for one in u])
        assert (denoiser.vjp(x, u, sigma, alpha) - transposed).abs().max() <= amplified
        # Single precision is as good as float32 posteriors are.
        single = denoiser(x.float(), sigma, alpha)
        assert single.dtype == torch.float32
        assert (single.double() - expected).abs().max() <= 1e-4


@each
def test_without_a_slope_it_is_the_model_to_the_bit(name, data):
    model = MODELS[name](data)
    denoiser = pf.LocallyLinearDenoiser(model, 0.0)
    level = torch.tensor([0.1, 0.5, 0.1]), torch.tensor([0.9, 0.8, 0.9])
    for dtype in (torch.float16, torch.float32, torch.float64):
        x, u = noisy(data, 0.3, 0.9).to(dtype), directions().to(dtype)
        with trace_backends() as calls:
            found = denoiser(x, *level)
        with trace_backends() as expected:
            assert torch.equal(found, model(x, *level))
        assert calls == expected
        assert all(map(torch.equal, denoiser.jvp(x, u, *level), model.jvp(x, u, *level)))
        assert torch.equal(denoiser.vjp(x, u, *level), model.vjp(x, u, *level))


@each
def test_flat_posteriors_with_slope_one_are_the_wiener_filter(name, data):
    wiener = pf.WienerDenoiser(data)
    denoiser = pf.LocallyLinearDenoiser(MODELS[name](data, temperature=1e30), 1.0)
    for sigma, alpha in LEVELS:
        x, u = noisy(data, sigma, alpha), directions()
        found, products = denoiser.jvp(x, u, sigma, alpha)
        expected, along = wiener.jvp(x, u, sigma, alpha)
        assert (found - expected).abs().max() <= LINEAR
        assert (products - along).abs().max() <= 1e-12
        assert (denoiser.vjp(x, u, sigma, alpha) - along).abs().max() <= 1e-12


@each
def test_no_noise_finds_the_nearest_image_and_goes_all_the_way_from_there(name, data):
    """As noise vanishes W is 1 / alpha where the images vary: with slope 1, x / alpha."""
    x = noisy(data, 0.05, 0.9)
    found = pf.LocallyLinearDenoiser(MODELS[name](data), 1.0)(x, 0.0, 0.9)
    assert (found - x / 0.9).abs().max() <= 1e-5


SLOPES = {
    "table": [(0.1, 0.0), (1.0, 0.25), (3.0, 0.75)],
    "function": lambda alpha, sigma: 0.0 if sigma < 0.2 else 0.25 if sigma < 1 else 0.75,
}


@each
@pytest.mark.parametrize("slopes", SLOPES)
def test_each_level_has_its_slope_and_one_pass(name, slopes, data):
    denoiser = pf.LocallyLinearDenoiser(MODELS[name](data), SLOPES[slopes])
    rows = [0, 1, 2, 1, 0]
    pairs = [LEVELS[row] for row in rows]
    assert [denoiser.slope_at(*pair) for pair in LEVELS] == [0.0, 0.25, 0.75]
    x = torch.cat([noisy(data, *pair, batch=1) for pair in pairs])
    u = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sigma, alpha = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    with trace_backends() as calls:
        together = denoiser(x, sigma, alpha)
    assert len([call for call in calls if call[0] != "covariance"]) == 3
    found, products = denoiser.jvp(x, u, sigma, alpha)
    transposed = denoiser.vjp(x, u, sigma, alpha)
    for b, pair in enumerate(pairs):
        slope = (0.0, 0.25, 0.75)[rows[b]]
        alone = pf.LocallyLinearDenoiser(denoiser.denoiser, slope, moments=denoiser._basis)
        one, along = x[b : b + 1], u[:, b : b + 1]
        close = {"rtol": 0, "atol": 1e-12}
        torch.testing.assert_close(together[b : b + 1], alone(one, *pair), **close)
        estimate, product = alone.jvp(one, along, *pair)
        torch.testing.assert_close(found[b : b + 1], estimate, **close)
        torch.testing.assert_close(products[:, b : b + 1], product, **close)
        back = alone.vjp(one, along, *pair)
        torch.testing.assert_close(transposed[:, b : b + 1], back, **close)


@pytest.mark.parametrize("name", ["local", "pca"])
def test_copies_of_an_augmentation_have_linear_images_of_their_own(name, data):
    twice = data.augmented(flip=True)
    x = noisy(data, 0.5, 0.8)
    found = pf.LocallyLinearDenoiser(MODELS[name](twice), 0.4)(x, 0.5, 0.8)
    assert (found - truth(name, twice, x, 0.5, 0.8, 0.4)).abs().max() <= LINEAR


@each
def test_temperatures_are_those_of_the_model(name, data):
    x = noisy(data, 0.5, 0.8)
    denoiser = pf.LocallyLinearDenoiser(MODELS[name](data, temperature=1.4), 0.4)
    expected = truth(name, data, x, 0.5, 0.8, 0.4, temperature=1.4)
    assert (denoiser(x, 0.5, 0.8) - expected).abs().max() <= LINEAR


def test_moments_of_pca_locality_are_made_once(data):
    model = pca(data)
    denoiser = pf.LocallyLinearDenoiser(model, 0.3)
    assert isinstance(model.moments, pf.Moments)
    with trace_backends() as calls:
        denoiser(noisy(data, 0.5, 0.8), 0.5, 0.8)
    assert "covariance" not in [operation for operation, _ in calls]
    given = pf.LocallyLinearDenoiser(model, 0.3, moments=pf.Basis.from_data(data))
    x = noisy(data, 0.5, 0.8)
    torch.testing.assert_close(given(x, 0.5, 0.8), denoiser(x, 0.5, 0.8), rtol=0, atol=LINEAR)


def test_few_images_are_told_of(data):
    few = data.subset(range(10))
    with pytest.warns(
        UserWarning, match="10 images are too few for the slope of the Wiener filter"
    ):
        denoiser = pf.LocallyLinearDenoiser(MODELS["local"](few), 0.3)
    x = noisy(data, 0.5, 0.8)
    expected = truth("local", few, x, 0.5, 0.8, 0.3)
    assert (denoiser(x, 0.5, 0.8) - expected).abs().max() <= LINEAR


def test_derivatives_of_derivatives_and_none_by_the_level(data):
    denoiser = pf.LocallyLinearDenoiser(MODELS["local"](data), 0.4)
    x = noisy(data, 0.5, 0.8, batch=1)

    def energy(z: Tensor) -> Tensor:
        return denoiser(z, 0.5, 0.8).square().sum()

    def formula(z: Tensor) -> Tensor:
        return truth("local", data, z, 0.5, 0.8, 0.4).square().sum()

    u = directions(1)[:, :1]
    found = torch.func.jvp(torch.func.grad(energy), (x,), (u[0],))[1]
    expected = torch.func.jvp(torch.func.grad(formula), (x,), (u[0],))[1]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    sigma = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no derivative by `sigma` or `alpha` where `slo"):
        denoiser(x, sigma, 0.8).sum().backward()
    # Without a slope they are the model's.
    flat = pf.LocallyLinearDenoiser(MODELS["local"](data), 0.0)
    (gradient,) = torch.autograd.grad(flat(x, sigma, 0.8).sum(), sigma)
    (expected,) = torch.autograd.grad(flat.denoiser(x, sigma, 0.8).sum(), sigma)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_pickles_and_copies_hold_no_linear_images(data):
    denoiser = pf.LocallyLinearDenoiser(MODELS["local"](data), 0.4)
    # What is made of the set is no state: none is loaded that linear images are not of.
    assert not denoiser.state_dict()
    x = noisy(data, 0.5, 0.8)
    before = len(pickle.dumps(denoiser))
    expected = denoiser(x, 0.5, 0.8)
    # The content key of the set is new.
    assert len(pickle.dumps(denoiser)) - before < 1000 < 4 * D * len(data)
    assert torch.equal(pickle.loads(pickle.dumps(denoiser))(x, 0.5, 0.8), expected)
    assert torch.equal(copy.deepcopy(denoiser)(x, 0.5, 0.8), expected)


WRONG = {
    "denoiser": (
        lambda d: pf.LocallyLinearDenoiser(pf.OptimalDenoiser(d), 0.3),
        TypeError,
        "`denoiser` must be a PCALocalityDenoiser, a LocalDenoiser or a PatchSetDenoiser, got",
    ),
    "set": (
        lambda d: pf.LocallyLinearDenoiser(d, 0.3),
        TypeError,
        "`denoiser` must be a PCALocalityDenoiser",
    ),
    "aggregation": (
        lambda d: pf.LocallyLinearDenoiser(pca(d, aggregation="batch_mean"), 0.3),
        ValueError,
        "`denoiser` must have aggregation='exact', got one of 'batch_mean'",
    ),
    "slope": (
        lambda d: pf.LocallyLinearDenoiser(pca(d), 1.5),
        ValueError,
        r"`slope` must be in \[0, 1\], got 1.5",
    ),
    "slope below": (lambda d: pf.LocallyLinearDenoiser(pca(d), -0.1), ValueError, "`slope`"),
    "slope type": (lambda d: pf.LocallyLinearDenoiser(pca(d), "1"), TypeError, "`slope` must be"),
    "slope flag": (lambda d: pf.LocallyLinearDenoiser(pca(d), True), TypeError, "`slope`"),
    "slope table": (
        lambda d: pf.LocallyLinearDenoiser(pca(d), [(0.1, 0.2), (1.0, 2.0)]),
        ValueError,
        "`slope`",
    ),
    "moments": (
        lambda d: pf.LocallyLinearDenoiser(pca(d), 0.3, moments=d),
        TypeError,
        "`moments` must be Moments or a Basis",
    ),
    "moments shape": (
        lambda d: pf.LocallyLinearDenoiser(
            pca(d), 0.3, moments=pf.Basis.from_data(d.images[..., :3].contiguous())
        ),
        ValueError,
        "`moments` must be of images of shape",
    ),
    "progress": (
        lambda d: pf.LocallyLinearDenoiser(pca(d), 0.3, progress=1),
        TypeError,
        "`progress` must be True or False",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_before_any_work(case, data):
    make, error, message = WRONG[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message), trace_backends() as calls:
            make(data)
    assert case == "moments shape" or calls == []


def test_a_slope_function_is_checked_when_it_answers(data):
    denoiser = pf.LocallyLinearDenoiser(pca(data), lambda alpha, sigma: 2.0)
    with pytest.raises(ValueError, match="`slope` must be"):
        denoiser(noisy(data, 0.5, 0.8), 0.5, 0.8)
