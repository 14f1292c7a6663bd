"""Classical shrinkage against NumPy, SciPy, PyWavelets and scikit-learn computed independently."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from truth import random_images, values_of

import pyflocality as pf

SHAPE = (2, 8, 6)


@pytest.fixture(scope="module")
def data():
    images = random_images(torch.Generator().manual_seed(1), 60, SHAPE, torch.uint8)
    return pf.TrainingSet(images)


def noisy(shape=SHAPE, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)


MAKERS = {
    "fourier": pf.FourierWienerDenoiser,
    "ledoit_wolf": pf.LedoitWolfDenoiser,
    "noise_trained": lambda data: pf.NoiseTrainedDenoiser(data, 4),
    "hard": lambda data: pf.WaveletShrinkageDenoiser(SHAPE, 1, rule="hard", threshold=1.5),
    "soft": lambda data: pf.WaveletShrinkageDenoiser(SHAPE, 1, wavelet="db2", rule="soft"),
    "bayes": lambda data: pf.WaveletShrinkageDenoiser(SHAPE, 1, rule="bayes"),
}
LINEAR = ["fourier", "ledoit_wolf", "noise_trained"]
each = pytest.mark.parametrize("name", MAKERS)


@each
def test_levels_per_image_equal_one_call_each(name, data):
    denoiser, x = MAKERS[name](data), noisy()
    sigma, alpha = torch.tensor([0.0, 0.3, 0.9]), torch.tensor([1.0, 0.8, 0.8])
    together = denoiser(x, sigma, alpha)
    for b in range(3):
        alone = denoiser(x[b : b + 1], float(sigma[b]), float(alpha[b]))
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-12)


@each
def test_dtypes(name, data):
    denoiser, x = MAKERS[name](data), noisy()
    exact = denoiser(x, 0.3, 0.8)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-2)):
        found = denoiser(x.to(dtype), 0.3, 0.8)
        assert found.dtype == dtype
        # A coefficient at a threshold may fall on either side of it.
        assert (found.double() - exact).abs().median() <= tolerance


@each
@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e3, 1e30])
def test_extreme_noise_gives_finite_values(name, sigma, data):
    x = noisy(dtype=torch.float32)
    assert torch.isfinite(MAKERS[name](data)(x, sigma)).all()
    assert MAKERS[name](data)(x[:0], sigma).shape == (0, *SHAPE)


@each
def test_no_noise_returns_the_image(name, data):
    x = data.values(0, 2, dtype=torch.float64)
    found = MAKERS[name](data)(0.8 * x, 0.0, 0.8)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-9)


@each
def test_derivatives(name, data):
    denoiser, x = MAKERS[name](data), noisy()
    sigma = torch.tensor([0.2, 0.4, 0.7], dtype=torch.float64)
    u = noisy(batch=6).reshape(2, 3, *SHAPE)
    x0, jv = denoiser.jvp(x, u, sigma, 0.9)
    torch.testing.assert_close(x0, denoiser(x, sigma, 0.9), rtol=0, atol=1e-12)
    step = 1e-6
    for k in range(2):
        ends = [denoiser(x + sign * step * u[k], sigma, 0.9) for sign in (1, -1)]
        torch.testing.assert_close(jv[k], (ends[0] - ends[1]) / (2 * step), rtol=0, atol=1e-7)
    g = noisy(batch=6).flip(0).reshape(2, 3, *SHAPE)
    back = denoiser.vjp(x, g, sigma, 0.9)
    left, right = (jv * g).flatten(2).sum(2), (u * back).flatten(2).sum(2)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@each
def test_noise_levels_are_differentiable(name, data):
    denoiser, x = MAKERS[name](data), noisy(batch=1)
    sigma = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(denoiser(x, sigma, 0.9).sum(), sigma)
    step = 1e-6
    ends = [denoiser(x, 0.4 + sign * step, 0.9).sum() for sign in (1, -1)]
    torch.testing.assert_close(found[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@each
def test_copies_pickles_and_casts(name, data):
    denoiser, x = MAKERS[name](data), noisy(dtype=torch.float32)
    expected = denoiser(x, 0.3, 0.8)
    cast = MAKERS[name](data).half().to("cpu")
    fresh = MAKERS[name](data)
    fresh.load_state_dict(denoiser.state_dict())
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser)), cast, fresh):
        assert torch.equal(twin(x, 0.3, 0.8), expected)


@pytest.mark.parametrize("name", LINEAR)
def test_augmented_set_equals_the_enlarged_one(name, data):
    both = torch.cat([data.images, data.images.flip(-1)])
    found = MAKERS[name](data.augmented(flip=True))(noisy(), 0.3)
    expected = MAKERS[name](pf.TrainingSet(both))(noisy(), 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_fourier_equals_scipy(data):
    fft = pytest.importorskip("scipy.fft")
    values, x = values_of(data.images), noisy()
    power = (np.abs(fft.fft2(values, norm="ortho")) ** 2).mean(0)
    denoiser = pf.FourierWienerDenoiser(data)
    np.testing.assert_allclose(denoiser.spectrum.numpy(), power, rtol=1e-10)
    for sigma, alpha in ((0.3, 0.8), (2.0, 1.0)):
        # lambda_k multiplies the coefficients of x / alpha.
        factor = alpha**2 * power / (alpha**2 * power + sigma**2)
        coefficients = fft.fft2(x.numpy() / alpha, norm="ortho")
        expected = fft.ifft2(factor * coefficients, norm="ortho").real
        np.testing.assert_allclose(denoiser(x, sigma, alpha).numpy(), expected, atol=1e-12)


def test_fourier_from_moments_equals_from_images(data):
    found = pf.FourierWienerDenoiser(pf.Moments.from_data(data)).spectrum
    torch.testing.assert_close(found, pf.FourierWienerDenoiser(data).spectrum, rtol=1e-9, atol=0)


def test_fourier_odd_width():
    images = random_images(torch.Generator().manual_seed(3), 20, (1, 5, 7), torch.float64)
    x = noisy((1, 5, 7))
    denoiser = pf.FourierWienerDenoiser(pf.TrainingSet(images))
    factor = denoiser.spectrum / (denoiser.spectrum + 0.25)
    expected = torch.fft.ifft2(torch.fft.fft2(x) * factor).real
    torch.testing.assert_close(denoiser(x, 0.5), expected, rtol=0, atol=1e-12)


def test_fourier_is_the_wiener_filter_of_stationary_data():
    """On all circular shifts of a set the covariance is diagonal in the Fourier basis."""
    base = random_images(torch.Generator().manual_seed(4), 3, (1, 4, 4), torch.float64)
    base = torch.cat([base, -base])
    shifts = [base.roll((i, j), (-2, -1)) for i in range(4) for j in range(4)]
    data = pf.TrainingSet(torch.cat(shifts))
    moments = pf.Moments.from_data(data)
    x = noisy((1, 4, 4))
    # The moments have N - 1 in the denominator.
    share = (len(data) - 1) / len(data)
    expected = pf.WienerDenoiser(moments)(x, 0.5 / share**0.5)
    torch.testing.assert_close(pf.FourierWienerDenoiser(data)(x, 0.5), expected)


def test_error_of_a_power_law_falls_at_the_known_rate():
    """Power |k|^-p in the plane: mean squared error sigma^(2 - 4 / p)."""
    size, p = 256, 5.0
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    radius = torch.hypot(k[:, None], k[None])
    amplitude = torch.where(radius > 0, radius, torch.inf) ** (-p / 2)
    image = torch.fft.ifft2(amplitude, norm="ortho").real
    largest = image.abs().max()
    denoiser = pf.FourierWienerDenoiser(pf.TrainingSet((image / largest)[None, None]))
    power = (amplitude / largest).square()
    impulse = torch.zeros(1, 1, size, size, dtype=torch.float64)
    impulse[..., 0, 0] = 1.0
    # Where the filter cuts off: far from the lowest and the highest frequencies.
    cutoffs, errors = (8.0, 24.0), []
    for cutoff in cutoffs:
        sigma = float(cutoff ** (-p / 2) / largest)
        factor = torch.fft.fft2(denoiser(impulse, sigma)).real[0, 0]
        # Bias of every frequency, and the noise let through.
        errors.append(float(((1 - factor) ** 2 * power + factor**2 * sigma**2).sum()))
    ratio = (cutoffs[1] / cutoffs[0]) ** (p / 2)
    slope = np.log(errors[0] / errors[1]) / np.log(ratio)
    assert slope == pytest.approx(2 - 4 / p, abs=0.03)


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("rule", ["hard", "soft", "bayes"])
def test_thresholding_equals_pywavelets(rule, wavelet):
    pywt = pytest.importorskip("pywt")
    shape, sigma, alpha = (2, 16, 8), 0.3, 0.8
    smooth = random_images(torch.Generator().manual_seed(5), 2, shape, torch.float64)
    x = 2 * smooth + sigma * noisy(shape, 2)
    found = pf.WaveletShrinkageDenoiser(shape, 2, wavelet=wavelet, rule=rule)(x, sigma, alpha)
    s = sigma / alpha
    threshold = s * np.sqrt(2 * np.log(16 * 8))

    def shrunk(band):
        if rule != "bayes":
            return pywt.threshold(band, threshold, rule)
        variance = (band**2).mean() - s**2
        return pywt.threshold(band, s**2 / variance**0.5, "soft") if variance > 0 else 0 * band

    for b in range(2):
        for c in range(2):
            low, *details = pywt.wavedec2(x[b, c] / alpha, wavelet, "periodization", 2)
            details = [tuple(map(shrunk, bands)) for bands in details]
            expected = pywt.waverec2([low, *details], wavelet, "periodization")
            np.testing.assert_allclose(found[b, c].numpy(), expected, rtol=0, atol=1e-11)


def test_wavelets_beat_fourier_on_edges():
    """The error falls faster with the noise for wavelets (sigma^1) than for Fourier (sigma^2/3)."""
    data = pf.synthetic.c_alpha(48, 64, 4.0)
    clean = data.values(0, 16, dtype=torch.float64)
    noise = noisy((1, 64, 64), 16)
    fourier = pf.FourierWienerDenoiser(data)
    wavelet = pf.WaveletShrinkageDenoiser((1, 64, 64), 4, wavelet="db2", threshold=3.0)
    slopes = {}
    for name, denoiser in (("fourier", fourier), ("wavelet", wavelet)):
        low, high = (
            pf.metrics.mse(denoiser(clean + s * noise, s), clean).mean() for s in (0.03, 0.3)
        )
        slopes[name] = float(torch.log10(high / low))
    assert 0.5 < slopes["fourier"] < slopes["wavelet"] - 0.1 < 1.6


@pytest.mark.parametrize("count", [12, 60, 300])
def test_ledoit_wolf_equals_scikit_learn(count):
    covariance = pytest.importorskip("sklearn.covariance")
    images = random_images(torch.Generator().manual_seed(6), count, (1, 6, 6), torch.uint8)
    denoiser = pf.LedoitWolfDenoiser(pf.TrainingSet(images))
    flat = values_of(images).reshape(count, -1)
    theirs = covariance.LedoitWolf().fit(flat)
    assert 0 < denoiser.shrinkage < 1
    assert denoiser.shrinkage == pytest.approx(theirs.shrinkage_, rel=1e-9)
    x, mean = noisy((1, 6, 6)), flat.mean(0)
    for sigma, alpha in ((0.1, 1.0), (0.5, 0.8)):
        total = alpha**2 * theirs.covariance_ + sigma**2 * np.eye(36)
        centred = x.reshape(3, -1).numpy() - alpha * mean
        expected = mean + alpha * centred @ np.linalg.solve(total, theirs.covariance_)
        found = denoiser(x, sigma, alpha).reshape(3, -1).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_ledoit_wolf_helps_where_images_are_few():
    """Gaussian data of a flat spectrum, fewer images than values."""
    deviation = torch.linspace(0.05, 0.25, 64, dtype=torch.float64).reshape(1, 8, 8)
    images = (deviation * noisy((1, 8, 8), 540)).clamp(-1, 1)
    few, clean = pf.TrainingSet(images[:40]), images[40:]
    x = clean + 0.15 * noisy((1, 8, 8), 1040)[540:]
    plain, shrunk = (
        float(pf.metrics.mse(make(few)(x, 0.15), clean).mean())
        for make in (pf.WienerDenoiser, pf.LedoitWolfDenoiser)
    )
    assert shrunk < 0.9 * plain


def test_noise_training_solves_its_least_squares(data):
    generator = torch.Generator().manual_seed(7)
    denoiser = pf.NoiseTrainedDenoiser(data, 2, ratio=1.5, generator=generator)
    flat = values_of(data.images).reshape(len(data), -1)
    mean = flat.mean(0)
    drawn = torch.Generator().manual_seed(7)
    z = [torch.randn(flat.shape, generator=drawn, dtype=torch.float64).numpy() for _ in range(2)]
    clean = np.tile(flat - mean, (2, 1))
    seen = 0.8 * clean + 1.5 * 0.3 * np.concatenate(z)
    matrix = np.linalg.lstsq(seen, clean, rcond=None)[0].T
    np.testing.assert_allclose(denoiser.matrix(0.3, 0.8).numpy(), matrix, rtol=0, atol=1e-8)
    x = noisy()
    expected = mean + (x.reshape(3, -1).numpy() - 0.8 * mean) @ matrix.T
    found = denoiser(x, 0.3, 0.8).reshape(3, -1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


def test_noise_training_with_fewer_pairs_than_values():
    images = random_images(torch.Generator().manual_seed(8), 20, (1, 6, 6), torch.float64)
    data = pf.TrainingSet(images)
    flat = images.reshape(20, -1).numpy()
    clean = flat - flat.mean(0)
    z = torch.randn(20, 36, generator=torch.Generator().manual_seed(7), dtype=torch.float64).numpy()
    matrix = np.linalg.lstsq(clean + 0.3 * z, clean, rcond=None)[0].T
    denoiser = pf.NoiseTrainedDenoiser(data, generator=torch.Generator().manual_seed(7))
    np.testing.assert_allclose(denoiser.matrix(0.3).numpy(), matrix, rtol=0, atol=1e-7)


def test_noise_training_approaches_the_wiener_filter():
    data = pf.synthetic.c_alpha(100, 6)
    x = noisy((1, 6, 6))
    # With N instead of N - 1 in the covariance.
    expected = pf.WienerDenoiser(data)(x, 0.4 / (99 / 100) ** 0.5)
    gaps = [
        float((pf.NoiseTrainedDenoiser(data, k)(x, 0.4) - expected).norm()) for k in (1, 16, 256)
    ]
    # The error falls with the root of the number of copies.
    assert gaps[2] < 0.4 * gaps[1] < 0.2 * gaps[0]


WRONG = {
    "fourier": (lambda d: pf.FourierWienerDenoiser(d.images), TypeError, "`data` must be"),
    "ledoit": (lambda d: pf.LedoitWolfDenoiser(pf.Moments()), TypeError, "`data` must be"),
    "copies": (lambda d: pf.NoiseTrainedDenoiser(d, 0), ValueError, "`copies`"),
    "ratio": (lambda d: pf.NoiseTrainedDenoiser(d, ratio=0.0), ValueError, "`ratio`"),
    "generator": (lambda d: pf.NoiseTrainedDenoiser(d, generator=1), TypeError, "`generator`"),
    "shape": (lambda d: pf.WaveletShrinkageDenoiser((8, 8)), ValueError, "`image_shape`"),
    "sides": (lambda d: pf.WaveletShrinkageDenoiser((1, 12, 8), 3), ValueError, "divisible by 8"),
    "levels": (lambda d: pf.WaveletShrinkageDenoiser((1, 8, 8), 0), ValueError, "`levels`"),
    "rule": (
        lambda d: pf.WaveletShrinkageDenoiser((1, 8, 8), rule="firm"),
        ValueError,
        "`rule` must be one of 'hard', 'soft', 'bayes'",
    ),
    "threshold": (
        lambda d: pf.WaveletShrinkageDenoiser((1, 8, 8), threshold=-1.0),
        ValueError,
        "`threshold`",
    ),
    "threshold of bayes": (
        lambda d: pf.WaveletShrinkageDenoiser((1, 8, 8), rule="bayes", threshold=1.0),
        ValueError,
        "`threshold` belongs to",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case, data):
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        make(data)
