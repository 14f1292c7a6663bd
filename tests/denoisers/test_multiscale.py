"""The multi-scale denoiser against the formulas written out in NumPy, and its promises."""

from __future__ import annotations

import copy
import pickle
import tempfile

import numpy as np
import pytest
import torch
from truth import random_images, softmax, values_of, window_weights

import pyflocality as pf

SHAPE = (2, 8, 12)
COARSE = ["optimal", "wiener", "pca_locality"]


@pytest.fixture(scope="module")
def data():
    images = random_images(torch.Generator().manual_seed(1), 50, SHAPE, torch.uint8)
    return pf.TrainingSet(images)


@pytest.fixture(scope="module")
def exact(data):
    """The same images in double precision, which the bands then have, too."""
    return pf.TrainingSet(data.values(dtype=torch.float64))


def noisy(data, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(batch, *data.image_shape, generator=generator, dtype=torch.float64)
    return (0.8 * data.values(5, 5 + batch, dtype=torch.float64) + 0.3 * noise).to(dtype)


def bands_by_pywavelets(images, levels, wavelet):
    """Low-pass images and details [n, 3 C, h, w] of each level, the finest first."""
    pywt = pytest.importorskip("pywt")
    low, details = images, []
    for _ in range(levels):
        low, bands = pywt.dwt2(low, wavelet, "periodization")
        details.append(np.concatenate(bands, 1))
    return low, details


def inverse(low, details, wavelet):
    import pywt

    return pywt.idwt2((low, np.split(details, 3, 1)), wavelet, "periodization")


def truth(x, images, windows, wavelet, bandwidth, sigma, alpha):
    """The model with an optimal global model, in orthonormal bands, float64."""
    import pywt

    levels, count = len(windows), len(images)
    values, x = values_of(images), x.numpy()
    noisy_low, noisy_details = bands_by_pywavelets(x, levels, wavelet)
    clean_low, clean_details = bands_by_pywavelets(values, levels, wavelet)
    low = np.empty_like(noisy_low)
    for b in range(len(x)):
        gap = ((noisy_low[b] - alpha * clean_low) ** 2).reshape(count, -1).sum(1)
        weights = softmax(-gap / (2 * sigma**2))
        low[b] = np.tensordot(weights, clean_low, 1)
    for level in range(levels, 0, -1):
        condition = values
        for _ in range(level):
            condition, _ = pywt.dwt2(condition, wavelet, "periodization")
        clean, seen = clean_details[level - 1], noisy_details[level - 1]
        near, _ = window_weights((1, *clean.shape[2:]), windows[level - 1])
        found = np.empty_like(seen)
        for b in range(len(x)):
            first = ((seen[b] - alpha * clean) ** 2).sum(1).reshape(count, -1)
            second = ((low[b] - condition) ** 2).sum(1).reshape(count, -1)
            spread = bandwidth * sigma / alpha
            logits = -(first @ near) / (2 * sigma**2) - (second @ near) / (2 * spread**2)
            weights = softmax(logits)
            mixed = np.einsum("nq,ncq->cq", weights, clean.reshape(count, clean.shape[1], -1))
            found[b] = mixed.reshape(clean.shape[1:])
        low = inverse(low, found, wavelet)
    return low


@pytest.mark.parametrize(
    ("windows", "wavelet", "bandwidth"),
    [([3], "haar", 1.0), ([3, 1], "haar", 0.5), ([5, 3], "db2", 2.0), ([11, 5], "haar", 1.0)],
)
def test_equals_the_formula(windows, wavelet, bandwidth, exact):
    model = pf.MultiscaleDenoiser(
        exact, len(windows), windows, wavelet=wavelet, bandwidth=bandwidth
    )
    x = noisy(exact)
    for sigma, alpha in ((0.3, 0.8), (1.0, 1.0)):
        expected = truth(x, exact.images, windows, wavelet, bandwidth, sigma, alpha)
        np.testing.assert_allclose(model(x, sigma, alpha).numpy(), expected, rtol=0, atol=1e-10)


def test_native_kernels_in_float32(data):
    pytest.importorskip("pyflocality._C")
    model = pf.MultiscaleDenoiser(data, 2, [5, 3])
    x = noisy(data, dtype=torch.float32)
    with pf.trace_backends() as calls:
        found = model(x, 0.3, 0.8)
    assert calls == [("global_posterior", "cpu"), *[("window_posterior", "cpu")] * 2]
    expected = truth(x.double(), data.images, [5, 3], "haar", 1.0, 0.3, 0.8)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)


