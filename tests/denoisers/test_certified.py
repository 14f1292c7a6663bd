"""The certified subset: proven bounds, checked against float64 truth."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from truth import random_images, softmax, values_of

import pyflocality as pf
from pyflocality.denoisers import CertifiedResult
from pyflocality.denoisers import certificate as _certificate
from pyflocality.denoisers.bounds import DistanceBounds

SHAPE = (3, 6, 6)
LEVELS = (1e-3, 0.02, 0.1, 0.3, 0.6, 1.2, 3.0, 20.0)


def low_rank_images(
    count: int, seed: int, dtype: torch.dtype = torch.uint8, rank: int = 4
) -> torch.Tensor:
    """Random mixtures of a few patterns and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(rank, *SHAPE, generator=generator)
    mixture = torch.randn(count, rank, generator=generator)
    noise = 0.02 * torch.randn(count, *SHAPE, generator=generator)
    values = (0.25 * torch.einsum("nk,kchw->nchw", mixture, patterns) + noise).clamp(-1, 1)
    return ((values + 1) * 127.5).round().to(torch.uint8) if dtype == torch.uint8 else values


SETS = {
    "digits": lambda: pf.TrainingSet.load("digits", progress=False),
    "low rank": lambda: pf.TrainingSet(low_rank_images(600, 3)),
    "float": lambda: pf.TrainingSet(low_rank_images(300, 4, torch.float32)),
    "smooth": lambda: pf.TrainingSet(
        random_images(torch.Generator().manual_seed(5), 200, SHAPE, torch.uint8)
    ),
    "duplicates": lambda: pf.TrainingSet(low_rank_images(50, 6).repeat(4, 1, 1, 1)),
}


def truth(x: torch.Tensor, data: pf.TrainingSet, sigma: float, alpha: float, tau: float = 1.0):
    """Posterior mean of one noisy image over the whole set, float64 [C, H, W]."""
    values = values_of(data.images).reshape(len(data), -1)
    gaps = ((x.double().numpy().ravel() - alpha * values) ** 2).sum(1)
    return (softmax(-gaps / (2 * sigma**2 * tau)) @ values).reshape(x.shape)


def noisy(data: pf.TrainingSet, count: int, sigma: float, alpha: float, seed: int) -> torch.Tensor:
    """Means of two images of the set, and noise."""
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randint(len(data), (2, count), generator=generator)
    clean = (data.subset(one).values() + data.subset(two).values()) / 2
    return alpha * clean + sigma * torch.randn(clean.shape, generator=generator)


@pytest.fixture(scope="module")
def low_rank() -> pf.TrainingSet:
    return SETS["low rank"]()


@pytest.mark.parametrize("name", SETS)
def test_true_error_never_exceeds_the_bound(name):
    """5 sets x 8 levels x 25 noisy images: 1,000 cases."""
    data = SETS[name]()
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(data, 1.3), tol=1e-3)
    ratios = []
    for number, sigma in enumerate(LEVELS):
        alpha = 1.0 if number % 2 else 0.7
        x = noisy(data, 25, sigma, alpha, number)
        found = certified.certify(x, sigma, alpha)
        for image, x0, bound in zip(x, found.x0, found.error_bound.tolist(), strict=True):
            error = np.abs(x0.double().numpy() - truth(image, data, sigma, alpha, 1.3)).max()
            ratios.append(error / bound)
        # A bound that says nothing would pass the test, too.
        tie = name == "duplicates" and sigma == 1e-3
        assert found.error_bound.max() <= 2 * 1e-3 + 1e-5 or tie
    assert len(ratios) == 200
    assert max(ratios) <= 1.0


def test_less_than_the_set_is_read(low_rank):
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank))
    shares = [
        certified.certify(noisy(low_rank, 20, sigma, 1.0, 0), sigma).share_read for sigma in LEVELS
    ]
    assert all(share.max() < 0.1 for share in shares[:3])
    assert shares[4].max() < 1.0
    assert shares[-1].min() == 1.0


