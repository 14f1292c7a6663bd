"""Samplers against diffusers and the runs of the published codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sampled_models import Gaussian, _step

from pyflocality.noise import (
    CosineSchedule,
    DDPMSchedule,
    KarrasSchedule,
)
from pyflocality.sampling import DDIM, sample


class Replay:
    """Answers with a recorded sequence and checks that it is asked the recorded questions."""

    def __init__(self, states, answers, levels=None, atol=1e-5, rtol=0.0):
        self.states, self.answers, self.levels = states, answers, levels
        self.close = {"atol": atol, "rtol": rtol}
        self.calls = 0

    def __call__(self, x, sigma, alpha):
        np.testing.assert_allclose(x, self.states[self.calls], **self.close)
        if self.levels is not None:
            assert (alpha, sigma) == pytest.approx(self.levels[self.calls], rel=1e-6)
        self.calls += 1
        return torch.from_numpy(self.answers[self.calls - 1])


def optimal(images):
    """Posterior mean over a few images, in the plainest torch."""

    def denoise(x, sigma, alpha):
        differences = x[:, None] - alpha * images.to(x)
        logits = -differences.square().flatten(2).sum(2) / (2 * sigma**2)
        return torch.einsum("bn,nchw->bchw", torch.softmax(logits, 1), images.to(x))

    return denoise


def local(images, windows):
    """Posterior mean per pixel over its window, with one window size per call."""
    sizes = iter(windows)

    def denoise(x, sigma, alpha):
        k = next(sizes)
        differences = (x[:, None] - alpha * images.to(x)).square().sum(2)
        sums = F.conv2d(
            differences.flatten(0, 1)[:, None], torch.ones(1, 1, k, k).to(x), padding=k // 2
        )
        logits = -sums.reshape(differences.shape) / (2 * sigma**2)
        return torch.einsum("bnhw,nchw->bchw", torch.softmax(logits, 1), images.to(x))

    return denoise


def as_images(array):
    return torch.from_numpy(array).double() / 127.5 - 1


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers comes with the extra [test]")


def _their_scheduler(diffusers, steps, clip, *, double=False):
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=clip)
    scheduler.set_timesteps(steps)
    if double:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 10])
def test_every_ddim_step_is_diffusers(diffusers, clip, eta, steps, step_inputs):
    """Given their formula in float64, ours agrees to rounding at every step."""
    x, x0, noise = step_inputs
    scheduler = _their_scheduler(diffusers, steps, clip, double=True)
    schedule = DDPMSchedule()
    levels = [schedule(t) for t in schedule.timesteps(steps).tolist()] + [schedule.final]
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(x0, t, x, eta=eta, variance_noise=noise).prev_sample
        ours = _step(DDIM(eta), x, x0, levels[i], levels[i + 1], clip=clip, noise=noise)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_run_with_a_seed_is_diffusers(diffusers, clip, eta):
    """Their float32 loop and our `sample` see the same noise from the same generator."""
    gaussian = Gaussian((3, 4, 4), dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    scheduler = _their_scheduler(diffusers, 10, clip)
    state = torch.randn(6, 3, 4, 4, generator=generator)
    states = []
    for t in scheduler.timesteps:
        states.append(state)
        alpha = scheduler.alphas_cumprod[t].item() ** 0.5
        x0 = gaussian(state, (1 - alpha**2) ** 0.5, alpha)
        state = scheduler.step(x0, t, state, eta=eta, generator=generator).prev_sample
    out = sample(
        gaussian,
        6,
        sampler=DDIM(eta),
        clip=clip,
        generator=torch.Generator().manual_seed(5),
        progress=False,
    )
    assert out.images.dtype == torch.float32
    assert out.x0.abs().max() > 1.2
    torch.testing.assert_close(out.x_t, torch.stack(states), rtol=0, atol=2e-5)
    torch.testing.assert_close(out.images, state, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["locality_public_mnist10.npz", "locality_public_cifar8.npz"])
@pytest.mark.parametrize("model", ["optimal", "wiener", "pca_locality", "pca_signed", "nearest"])
def test_published_ddim_runs(golden, name, model):
    """Every state of the ten-step runs, given the recorded answers.

    Their noise direction takes sqrt(1 - alpha^2 + 1e-8), which is 3e-6 from ours at most. They
    publish the last answer before it is clipped: our `x0[-1]`.
    """
    arrays = golden(name)
    states, answers = arrays[f"{model}_traj_xt"], arrays[f"{model}_traj_x0"]
    replay = Replay(states, answers)
    out = sample(replay, x_T=torch.from_numpy(arrays["x_T"]), progress=False)
    assert replay.calls == 10
    np.testing.assert_allclose(out.x_t, states, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out.x0, answers)
    np.testing.assert_array_equal(out.timesteps, arrays["timesteps"])
    np.testing.assert_array_equal(out.x0[-1], arrays[f"{model}_sample"])
    np.testing.assert_allclose(out.images, arrays[f"{model}_sample"].clip(-1, 1), rtol=0, atol=1e-6)


def test_the_published_wiener_run_leaves_the_range(golden):
    """Otherwise the runs above would not see what clipping does."""
    assert np.abs(golden("locality_public_mnist10.npz")["wiener_traj_x0"]).max() > 1.3


@pytest.mark.parametrize(("sampler", "theirs"), [("euler", "euler"), ("heun", "huen")])
def test_published_karras_runs(golden, sampler, theirs):
    """Every denoiser call of the Euler and Heun runs, given the recorded answers."""
    arrays = golden("pspc_public_sampler_cifar16.npz")
    levels = [(1.0, float(t)) for t in arrays[f"{theirs}_call_t"]]
    states, answers = arrays[f"{theirs}_call_z"], arrays[f"{theirs}_call_x0"]
    replay = Replay(states, answers, levels, atol=1e-5, rtol=1e-6)
    out = sample(
        replay,
        schedule=KarrasSchedule(),
        steps=6,
        sampler=sampler,
        x_T=torch.from_numpy(arrays["z_T"]),
        clip=False,
        progress=False,
    )
    assert replay.calls == len(levels) == (6 if sampler == "euler" else 11)
    np.testing.assert_allclose(out.images, arrays[f"{theirs}_final"], rtol=0, atol=1e-5)
    # The correction of a Heun step is the call between the starts of two steps.
    np.testing.assert_array_equal(out.x0, answers[:: 1 if sampler == "euler" else 2])


@pytest.mark.parametrize(("sampler", "theirs"), [("euler", "euler"), ("heun", "huen")])
def test_published_karras_runs_of_the_optimal_denoiser(golden, sampler, theirs):
    arrays = golden("pspc_public_sampler_cifar16.npz")
    out = sample(
        optimal(as_images(arrays["images_u8"])),
        schedule=KarrasSchedule(),
        steps=6,
        sampler=sampler,
        x_T=torch.from_numpy(arrays["z_T"]).double(),
        clip=False,
        progress=False,
    )
    np.testing.assert_allclose(out.images, arrays[f"empirical_{theirs}_final"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", ["ideal", "ls"])
def test_published_cosine_runs(golden, model):
    """The published 20-step runs visit 19 times; their float32 noise is up to 1e-3."""
    arrays = golden("kamb_public_machine_mnist60.npz")
    images = as_images(arrays["images_u8"])
    windows = arrays["scales"][:0:-1].tolist()
    denoiser = optimal(images) if model == "ideal" else local(images, windows)
    out = sample(
        denoiser,
        schedule=CosineSchedule(),
        steps=19,
        x_T=torch.from_numpy(arrays["x_T"]).double(),
        progress=False,
    )
    np.testing.assert_allclose(out.timesteps, arrays["t_visited"], rtol=1e-6)
    np.testing.assert_allclose(out.x_t[:, 0], arrays[f"{model}_traj_xt"][0], rtol=0, atol=1e-3)
    np.testing.assert_allclose(out.images, arrays[f"{model}_final"], rtol=0, atol=1e-3)
