"""Samplers against closed forms, diffusers and the published codes' runs."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch
from sampled_models import Gaussian, _step

import pyflocality as pf
from pyflocality import sampling
from pyflocality.noise import (
    CosineSchedule,
    DDPMSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
)
from pyflocality.sampling import DDIM, Euler, Heun, SampleResult, sample

LEVELS = [
    ((0.3, math.sqrt(1 - 0.09)), (0.8, 0.6)),
    ((1.0, 7.0), (1.0, 2.5)),
    ((0.2, 0.8), (0.7, 0.3)),
]


# Single steps --------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "next_level"), LEVELS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_noise_is_the_posterior_variance(level, next_level, eta, step_inputs):
    """Bayes' rule for x' between x0 and x gives both the mean and the noise at eta = 1."""
    x, x0, noise = step_inputs
    (alpha, sigma), (next_alpha, next_sigma) = level, next_level
    # x = ratio x' + N(0, transition), and x' = next_alpha x0 + N(0, next_sigma^2).
    ratio = alpha / next_alpha
    transition = sigma**2 - ratio**2 * next_sigma**2
    variance = 1 / (1 / next_sigma**2 + ratio**2 / transition)
    found = _step(DDIM(eta), x, x0, level, next_level, clip=False, noise=noise)
    eps = (x - alpha * x0) / sigma
    expected = (
        next_alpha * x0
        + math.sqrt(next_sigma**2 - eta**2 * variance) * eps
        + eta * math.sqrt(variance) * noise
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if eta == 1:
        mean = variance * (next_alpha * x0 / next_sigma**2 + ratio * x / transition)
        torch.testing.assert_close(found, mean + math.sqrt(variance) * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("level", "next_level"), LEVELS)
def test_euler_step_is_eulers_rule_in_scaled_state(level, next_level, step_inputs):
    x, x0, _ = step_inputs
    (alpha, sigma), (next_alpha, next_sigma) = level, next_level
    for clip in (False, True):
        used = x0.clamp(-1, 1) if clip else x0
        y, s, next_s = x / alpha, sigma / alpha, next_sigma / next_alpha
        expected = next_alpha * (y + (next_s - s) * (y - used) / s)
        found = _step(Euler(), x, x0, level, next_level, clip=clip)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("level", "next_level"), LEVELS)
@pytest.mark.parametrize("clip", [False, True])
def test_heun_step_is_the_trapezoidal_rule_in_scaled_state(level, next_level, clip, step_inputs):
    x, x0, other = step_inputs
    (alpha, sigma), (next_alpha, next_sigma) = level, next_level
    answers = {sigma: x0, next_sigma: 2 * other}
    asked = []

    def denoise(state, level_sigma, level_alpha):
        asked.append((state, level_alpha, level_sigma))
        return answers[level_sigma]

    found, answer = Heun().step(denoise, x, level, next_level, clip=clip)
    assert answer is x0
    first, second = (v.clamp(-1, 1) if clip else v for v in answers.values())
    y, s, next_s = x / alpha, sigma / alpha, next_sigma / next_alpha
    slope = (y - first) / s
    predicted = y + (next_s - s) * slope
    next_slope = (predicted - second) / next_s
    expected = next_alpha * (y + (next_s - s) * (slope + next_slope) / 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert [pair[1:] for pair in asked] == [level, next_level]
    torch.testing.assert_close(asked[1][0], next_alpha * predicted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(0.5), Euler(), Heun()])
@pytest.mark.parametrize("clip", [False, True])
def test_the_last_step_gives_x0(sampler, clip, step_inputs):
    x, x0, noise = step_inputs
    found = _step(sampler, x, x0, (0.6, 0.8), (1.0, 0.0), clip=clip, noise=noise)
    torch.testing.assert_close(found, x0.clamp(-1, 1) if clip else x0, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(0.5), Euler(), Heun()])
def test_a_clean_state_steps_without_nan(sampler, step_inputs):
    x, x0, noise = step_inputs
    found = _step(sampler, x, x0, (1.0, 0.0), (1.0, 0.0), clip=False, noise=noise)
    assert torch.equal(found, x0)


def test_ddim_keeps_the_noise_direction_of_the_unclipped_answer():
    x, x0 = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 3.0)
    level, next_level = (0.6, 0.8), (0.8, 0.6)
    moved = _step(DDIM(), x, x0, level, next_level)
    assert moved.item() == pytest.approx(0.8 * 1.0 + 0.6 * (0.5 - 0.6 * 3.0) / 0.8, rel=1e-6)
    moved = _step(Euler(), x, x0, level, next_level)
    assert moved.item() == pytest.approx(0.8 * 1.0 + 0.6 * (0.5 - 0.6 * 1.0) / 0.8, rel=1e-6)


def test_ddim_between_equal_levels_stays_real():
    """The share of fresh noise is a difference of equal numbers, negative after rounding."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for level in ((0.1, 0.7), (0.3, 0.9), (0.7, 0.1), (1.0, 3.0)):
        for factor in (1.0, 3.0, 7.0):
            scaled = (level[0] * factor, level[1] * factor)
            moved = _step(DDIM(1.0), x, 0 * x, level, scaled, clip=False, noise=x)
            assert moved.dtype == torch.float64
            assert moved.item() == pytest.approx(factor, rel=1e-6)