def test_a_window_that_covers_a_band_is_the_global_conditional(exact):
    """One posterior for the whole band, its weights computed directly."""
    model = pf.MultiscaleDenoiser(exact, 1, 11, bandwidth=0.7)
    x, low = noisy(exact), torch.randn(3, 2, 4, 6, dtype=torch.float64) / 4
    _, (details,) = pf.wavelets.decompose(x, 1)
    clean_low, (clean,) = pf.wavelets.decompose(exact.images, 1)
    clean_low, clean, details = clean_low / 2, clean / 2, details / 2
    sigma, alpha = 0.2, 0.8
    first = torch.cdist(details.flatten(1), alpha * clean.flatten(1)).square()
    second = torch.cdist(low.flatten(1), clean_low.flatten(1)).square()
    logits = -first / (2 * sigma**2) - second * alpha**2 / (2 * 0.7**2 * sigma**2)
    expected = (logits.softmax(1) @ clean.flatten(1)).reshape(details.shape)
    found = model.conditional(1, details, low, sigma, alpha)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_without_levels_it_is_the_global_model(coarse, dtype, data):
    wrapped = {
        "optimal": pf.OptimalDenoiser,
        "wiener": pf.WienerDenoiser,
        "pca_locality": pf.PCALocalityDenoiser,
    }[coarse](data)
    model = pf.MultiscaleDenoiser(data, 0, 3, coarse=coarse)
    x = noisy(data, dtype=dtype)
    # Half precision is computed in float32 by both and rounded once.
    assert torch.equal(model(x, 0.3, 0.8), wrapped(x, 0.3, 0.8))


def test_the_threshold_is_that_of_the_coarse_model(data):
    model = pf.MultiscaleDenoiser(data, 1, 3, coarse="pca_locality", mask_threshold=0.3)
    assert model.low_pass.mask_threshold == 0.3
    with pytest.raises(ValueError, match="`mask_threshold` is for coarse='pca_locality'"):
        pf.MultiscaleDenoiser(data, 1, 3, mask_threshold=0.3)
    with pytest.raises(ValueError, match=r"`mask_threshold` must be in \[0, 1\)"):
        pf.MultiscaleDenoiser(data, 1, 3, coarse="pca_locality", mask_threshold=1.0)


@pytest.mark.parametrize("coarse", COARSE)
def test_the_global_model_sees_block_means(coarse, exact):
    model = pf.MultiscaleDenoiser(exact, 1, 3, coarse=coarse)
    pool = torch.nn.functional.avg_pool2d
    x, means = noisy(exact), pf.TrainingSet(pool(exact.images, 2))
    # The mean of four values has half of their noise.
    expected = type(model.low_pass)(means)(pool(x, 2), 0.3 / 2, 0.8)
    torch.testing.assert_close(pool(model(x, 0.3, 0.8), 2), expected, rtol=0, atol=1e-10)


def test_window_of_one_level_cuts_to_what_covers_the_others(exact):
    x = noisy(exact)
    whole = pf.MultiscaleDenoiser(exact, 2, 11)
    assert whole.window == (11, 5)
    expected = pf.MultiscaleDenoiser(exact, 2, [11, 5])(x, 0.3)
    assert torch.equal(whole(x, 0.3), expected)