@pytest.mark.parametrize("flaw", ["too high", "swapped"])
def test_a_wrong_bound_is_noticed(flaw, low_rank, monkeypatch):
    """What the other tests rely on: bounds that are too high lead to errors beyond them."""
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank))
    sharpen = DistanceBounds.sharpen

    def too_high(bounds, images):
        sharpen(bounds, images)
        chosen = slice(None) if images is None else images
        if flaw == "too high":
            bounds.values[chosen] += 10.0
        else:
            bounds.values[chosen] = bounds.values[chosen].flip(0)

    monkeypatch.setattr(DistanceBounds, "sharpen", too_high)
    sigma, excess = 0.3, []
    x = noisy(low_rank, 20, sigma, 1.0, 0)
    found = certified.certify(x, sigma)
    for image, x0, bound in zip(x, found.x0, found.error_bound.tolist(), strict=True):
        error = np.abs(x0.double().numpy() - truth(image, low_rank, sigma, 1.0)).max()
        excess.append(error / bound)
    assert max(excess) > 1.0


@pytest.mark.parametrize("name", SETS)
def test_bounds_lie_below_the_distances(name):
    data = SETS[name]()
    index = pf.CertifiedSubset(pf.OptimalDenoiser(data)).index
    values = values_of(data.images).reshape(len(data), -1)
    tightest = []
    for sigma in (0.0, 0.1, 1.0, 1e3):
        y = noisy(data, 1, sigma, 1.0, 7)[0].double().flatten()
        bounds = DistanceBounds(index, y)
        exact = ((y.numpy() - values) ** 2).sum(1)
        for stage in range(len(index.stages)):
            if stage > 0:
                bounds.sharpen(torch.arange(len(data)))
            lowest = bounds.values.double().numpy() + bounds.energy - bounds.margin
            assert (lowest <= exact).all()
            # Sharp where all components count: the margin alone is lost.
            tightest.append(np.max(lowest / np.maximum(exact, 1e-9)))
        assert bounds.margin < 1e-3 * max(1.0, bounds.energy)
    assert max(tightest) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tolerance_equals_the_whole_set(dtype, low_rank):
    denoiser = pf.OptimalDenoiser(low_rank, dtype=torch.float64)
    certified = pf.CertifiedSubset(denoiser, tol=0)
    eps = torch.finfo(dtype).eps
    for sigma in (1e-3, 0.1, 0.3, 1.0, 10.0):
        x = noisy(low_rank, 10, sigma, 0.9, 1).to(dtype)
        found = certified.certify(x, sigma, 0.9)
        whole = denoiser(x.double(), sigma, 0.9)
        assert (found.x0.double() - whole).abs().max() <= 2 * eps + 1e-12
        assert found.error_bound.max() <= 2 * eps + 1e-9
    assert certified.certify(noisy(low_rank, 10, 0.1, 1.0, 1), 0.1).share_read.max() < 0.2


@pytest.fixture
def small_images_pay(monkeypatch):
    """As if looking at bounds cost nothing, so that subsets of small images can pay."""
    monkeypatch.setattr(_certificate, "_LOOK_COST", 0)


def test_forward_is_within_the_tolerance_of_the_whole_set(small_images_pay):
    """Where subsets pay and where they do not."""
    data = pf.TrainingSet(low_rank_images(20_000, 8, rank=2))
    denoiser = pf.OptimalDenoiser(data)
    certified = pf.CertifiedSubset(denoiser, tol=1e-2)
    pays = set()
    for sigma in LEVELS:
        x = noisy(data, 8, sigma, 1.0, 2)
        pays.add(certified.plan(sigma).pays)
        assert (certified(x, sigma) - denoiser(x, sigma)).abs().max() <= 2e-2
    assert pays == {True, False}


def test_single_images_that_need_too_much_go_to_the_whole_set(small_images_pay):
    data = pf.TrainingSet(low_rank_images(20_000, 8, rank=2))
    denoiser = pf.OptimalDenoiser(data)
    certified = pf.CertifiedSubset(denoiser)
    sigma = 0.02
    assert certified.plan(sigma).pays
    near = noisy(data, 1, sigma, 1.0, 2)
    # So far away that all images are about as near.
    far = torch.full((1, *SHAPE), 1e7)
    calls = []
    denoiser._denoise = lambda x, *level: calls.append(len(x)) or torch.zeros_like(x)
    found = certified(torch.cat([near, far]), sigma)
    assert calls == [1]
    assert (found[1] == 0).all() and (found[0] != 0).any()


