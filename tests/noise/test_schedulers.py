"""Every scheduler of diffusers that the adapters may meet: taken right, or refused by name."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pyflocality as pf
from pyflocality import adapters
from pyflocality.adapters import TableSchedule
from pyflocality.noise.schedules import time_at

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

# diffusers and NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPE = (1, 4, 4)
CLAMPED = 2.0**-24

# Of a single image x0 the noise in a state is known, and a deterministic run keeps it: where a
# scheduler shows its model another noise level than the model takes its time for, it changes.
STRAIGHT = [
    "DDIM", "DDIMParallel", "PNDM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep",
    "UniPCMultistep", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete",
    "CogVideoXDDIM",
]  # fmt: skip
NOISY = [
    "DDPM", "DDPMParallel", "LCM", "TCD", "SASolver", "EulerAncestralDiscrete",
    "KDPM2AncestralDiscrete", "UnCLIP", "CogVideoXDPM",
]  # fmt: skip
OPTIONS = {
    "default": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "log_linear": {"interpolation_type": "log_linear"},
    "offset": {"timestep_spacing": "leading", "steps_offset": 1},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "zero_snr": {"rescale_betas_zero_snr": True},
    "v": {"prediction_type": "v_prediction"},
    "v_zero_snr": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


def image() -> Tensor:
    return 1.6 * torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)) - 0.8


def known(name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters)


def made(name: str, options: dict[str, object]) -> object:
    clip = {"clip_sample": False} if "clip_sample" in known(name) else {}
    return getattr(diffusers, f"{name}Scheduler")(**options, **clip)


def cases(names: list[str]) -> list[tuple[str, str]]:
    return [(n, o) for n in names for o in OPTIONS if set(OPTIONS[o]) <= known(n)]


def run(scheduler: object, steps: int) -> tuple[Tensor, list[Tensor]]:
    """The end of a run from noise, and the noise that the model saw in each state."""
    x0 = image().double()
    model = adapters.as_diffusers(pf.OptimalDenoiser(pf.TrainingSet(image())), scheduler)
    scheduler.set_timesteps(steps)
    start = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    x, seen = start * float(scheduler.init_noise_sigma), []
    fresh = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(2)} if fresh else {}
    for t in scheduler.timesteps:
        shown = x
        if hasattr(scheduler, "scale_model_input"):
            shown = scheduler.scale_model_input(x, t)
        alpha, sigma = model.levels(t)
        seen.append((shown - alpha * x0) / sigma)
        x = scheduler.step(model(shown, t).sample, t, x, **options).prev_sample
    return x, seen


@pytest.mark.parametrize(("name", "option"), cases(STRAIGHT))
def test_the_model_sees_the_noise_level_that_it_takes_its_time_for(name, option):
    # 10 divides T: diffusers' DDIM goes by T // steps, whatever its times are.
    x, seen = run(made(name, OPTIONS[option]), 10)
    keeps = option != "v" or name != "PNDM"
    for noise in seen if keeps else []:
        torch.testing.assert_close(noise, seen[0], rtol=0, atol=3e-3)
    # Some end at their smallest noise level.
    torch.testing.assert_close(x, image().double(), rtol=0, atol=0.1)


@pytest.mark.parametrize(("name", "option"), cases(["EulerDiscrete", "UniPCMultistep"]))
def test_schedulers_that_end_without_noise_give_the_image(name, option):
    x, _ = run(made(name, OPTIONS[option]), 10)
    atol = 0.05 if option == "sigma_min" else 1e-5
    if option != "log_linear":
        torch.testing.assert_close(x, image().double(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", NOISY)
def test_schedulers_with_fresh_noise_give_the_image(name):
    if name == "CogVideoXDPM":
        # Its steps want earlier answers as further arguments.
        table = TableSchedule.of(made(name, {}))
        assert len(table.values) == 1000
        return
    x, _ = run(made(name, {}), 10)
    torch.testing.assert_close(x, image().double(), rtol=0, atol=0.2)


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_a_clamped_end_is_the_end_of_the_table(name):
    scheduler = made(name, {"rescale_betas_zero_snr": True})
    table = TableSchedule.of(scheduler)
    alpha, sigma = table(999)
    assert (alpha**2, sigma**2) == pytest.approx((CLAMPED, 1 - CLAMPED), rel=1e-12)
    # The time before it is noisier, as the scheduler itself has it.
    exact = made("DDIM", {"rescale_betas_zero_snr": True}).alphas_cumprod.double()
    torch.testing.assert_close(table(998)[0] ** 2, exact[998].item(), rtol=1e-6, atol=0)
    ratios = (table(torch.arange(1000))[1] / table(torch.arange(1000))[0]).double()
    assert time_at(table, ratios).tolist() == list(range(1000))
    assert time_at(table, torch.tensor([1e9, 0.0]).double()).tolist() == [998, 0]


def test_an_end_without_signal_is_found_behind_all_levels():
    table = TableSchedule.of(made("DDIM", {"rescale_betas_zero_snr": True}))
    assert table(999) == (0.0, 1.0)
    alpha, sigma = table(torch.arange(999))
    assert time_at(table, sigma / alpha).tolist() == list(range(999))
    far = torch.tensor([1e5, 2.0**24, torch.inf]).double()
    assert time_at(table, far).tolist() == [999] * 3


class Velocity(nn.Module):
    """A network that knows its time, without signal at the end as before it."""

    config = type("Config", (), {"in_channels": 1, "sample_size": 4})()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> object:
        time = (torch.as_tensor(t) / 1000).reshape(-1, 1, 1, 1)
        answer = torch.tanh(self.layer(x) + time) - 0.4 * x
        return type("Output", (), {"sample": answer})()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_network_of_zero_terminal_snr_samples_as_in_diffusers(prediction, clip):
    network = Velocity().double().requires_grad_(False)
    scheduler = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=clip,
    )
    denoiser = adapters.from_diffusers(network, scheduler)
    start = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    found = pf.sample(
        denoiser, x_T=start, schedule=denoiser.takes, steps=10, clip=clip, progress=False
    )
    scheduler.set_timesteps(10)
    assert found.timesteps.tolist() == scheduler.timesteps.tolist()
    assert found.timesteps[0] == 999
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    # diffusers steps by its float32 table.
    torch.testing.assert_close(found.images, x, rtol=0, atol=1e-4)


def test_a_network_of_zero_terminal_snr_with_a_clamped_table():
    network = Velocity().double().requires_grad_(False)
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = diffusers.EulerDiscreteScheduler(**options, timestep_spacing="trailing")
    denoiser = adapters.from_diffusers(network, scheduler)
    start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    found = pf.sample(
        denoiser, x_T=start, schedule=denoiser.takes, steps=10, sampler="euler", clip=False,
        progress=False,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    # At alpha = 1, in float64: the same noise levels, scaled.
    x = start * scheduler.sigmas[0].double().square().add(1).sqrt()
    for t, s, r in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        s, r = s.double(), r.double()
        scaled = x / (s.square() + 1).sqrt()
        v = network(scaled, t).sample
        x0 = (scaled - s * v) / (s.square() + 1).sqrt()
        x = x0 + r / s * (x - x0)
    torch.testing.assert_close(found.images, x, rtol=0, atol=1e-4)


def test_the_spacing_of_a_scheduler_is_that_of_its_schedule():
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
        table = TableSchedule.of(scheduler)
        assert (
            table.spacing == TableSchedule.of(pf.DDPMSchedule(spacing=spacing)).spacing == spacing
        )
        for steps in (1, 7, 10, 501):
            scheduler.set_timesteps(steps)
            assert table.timesteps(steps).tolist() == scheduler.timesteps.tolist()
    assert replace(TableSchedule.of(pf.DDPMSchedule()), spacing="trailing").timesteps(3)[0] == 999
    with pytest.raises(ValueError, match="`spacing` must be one of"):
        TableSchedule((0.5,), "middle")


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("FlowMatchEulerDiscrete", {}, TypeError, "alphas_cumprod.*FlowMatchEulerDiscreteSch"),
        ("FlowMatchHeunDiscrete", {}, TypeError, "FlowMatchHeunDiscreteScheduler"),
        ("EDMEuler", {}, TypeError, "EDMEulerScheduler"),
        ("EDMDPMSolverMultistep", {}, TypeError, "EDMDPMSolverMultistepScheduler"),
        ("CMStochasticIterative", {}, TypeError, "CMStochasticIterativeScheduler"),
        ("IPNDM", {}, TypeError, "IPNDMScheduler"),
        ("SCM", {}, (TypeError, ValueError), "SCMScheduler"),
        ("DDIMInverse", {}, ValueError, "DDIMInverseScheduler.*leads to"),
        (
            "DPMSolverMultistep",
            {"use_flow_sigmas": True},
            ValueError,
            "use_flow_sigmas.*DPMSolverM",
        ),
        ("UniPCMultistep", {"use_flow_sigmas": True}, ValueError, "use_flow_sigmas.*UniPC"),
        ("DEISMultistep", {"use_flow_sigmas": True}, ValueError, "use_flow_sigmas.*DEIS"),
        ("DDPM", {"variance_type": "learned_range"}, ValueError, "variance.*DDPMScheduler"),
        ("DDPM", {"trained_betas": [0.1, 0.0, 0.2]}, ValueError, "DDPMScheduler.*entry 0 to 1"),
        ("EulerDiscrete", {"trained_betas": [0.0, 0.1]}, ValueError, "EulerDiscreteScheduler"),
    ],
)
def test_schedulers_that_cannot_be_are_refused_by_name(name, options, error, words):
    denoiser = pf.OptimalDenoiser(pf.TrainingSet(image()))
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    with pytest.raises(error, match=f"(?s)`schedule`.*{words}"):
        adapters.as_diffusers(denoiser, scheduler)
    if name != "DDIMInverse" and "variance_type" not in options:
        with pytest.raises(error, match=f"(?s)`scheduler`.*{words}"):
            adapters.from_diffusers(Velocity(), scheduler)


def test_times_in_logarithms_of_the_noise_are_refused():
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    )
    with pytest.raises(ValueError, match="`scheduler`.*EulerDiscreteScheduler.*'continuous'"):
        adapters.from_diffusers(Velocity(), scheduler)
    with pytest.raises(ValueError, match="`schedule`.*EulerDiscreteScheduler.*'continuous'"):
        adapters.as_diffusers(pf.OptimalDenoiser(pf.TrainingSet(image())), scheduler)


def test_noise_at_a_time_without_signal_is_refused_by_the_time():
    scheduler = made("DDIM", {"rescale_betas_zero_snr": True})
    model = adapters.as_diffusers(pf.OptimalDenoiser(pf.TrainingSet(image())), scheduler)
    with pytest.raises(ValueError, match="`timestep` 999 of this DDIMScheduler has no signal"):
        model(image(), 999)
    assert torch.isfinite(model(image(), 998).sample).all()


def test_levels_that_times_do_not_tell_need_the_scheduler_that_samples():
    scheduler = made("DPMSolverMultistep", {"use_karras_sigmas": True})
    model = adapters.as_diffusers(pf.OptimalDenoiser(pf.TrainingSet(image())), scheduler)
    with pytest.raises(ValueError, match="`timestep` must be one that the DPMSolverMultistepSche"):
        model(image(), 500)
    scheduler.set_timesteps(8)
    for place, t in enumerate(scheduler.timesteps):
        alpha, sigma = model.levels(t)
        assert (sigma / alpha).item() == pytest.approx(scheduler.sigmas[place].item(), rel=1e-6)