def test_no_bandwidth_ignores_the_condition_and_none_of_noise_takes_the_nearest(exact):
    x, low = noisy(exact), exact.images[:3, :, ::2, ::2].contiguous()
    model = pf.MultiscaleDenoiser(exact, 1, 3, bandwidth=1e9)
    _, (details,) = pf.wavelets.decompose(x, 1)
    found = model.conditional(1, details / 2, low, 0.2)
    torch.testing.assert_close(found, model.conditional(1, details / 2, 0 * low, 0.2))
    bands = pf.wavelets.decompose(exact.images, 1).details[0] / 2
    alone = pf.LocalDenoiser(pf.TrainingSet(bands.clamp(-1, 1)), 3)(details / 2, 0.2)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-8)
    # A training image is its own answer where there is no noise.
    v = exact.images[:3]
    torch.testing.assert_close(model(0.8 * v, 0.0, 0.8), v, rtol=0, atol=1e-12)


def test_huge_noise_gives_the_mean(exact):
    mean = exact.images.mean(0).expand(3, *SHAPE)
    found = pf.MultiscaleDenoiser(exact, 2, 3)(noisy(exact), 1e6)
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-5)


def test_levels_per_image_and_batches(exact):
    model, x = pf.MultiscaleDenoiser(exact, 2, 3, coarse="wiener"), noisy(exact)
    sigma, alpha = torch.tensor([0.05, 0.3, 0.9]), torch.tensor([1.0, 0.8, 0.8])
    together = model(x, sigma, alpha)
    for b in range(3):
        alone = model(x[b : b + 1], float(sigma[b]), float(alpha[b]))
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-12)
    assert model(x[:0], 0.3).shape == (0, *SHAPE)


def rolled(data, shift):
    return pf.TrainingSet(data.images.roll(shift, (-2, -1)))


@pytest.mark.parametrize(
    ("levels", "wavelet", "shifts"),
    [
        (1, "haar", [(0, 0), (1, 1), (0, 1), (1, 0)]),
        (2, "db2", [(0, 0), (1, 1), (0, 1), (1, 0), (2, 2), (3, 3)]),
    ],
)
def test_shifts_are_the_mean_of_pyramids_of_rolled_images(levels, wavelet, shifts, exact):
    options = {"wavelet": wavelet, "bandwidth": 0.7, "coarse": "wiener"}
    x, sigma, alpha = noisy(exact), 0.3, 0.8
    expected = torch.zeros_like(x)
    for shift in shifts:
        model = pf.MultiscaleDenoiser(rolled(exact, shift), levels, 3, **options)
        back = tuple(-pixels for pixels in shift)
        expected += model(x.roll(shift, (-2, -1)), sigma, alpha).roll(back, (-2, -1))
    spun = pf.MultiscaleDenoiser(exact, levels, 3, shifts=len(shifts), **options)
    with pf.trace_backends() as calls:
        found = spun(x, sigma, alpha)
    assert len(calls) == levels * len(shifts)
    torch.testing.assert_close(found, expected / len(shifts), rtol=0, atol=1e-12)


def test_all_shifts_treat_all_places_alike(exact):
    """Rolled images of a rolled set become the rolled estimate; of one pyramid they do not.

    Windows cover their bands: smaller ones end at the borders, which are elsewhere then.
    """
    x, shift = noisy(exact), (3, 1)
    for shifts, alike in ((16, True), (1, False)):
        here, there = (
            pf.MultiscaleDenoiser(some, 2, [11, 5], shifts=shifts)(y, 0.3, 0.8)
            for some, y in ((exact, x), (rolled(exact, shift), x.roll(shift, (-2, -1))))
        )
        assert torch.allclose(here.roll(shift, (-2, -1)), there, rtol=0, atol=1e-10) == alike


