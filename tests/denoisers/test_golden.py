"""The golden subset: its schedule, its choice of images, and the posterior over them."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from truth import random_images, softmax, values_of

import pyflocality as pf
from pyflocality.backends import trace_blocks
from pyflocality.denoisers import golden_sizes

SHAPE = (3, 6, 6)
COUNT = 200


@pytest.fixture(scope="module")
def data() -> pf.TrainingSet:
    generator = torch.Generator().manual_seed(1)
    return pf.TrainingSet(random_images(generator, COUNT, SHAPE, torch.uint8))


def near_masks() -> torch.Tensor:
    place = torch.arange(6)
    near = (place[:, None] - place).abs() <= 1
    return near[:, None, :, None] & near[None, :, None, :]


def soft() -> torch.Tensor:
    return torch.rand(4, 108, generator=torch.Generator().manual_seed(4))


MAKERS = {
    "optimal": lambda data: pf.OptimalDenoiser(data),
    "local": lambda data: pf.LocalDenoiser(data, 3),
    "pca": lambda data: pf.PCALocalityDenoiser(data, 0.1),
    "equivariant": lambda data: pf.EquivariantDenoiser(data, 3),
    "patch set": lambda data: pf.PatchSetDenoiser(data, 3),
    "patch masks": lambda data: pf.PatchSetDenoiser(data, masks=near_masks()),
    "filtered": lambda data: pf.FilteredPosteriorDenoiser(data, soft(), soft()),
}
each = pytest.mark.parametrize("name", MAKERS)


def noisy(data: pf.TrainingSet, count: int = 3, sigma: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    clean = data.values(5, 5 + count, dtype=torch.float64)
    return 0.8 * clean + sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)


def golden_truth(
    x: torch.Tensor, data: pf.TrainingSet, sizes: tuple[int, int], alpha: float, resolution: int
) -> np.ndarray:
    """Positions of the subset of one noisy image, ascending; the pool is of averaged blocks."""
    pool, kept = sizes
    values, y = values_of(data.images), x.double().numpy() / alpha

    def blocks(image: np.ndarray) -> np.ndarray:
        side = image.shape[-1] // resolution
        parts = image.reshape(*image.shape[:-2], resolution, side, resolution, side)
        return parts.mean((-3, -1))

    def distances(images: np.ndarray, target: np.ndarray) -> np.ndarray:
        return ((images - target) ** 2).reshape(len(images), -1).sum(1)

    candidates = np.argsort(distances(blocks(values), blocks(y)))[:pool]
    order = np.argsort(distances(values[candidates], y))[:kept]
    return np.sort(candidates[order])


@pytest.mark.parametrize(
    ("sigma", "alpha", "expected"),
    [
        # g = 1 - sigma for variance-preserving noise: N = 50,000, k from 2,500 to 5,000.
        (1.0, 1e-9, (5000, 5000)),
        (0.6, 0.8, (23000, 4000)),
        (0.28, 0.96, (37400, 3200)),
        (0.0, 1.0, (50000, 2500)),
        # Noise without a factor of the image: sigma / alpha = 0.75 is 0.6 / 0.8.
        (0.75, 1.0, (23000, 4000)),
        (1e9, 1.0, (5000, 5000)),
    ],
)
def test_sizes_follow_the_published_formulas(sigma, alpha, expected):
    assert golden_sizes(50_000, 2500, 5000, sigma, alpha) == expected


def test_sizes_are_rounded_and_default_to_a_twentieth_and_a_tenth(data):
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data))
    assert (golden.k_min, golden.k_max) == (10, 20)
    g = 1 - 0.5 / math.hypot(1.0, 0.5)
    assert golden.sizes(0.5) == (round(20 + 180 * g), round(20 - 10 * g)) == (120, 14)
    few = pf.GoldenSubset(pf.OptimalDenoiser(data.subset(range(3))))
    assert (few.k_min, few.k_max) == (1, 1)
    assert pf.GoldenSubset(pf.OptimalDenoiser(data), k_max=4).k_min == 4


@pytest.mark.parametrize("resolution", [2, 3])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.8, 3.0])
def test_chosen_images_against_truth(resolution, sigma, data):
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data), 15, 40, pool_resolution=resolution)
    for x in noisy(data, 5, sigma):
        expected = golden_truth(x, data, golden.sizes(sigma, 0.8), 0.8, resolution)
        assert golden.select(x, sigma, 0.8).tolist() == expected.tolist()


@pytest.mark.parametrize("alpha", [1e-4, 1e-8])
def test_single_precision_chooses_the_same_images(alpha, data):
    """Where the distances of all images agree in single precision."""
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data), 15, 40)
    values = values_of(data.images).reshape(len(data), -1)
    for x in noisy(data, 5, 1e-3):
        x = x.float()
        # No noise, as these levels are: all images are candidates.
        found = golden.select(x, 1e-6 * alpha, alpha)
        inner = values @ x.double().numpy().ravel()
        gaps = alpha * (values**2).sum(1) - 2.0 * inner
        assert found.tolist() == np.sort(np.argsort(gaps, kind="stable")[:15]).tolist()


def test_pooling_matters(data):
    """The pool is not the nearest images at full resolution."""
    x = noisy(data, 5, 1.0)
    coarse, fine = (
        pf.GoldenSubset(pf.OptimalDenoiser(data), 20, 40, pool_resolution=size) for size in (2, 16)
    )
    assert any(coarse.select(i, 1.0).tolist() != fine.select(i, 1.0).tolist() for i in x)


@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
def test_noisy_images_of_a_level_are_ranked_together(stored, data):
    """Each of them read the set by itself, as float32 copies."""
    images = data.images if stored == torch.uint8 else data.values()
    golden = pf.GoldenSubset(pf.OptimalDenoiser(pf.TrainingSet(images)), pool_resolution=3)
    x, level = noisy(data, 6), 1e-3
    assert golden.sizes(level).pool == COUNT > golden.sizes(level).kept
    with trace_blocks() as blocks, pf.trace_backends() as calls:
        golden(x, level)
    # The posteriors over the subsets read these.
    assert sum(block.count for block in blocks) == COUNT + 6 * golden.sizes(level).kept
    assert [op for op, _ in calls].count("nearest") == 1
    # Candidates are chosen in one pass over pooled images, and ranked for each noisy image.
    level = 0.5
    golden(x, level)
    with trace_blocks() as blocks, pf.trace_backends() as calls:
        golden(x, level)
    assert sum(block.count for block in blocks) == 6 * golden.sizes(level).kept
    assert [op for op, _ in calls].count("nearest") == 6
    # Together they are chosen as they are alone.
    together = golden._select(x, [(1.0, level)] * 6)
    for row, chosen in zip(x, together, strict=True):
        assert torch.equal(golden.select(row, level), chosen)


def test_optimal_over_the_subset_against_truth(data):
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data), 15, 40, pool_resolution=3)
    for sigma in (0.05, 0.3, 1.0):
        x = noisy(data, 4, sigma)
        found = golden(x, sigma, 0.8).numpy()
        for b, image in enumerate(x):
            chosen = golden_truth(image, data, golden.sizes(sigma, 0.8), 0.8, 3)
            values = values_of(data.images[torch.from_numpy(chosen)]).reshape(len(chosen), -1)
            gaps = ((image.numpy().ravel() - 0.8 * values) ** 2).sum(1)
            expected = softmax(-gaps / (2 * sigma**2)) @ values
            np.testing.assert_allclose(found[b].ravel(), expected, rtol=0, atol=1e-10)


@each
def test_all_images_are_the_wrapped_denoiser(name, data):
    denoiser = MAKERS[name](data)
    golden = pf.GoldenSubset(denoiser, COUNT, COUNT)
    for sigma in (0.05, 0.5):
        x = noisy(data, 3, sigma)
        # One noisy image at a time: a BLAS, where torch uses one, may round otherwise.
        torch.testing.assert_close(
            golden(x, sigma, 0.8), denoiser(x, sigma, 0.8), rtol=0, atol=1e-13
        )


@each
def test_subset_is_a_denoiser_over_the_chosen_images(name, data):
    denoiser = MAKERS[name](data)
    golden = pf.GoldenSubset(denoiser)
    x = noisy(data)
    found = golden(x, 0.3, 0.8)
    for b in range(len(x)):
        part = data.subset(golden.select(x[b], 0.3, 0.8))
        assert len(part) == golden.sizes(0.3, 0.8).kept < COUNT
        if name == "pca":
            # Masks of the whole set.
            moments = pf.Moments.from_data(data)
            over_part = pf.PCALocalityDenoiser(part, 0.1, moments=moments)
        else:
            over_part = MAKERS[name](part)
        expected = over_part(x[b : b + 1], 0.3, 0.8)[0]
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)
    assert (found - denoiser(x, 0.3, 0.8)).abs().max() > 0
    assert golden.denoiser.data is data


@each
def test_levels_per_image_and_repetition(name, data):
    golden = pf.GoldenSubset(MAKERS[name](data))
    x = noisy(data)
    sigma, alpha = torch.tensor([0.05, 0.3, 0.9]), torch.tensor([1.0, 0.8, 0.8])
    together = golden(x, sigma, alpha)
    assert torch.equal(golden(x, sigma, alpha), together)
    for b in range(3):
        alone = golden(x[b : b + 1], float(sigma[b]), float(alpha[b]))
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-12)


def test_random_pool_comes_from_the_generator_alone(data):
    def answers(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pf.GoldenSubset(pf.OptimalDenoiser(data), generator=generator)(noisy(data), 0.8)

    torch.manual_seed(0)
    first = answers(3)
    torch.manual_seed(1)
    assert torch.equal(answers(3), first)
    assert not torch.equal(answers(4), first)
    generator = torch.Generator().manual_seed(3)
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data), generator=generator)
    chosen = golden.select(noisy(data)[0], 30.0)
    drawn = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    assert chosen.tolist() == drawn[: golden.sizes(30.0).kept].sort().values.tolist()


def test_pooled_images_beyond_the_budget_are_not_kept(data):
    expected = pf.GoldenSubset(pf.OptimalDenoiser(data), pool_resolution=3)
    # 200 x 27 values in half precision are 10,800 bytes.
    small = pf.OptimalDenoiser(data, memory_budget=20_000)
    golden = pf.GoldenSubset(small, pool_resolution=3)
    x = noisy(data)
    torch.testing.assert_close(golden(x, 0.8), expected(x, 0.8), rtol=0, atol=1e-10)
    assert golden._pooled is None and expected._pooled is not None


def test_one_image_and_empty_batch(data):
    one = data.subset([3])
    golden = pf.GoldenSubset(pf.OptimalDenoiser(one))
    expected = one.values(dtype=torch.float64).expand(3, *SHAPE)
    torch.testing.assert_close(golden(noisy(data), 0.4), expected)
    assert golden(torch.zeros(0, *SHAPE), 0.4).shape == (0, *SHAPE)


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e3, 1e30])
def test_extreme_noise_gives_finite_values(sigma, data):
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data))
    assert torch.isfinite(golden(noisy(data).float(), sigma)).all()


@each
def test_derivatives_are_those_over_the_subset(name, data):
    golden = pf.GoldenSubset(MAKERS[name](data))
    x, sigma = noisy(data, 2), 0.4
    generator = torch.Generator().manual_seed(9)
    tangents = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64)
    mean, products = golden.jvp(x, tangents, sigma)
    torch.testing.assert_close(mean, golden(x, sigma), rtol=0, atol=1e-10)
    step = 1e-5
    for u, found in zip(tangents, products, strict=True):
        slope = (golden(x + step * u, sigma) - golden(x - step * u, sigma)) / (2 * step)
        torch.testing.assert_close(found, slope, rtol=0, atol=1e-5)
    transposed = golden.vjp(x, tangents, sigma)
    # What is known to be symmetric is, and the rest is not.
    assert golden.symmetric_jacobian == (name == "optimal")
    assert ((transposed - products).abs().max() < 1e-9) == golden.symmetric_jacobian
    torch.testing.assert_close(
        (transposed[0] * tangents[1]).sum(), (tangents[0] * products[1]).sum()
    )


def test_second_derivatives_and_what_they_leave_behind(data):
    """The first call, which pools the images, happens while torch differentiates."""
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data), pool_resolution=3)
    x, sigma = noisy(data, 1), 0.4
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def along(level: torch.Tensor) -> torch.Tensor:
        return golden(x, level).sum()

    level, step = torch.tensor(sigma, dtype=torch.float64), 1e-5
    slope = torch.func.jvp(along, (level,), (torch.ones_like(level),))[1]
    expected = (along(level + step) - along(level - step)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)

    def energy(z: torch.Tensor) -> torch.Tensor:
        return (golden(z, sigma) ** 2).sum()

    twice = torch.func.jvp(torch.func.grad(energy), (x,), (u,))[1]
    gradient = torch.func.grad(energy)
    expected = (gradient(x + step * u) - gradient(x - step * u)) / (2 * step)
    torch.testing.assert_close(twice, expected, rtol=1e-4, atol=1e-4)


@each
def test_gradients_with_respect_to_the_level_over_float_images(name, data):
    """A subset of float images is gathered while torch differentiates."""
    golden = pf.GoldenSubset(MAKERS[name](pf.TrainingSet(data.values())), pool_resolution=3)
    x, step = noisy(data, 2), 1e-5
    sigma = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    golden(x, sigma).sum().backward()
    level = sigma.detach()
    ends = [golden(x, level + sign * step).sum((1, 2, 3)) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(sigma.grad, expected, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_state(data):
    golden = pf.GoldenSubset(pf.PCALocalityDenoiser(data, 0.1), pool_resolution=3)
    x = noisy(data).float()
    expected = golden(x, 0.5)
    assert golden._pooled is not None
    for twin in (copy.deepcopy(golden), pickle.loads(pickle.dumps(golden)).half()):
        assert torch.equal(twin(x, 0.5), expected)
    assert golden.state_dict() == {}


WRONG = {
    "wiener": (lambda d: pf.WienerDenoiser(d), {}, TypeError, "`denoiser` must be one of Optimal"),
    "nearest": (lambda d: pf.NearestDenoiser(d), {}, TypeError, "`denoiser` must be one of"),
    "batch mean": (
        lambda d: pf.PCALocalityDenoiser(d, aggregation="batch_mean"),
        {},
        ValueError,
        "aggregation='exact'",
    ),
    "augmented": (
        lambda d: pf.OptimalDenoiser(d.augmented(flip=True)),
        {},
        ValueError,
        "without augmentation",
    ),
    "k_min 0": (lambda d: pf.OptimalDenoiser(d), {"k_min": 0}, ValueError, "`k_min`"),
    "k_max large": (lambda d: pf.OptimalDenoiser(d), {"k_max": 201}, ValueError, "`k_max` .*200"),
    "k_min large": (
        lambda d: pf.OptimalDenoiser(d),
        {"k_min": 30, "k_max": 20},
        ValueError,
        "`k_min` must be at most 20",
    ),
    "k_max type": (lambda d: pf.OptimalDenoiser(d), {"k_max": 2.5}, TypeError, "`k_max`"),
    "resolution": (
        lambda d: pf.OptimalDenoiser(d),
        {"pool_resolution": 0},
        ValueError,
        "`pool_resolution`",
    ),
    "generator": (lambda d: pf.OptimalDenoiser(d), {"generator": 3}, TypeError, "`generator`"),
    "budget": (
        lambda d: pf.OptimalDenoiser(d, memory_budget=2000),
        {},
        ValueError,
        "`k_max` must be at most 18",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case, data):
    make, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        pf.GoldenSubset(make(data), **options)


WRONG_SIZES = {
    "no images": ((0, 1, 1, 0.3), ValueError, "`count`"),
    "k_max large": ((10, 2, 11, 0.3), ValueError, "`k_max` must be at most 10"),
    "k_min large": ((10, 6, 5, 0.3), ValueError, "`k_min` must be at most 5"),
    "sigma": ((10, 2, 5, -0.3), ValueError, "`sigma` must be finite and not negative"),
    "sigma nan": ((10, 2, 5, float("nan")), ValueError, "`sigma`"),
    "sigma type": ((10, 2, 5, "much"), TypeError, "`sigma` must be a number"),
    "alpha": ((10, 2, 5, 0.3, 0.0), ValueError, "`alpha` must be finite and positive"),
}


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_wrong_sizes(case):
    arguments, error, message = WRONG_SIZES[case]
    with pytest.raises(error, match=message):
        golden_sizes(*arguments)


def test_levels_may_be_what_schedules_answer(data):
    alpha, sigma = pf.DDPMSchedule()(300)
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data))
    assert golden.sizes(torch.tensor(0.75), torch.ones(1)) == golden.sizes(0.75)
    assert len(golden.select(noisy(data)[0], sigma, alpha)) == golden.sizes(sigma, alpha).kept


def test_the_budget_does_not_change_the_pool():
    """Averages that half precision rounds into ties, with and without keeping them."""
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    values = torch.linspace(-0.501, -0.5, 100)[order].reshape(100, 1, 1, 1)
    data = pf.TrainingSet(values.expand(100, 1, 4, 4).contiguous())
    x = torch.full((1, 4, 4), -0.5)
    chosen = []
    # The kept averages take 800 bytes.
    for budget in (1600, 1599):
        denoiser = pf.OptimalDenoiser(data, memory_budget=budget)
        golden = pf.GoldenSubset(denoiser, 5, 10, pool_resolution=2)
        chosen.append(golden.select(x, 5.0))
        assert (golden._pooled is None) == (budget == 1599)
    assert torch.equal(*chosen)


def test_wrong_calls(data):
    golden = pf.GoldenSubset(pf.OptimalDenoiser(data))
    x = torch.zeros(SHAPE)
    for arguments, error, message in (
        ((torch.zeros(1, *SHAPE), 0.3), ValueError, r"`x` must have shape \[3, 6, 6\]"),
        ((x.to(torch.uint8), 0.3), TypeError, "`x` must have a floating-point"),
        ((x.numpy(), 0.3), TypeError, "`x` must be a torch.Tensor"),
        ((x * torch.nan, 0.3), ValueError, "`x` holds NaN"),
        ((x, -0.3), ValueError, "`sigma`"),
        ((x, 0.3, 0.0), ValueError, "`alpha`"),
    ):
        with pytest.raises(error, match=message):
            golden.select(*arguments)
    with pytest.raises(ValueError, match="`x` must have shape"):
        golden(torch.zeros(2, 1, 6, 6), 0.3)
    with pytest.raises(ValueError, match="`alpha`"):
        golden(torch.zeros(2, *SHAPE), 0.3, 0.0)