def test_each_image_has_its_own_level_and_answer(low_rank):
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank))
    x = noisy(low_rank, 3, 0.2, 1.0, 3)
    sigma, alpha = torch.tensor([0.05, 0.2, 2.0]), torch.tensor([1.0, 0.8, 0.5])
    together = certified.certify(x, sigma, alpha)
    for b in range(3):
        alone = certified.certify(x[b : b + 1], float(sigma[b]), float(alpha[b]))
        assert torch.equal(alone.x0[0], together.x0[b])
        assert alone.error_bound[0] == together.error_bound[b]
        assert alone.share_read[0] == together.share_read[b]


def test_no_noise_and_ties(low_rank):
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank))
    found = certified.certify(low_rank.values(3, 5), 0.0)
    torch.testing.assert_close(found.x0, low_rank.values(3, 5), rtol=0, atol=1e-7)
    assert found.error_bound.max() < 1e-6 and found.share_read.max() < 0.05
    pair = pf.TrainingSet(torch.tensor([-0.5, 0.5]).reshape(2, 1, 1, 1))
    tie = pf.CertifiedSubset(pf.OptimalDenoiser(pair)).certify(torch.zeros(1, 1, 1, 1), 0.0)
    # Rounding could have decided for either: nothing better than the range is certain.
    assert tie.x0.item() == 0.0 and tie.error_bound.item() >= 1.0


def test_one_image_and_empty_batch():
    data = pf.TrainingSet(low_rank_images(1, 1))
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(data))
    for sigma in (0.0, 0.5, 1e30):
        found = certified.certify(torch.zeros(2, *SHAPE), sigma)
        torch.testing.assert_close(found.x0, data.values().expand(2, *SHAPE))
        assert found.share_read.tolist() == [1.0, 1.0]
    empty = certified.certify(torch.zeros(0, *SHAPE), 0.3)
    assert isinstance(empty, CertifiedResult)
    assert empty.x0.shape == (0, *SHAPE) and empty.error_bound.shape == (0,)


@pytest.mark.parametrize("sigma", [0.0, 1e-200, 1e-30, 1e30, 1e200])
def test_extreme_noise(sigma, low_rank):
    x = noisy(low_rank, 2, 0.3, 1.0, 1)
    found = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank)).certify(x, sigma)
    if sigma < 1:
        expected = [truth(image, low_rank, 1e-6, 1.0) for image in x]
    else:
        expected = [values_of(low_rank.images).mean(0)] * 2
    for x0, wanted in zip(found.x0, expected, strict=True):
        np.testing.assert_allclose(x0.numpy(), wanted, rtol=0, atol=1e-6)
    assert torch.isfinite(found.error_bound).all()


def test_bounds_do_without_coarse_products(low_rank, monkeypatch):
    """Products of matrices may be as coarse as the user allows: then they are not used."""
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank))
    x = noisy(low_rank, 4, 0.2, 1.0, 3)
    expected = certified.certify(x, 0.2)
    y = x[0].double().flatten()
    plain = DistanceBounds(certified.index, y).values
    for coarse in ("medium", RuntimeError("precisions are mixed")):

        def precision(coarse=coarse):
            if isinstance(coarse, Exception):
                raise coarse
            return coarse

        monkeypatch.setattr(torch, "get_float32_matmul_precision", precision)
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: coarse_product(a, b))
        summed = DistanceBounds(certified.index, y).values
        found = certified.certify(x, 0.2)
        monkeypatch.undo()
        torch.testing.assert_close(summed, plain, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.x0, expected.x0, rtol=0, atol=2e-3)