def test_bands_of_all_shifts_together_lie_within_the_budget(data, monkeypatch):
    """What one pyramid keeps in memory goes into files where there are several of it."""
    files, open_file = [], tempfile.TemporaryFile
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda *a, **k: files.append(open_file(*a, **k)) or files[-1]
    )
    # Of 50 x 2 x 8 x 12 values, times 4 bytes and 5 / 4, 48 kB a pyramid.
    for shifts, count in ((1, 0), (4, 8)):
        pf.MultiscaleDenoiser(data, 1, 3, shifts=shifts, memory_budget="200KB")
        assert len(files) == count


@pytest.mark.parametrize(
    ("coarse", "shifts"), [*((coarse, 1) for coarse in COARSE), ("optimal", 3)]
)
def test_derivatives(coarse, shifts, exact):
    model = pf.MultiscaleDenoiser(
        exact,
        2,
        [3, 5],
        coarse=coarse,
        wavelet="db2",
        bandwidth=0.8,
        shifts=shifts,
        backend="reference",
    )
    x, sigma, alpha = noisy(exact, 2), torch.tensor([0.4, 0.7]).double(), 0.9
    generator = torch.Generator().manual_seed(3)
    u, g = torch.randn(2, 3, 2, *SHAPE, generator=generator, dtype=torch.float64)
    x0, jv = model.jvp(x, u, sigma, alpha)
    back = model.vjp(x, g, sigma, alpha)
    torch.testing.assert_close(x0, model(x, sigma, alpha), rtol=0, atol=1e-12)
    step = 1e-5
    for k in range(3):
        ends = [model(x + sign * step * u[k], sigma, alpha) for sign in (1, -1)]
        torch.testing.assert_close(jv[k], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)
    left, right = (jv * g).flatten(2).sum(2), (u * back).flatten(2).sum(2)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)
    # What torch asks for is the same.
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((model(x, sigma, alpha) * g[0]).sum(), x)
    torch.testing.assert_close(gradient, back[0], rtol=1e-9, atol=1e-10)


def test_derivatives_without_levels_and_in_float32(data):
    u = noisy(data, 2, torch.float32)[None]
    for levels in (0, 2):
        model = pf.MultiscaleDenoiser(data, levels, 3)
        exact = pf.MultiscaleDenoiser(data, levels, 3, dtype=torch.float64)
        x = noisy(data, 2, torch.float32)
        for name in ("jvp", "vjp"):
            found, expected = getattr(model, name)(x, u, 0.5), getattr(exact, name)(x, u, 0.5)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_augmented_set_equals_the_enlarged_one(data):
    both = pf.TrainingSet(torch.cat([data.images, data.images.flip(-1)]))
    x = noisy(data)
    for levels in (0, 2):
        found = pf.MultiscaleDenoiser(data.augmented(flip=True), levels, 3)(x, 0.3)
        expected = pf.MultiscaleDenoiser(both, levels, 3)(x, 0.3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_bands_beyond_the_budget_lie_in_a_file(data, monkeypatch):
    files, open_file = [], tempfile.TemporaryFile

    def opened(*args, **options):
        files.append(open_file(*args, **options))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", opened)
    x = noisy(data)
    expected = pf.MultiscaleDenoiser(data, 2, 3)(x, 0.3, 0.8)
    assert files == []
    small = pf.MultiscaleDenoiser(data, 2, 3, memory_budget="40KB")
    assert len(files) == 3 and all(file.closed for file in files)
    torch.testing.assert_close(small(x, 0.3, 0.8), expected, rtol=0, atol=1e-10)


def test_copies_pickles_and_casts(data):
    model, x = pf.MultiscaleDenoiser(data, 2, [3, 1]), noisy(data, dtype=torch.float32)
    expected = model(x, 0.3, 0.8)
    cast = pf.MultiscaleDenoiser(data, 2, [3, 1]).half().to("cpu")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cast):
        assert torch.equal(twin(x, 0.3, 0.8), expected)
    assert "levels=2, window=(3, 1)" in repr(model)


