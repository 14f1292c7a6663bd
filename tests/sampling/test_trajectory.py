"""Runs that keep no step: the same images, in the memory of two states."""

from __future__ import annotations

import pytest
import torch
from peak_memory import PeakMemory, peak_of
from sampled_models import Gaussian
from truth import random_images

import pyflocality as pf
from pyflocality.sampling import DDIM, Euler, Heun, Sampler, sample

# What the schedule takes for its levels.
SMALL = 2**14


def denoise(x, sigma, alpha):
    """Answers that do not depend on the batch."""
    return (0.9 * x).clamp(-1.5, 1.5) - 0.1 * sigma


def run(n, trajectory, sampler="ddim", steps=4, batch_size=None, denoiser=denoise, dtype=None):
    generator = torch.Generator().manual_seed(5)
    x_T = torch.randn(n, 2, 3, 4, generator=generator)
    return sample(
        denoiser,
        x_T=x_T if dtype is None else x_T.to(dtype),
        steps=steps,
        sampler=sampler,
        generator=generator,
        batch_size=batch_size,
        progress=False,
        trajectory=trajectory,
    )


@pytest.mark.parametrize("batch_size", [None, 1, 3, 5, 7])
@pytest.mark.parametrize(
    "sampler", ["ddim", "euler", "heun", DDIM(0.5), DDIM(1.0)], ids=lambda one: str(one)
)
def test_the_images_are_those_of_a_run_that_keeps_everything(sampler, batch_size):
    whole, none = run(7, True, sampler), run(7, False, sampler, batch_size=batch_size)
    assert torch.equal(none.images, whole.images)
    assert none.x_t.shape == none.x0.shape == (0, 7, 2, 3, 4)
    assert torch.equal(none.timesteps, whole.timesteps)
    # Nor do batches change what is kept.
    again = run(7, True, sampler, batch_size=batch_size)
    for name in ("images", "x_t", "x0"):
        assert torch.equal(getattr(again, name), getattr(whole, name))


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("answered", [torch.float32, torch.float64])
def test_dtypes_are_those_of_a_run_that_keeps_everything(given, answered, batch_size):
    def answer(x, sigma, alpha):
        return denoise(x, sigma, alpha).to(answered)

    options = {"denoiser": answer, "batch_size": batch_size, "dtype": given}
    whole, none = run(5, True, **options), run(5, False, **options)
    expected = torch.promote_types(given, answered)
    assert {whole.images.dtype, whole.x_t.dtype, whole.x0.dtype} == {expected}
    assert {none.images.dtype, none.x_t.dtype, none.x0.dtype} == {expected}
    assert torch.equal(none.images, whole.images)


class Plain(Sampler):
    """The answer is the next state: a step allocates nothing of its own."""

    def _step(self, predict, x, level, next_level, noise):
        x0, _ = predict(x, level)
        return x0, x0


@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize("batch_size", [None, 128])
def test_a_run_holds_two_states_whatever_the_steps(steps, batch_size):
    """And what one batch takes: here its answer, and that answer clipped."""
    n = 1024
    state = n * 24 * 4
    batch = state if batch_size is None else state * batch_size // n

    def peak(trajectory):
        return peak_of(
            lambda: run(n, trajectory, Plain(), steps, batch_size, lambda x, *_: 1.0 * x)
        )

    # The noise that the test itself draws comes on top.
    assert peak(False) <= state + 2 * state + 3 * batch + SMALL
    # Of each step two states more.
    assert peak(True) - peak(False) == pytest.approx(2 * steps * state, abs=SMALL)


def test_fresh_noise_is_held_once():
    n, state = 1024, 1024 * 24 * 4
    peaks = [peak_of(lambda steps=steps: run(n, False, DDIM(1.0), steps, 128)) for steps in (2, 20)]
    assert peaks[0] == pytest.approx(peaks[1], abs=SMALL)
    # The given noise, its copy, the next state, fresh noise, and a few batches of an eighth.
    assert peaks[1] <= 4 * state + 10 * state // 8 + SMALL


def test_what_the_denoiser_was_given_stays_as_it_was():
    """Also where it takes hold of it, and where the batches are small."""
    held, copies = [], []

    def take(x, sigma, alpha):
        held.append(x)
        copies.append(x.clone())
        return 0.5 * x

    out = run(5, False, batch_size=2, denoiser=take)
    out.images.zero_()
    assert all(torch.equal(one, copy) for one, copy in zip(held, copies, strict=True))


def test_the_state_that_is_given_is_never_written_to():
    x_T = torch.ones(2, 1, 2, 2)
    out = sample(
        lambda x, sigma, alpha: x.mul_(0.5), x_T=x_T, steps=3, trajectory=False, progress=False
    )
    out.images.zero_()
    assert (x_T == 1).all()


@pytest.mark.parametrize("sampler", [DDIM(), Euler(), Heun()])
def test_models_of_the_library(sampler):
    data = pf.TrainingSet(
        random_images(torch.Generator().manual_seed(1), 40, (1, 5, 5), torch.uint8)
    )
    for model in (pf.OptimalDenoiser(data), pf.PCALocalityDenoiser(data, 0.1), Gaussian()):
        runs = [
            sample(
                model,
                6,
                steps=5,
                sampler=sampler,
                generator=torch.Generator().manual_seed(2),
                progress=False,
                trajectory=trajectory,
            )
            for trajectory in (True, False)
        ]
        assert torch.equal(runs[0].images, runs[1].images)


def test_a_compiled_denoiser():
    compiled = torch.compile(denoise, backend="eager")
    whole, none = (run(5, trajectory, "heun", 3, 2, compiled) for trajectory in (True, False))
    assert torch.equal(whole.images, none.images)
    assert torch.equal(none.images, run(5, False, "heun", 3).images)


@pytest.mark.parametrize("trajectory", [-1, 1, 1.0, "yes", None, torch.tensor(True)])
def test_what_is_no_flag_is_refused_before_work(trajectory):
    with pytest.raises((TypeError, ValueError), match="`trajectory`"), PeakMemory() as memory:
        run(2, trajectory, denoiser=lambda *_: pytest.fail("was asked"))
    # The noise of the test.
    assert memory.peak <= 1024


def test_more_steps_than_memory_holds_are_refused_where_they_are_kept():
    """A run of a million steps that keeps nothing needs no more than one of two."""
    schedule = pf.KarrasSchedule()
    big = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**13, 2**13)

    def attempt(trajectory):
        return sample(
            lambda *_: (_ for _ in ()).throw(RuntimeError("asked")),
            x_T=big,
            schedule=schedule,
            steps=10**6,
            trajectory=trajectory,
            progress=False,
        )

    with pytest.raises(ValueError, match="`steps` must be at most"):
        attempt(True)
    with pytest.raises(RuntimeError, match="asked"):
        attempt(False)
