"""What every denoiser promises, run through all of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from every_denoiser import MAKERS
from truth import random_images

import pyflocality as pf

SHAPE = (3, 6, 6)


@pytest.fixture(scope="module")
def data() -> pf.TrainingSet:
    images = random_images(torch.Generator().manual_seed(1), 200, SHAPE, torch.uint8)
    return pf.TrainingSet(images)


# Their answers are made of other pixels, too: one image alone is not simply returned.
PATCHES_FROM_ANYWHERE = {"equivariant", "equivariant_broken"}
# Their posteriors leave images out on purpose: much noise gives the mean of those kept.
HEURISTIC_SUBSETS = {"golden", "golden_pca"}
# Reads the images itself, in float64 and plain torch: no backend has a say in it.
READING = {"certified"}
SCANNING = [name for name in MAKERS if name != "wiener"]
PICKLED = [name for name in MAKERS if name != "local_schedule"]
each = pytest.mark.parametrize("name", MAKERS)


def noisy(data: pf.TrainingSet, batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    noise = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return 0.8 * data.values(5, 5 + batch, dtype=dtype) + 0.3 * noise


@each
def test_levels_per_image_equal_one_call_each(name, data):
    denoiser = MAKERS[name](data)
    x = noisy(data)
    sigma, alpha = torch.tensor([0.05, 0.3, 0.9]), torch.tensor([1.0, 0.8, 0.8])
    together = denoiser(x, sigma, alpha)
    for b in range(3):
        alone = denoiser(x[b : b + 1], float(sigma[b]), float(alpha[b]))
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-10)


@each
def test_dtype_and_shape_follow_the_input(name, data):
    denoiser = MAKERS[name](data)
    exact = denoiser(noisy(data), 0.3, 0.8)
    for dtype, tolerance in ((torch.float64, 0), (torch.float32, 1e-4), (torch.float16, 2e-2)):
        found = denoiser(noisy(data).to(dtype), 0.3, 0.8)
        assert found.dtype == dtype and found.shape == exact.shape
        # Rounding of the input to half precision moves it by 1e-3; a near-tie amplifies that.
        assert (found.double() - exact).abs().median() <= tolerance


@pytest.mark.parametrize("name", [name for name in SCANNING if name != "nearest"])
def test_precision_is_kept_and_only_permits(name, data):
    """Backends without coarser arithmetic answer the same bits."""
    denoiser = MAKERS[name](data, precision="auto")
    twin = pickle.loads(pickle.dumps(denoiser)) if name in PICKLED else copy.deepcopy(denoiser)
    x, plain = noisy(data, dtype=torch.float32), MAKERS[name](data)
    for denoiser, precision in ((twin, "auto"), (plain, "exact")):
        parts = [part for part in denoiser.modules() if hasattr(part, "precision")]
        assert parts and all(part.precision == precision for part in parts)
    assert torch.equal(twin(x, 0.9, 0.8), plain(x, 0.9, 0.8))


@each
def test_empty_batch(name, data):
    assert MAKERS[name](data)(torch.zeros(0, *SHAPE), 0.3).shape == (0, *SHAPE)


@each
@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-3, 1e3, 1e30])
def test_extreme_noise_gives_finite_values(name, sigma, data):
    found = MAKERS[name](data)(noisy(data, dtype=torch.float32), sigma)
    assert torch.isfinite(found).all()
    if sigma >= 1e3 and name not in PATCHES_FROM_ANYWHERE | HEURISTIC_SUBSETS | {"nearest"}:
        mean = data.values(dtype=torch.float64).mean(0)
        if name == "pca_batch_mean":
            # Equal weight for unequal batches: the published estimator's mean.
            mean = torch.stack(
                [b.mean(0) for b in data.values(dtype=torch.float64).split(64)]
            ).mean(0)
        torch.testing.assert_close(found.double(), mean.expand(3, *SHAPE), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in PATCHES_FROM_ANYWHERE])
def test_one_image_is_always_returned(name, data):
    denoiser = MAKERS[name](data.subset([3]))
    found = denoiser(noisy(data), 0.4, 0.9)
    torch.testing.assert_close(
        found, data.values(3, 4, dtype=torch.float64).expand_as(found), rtol=0, atol=1e-12
    )


@each
def test_input_is_left_alone(name, data):
    x = noisy(data)
    before = x.clone()
    MAKERS[name](data)(x, 0.3, 0.8)
    assert torch.equal(x, before)


@each
def test_deepcopy_half_and_state_dict(name, data):
    denoiser = MAKERS[name](data)
    x = noisy(data, dtype=torch.float32)
    expected = denoiser(x, 0.3, 0.8)
    for twin in (copy.deepcopy(denoiser), MAKERS[name](data).half().eval().to("cpu")):
        assert torch.equal(twin(x, 0.3, 0.8), expected)
    fresh = MAKERS[name](data)
    fresh.load_state_dict(denoiser.state_dict())
    assert torch.equal(fresh(x, 0.3, 0.8), expected)


@pytest.mark.parametrize("name", PICKLED)
def test_a_device_without_values_is_refused_and_leaves_all_where_it_was(name, data):
    denoiser = MAKERS[name](data)
    x = torch.zeros(1, *data.image_shape)
    before = denoiser(x, 0.5)
    with pytest.raises(ValueError, match="`device` must be a device that holds values"):
        denoiser.to("meta")
    for same in (denoiser.to("cpu"), denoiser.to(torch.float64), denoiser.double().half()):
        assert same is denoiser and torch.equal(same(x, 0.5), before)


@pytest.mark.parametrize("name", PICKLED)
def test_pickling(name, data):
    denoiser = MAKERS[name](data)
    x = noisy(data, dtype=torch.float32)
    twin = pickle.loads(pickle.dumps(denoiser))
    assert torch.equal(twin(x, 0.3, 0.8), denoiser(x, 0.3, 0.8))


@pytest.mark.parametrize("name", [name for name in SCANNING if name not in READING])
def test_reference_backend_runs_when_asked(name, data):
    with pf.trace_backends() as calls:
        MAKERS[name](data, backend="reference")(noisy(data), 0.3, 0.8)
    posterior = [backend for op, backend in calls if op != "covariance"]
    assert posterior and set(posterior) == {"reference"}


@pytest.mark.parametrize("name", SCANNING)
def test_memory_budget_does_not_change_the_result(name, data):
    x = noisy(data)
    torch.testing.assert_close(
        MAKERS[name](data, memory_budget="100KB")(x, 0.3, 0.8),
        MAKERS[name](data)(x, 0.3, 0.8),
        rtol=0,
        atol=1e-10,
    )


GOOD = torch.zeros(2, *SHAPE)
WRONG_CALLS = {
    "not a tensor": (([1.0],), 0.3, 1.0, TypeError, "`x` must be a torch.Tensor"),
    "integers": (GOOD.to(torch.uint8), 0.3, 1.0, TypeError, "`x` must have a floating-point"),
    "no batch": (GOOD[0], 0.3, 1.0, ValueError, r"`x` must have shape \[B, 3, 6, 6\]"),
    "shape": (GOOD[..., :5], 0.3, 1.0, ValueError, r"`x` must have shape \[B, 3, 6, 6\]"),
    "device": (GOOD.to("meta"), 0.3, 1.0, ValueError, "`x`"),
    "nan": (GOOD + float("nan"), 0.3, 1.0, ValueError, "`x` holds NaN"),
    "inf": (GOOD + float("inf"), 0.3, 1.0, ValueError, "`x` holds NaN or infinite"),
    "sigma negative": (GOOD, -0.1, 1.0, ValueError, "`sigma` must be finite and not negative"),
    "sigma nan": (GOOD, float("nan"), 1.0, ValueError, "`sigma` must be finite"),
    "sigma inf": (GOOD, float("inf"), 1.0, ValueError, "`sigma` must be finite"),
    "sigma length": (GOOD, torch.ones(3), 1.0, ValueError, r"`sigma` must be .* shape \[2\]"),
    "sigma type": (GOOD, "high", 1.0, TypeError, "`sigma` must be a number"),
    "alpha zero": (GOOD, 0.3, 0.0, ValueError, "`alpha` must be finite and positive"),
    "alpha negative": (GOOD, 0.3, -1.0, ValueError, "`alpha` must be finite and positive"),
    "alpha nan": (GOOD, 0.3, float("nan"), ValueError, "`alpha` must be finite and positive"),
    "alpha tiny": (GOOD + 1, 0.3, 1e-20, ValueError, "`x` must lie within 1e[+]12 times `alpha`"),
    "alpha huge": (GOOD, 0.3, 1e30, ValueError, "`alpha` must be at most 1e[+]12"),
    "x huge": (GOOD + 1e17, 0.3, 1.0, ValueError, "`x` must lie within 1e[+]12"),
    "sigma beyond floats": (GOOD, 10**400, 1.0, ValueError, "`sigma` must be finite"),
    "alpha one bad": (GOOD, 0.3, torch.tensor([1.0, 0.0]), ValueError, "`alpha`"),
}


@each
@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls_are_refused_before_any_work(name, case, data, monkeypatch):
    x, sigma, alpha, error, message = WRONG_CALLS[case]
    denoiser = MAKERS[name](data)
    monkeypatch.setattr(type(denoiser), "_denoise", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(error, match=message):
        denoiser(x, sigma, alpha)


WRONG_OPTIONS = {
    "data": (lambda d: pf.OptimalDenoiser(d.images), TypeError, "`data` must be a TrainingSet"),
    "wiener data": (lambda d: pf.WienerDenoiser(3), TypeError, "`data` must be a TrainingSet,"),
    "temperature": (lambda d: pf.OptimalDenoiser(d, 0.0), ValueError, "`temperature`"),
    "temperature nan": (
        lambda d: pf.OptimalDenoiser(d, temperature=float("nan")),
        ValueError,
        "`temperature`",
    ),
    "temperature type": (
        lambda d: pf.LocalDenoiser(d, temperature="1"),
        TypeError,
        "`temperature`",
    ),
    "threshold 1": (
        lambda d: pf.PCALocalityDenoiser(d, 1.0),
        ValueError,
        r"`mask_threshold` .*\[0, 1\)",
    ),
    "threshold -1": (lambda d: pf.PCALocalityDenoiser(d, -0.1), ValueError, "`mask_threshold`"),
    "threshold nan": (
        lambda d: pf.PCALocalityDenoiser(d, float("nan")),
        ValueError,
        "`mask_threshold`",
    ),
    "aggregation": (
        lambda d: pf.PCALocalityDenoiser(d, aggregation="mean"),
        ValueError,
        "`aggregation` must be one of 'exact', 'batch_mean'",
    ),
    "batch size": (lambda d: pf.PCALocalityDenoiser(d, batch_size=0), ValueError, "`batch_size`"),
    "moments type": (lambda d: pf.PCALocalityDenoiser(d, moments=d), TypeError, "`moments`"),
    "moments shape": (
        lambda d: pf.PCALocalityDenoiser(
            d, moments=pf.Moments.from_data(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
        ),
        ValueError,
        "`moments` must be of images of shape",
    ),
    "even window": (lambda d: pf.LocalDenoiser(d, 4), ValueError, "`window` must be odd"),
    "window 0": (lambda d: pf.LocalDenoiser(d, 0), ValueError, "`window` must be at least 1"),
    "window too large": (
        lambda d: pf.LocalDenoiser(d, 13),
        ValueError,
        "`window` must be at most 11",
    ),
    "window type": (
        lambda d: pf.LocalDenoiser(d, "3"),
        TypeError,
        "`window` must be one value, a function",
    ),
    "window float": (lambda d: pf.LocalDenoiser(d, 3.0), TypeError, "`window`"),
    "table level type": (
        lambda d: pf.LocalDenoiser(d, [("a", 3)]),
        TypeError,
        "`window` must hold numbers",
    ),
    "empty table": (lambda d: pf.LocalDenoiser(d, []), ValueError, "`window` .* at least one pair"),
    "table row": (lambda d: pf.LocalDenoiser(d, [3]), TypeError, "`window` must hold pairs"),
    "table level": (
        lambda d: pf.LocalDenoiser(d, [(-1.0, 3)]),
        ValueError,
        "positive noise levels",
    ),
    "table window": (lambda d: pf.LocalDenoiser(d, [(1.0, 2)]), ValueError, "`window` must be odd"),
    "backend": (
        lambda d: pf.OptimalDenoiser(d, backend="gpu"),
        ValueError,
        "`backend` must be one",
    ),
    "dtype": (lambda d: pf.OptimalDenoiser(d, dtype=torch.float16), ValueError, "`dtype`"),
    "budget": (
        lambda d: pf.OptimalDenoiser(d, memory_budget="much"),
        ValueError,
        "`memory_budget`",
    ),
    "precision": (
        lambda d: pf.PCALocalityDenoiser(d, precision="half"),
        ValueError,
        "`precision` must be one of 'exact', 'auto', got 'half'",
    ),
    "query weights": (
        lambda d: pf.FilteredPosteriorDenoiser(d, torch.ones(2, 107), torch.ones(2, 108)),
        ValueError,
        r"`query_weights` must have shape \[Q, 108\]",
    ),
    "response weights": (
        lambda d: pf.FilteredPosteriorDenoiser(d, torch.ones(2, 108), torch.ones(3, 108)),
        ValueError,
        r"`response_weights` must have shape \[2, 108\] like `query_weights`",
    ),
    "query weights beyond floats": (
        lambda d: pf.FilteredPosteriorDenoiser(d, 1e38 * torch.ones(2, 108), torch.ones(2, 108)),
        ValueError,
        r"`query_weights` must be at most 1e[+]09, got values from 1e[+]38",
    ),
    "response weights beyond floats": (
        lambda d: pf.FilteredPosteriorDenoiser(d, torch.ones(2, 108), 2e9 * torch.ones(2, 108)),
        ValueError,
        "`response_weights` must be at most",
    ),
    "budget 0": (lambda d: pf.OptimalDenoiser(d, memory_budget=0), ValueError, "`memory_budget`"),
    "budget type": (
        lambda d: pf.OptimalDenoiser(d, memory_budget=1.5),
        TypeError,
        "`memory_budget`",
    ),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_refused_at_construction(case, data):
    make, error, message = WRONG_OPTIONS[case]
    with pytest.raises(error, match=message):
        make(data)


def test_the_largest_weights_do_not_overflow(data):
    x = torch.full((1, *SHAPE), 1e12)
    weights = torch.full((2, 108), 1e9)
    for ones in (1e9, torch.tensor([1.0, 1e9])[:, None]):
        denoiser = pf.FilteredPosteriorDenoiser(data, weights, weights / 1e9 * ones)
        assert torch.isfinite(denoiser(x, 0.3)).all()


def test_a_window_function_is_checked_when_it_answers(data):
    denoiser = pf.LocalDenoiser(data, lambda alpha, sigma: 4)
    with pytest.raises(ValueError, match="`window` must be odd"):
        denoiser(GOOD, 0.3)


def test_table_takes_the_nearest_level_in_log_ratio(data):
    table = pf.LocalDenoiser(data, [(0.1, 1), (1.0, 5)])
    x = noisy(data)
    for sigma, alpha, window in ((0.3, 1.0, 1), (0.33, 1.0, 5), (0.0, 1.0, 1), (0.2, 0.5, 5)):
        expected = pf.LocalDenoiser(data, window)(x, sigma, alpha)
        assert torch.equal(table(x, sigma, alpha), expected)


def test_batch_mean_is_the_mean_of_batches(data):
    moments = pf.Moments.from_data(data)
    x = noisy(data)
    whole = pf.PCALocalityDenoiser(
        data, 0.1, aggregation="batch_mean", batch_size=64, moments=moments
    )
    parts = [
        pf.PCALocalityDenoiser(data.subset(range(i, min(i + 64, 200))), 0.1, moments=moments)
        for i in range(0, 200, 64)
    ]
    expected = torch.stack([part(x, 0.3, 0.8) for part in parts]).mean(0)
    torch.testing.assert_close(whole(x, 0.3, 0.8), expected, rtol=0, atol=1e-12)
    exact = pf.PCALocalityDenoiser(data, 0.1, moments=moments)(x, 0.3, 0.8)
    assert (exact - expected).abs().max() > 1e-3


def test_weights_are_kept_within_the_budget(data):
    denoiser = pf.PCALocalityDenoiser(data, 0.1, memory_budget=4000)
    first = denoiser.weights_at(0.3, 1.0)
    assert denoiser.weights_at(0.3, 1.0) is first
    # 108 x 14 bytes a level: two fit in 4,000 bytes, a third pushes the oldest out.
    denoiser.weights_at(0.4, 1.0)
    denoiser.weights_at(0.5, 1.0)
    assert denoiser.weights_at(0.3, 1.0) is not first


def test_wiener_equals_the_formula(data):
    x = noisy(data)
    values = data.values(dtype=torch.float64).flatten(1)
    mean, covariance = values.mean(0), torch.cov(values.T)
    for sigma, alpha in ((0.3, 0.8), (2.0, 1.0), (0.01, 1.0)):
        noise = sigma**2 * torch.eye(len(mean), dtype=torch.float64)
        centred = x.flatten(1) - alpha * mean
        solved = torch.linalg.solve(alpha**2 * covariance + noise, centred.T)
        expected = (mean + (alpha * covariance @ solved).T).reshape(x.shape)
        torch.testing.assert_close(pf.WienerDenoiser(data)(x, sigma, alpha), expected)


def test_wiener_takes_moments(data):
    x = noisy(data)
    found = pf.WienerDenoiser(pf.Moments.from_data(data))(x, 0.3)
    assert torch.equal(found, pf.WienerDenoiser(data)(x, 0.3))


def test_nearest_ignores_sigma_and_heeds_alpha(data):
    x = 0.5 * data.values(17, 18)
    denoiser = pf.NearestDenoiser(data)
    for sigma in (0.0, 1.0):
        torch.testing.assert_close(denoiser(x, sigma, 0.5), data.values(17, 18))


@each
def test_jvp_gives_the_estimate_and_both_follow_the_input(name, data):
    denoiser = MAKERS[name](data)
    x, u = noisy(data), torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(3))
    exact = denoiser.jvp(x, u.double(), 0.3, 0.8), denoiser.vjp(x, u.double(), 0.3, 0.8)
    torch.testing.assert_close(exact[0][0], denoiser(x, 0.3, 0.8), rtol=0, atol=1e-12)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 5e-2)):
        estimate, jv = denoiser.jvp(x.to(dtype), u.to(dtype), 0.3, 0.8)
        gradient = denoiser.vjp(x.to(dtype), u.to(dtype), 0.3, 0.8)
        assert estimate.dtype == jv.dtype == gradient.dtype == dtype
        assert jv.shape == gradient.shape == u.shape
        for found, true in ((jv, exact[0][1]), (gradient, exact[1])):
            # Rounding of the input to half precision, as for the estimate.
            assert (found.double() - true).abs().median() <= tolerance


@each
def test_no_tangents_and_no_images(name, data):
    denoiser = MAKERS[name](data)
    x = noisy(data)
    estimate, jv = denoiser.jvp(x, torch.zeros(0, 3, *SHAPE, dtype=torch.float64), 0.3)
    assert torch.equal(estimate, denoiser(x, 0.3)) and jv.shape == (0, 3, *SHAPE)
    empty, none = torch.zeros(0, *SHAPE), torch.zeros(2, 0, *SHAPE)
    assert [part.shape for part in denoiser.jvp(empty, none, 0.3)] == [empty.shape, none.shape]
    assert denoiser.vjp(empty, none, 0.3).shape == none.shape


WRONG_DIRECTIONS = {
    "no directions": (GOOD, ValueError, r"must have shape \[K, 2, 3, 6, 6\]"),
    "batch": (torch.zeros(1, 3, *SHAPE), ValueError, r"must have shape \[K, 2, 3, 6, 6\]"),
    "dtype": (GOOD[None].double(), TypeError, "must be torch.float32 like `x`"),
    "device": (GOOD[None].to("meta"), ValueError, "must be on cpu"),
    "nan": (GOOD[None] + float("nan"), ValueError, "holds NaN"),
    "list": ([1.0], TypeError, "must be a torch.Tensor"),
}


@pytest.mark.parametrize("case", WRONG_DIRECTIONS)
@pytest.mark.parametrize("name", ["optimal", "wiener", "local"])
def test_wrong_directions_are_refused(name, case, data):
    directions, error, message = WRONG_DIRECTIONS[case]
    denoiser = MAKERS[name](data)
    with pytest.raises(error, match="`tangents` " + message):
        denoiser.jvp(GOOD, directions, 0.3)
    with pytest.raises(error, match="`cotangents` " + message):
        denoiser.vjp(GOOD, directions, 0.3)


@pytest.mark.parametrize("name", [name for name in SCANNING if name != "nearest"])
def test_no_derivative_without_noise(name, data):
    denoiser = MAKERS[name](data)
    x = noisy(data)
    with pytest.raises(ValueError, match="`sigma` must be positive for derivatives"):
        denoiser.jvp(x, x[None], 0.0)
    with pytest.raises(ValueError, match="`sigma` must be positive for derivatives"):
        denoiser(x.requires_grad_(), 0.0).sum().backward()
