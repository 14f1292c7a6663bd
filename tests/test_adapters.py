"""Networks of other libraries as denoisers, and denoisers in their samplers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import pyflocality as pf
from pyflocality import adapters
from pyflocality.adapters import TableSchedule

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def denoiser():
    # Smooth images: the posteriors of pure noise jump, and a run would magnify its rounding.
    coarse = torch.randn(60, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    images = nn.functional.interpolate(coarse / 2, size=(8, 8), mode="bilinear").clamp(-1, 1)
    return pf.LocalDenoiser(pf.TrainingSet(images), 5)


def noise(batch=2, shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, *shape, generator=generator).to(dtype)


def tiny_unet(diffusers, attention=False, **options):
    torch.manual_seed(0)
    blocks = ("DownBlock2D", "AttnDownBlock2D" if attention else "DownBlock2D")
    up = ("AttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D")
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=blocks,
        up_block_types=up,
        **({"out_channels": 3} | options),
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_unet_in_our_sampler_and_in_diffusers_gives_the_same(diffusers, prediction):
    unet = tiny_unet(diffusers)
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, beta_schedule="squaredcos_cap_v2"
    )
    ours = adapters.from_diffusers(unet, scheduler)
    assert ours.image_shape == SHAPE
    found = pf.sample(ours, x_T=noise(), schedule=ours.takes, steps=5, progress=False)
    scheduler.set_timesteps(5)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(found.images, x, rtol=0, atol=1e-5)
    assert found.timesteps.tolist() == scheduler.timesteps.tolist()


def test_unet_with_learned_variance_and_classes(diffusers):
    unet = tiny_unet(diffusers, out_channels=6, num_class_embeds=4)
    scheduler = diffusers.DDPMScheduler()
    denoiser = adapters.from_diffusers(unet, scheduler, class_labels=2)
    t = torch.tensor([10, 500])
    alpha, sigma = denoiser.takes(t)
    found = denoiser(noise(), sigma, alpha)
    output = unet(noise(), t, class_labels=torch.tensor([2, 2])).sample[:, :3]
    expected = pf.noise.x0_from_noise(noise(), output, alpha, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_jacobian_of_a_unet_with_attention(diffusers):
    unet = tiny_unet(diffusers, attention=True).double()
    denoiser = adapters.from_diffusers(unet, diffusers.DDIMScheduler())
    x, u = noise(1, dtype=torch.float64), noise(3, dtype=torch.float64)[:, None]
    full = torch.autograd.functional.jacobian(lambda x: denoiser(x, 0.6, 0.8), x)
    jv, g = denoiser.jvp(x, u, 0.6, 0.8)[1], denoiser.vjp(x, u, 0.6, 0.8)
    torch.testing.assert_close(jv, torch.einsum("bchwaijk,naijk->nbchw", full, u))
    torch.testing.assert_close(g, torch.einsum("bchwaijk,nbchw->naijk", full, u))


# Its table is in float32: at t = 0, where it holds 1 - 1e-4, that moves sigma by 1e-4 of itself,
# and x0 with it unless the model reads the same table.
@pytest.mark.parametrize(("own_schedule", "tolerance"), [(False, 1e-5), (True, 2e-4)])
def test_our_denoiser_in_the_ddim_loop_of_diffusers(diffusers, denoiser, own_schedule, tolerance):
    scheduler = diffusers.DDIMScheduler()
    model = adapters.as_diffusers(denoiser, pf.DDPMSchedule() if own_schedule else scheduler)
    scheduler.set_timesteps(10)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    found = pf.sample(denoiser, x_T=noise(), steps=10, progress=False)
    torch.testing.assert_close(x, found.images, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_our_denoiser_in_a_pipeline(diffusers, denoiser, name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    model = adapters.as_diffusers(denoiser, scheduler)
    pipeline = getattr(diffusers, f"{name}Pipeline")(unet=model, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    made = pipeline(2, generator=generator, num_inference_steps=4, output_type="np").images
    # The same noise, and for DDPM the same fresh noise at every step.
    start = noise()
    if name == "DDIM":
        expected = pf.sample(denoiser, x_T=start, steps=4, progress=False).images
    else:
        scheduler.set_timesteps(4)
        again = torch.Generator().manual_seed(2)
        expected = torch.randn(2, *SHAPE, generator=again)
        for t in scheduler.timesteps:
            alpha, sigma = TableSchedule.of(scheduler)(t)
            x0 = denoiser(expected, sigma, alpha)
            predicted = pf.noise.noise_from_x0(expected, x0, alpha, sigma)
            expected = scheduler.step(predicted, t, expected, generator=again).prev_sample
    shown = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(made), shown, rtol=0, atol=1e-5)


def test_schedulers_that_visit_times_between_whole_ones(diffusers, denoiser):
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    model = adapters.as_diffusers(denoiser, scheduler)
    assert any(t % 1 for t in scheduler.timesteps.tolist())
    x = noise() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    # The same in our terms: Euler steps at alpha = 1.
    y, levels = noise() * scheduler.init_noise_sigma, scheduler.sigmas.tolist()
    for level, following in zip(levels, levels[1:], strict=False):
        x0 = denoiser(y, level)
        y = x0 + following / level * (y - x0)
    torch.testing.assert_close(x, y, rtol=0, atol=2e-4)


def test_diffusers_model_is_a_module(denoiser):
    model = adapters.as_diffusers(denoiser, pf.DDPMSchedule())
    alpha, sigma = pf.DDPMSchedule()(torch.tensor([3, 700]))
    x = noise(dtype=torch.float64)
    expected = pf.noise.noise_from_x0(x, denoiser(x, sigma, alpha), alpha, sigma)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for call in (model, twin):
        torch.testing.assert_close(
            call(x, torch.tensor([3, 700])).sample, expected, rtol=0, atol=1e-12
        )
    (one,) = model(x[:1], 3, return_dict=False)
    torch.testing.assert_close(one, expected[:1], rtol=0, atol=1e-12)
    assert model.config.sample_size == (8, 8) and model.config.in_channels == 3
    assert model.device == torch.device("cpu") and model.dtype == torch.float32


def test_table_schedule():
    ddpm = pf.DDPMSchedule()
    table = TableSchedule.of(ddpm)
    times = torch.arange(1000)
    for found, expected in zip(table(times), ddpm(times), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert table.timesteps(10).tolist() == ddpm.timesteps(10).tolist()
    assert table == TableSchedule.of(ddpm) and hash(table) == hash(TableSchedule.of(ddpm))
    # Between whole times sigma / alpha is linear, and alpha^2 + sigma^2 is 1.
    alpha, sigma = table(torch.tensor([41.25, 999.0, 0.5]).double())
    ratio = (ddpm(times)[1] / ddpm(times)[0]).tolist()
    expected = [0.75 * ratio[41] + 0.25 * ratio[42], ratio[999], (ratio[0] + ratio[1]) / 2]
    assert (sigma / alpha).tolist() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3).double())
    for values, message in (
        ((), "must fall within"),
        ((0.5, 0.6), "must fall within"),
        ((1.0, 0.5), "must fall within"),
        ((0.5, -0.1), "must fall within"),
        ((math.nan,), "`values` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            TableSchedule(values)
    with pytest.raises(ValueError, match="`t` must lie in"):
        table(1000)
    with pytest.raises(ValueError, match="`steps` must be at most the schedule's 1000"):
        table.timesteps(1001)


def test_a_table_that_ends_without_signal_is_never_divided_by(diffusers):
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    denoiser = adapters.from_diffusers(tiny_unet(diffusers), scheduler)
    assert denoiser.takes(999)[0] == 0
    assert torch.isfinite(denoiser(noise(), 1e6, 1.0)).all()


class Edm(nn.Module):
    """Stand-in of EDM's preconditioned networks: attributes, and D(x, sigma[, labels])."""

    img_channels, img_resolution = 3, 8

    def forward(self, x, sigma, class_labels=None):
        column = sigma.reshape(-1, 1, 1, 1)
        label = 0 if class_labels is None else class_labels.sum(1).reshape(-1, 1, 1, 1)
        return x / (1 + column**2) + label