# Parity with diffusers -------------------------------------------------------------------------


# Parity with the published runs ----------------------------------------------------------------


# Whole runs against closed forms -----------------------------------------------------------------


# The contract of `sample` -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", DDIM(0.7), "euler", "heun"])
def test_batch_size_does_not_change_results(sampler):
    gaussian = Gaussian((2, 3, 3))

    def elementwise(x, sigma, alpha):
        # Matrix products may round differently for other numbers of rows; this cannot.
        return torch.tanh(alpha * x / (alpha**2 + sigma**2)) * 1.3

    elementwise.image_shape, elementwise.device = gaussian.image_shape, gaussian.device
    runs = [
        sample(
            elementwise,
            7,
            steps=4,
            sampler=sampler,
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(8),
            progress=False,
        )
        for batch_size in (None, 1, 2, 3, 7, 100)
    ]
    for run in runs[1:]:
        assert torch.equal(runs[0].x_t, run.x_t)
        assert torch.equal(runs[0].x0, run.x0)
        assert torch.equal(runs[0].images, run.images)


def test_batches_have_the_size_asked_for():
    sizes = []

    def denoise(x, sigma, alpha):
        sizes.append(len(x))
        return 0 * x

    sample(denoise, x_T=torch.ones(7, 1, 2, 2), steps=2, batch_size=3, progress=False)
    assert sizes == [3, 3, 1, 3, 3, 1]


def test_the_denoiser_gets_plain_numbers_and_no_gradients():
    calls = []

    def denoise(x, sigma, alpha):
        calls.append((type(sigma), type(alpha), torch.is_grad_enabled(), x.dtype))
        return torch.nn.functional.silu(x * weight)

    weight = torch.ones((), requires_grad=True)
    out = sample(denoise, x_T=torch.ones(1, 1, 2, 2), steps=2, progress=False)
    assert calls == [(float, float, False, torch.float32)] * 2
    assert not out.images.requires_grad and not out.x0.requires_grad


def test_trajectories_hold_every_call(rng):
    """x_t and x0 are what the denoiser was given and what it said, also where it was clipped."""
    calls = []

    def denoise(x, sigma, alpha):
        calls.append((x.clone(), 2 * x))
        return calls[-1][1]

    x_T = torch.randn(2, 1, 3, 3, generator=rng)
    before = x_T.clone()
    out = sample(denoise, x_T=x_T, steps=4, progress=False)
    assert isinstance(out, SampleResult)
    assert torch.equal(out.x_t, torch.stack([x for x, _ in calls]))
    assert torch.equal(out.x0, torch.stack([x0 for _, x0 in calls]))
    assert torch.equal(out.x_t[0], before) and torch.equal(x_T, before)
    assert torch.equal(out.images, out.x0[-1].clamp(-1, 1))
    assert out.timesteps.tolist() == [750, 500, 250, 0]
    assert repr(out) == "SampleResult(images=[2, 1, 3, 3], steps=4)"
    out.images.zero_()
    assert torch.equal(out.x_t[-1], calls[-1][0])


def test_defaults_are_eight_images_in_ten_ddim_steps():
    torch.manual_seed(0)
    out = sample(Gaussian(), progress=False)
    assert out.images.shape == (8, 1, 2, 3)
    assert out.timesteps.tolist() == list(range(900, -1, -100))
    torch.manual_seed(0)
    assert torch.equal(out.x_t[0].float(), torch.randn(8, 1, 2, 3))