def test_sampling_runs_through_it(data):
    model = pf.MultiscaleDenoiser(data, 2, 3)
    out = pf.sample(model, 2, steps=4, generator=torch.Generator().manual_seed(0), progress=False)
    # The last prediction is the model's own at the last state.
    alpha, sigma = pf.DDPMSchedule()(out.timesteps[-1])
    expected = model(out.x_t[-1], float(sigma), float(alpha)).clamp(-1, 1)
    torch.testing.assert_close(out.images, expected)


def make(data, *args, **options):
    return lambda: pf.MultiscaleDenoiser(data, *args, **options)


WRONG = {
    "data": (lambda d: make(d.images, 1, 3), TypeError, "`data` must be a TrainingSet"),
    "levels": (lambda d: make(d, -1, 3), ValueError, "`levels` must be at least 0"),
    "levels type": (lambda d: make(d, 1.0, 3), TypeError, "`levels`"),
    "sides": (lambda d: make(d, 3, 3), ValueError, "`data` must have sides divisible by 8"),
    "even": (lambda d: make(d, 1, 4), ValueError, "`window` must be odd"),
    "large": (lambda d: make(d, 1, 13), ValueError, "`window` must be at most 11"),
    "large of a level": (lambda d: make(d, 2, [11, 7]), ValueError, "`window` must be at most 5"),
    "length": (lambda d: make(d, 2, [3]), ValueError, "`window` must have 2 numbers"),
    "window type": (lambda d: make(d, 2, "35"), TypeError, "`window` must be a whole number"),
    "wavelet": (lambda d: make(d, 1, 3, wavelet="gabor"), ValueError, "`wavelet`"),
    "coarse": (lambda d: make(d, 1, 3, coarse="mean"), ValueError, "`coarse` must be one of"),
    "bandwidth": (lambda d: make(d, 1, 3, bandwidth=0.0), ValueError, "`bandwidth`"),
    "no shift": (lambda d: make(d, 1, 3, shifts=0), ValueError, "`shifts` must be at least 1"),
    "shifts": (lambda d: make(d, 1, 3, shifts=5), ValueError, "`shifts` must be at most 4"),
    "shifts type": (lambda d: make(d, 1, 3, shifts=2.0), TypeError, "`shifts`"),
    "backend": (lambda d: make(d, 1, 3, backend="gpu"), ValueError, "`backend`"),
    "budget": (lambda d: make(d, 1, 3, memory_budget=0), ValueError, "`memory_budget`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case, data):
    build, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        build(data)()


WRONG_CONDITIONS = {
    "level 0": ((0, (3, 6, 4, 6), (3, 2, 4, 6)), "`level` must be at least 1"),
    "level 3": ((3, (3, 6, 4, 6), (3, 2, 4, 6)), "`level` must be at most 2"),
    "details": ((1, (3, 2, 4, 6), (3, 2, 4, 6)), r"`details` must have shape \[B, 6, 4, 6\]"),
    "low": ((1, (3, 6, 4, 6), (3, 2, 2, 3)), r"`low` must have shape \[B, 2, 4, 6\]"),
    "batch": ((1, (3, 6, 4, 6), (2, 2, 4, 6)), "`low` must be as many images"),
}


@pytest.mark.parametrize("case", WRONG_CONDITIONS)
def test_wrong_conditions(case, data):
    (level, details, low), message = WRONG_CONDITIONS[case]
    model = pf.MultiscaleDenoiser(data, 2, 3)
    with pytest.raises(ValueError, match=message):
        model.conditional(level, torch.zeros(details), torch.zeros(low), 0.3)


def test_a_level_beyond_float32_is_named_by_the_conditional():
    model = pf.MultiscaleDenoiser(pf.TrainingSet(torch.zeros(3, 1, 8, 8)), levels=1, window=3)
    with pytest.raises(ValueError, match="`alpha` must be at most"):
        model.conditional(1, torch.zeros(2, 3, 4, 4), torch.ones(2, 1, 4, 4), 0.3, 1e308)