def test_edm_networks():
    denoiser = adapters.from_edm(Edm())
    x = noise(dtype=torch.float64)
    sigma, alpha = torch.tensor([0.5, 3.0]).double(), torch.tensor([1.0, 0.4]).double()
    ratio = (sigma / alpha).reshape(-1, 1, 1, 1)
    expected = x / alpha.reshape(-1, 1, 1, 1) / (1 + ratio**2)
    torch.testing.assert_close(denoiser(x, sigma, alpha), expected)
    labelled = adapters.from_edm(Edm(), class_labels=torch.tensor([[0.0, 1.0, 0.5]]))
    torch.testing.assert_close(labelled(x, sigma, alpha), expected + 1.5)
    with pytest.raises(TypeError, match="`image_shape` must be given"):
        adapters.from_edm(nn.Identity())


def test_a_denoiser_is_a_k_diffusion_model(denoiser):
    sampling = pytest.importorskip(
        "k_diffusion.sampling", reason="k-diffusion and all it imports are not installed"
    )
    schedule = pf.KarrasSchedule(0.01, 20.0)
    sigmas = sampling.get_sigmas_karras(6, 0.01, 20.0)
    for name, function in (("euler", sampling.sample_euler), ("heun", sampling.sample_heun)):
        found = function(denoiser, 20 * noise(), sigmas, disable=True)
        expected = pf.sample(
            denoiser, x_T=20 * noise(), schedule=schedule, steps=6, sampler=name, clip=False,
            progress=False,
        )  # fmt: skip
        torch.testing.assert_close(found, expected.images, rtol=0, atol=1e-4)


