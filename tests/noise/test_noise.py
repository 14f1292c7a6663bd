"""Noise schedules and conversions against closed forms and the published codes' levels."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from pyflocality.noise import (
    CosineSchedule,
    DDPMSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
    noise_from_x0,
    score_from_x0,
    v_from_x0,
    x0_from_noise,
    x0_from_v,
)

SCHEDULES = [DDPMSchedule(), CosineSchedule(), KarrasSchedule(), FlowSchedule()]


def test_ddpm_levels_are_the_product_of_its_betas():
    schedule = DDPMSchedule()
    for t in (0, 1, 499, 999):
        product = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1))
        alpha, sigma = schedule(t)
        assert alpha == pytest.approx(math.sqrt(product), rel=1e-12)
        assert sigma == pytest.approx(math.sqrt(1 - product), rel=1e-10)


@pytest.mark.parametrize("name", ["locality_public_mnist10.npz", "locality_public_cifar8.npz"])
def test_ddpm_matches_the_published_levels(golden, name):
    arrays = golden(name)
    for t in (900, 500, 200, 100, 0):
        assert DDPMSchedule()(t)[0] ** 2 == pytest.approx(
            float(arrays[f"alpha_cumprod_{t}"]), abs=1e-6
        )
    assert DDPMSchedule().timesteps(10).tolist() == arrays["timesteps"].tolist()


def test_ddpm_matches_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the extra [test]")
    theirs = diffusers.DDIMScheduler()
    alpha, _ = DDPMSchedule()(torch.arange(1000))
    torch.testing.assert_close(alpha**2, theirs.alphas_cumprod.double(), rtol=0, atol=1e-6)
    for steps in (1, 3, 7, 10, 50, 300, 600, 1000):
        theirs.set_timesteps(steps)
        assert torch.equal(DDPMSchedule().timesteps(steps), theirs.timesteps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1000, 50, 37])
def test_timesteps_of_every_spacing_are_those_of_diffusers(spacing, count):
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the extra [test]")
    theirs = diffusers.DDIMScheduler(num_train_timesteps=count, timestep_spacing=spacing)
    ours = DDPMSchedule(num_timesteps=count, spacing=spacing)
    for steps in {*range(1, count + 1, max(1, count // 97)), 7, 10, 20, count // 2 + 1, count}:
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        # For some numbers of steps theirs is one too long and ends at -1.
        if expected[-1] == -1:
            expected.pop()
        assert ours.timesteps(steps).tolist() == expected
        assert ours.timesteps(steps).dtype == torch.int64


def test_spaced_runs_begin_at_the_end_of_the_schedule():
    for spacing in ("trailing", "linspace"):
        schedule = CosineSchedule(spacing=spacing)
        for steps in (1, 2, 19):
            times = schedule.timesteps(steps)
            assert times.dtype == torch.float64 and len(times) == steps
            assert times[0] == 1 and times[-1] > 0 and (times.diff() < 0).all()
    assert CosineSchedule(spacing="trailing").timesteps(4).tolist() == [1, 0.75, 0.5, 0.25]
    times = CosineSchedule(spacing="linspace").timesteps(4).tolist()
    assert times == pytest.approx([1, 1 - 4 / 15, 1 - 8 / 15, 0.2])
    assert CosineSchedule() == CosineSchedule(spacing="leading") != CosineSchedule("trailing")
    for make in (DDPMSchedule, CosineSchedule):
        for wrong in ("Trailing", "", None, 3):
            with pytest.raises(ValueError, match="`spacing` must be one of 'leading', 'trail"):
                make(spacing=wrong)


def test_ddpm_of_other_length_and_betas():
    schedule = DDPMSchedule(num_timesteps=3, beta_start=0.1, beta_end=0.5)
    alpha, sigma = schedule(torch.tensor([[0, 1, 2]]))
    squared = torch.tensor([[0.9, 0.9 * 0.7, 0.9 * 0.7 * 0.5]], dtype=torch.float64)
    torch.testing.assert_close(alpha, squared.sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma, (1 - squared).sqrt(), rtol=1e-14, atol=0)
    assert schedule.timesteps(2).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["kamb_public_mnist60.npz", "kamb_public_cifar40.npz"])
def test_cosine_matches_the_published_levels(golden, name):
    arrays = golden(name)
    alpha, sigma = CosineSchedule()(torch.from_numpy(arrays["t"]))
    np.testing.assert_allclose(alpha, arrays["alpha"], atol=1e-6)
    np.testing.assert_allclose(sigma, arrays["sigma"], atol=1e-6)
    np.testing.assert_allclose(sigma**2, arrays["beta"], atol=1e-6)


def test_cosine_closed_form_and_timesteps():
    for t in (0.0, 0.05, 0.5, 1.0):
        beta = 1 - math.cos(math.pi * t / (2 * 1.008)) ** 2
        alpha, sigma = CosineSchedule()(t)
        assert alpha == pytest.approx(math.sqrt(1 - beta), rel=1e-12)
        assert sigma == pytest.approx(math.sqrt(beta), rel=1e-12)
    assert CosineSchedule()(1.0)[0] > 0.012
    # The published 20-step run visits 19 times.
    visited = CosineSchedule().timesteps(19)
    np.testing.assert_allclose(visited, [i / 20 for i in range(19, 0, -1)], rtol=1e-15)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(KarrasSchedule(), 18), (KarrasSchedule(), 2), (KarrasSchedule(0.05, 10.0, 3.0), 7)],
)
def test_karras_timesteps_are_equation_5(schedule, steps):
    low, high = schedule.sigma_min ** (1 / schedule.rho), schedule.sigma_max ** (1 / schedule.rho)
    expected = [(high + i / (steps - 1) * (low - high)) ** schedule.rho for i in range(steps)]
    times = schedule.timesteps(steps)
    np.testing.assert_allclose(times, expected, rtol=1e-12)
    assert times[0] == schedule.sigma_max and times[-1] == schedule.sigma_min


def test_karras_matches_the_published_levels(golden):
    expected = golden("pspc_public_sampler_cifar16.npz")["t_steps"]
    np.testing.assert_allclose(KarrasSchedule().timesteps(6), expected, rtol=1e-6)


def test_karras_levels():
    assert KarrasSchedule()(3.5) == (1.0, 3.5)
    assert KarrasSchedule()(1000) == (1.0, 1000.0)
    assert KarrasSchedule().timesteps(1).tolist() == [80.0]
    assert KarrasSchedule(sigma_max=7).init_noise_sigma == 7.0


def test_levels_do_not_alias_the_times():
    for schedule in (KarrasSchedule(), FlowSchedule()):
        t = torch.tensor([0.25, 0.5], dtype=torch.float64)
        for level in schedule(t):
            level.zero_()
        assert t.tolist() == [0.25, 0.5]


def test_flow_levels_and_timesteps():
    assert FlowSchedule()(0.25) == (0.25, 0.75)
    assert FlowSchedule()(1) == (1.0, 0.0)
    np.testing.assert_allclose(
        FlowSchedule(t_min=0.2).timesteps(4), [0.2, 0.4, 0.6, 0.8], rtol=1e-14
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numbers_give_floats_and_tensors_give_tensors(schedule):
    times = schedule.timesteps(4)
    alpha, sigma = schedule(times.reshape(2, 2))
    assert alpha.shape == sigma.shape == (2, 2)
    assert alpha.dtype == sigma.dtype == torch.float64
    for i, t in enumerate(times.tolist()):
        pair = schedule(t)
        assert all(isinstance(value, float) for value in pair)
        assert pair == (alpha.flatten()[i].item(), sigma.flatten()[i].item())
    assert schedule(np.float64(1.0) if times.is_floating_point() else np.int64(1)) == schedule(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 31])
def test_sampling_runs_from_noise_to_data(schedule, steps):
    alpha, sigma = schedule(schedule.timesteps(steps))
    assert alpha.shape == (steps,)
    assert (alpha > 0).all() and (sigma > 0).all()
    assert (torch.diff(sigma / alpha) < 0).all()
    assert schedule.final == (1.0, 0.0)
    # The starting noise has the standard deviation of a state at the first time.
    state = math.hypot(alpha[0].item(), sigma[0].item())
    assert isinstance(schedule, NoiseSchedule)
    if isinstance(schedule, (KarrasSchedule, FlowSchedule)):
        assert schedule.init_noise_sigma == pytest.approx(sigma[0].item(), rel=2e-3)
    else:
        assert schedule.init_noise_sigma == pytest.approx(state, rel=1e-12)


def test_schedules_compare_by_value_and_cannot_change():
    assert DDPMSchedule() == DDPMSchedule() != DDPMSchedule(num_timesteps=500)
    assert KarrasSchedule() != CosineSchedule()
    assert hash(FlowSchedule(0.1)) == hash(FlowSchedule(0.1))
    assert repr(KarrasSchedule()) == "KarrasSchedule(sigma_min=0.002, sigma_max=80.0, rho=7.0)"
    assert repr(FlowSchedule(np.float64(0.25))) == "FlowSchedule(t_min=0.25)"
    assert type(DDPMSchedule(np.int32(10)).num_timesteps) is int
    used = DDPMSchedule()
    used(3)
    assert used == DDPMSchedule() == pickle.loads(pickle.dumps(used)) == copy.deepcopy(used)
    with pytest.raises(dataclasses.FrozenInstanceError):
        used.beta_end = 0.5


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        (DDPMSchedule(), -1),
        (DDPMSchedule(), 1000),
        (DDPMSchedule(), 10**30),
        (DDPMSchedule(), torch.tensor([3, 1000])),
        (DDPMSchedule(num_timesteps=10), 10),
        (CosineSchedule(), 1.01),
        (CosineSchedule(), -1e-9),
        (CosineSchedule(), math.nan),
        (CosineSchedule(), torch.tensor([0.5, math.nan])),
        (KarrasSchedule(), -0.1),
        (KarrasSchedule(), math.inf),
        (KarrasSchedule(), torch.tensor(math.inf)),
        (KarrasSchedule(), 10**400),
        (FlowSchedule(), 1.5),
        (FlowSchedule(), torch.tensor([[-0.5]])),
    ],
)
def test_times_out_of_range(schedule, t):
    with pytest.raises(ValueError, match="`t` must lie in"):
        schedule(t)


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        (DDPMSchedule(), 3.0),
        (DDPMSchedule(), torch.tensor([3.0])),
        (DDPMSchedule(), True),
        (CosineSchedule(), "0.5"),
        (CosineSchedule(), None),
        (CosineSchedule(), [0.5]),
        (KarrasSchedule(), torch.tensor([True])),
        (FlowSchedule(), 0.5j),
        (FlowSchedule(), torch.tensor([0.5j])),
    ],
)
def test_times_of_the_wrong_type(schedule, t):
    with pytest.raises(TypeError, match="`t` must be a"):
        schedule(t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError)])
def test_wrong_steps(schedule, steps, error):
    with pytest.raises(error, match="`steps`"):
        schedule.timesteps(steps)


def test_more_steps_than_times():
    with pytest.raises(ValueError, match="`steps` must be at most .* 1000 .* 1001"):
        DDPMSchedule().timesteps(1001)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: DDPMSchedule(num_timesteps=0), ValueError, "num_timesteps"),
        (lambda: DDPMSchedule(num_timesteps=10.0), TypeError, "num_timesteps"),
        (lambda: DDPMSchedule(beta_start=0.0), ValueError, "beta_start"),
        (lambda: DDPMSchedule(beta_end=1.0), ValueError, "beta_end"),
        (lambda: DDPMSchedule(beta_start=0.5), ValueError, "beta_end"),
        (lambda: KarrasSchedule(sigma_min=0), ValueError, "sigma_min"),
        (lambda: KarrasSchedule(sigma_min=3, sigma_max=2), ValueError, "sigma_max"),
        (lambda: KarrasSchedule(rho=-1), ValueError, "rho"),
        (lambda: KarrasSchedule(sigma_max="80"), TypeError, "sigma_max"),
        (lambda: FlowSchedule(t_min=0.0), ValueError, "t_min"),
        (lambda: FlowSchedule(t_min=1.0), ValueError, "t_min"),
    ],
)
def test_wrong_fields(make, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        make()


@pytest.fixture
def triple(rng):
    """x0, noise [5, 2, 3, 4] in float64 and per-image alpha, sigma [5] of no special schedule."""
    x0, noise = torch.randn(2, 5, 2, 3, 4, generator=rng, dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.9, 0.3, 0.05, 1.0], dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.4, 0.95, 0.99, 40.0], dtype=torch.float64)
    return x0, noise, alpha, sigma


def _noisy(x0, noise, alpha, sigma):
    column = (-1, 1, 1, 1)
    return alpha.reshape(column) * x0 + sigma.reshape(column) * noise


def test_conversions_invert_the_noising(triple):
    x0, noise, alpha, sigma = triple
    x = _noisy(x0, noise, alpha, sigma)
    v = alpha.reshape(-1, 1, 1, 1) * noise - sigma.reshape(-1, 1, 1, 1) * x0
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(x0_from_noise(x, noise, alpha, sigma), x0, **close)
    torch.testing.assert_close(x0_from_v(x, v, alpha, sigma), x0, **close)
    torch.testing.assert_close(noise_from_x0(x, x0, alpha, sigma), noise, **close)
    torch.testing.assert_close(v_from_x0(x, x0, alpha, sigma), v, **close)
    score = -noise / sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(score_from_x0(x, x0, alpha, sigma), score, **close)


def test_conversions_take_numbers_and_keep_the_dtype(triple):
    x0, noise, *_ = triple
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        x = (0.6 * x0 + 0.8 * noise).to(dtype)
        found = x0_from_noise(x, noise.to(dtype), 0.6, 0.8)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), x0, rtol=0, atol=atol)


def test_half_precision_score_survives_a_small_sigma():
    """The square of sigma 1e-4 is zero in float16."""
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float16)
    assert torch.equal(score_from_x0(x, x, 1.0, 1e-4), torch.zeros_like(x))


def test_clean_images_pass_through():
    x = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
    anything = torch.full_like(x, 9.0)
    torch.testing.assert_close(x0_from_noise(x, anything, 0.5, 0.0), 2 * x)
    torch.testing.assert_close(x0_from_v(x, anything, 0.5, 0.0), 2 * x)


def test_score_is_the_gradient_of_the_log_density(rng):
    """Two training points: the score of their noisy mixture, by autograd of log-sum-exp."""
    points = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    alpha, sigma = 0.7, 0.5
    x = torch.randn(3, 6, generator=rng, dtype=torch.float64).requires_grad_()
    logits = -((x[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2)
    (gradient,) = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), x)
    posterior_mean = torch.softmax(logits, 1).detach() @ points
    torch.testing.assert_close(
        score_from_x0(x.detach(), posterior_mean, alpha, sigma), gradient, rtol=1e-12, atol=1e-12
    )


def test_conversions_work_under_jvp_and_vmap(triple):
    x0, noise, *_ = triple
    _, tangent = torch.func.jvp(lambda x: noise_from_x0(x, x0, 0.6, 0.8), (noise,), (x0,))
    torch.testing.assert_close(tangent, x0 / 0.8)
    mapped = torch.func.vmap(lambda x: x0_from_v(x, x, 0.6, 0.8))(x0)
    torch.testing.assert_close(mapped, x0 * (0.6 - 0.8))


@pytest.mark.parametrize(
    "convert", [x0_from_noise, x0_from_v, noise_from_x0, v_from_x0, score_from_x0]
)
@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"alpha": torch.ones(4)}, ValueError, "alpha"),
        ({"sigma": -1.0}, ValueError, "sigma"),
        ({"sigma": "1"}, TypeError, "sigma"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x"),
        ({"other": torch.zeros(2, 4)}, ValueError, "(noise|v|x0)"),
        ({"other": None}, TypeError, "(noise|v|x0)"),
    ],
)
def test_wrong_conversions(convert, change, error, name):
    arguments = {"x": torch.zeros(2, 3), "other": torch.zeros(2, 3), "alpha": 1.0, "sigma": 1.0}
    with pytest.raises(error, match=f"`{name}`"):
        convert(*(arguments | change).values())


@pytest.mark.parametrize("convert", [noise_from_x0, v_from_x0, score_from_x0])
def test_noise_of_a_clean_image_is_unknown(convert):
    with pytest.raises(ValueError, match="`sigma` must be finite and positive"):
        convert(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, 0.0)