def two_modes(spacing, steps):
    """Share of samples at the first of two images, which are equally likely."""
    images = torch.stack([torch.full((1, 8, 8), v, dtype=torch.uint8) for v in (255, 159)])
    denoiser = pf.OptimalDenoiser(pf.TrainingSet(images))
    out = sample(
        denoiser,
        400,
        schedule=DDPMSchedule(spacing=spacing),
        steps=steps,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    return float((out.images.mean((1, 2, 3)) > 0.6).double().mean())


def test_noise_is_taken_for_a_half_clean_image_where_steps_do_not_divide_the_schedule():
    words = 'first of 501 times, 500, is not near pure noise.* 8% .*"trailing" or "linspace".*DDPM'
    with pytest.warns(UserWarning, match=words):
        assert two_modes("leading", 501) < 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Within three standard errors.
        assert abs(two_modes("trailing", 501) - 0.5) < 0.075
        assert abs(two_modes("linspace", 501) - 0.5) < 0.075
        assert abs(two_modes("leading", 500) - 0.5) < 0.075


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        (DDPMSchedule(), 1, 'first of 1 times, 0, .*spacing="trailing"'),
        (DDPMSchedule(), 2, "first of 2 times, 500"),
        (DDPMSchedule(), 600, "first of 600 times, 599"),
        (DDPMSchedule(spacing="linspace"), 1, "starts at more noise"),
        (DDPMSchedule(), 4, None),
        (DDPMSchedule(), 10, None),
        (DDPMSchedule(spacing="trailing"), 1, None),
        (DDPMSchedule(spacing="trailing"), 600, None),
        (CosineSchedule(), 5, "first of 5 times, 0.833333, .*CosineSchedule(.., spacing"),
        (CosineSchedule(), 19, None),
        (CosineSchedule(spacing="trailing"), 5, None),
        (CosineSchedule(spacing="linspace"), 5, None),
        (KarrasSchedule(), 3, None),
        (KarrasSchedule(sigma_max=3.0), 3, "larger `sigma_max` than 3"),
        (FlowSchedule(), 3, None),
        (FlowSchedule(0.3), 3, "starts at more noise"),
    ],
)
def test_a_start_far_from_noise_is_told(schedule, steps, words):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sample(Gaussian(), 2, schedule=schedule, steps=steps, progress=False)
    assert len(found) == (words is not None)
    if words is not None:
        assert re.search(words.replace("(..", r"\(\.\."), str(found[0].message))
        assert found[0].filename == __file__