def test_the_call_of_a_k_diffusion_model(denoiser):
    # Its samplers call model(x, sigma) with sigma [B] in float32, and step by (x - x0) / sigma.
    schedule = pf.KarrasSchedule(0.01, 20.0)
    x = 20 * noise()
    levels = [*schedule.timesteps(6).tolist(), 0.0]
    for level, following in zip(levels, levels[1:], strict=False):
        x0 = denoiser(x, level * torch.ones(2))
        x = x + (x - x0) / level * (following - level)
    expected = pf.sample(
        denoiser, x_T=20 * noise(), schedule=schedule, steps=6, sampler="euler", clip=False,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(x, expected.images, rtol=0, atol=1e-4)


class LinearPath:
    """Stand-in of azula's schedules: a function of t, 0 at the data."""

    def __call__(self, t):
        return 1 - 0.9 * t, 0.01 + t


def test_our_denoiser_in_azula(denoiser):
    sample = pytest.importorskip("azula.sample", reason="azula is not installed")
    noises = pytest.importorskip("azula.noise", reason="azula is not installed")
    schedule = noises.VPSchedule()
    model = adapters.as_azula(denoiser, schedule)
    found = sample.DDIMSampler(model, steps=6, silent=True)(noise())
    x, times = noise(), torch.linspace(1, 0, 7)
    for t, s in zip(times, times[1:], strict=False):
        (alpha, sigma), (next_alpha, next_sigma) = schedule(t), schedule(s)
        x0 = denoiser(x, sigma, alpha)
        x = next_alpha * x0 + next_sigma * (x - alpha * x0) / sigma
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


def test_the_call_of_an_azula_denoiser(denoiser):
    model = adapters.as_azula(denoiser, LinearPath())
    x = noise(dtype=torch.float64)
    for t in (torch.tensor(0.3), torch.tensor([0.3, 0.8])):
        alpha, sigma = LinearPath()(t)
        assert torch.equal(model(x, t).mean, denoiser(x, sigma, alpha))
    assert isinstance(model.schedule, LinearPath)


def test_wrong_arguments_are_refused(denoiser):
    class Flow:
        """A scheduler without a table."""

    class Predicts:
        """A scheduler whose model predicts something else."""

        alphas_cumprod = torch.tensor([0.9, 0.5])
        config = type("Config", (), {"prediction_type": "flow"})()

    class Unet(nn.Module):
        config = type("Config", (), {"in_channels": 3, "sample_size": 8})()

    for call, error, message in (
        (lambda: adapters.from_diffusers(nn.Identity(), Predicts()), TypeError, "`unet` must be"),
        (lambda: adapters.from_diffusers(Unet(), Flow()), TypeError, "`scheduler` must be a diff"),
        (lambda: adapters.from_diffusers(Unet(), Predicts()), ValueError, "must predict one of"),
        (lambda: adapters.as_diffusers(Unet(), Predicts()), TypeError, "`denoiser` must be a Den"),
        (lambda: adapters.as_diffusers(denoiser, Predicts()), ValueError, "must predict one of"),
        (lambda: adapters.as_diffusers(denoiser, pf.KarrasSchedule()), TypeError, "`schedule`"),
        (lambda: adapters.as_azula(denoiser, 3), TypeError, "`schedule` must be a function"),
        (lambda: adapters.as_azula(Unet(), LinearPath()), TypeError, "`denoiser`"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("network", "labels", "error", "name"),
    [
        (3, torch.zeros(1, 3), TypeError, "`network`"),
        (nn.Identity(), [1.0], TypeError, "`class_labels`"),
        (nn.Identity(), torch.zeros(3), ValueError, "`class_labels`"),
        (nn.Identity(), torch.zeros(2, 3), ValueError, "`class_labels`"),
    ],
)
def test_wrong_networks_and_labels_are_refused(network, labels, error, name):
    with pytest.raises(error, match=name):
        adapters.from_edm(network, (1, 4, 5), class_labels=labels)