def coarse_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product whose float32 operands are rounded to bfloat16."""
    if a.dtype == torch.float32:
        a, b = a.bfloat16().float(), b.bfloat16().float()
    return torch.matmul(a, b)


def test_memory_budget_bounds_the_index(low_rank):
    small = pf.OptimalDenoiser(low_rank, memory_budget=50_000)
    certified = pf.CertifiedSubset(small)
    assert certified.index.nbytes <= 25_000
    assert certified.index.nbytes < pf.CertifiedSubset(pf.OptimalDenoiser(low_rank)).index.nbytes
    x = noisy(low_rank, 4, 0.1, 1.0, 3)
    found = certified.certify(x, 0.1)
    for image, x0, bound in zip(x, found.x0, found.error_bound.tolist(), strict=True):
        assert np.abs(x0.numpy() - truth(image, low_rank, 0.1, 1.0)).max() <= bound


def test_given_moments_are_used(low_rank, monkeypatch):
    moments = pf.Moments.from_data(low_rank)
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank), moments=moments)
    monkeypatch.setattr(pf.Moments, "from_data", lambda *a: pytest.fail("moments computed"))
    assert certified.certify(noisy(low_rank, 1, 0.1, 1.0, 3), 0.1).share_read.item() < 0.2


def test_copies_and_pickles(low_rank):
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank), tol=1e-4)
    x = noisy(low_rank, 2, 0.2, 1.0, 3)
    expected = certified.certify(x, 0.2)
    assert certified._index is not None
    for twin in (copy.deepcopy(certified), pickle.loads(pickle.dumps(certified)).half()):
        found = twin.certify(x, 0.2)
        assert torch.equal(found.x0, expected.x0)
        assert torch.equal(found.error_bound, expected.error_bound)
    assert certified.state_dict() == {}


def test_derivatives_are_those_of_the_wrapped_denoiser(low_rank):
    denoiser = pf.OptimalDenoiser(low_rank)
    certified = pf.CertifiedSubset(denoiser)
    x = noisy(low_rank, 2, 0.5, 1.0, 3).double()
    tangents = torch.randn(2, *x.shape, dtype=torch.float64)
    for found, expected in zip(
        certified.jvp(x, tangents, 0.5), denoiser.jvp(x, tangents, 0.5), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert certified.symmetric_jacobian and denoiser.symmetric_jacobian
    gradients = []
    for model in (certified, denoiser):
        leaf = x.clone().requires_grad_()
        (model(leaf, 0.5) ** 2).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=3e-3 * float(gradients[1].abs().max()))


def test_the_plan_counts_costs(low_rank):
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank))
    plan = certified.plan(20.0)
    assert plan.share > 0.99 and not plan.pays and plan.stages == 1
    assert plan.limit == len(low_rank) // _certificate._READ_COST
    assert certified.plan(0.1).share < certified.plan(0.6).share < plan.share
    assert certified.plan(0.1) is certified.plan(0.1)


WRONG = {
    "local": (lambda d: (pf.LocalDenoiser(d, 3),), {}, TypeError, "`denoiser` must be an Optimal"),
    "set": (lambda d: (d,), {}, TypeError, "`denoiser` must be an OptimalDenoiser"),
    "tol 1": (lambda d: (pf.OptimalDenoiser(d), 1.0), {}, ValueError, r"`tol` must be in \[0, 1\)"),
    "tol -": (lambda d: (pf.OptimalDenoiser(d), -0.1), {}, ValueError, "`tol`"),
    "tol nan": (lambda d: (pf.OptimalDenoiser(d), float("nan")), {}, ValueError, "`tol`"),
    "tol type": (lambda d: (pf.OptimalDenoiser(d), "0"), {}, TypeError, "`tol` must be a number"),
    "moments": (lambda d: (pf.OptimalDenoiser(d),), {"moments": 3}, TypeError, "`moments`"),
    "moments shape": (
        lambda d: (pf.OptimalDenoiser(d),),
        {"moments": pf.Moments.from_data(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))},
        ValueError,
        "`moments` must be of images of shape",
    ),
    "augmented": (
        lambda d: (pf.OptimalDenoiser(d.augmented(flip=True)),),
        {},
        ValueError,
        "`denoiser` must have a training set without augmentation",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case, low_rank):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        pf.CertifiedSubset(*arguments(low_rank), **options)


def test_wrong_calls(low_rank):
    certified = pf.CertifiedSubset(pf.OptimalDenoiser(low_rank))
    for level, error, name in (
        ((-0.3,), ValueError, "sigma"),
        ((float("nan"),), ValueError, "sigma"),
        (("much",), TypeError, "sigma"),
        ((0.3, 0.0), ValueError, "alpha"),
        ((0.3, float("inf")), ValueError, "alpha"),
    ):
        with pytest.raises(error, match=f"`{name}` must be"):
            certified.plan(*level)
    with pytest.raises(ValueError, match="`x` must have shape"):
        certified.certify(torch.zeros(2, 1, 6, 6), 0.3)
    with pytest.raises(ValueError, match="`sigma`"):
        certified.certify(torch.zeros(2, *SHAPE), -0.3)
    with pytest.raises(TypeError, match="`x`"):
        certified.certify(torch.zeros(2, *SHAPE, dtype=torch.uint8), 0.3)
