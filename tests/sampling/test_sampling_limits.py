"""Samplers in the limit of small steps, against the flow and the data's distribution."""

from __future__ import annotations

import pytest
import torch
from sampled_models import Gaussian

from pyflocality.noise import (
    CosineSchedule,
    DDPMSchedule,
    FlowSchedule,
    KarrasSchedule,
)
from pyflocality.sampling import DDIM, sample

SCHEDULES = [DDPMSchedule(), CosineSchedule(), KarrasSchedule(), FlowSchedule()]


def _error_of_flow(sampler, schedule, steps):
    """Distance of the last state from the exact probability-flow map of a Gaussian data set."""
    gaussian = Gaussian()
    x_T = torch.randn(5, 1, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_T = schedule.init_noise_sigma * x_T
    out = sample(
        gaussian,
        schedule=schedule,
        steps=steps,
        sampler=sampler,
        x_T=x_T,
        clip=False,
        progress=False,
    )
    first, last = (schedule(out.timesteps[i].item()) for i in (0, -1))
    return (out.x_t[-1] - gaussian.transport(x_T, first, last)).abs().max().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_heun_converges_to_the_flow_with_the_square_of_the_step(schedule):
    coarse, fine = (_error_of_flow("heun", schedule, steps) for steps in (125, 250))
    assert fine < 2e-3
    assert fine < coarse / 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_converges_to_the_flow_with_the_step(schedule):
    coarse, fine = (_error_of_flow("euler", schedule, steps) for steps in (125, 250))
    assert coarse / 2.6 < fine < coarse / 1.6
    assert _error_of_flow("heun", schedule, 250) < fine / 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_runs_reach_the_data_distribution(schedule):
    """With eta = 1 and many steps the samples of a Gaussian have its mean and variances."""
    gaussian = Gaussian()
    out = sample(
        gaussian,
        4000,
        schedule=schedule,
        steps=800,
        sampler=DDIM(1.0),
        clip=False,
        generator=torch.Generator().manual_seed(3),
        progress=False,
    )
    flat = out.images.flatten(1) - gaussian.mean
    along = flat @ gaussian.vectors
    # Four standard errors of a mean and of a variance, and the bias of the discretisation.
    assert (along.mean(0).abs() < 4 * (gaussian.variance / 4000).sqrt() + 0.02).all()
    assert ((along.var(0) / gaussian.variance).log().abs() < 4 * (2 / 4000) ** 0.5 + 0.04).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_equals_ddim_without_noise_and_clipping(schedule):
    gaussian = Gaussian()
    runs = [
        sample(
            gaussian,
            3,
            schedule=schedule,
            sampler=sampler,
            clip=False,
            generator=torch.Generator().manual_seed(1),
            progress=False,
        )
        for sampler in ("euler", "ddim", DDIM(eta=0.0))
    ]
    for other in runs[1:]:
        assert torch.equal(runs[0].x_t, other.x_t)
        assert torch.equal(runs[0].images, other.images)
