"""Stochastic ascent: the published iteration, its noise level, and where it arrives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from truth import random_images

import pyflocality as pf
from pyflocality.ascent import ascend


@pytest.fixture(scope="module")
def data():
    return pf.TrainingSet(
        random_images(torch.Generator().manual_seed(1), 40, (1, 8, 8), torch.uint8)
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Shrink(pf.Denoiser):
    """A blind denoiser of data around 0 of variance 1 / 9, which counts what it is told."""

    def __init__(self):
        super().__init__((1, 4, 4))
        self.told = []

    @property
    def device(self):
        return torch.device("cpu")

    def _denoise(self, x, levels):
        self.told.append(levels.tensors(len(x))[1].clone())
        power = x.square().flatten(1).mean(1).reshape(-1, 1, 1, 1)
        return x * (1 / 9) / power.clamp(min=1 / 9)


def test_equals_the_published_iteration():
    """Written out in NumPy for a blind denoiser and one image, with the same noise."""
    denoiser, h0, beta = Shrink(), 0.1, 0.3
    found = ascend(
        denoiser, 1, step=h0, beta=beta, stop_sigma=0.1, generator=seeded(), progress=False
    )
    generator = seeded()

    def normal():
        return torch.randn(1, 1, 4, 4, generator=generator).double().numpy()

    y, t, levels = 2.0 * normal(), 1, []
    while True:
        f = y / 9 / max((y**2).mean(), 1 / 9)
        d = f - y
        levels.append(np.sqrt((d**2).mean()))
        if levels[-1] <= 0.1:
            break
        h = h0 * t / (1 + h0 * (t - 1))
        gamma = np.sqrt((1 - beta * h) ** 2 - (1 - h) ** 2) * levels[-1]
        y, t = y + h * d + gamma * normal(), t + 1
    (stage,) = found.stages
    assert t > 6 and stage.steps.tolist() == [t - 1]
    np.testing.assert_allclose(stage.sigma[:, 0].numpy(), levels, rtol=1e-5)
    np.testing.assert_allclose(found.images.numpy(), f, rtol=0, atol=1e-6)
    # It is told what the step before left, at first the start.
    expected = [2.0] + [
        level * (1 - beta * h0 * (i + 1) / (1 + h0 * i)) for i, level in enumerate(levels[:-1])
    ]
    np.testing.assert_allclose(torch.cat(denoiser.told).numpy(), expected, rtol=1e-5)


def test_the_optimal_denoiser_recites_the_set(data):
    out = ascend(
        pf.OptimalDenoiser(data), 6, step=0.05, beta=0.2, generator=seeded(), progress=False
    )
    gaps = torch.cdist(out.images.flatten(1), data.values().flatten(1)).amin(1)
    assert gaps.max() < 0.02
    (stage,) = out.stages
    # The noise level falls as it should, by (1 - beta h) a step, within what noise allows.
    late = stage.sigma[-12:-2, 0]
    rates = late[1:] / late[:-1]
    h = stage.steps[0] * 0.05 / (1 + 0.05 * (stage.steps[0] - 1))
    assert float(rates.mean()) == pytest.approx(float(1 - 0.2 * h), abs=0.03)
    assert (stage.sigma[-1] <= 0.02).all()


def test_coarse_to_fine_recites_the_set_where_windows_cover_it(data):
    # A narrow condition: at the default the details may decide for another image's while noisy.
    model = pf.MultiscaleDenoiser(data, 2, 7, bandwidth=0.1)
    out = ascend(model, 4, step=0.05, beta=0.2, generator=seeded(), progress=False)
    assert [stage.images.shape[1:] for stage in out.stages] == [(1, 2, 2), (3, 2, 2), (3, 4, 4)]
    assert torch.cdist(out.images.flatten(1), data.values().flatten(1)).amin(1).max() < 0.05
    # The stages are the image's own bands.
    low, details = pf.wavelets.decompose(out.images, 2)
    torch.testing.assert_close(low / 4, out.stages[0].images, rtol=0, atol=1e-5)
    torch.testing.assert_close(details[1] / 4, out.stages[1].images, rtol=0, atol=1e-5)
    torch.testing.assert_close(details[0] / 2, out.stages[2].images, rtol=0, atol=1e-5)


def test_without_levels_it_is_the_ascent_of_the_global_model(data):
    options = {"step": 0.1, "beta": 0.5, "progress": False}
    one = ascend(pf.MultiscaleDenoiser(data, 0, 1), 3, generator=seeded(), **options)
    two = ascend(pf.OptimalDenoiser(data), 3, generator=seeded(), **options)
    assert torch.equal(one.images, two.images)


def test_the_generator_decides_and_beta_one_adds_no_noise(data):
    denoiser = pf.LocalDenoiser(data, 3)
    options = {"step": 0.1, "progress": False}
    first, again, other = (
        ascend(denoiser, 2, beta=0.5, generator=seeded(seed), **options).images
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    # With beta = 1 all that is drawn is the start: the level falls by 1 - h, whatever comes.
    shrink = Shrink()
    out = ascend(shrink, 1, beta=1.0, stop_sigma=0.1, generator=seeded(), **options)
    y = 2.0 * torch.randn(1, 1, 4, 4, generator=seeded())
    for t in range(1, int(out.stages[0].steps) + 1):
        h = 0.1 * t / (1 + 0.1 * (t - 1))
        y = y + h * (shrink(y, 1.0) - y)
    torch.testing.assert_close(out.images, shrink(y, 1.0))


def test_gives_up_with_a_warning(data):
    with pytest.warns(UserWarning, match="2 of 2 images have not arrived at `stop_sigma` 0.02"):
        out = ascend(pf.OptimalDenoiser(data), 2, max_steps=3, generator=seeded(), progress=False)
    assert out.stages[0].sigma.shape == (3, 2) and out.stages[0].steps.tolist() == [3, 3]


WRONG = {
    "denoiser": ({"denoiser": lambda x, s: x}, TypeError, "`denoiser` must be a Denoiser"),
    "n": ({"n": 0}, ValueError, "`n` must be at least 1"),
    "step": ({"step": 1.5}, ValueError, r"`step` must be in \(0, 1\]"),
    "beta": ({"beta": 0.0}, ValueError, "`beta`"),
    "stop": ({"stop_sigma": 2.0}, ValueError, "`stop_sigma` must be below"),
    "steps": ({"max_steps": 0}, ValueError, "`max_steps`"),
    "generator": ({"generator": 3}, TypeError, "`generator`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, data):
    options, error, message = WRONG[case]
    options = {"denoiser": pf.OptimalDenoiser(data), "progress": False, **options}
    with pytest.raises(error, match=message):
        ascend(options.pop("denoiser"), **options)


def test_several_pyramids_are_refused(data):
    model = pf.MultiscaleDenoiser(data, 1, 3, shifts=2)
    with pytest.raises(ValueError, match="`denoiser` must have one pyramid.*shifts=2"):
        ascend(model, 1, progress=False)