def test_a_state_that_is_given_is_told_of_where_the_spacing_leads():
    state = torch.randn(2, 1, 2, 3)
    with pytest.warns(UserWarning, match="not near pure noise"):
        sample(Gaussian(), x_T=state, steps=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A caller's own, at the noise level where it starts.
        sample(Gaussian(), x_T=state, schedule=FlowSchedule(0.3), steps=2, progress=False)


def test_starting_noise_comes_from_the_generator():
    schedule = KarrasSchedule(sigma_max=10.0)
    out = sample(
        Gaussian(), 3, schedule=schedule, generator=torch.Generator().manual_seed(4), progress=False
    )
    expected = 10.0 * torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(out.x_t[0].float(), expected)
    torch.manual_seed(0)
    untouched = torch.random.get_rng_state()
    sample(
        Gaussian(), 3, sampler=DDIM(1.0), generator=torch.Generator().manual_seed(4), progress=False
    )
    assert torch.equal(torch.random.get_rng_state(), untouched)


@pytest.mark.parametrize(
    ("x_dtype", "answer_dtype", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("sampler", ["ddim", DDIM(0.5), "euler", "heun"])
def test_dtype_of_a_run(x_dtype, answer_dtype, expected, sampler):
    x_T = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2).to(x_dtype)
    out = sample(
        lambda x, sigma, alpha: (0.5 * x).to(answer_dtype),
        x_T=x_T,
        steps=3,
        sampler=sampler,
        batch_size=1,
        progress=False,
    )
    assert {out.images.dtype, out.x_t.dtype, out.x0.dtype} == {expected}
    assert torch.equal(out.x_t[0], x_T.to(expected))


def test_fresh_noise_is_the_same_in_both_precisions():
    def denoise(x, sigma, alpha):
        return alpha * x

    x_T = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2)
    runs = [
        sample(
            denoise,
            x_T=x_T.to(dtype),
            sampler=DDIM(1.0),
            generator=torch.Generator().manual_seed(6),
            progress=False,
        )
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(runs[0].images.double(), runs[1].images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("enabled", "batch_size", "total"), [(True, 2, 12), (False, None, 4)])
def test_progress_counts_steps_times_batches(monkeypatch, enabled, batch_size, total):
    bars = []

    def bar(items, *, description, enabled):
        bars.append((len(items), enabled))
        return iter(items)

    monkeypatch.setattr(sampling, "progress_bar", bar)
    sample(Gaussian(), 5, steps=4, batch_size=batch_size, progress=enabled)
    assert bars == [(total, enabled)]


class Backwards(NoiseSchedule):
    """A schedule that starts where there is no signal."""

    def timesteps(self, steps):
        return torch.zeros(steps, dtype=torch.float64)

    def _levels(self, t):
        return torch.zeros_like(t), torch.ones_like(t)


ELSEWHERE = Gaussian()
ELSEWHERE.device = torch.device("meta")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"denoiser": 3}, TypeError, "`denoiser` must be callable"),
        ({"denoiser": lambda *_: None}, ValueError, "`x_T` must be given"),
        ({"n": 0}, ValueError, "`n` must be at least 1"),
        ({"n": 2.0}, TypeError, "`n` must be a whole number"),
        ({"n": 3, "x_T": torch.zeros(2, 1, 2, 3)}, ValueError, "`n` must be .* 2, got 3"),
        ({"schedule": "ddpm"}, TypeError, "`schedule` must be a NoiseSchedule"),
        ({"schedule": KarrasSchedule}, TypeError, "`schedule` must be a NoiseSchedule"),
        ({"schedule": Backwards()}, ValueError, "`schedule` must have alpha above 0"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"steps": 1001}, ValueError, "`steps` must be at most"),
        ({"steps": "10"}, TypeError, "`steps` must be a whole number"),
        ({"sampler": "huen"}, ValueError, "`sampler` must be one of 'ddim', 'euler', 'heun'"),
        ({"sampler": DDIM}, TypeError, "`sampler` must be a name or a Sampler"),
        ({"x_T": torch.zeros(2, 1, 3, 2)}, ValueError, r"`x_T` must have shape \[B, 1, 2, 3\]"),
        ({"x_T": torch.zeros(1, 2, 3)}, ValueError, r"`x_T` must have shape \[n, C, H, W\]"),
        ({"x_T": torch.zeros(0, 1, 2, 3)}, ValueError, r"`x_T` must have shape \[n, C, H, W\]"),
        ({"x_T": torch.full((2, 1, 2, 3), math.nan)}, ValueError, "`x_T` holds NaN"),
        ({"x_T": torch.full((2, 1, 2, 3), 1e30)}, ValueError, "`x_T` must lie within"),
        ({"x_T": torch.zeros(2, 1, 2, 3, dtype=torch.uint8)}, TypeError, "`x_T` must have a float"),
        ({"x_T": np.zeros((2, 1, 2, 3))}, TypeError, "`x_T` must be a torch.Tensor"),
        (
            {"denoiser": ELSEWHERE, "x_T": torch.zeros(2, 1, 2, 3)},
            ValueError,
            "`x_T` must be on meta",
        ),
        ({"generator": 0}, TypeError, "`generator` must be a torch.Generator"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "`batch_size` must be a whole number"),
    ],
)
def test_wrong_arguments_fail_before_any_work(arguments, error, words):
    denoiser = Gaussian()
    denoiser.mean = None
    generator = torch.Generator().manual_seed(0)
    untouched = generator.get_state()
    given = {"denoiser": denoiser, "generator": generator} | arguments
    with pytest.raises(error, match=words):
        sample(given.pop("denoiser"), progress=False, **given)
    assert torch.equal(generator.get_state(), untouched)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (torch.zeros(2, 3, 2, 2), ValueError, r"`denoiser` must return .* \[2, 1, 2, 2\]"),
        (torch.zeros(1, 1, 2, 2), ValueError, r"`denoiser` must return .* \[2, 1, 2, 2\]"),
        ((torch.zeros(2, 1, 2, 2),), TypeError, "`denoiser` must return a tensor"),
    ],
)
def test_wrong_answers_of_the_denoiser(sampler, answer, error, words):
    with pytest.raises(error, match=words):
        sample(lambda *_: answer, x_T=torch.zeros(2, 1, 2, 2), sampler=sampler, progress=False)


@pytest.mark.parametrize(
    ("eta", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("1", TypeError)],
)
def test_wrong_eta(eta, error):
    with pytest.raises(error, match="`eta`"):
        DDIM(eta)


def test_a_stochastic_step_needs_noise():
    with pytest.raises(ValueError, match="`noise` must be given for eta 0.5"):
        DDIM(0.5).step(Gaussian(), torch.zeros(1, 1, 2, 3), (0.6, 0.8), (0.8, 0.6))
