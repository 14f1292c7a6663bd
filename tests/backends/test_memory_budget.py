"""The memory budget holds what it says, or the call is refused and the least is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peak_memory import peak_of
from truth import random_images

import pyflocality as pf
from pyflocality import ops

SHAPE = (3, 8, 8)
D, COUNT, BATCH = 192, 600, 2


def calls() -> dict[str, Callable[..., object]]:
    """Every operation over a set that is larger than the budgets, as a function of its options."""
    generator = torch.Generator().manual_seed(0)
    images = random_images(generator, COUNT, SHAPE, torch.uint8)
    x = images[:BATCH].float() / 127.5 - 1
    u = torch.randn(2, BATCH, *SHAPE, generator=generator)
    mask = torch.rand(D, D, generator=generator) < 0.1
    soft = torch.rand(30, D, generator=generator)
    return {
        "global": lambda **o: ops.global_posterior_mean(x, images, 0.5, **o),
        "global_jvp": lambda **o: ops.global_posterior_jvp(x, u, images, 0.5, **o),
        "window": lambda **o: ops.window_posterior_mean(x, images, 5, 0.5, **o),
        "window_jvp": lambda **o: ops.window_posterior_jvp(x, u, images, 5, 0.5, **o),
        "window_vjp": lambda **o: ops.window_posterior_vjp(x, u, images, 5, 0.5, **o),
        "masked": lambda **o: ops.masked_posterior_mean(x, images, mask, 0.5, **o),
        "masked_jvp": lambda **o: ops.masked_posterior_jvp(x, u, images, mask, 0.5, **o),
        "masked_vjp": lambda **o: ops.masked_posterior_vjp(x, u, images, mask, 0.5, **o),
        "filtered": lambda **o: ops.filtered_posterior_mean(x, images, soft, soft, 0.5, **o),
        "filtered_jvp": lambda **o: ops.filtered_posterior_jvp(x, u, images, soft, soft, 0.5, **o),
        "filtered_vjp": lambda **o: ops.filtered_posterior_vjp(x, u, images, soft, soft, 0.5, **o),
        "patch_set": lambda **o: ops.patch_set_mean(x, images, 4, 0.5, **o),
        "nearest": lambda **o: ops.nearest_images(x, images, k=3, **o),
    }


@pytest.mark.parametrize("name", calls())
def test_tensors_of_the_reference_stay_within_the_budget(name):
    """The chunk before lived on while the next one was made, and masks were not counted."""
    run = calls()[name]
    # The nearest images are looked at in float64, some thousand values at a time.
    budget = 4 * 2**20 if name == "nearest" else 2**20
    peak = peak_of(lambda: run(backend="reference", memory_budget=budget))
    assert budget / 10 < peak < 1.02 * budget


def test_patches_at_all_positions_stay_within_the_budget():
    images = random_images(torch.Generator().manual_seed(0), 60, (3, 6, 6), torch.uint8)
    x, budget = images[:2].float() / 127.5 - 1, 2**17
    u = torch.randn(2, 2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    given = (images, 5, 0.5)
    for run in (
        lambda **o: ops.equivariant_posterior_mean(x, *given, **o),
        lambda **o: ops.equivariant_posterior_jvp(x, u, *given, **o),
        lambda **o: ops.equivariant_posterior_vjp(x, u, *given, **o),
    ):
        peak = peak_of(lambda run=run: run(backend="reference", memory_budget=budget))
        assert budget / 10 < peak < 1.02 * budget


def test_the_least_is_named():
    shape, values = (3, 40, 40), 4800
    images = random_images(torch.Generator().manual_seed(0), 3, shape, torch.uint8)
    x = images[:1].float() / 127.5 - 1
    weights = torch.eye(values, dtype=torch.bool)
    options = {"backend": "reference", "memory_budget": "64MB"}
    # Two dense matrices of weights, and the masks that they come from.
    least = -(-10 * values**2 // 2**20)
    with pytest.raises(ValueError, match=f"`memory_budget` must be at least {least}MB for this"):
        ops.filtered_posterior_mean(x, images, weights, weights, 0.5, **options)
    options["memory_budget"] = f"{least + 1}MB"
    ops.filtered_posterior_mean(x, images, weights, weights, 0.5, **options)


def test_masks_that_exceed_the_budget_are_taken_by_tiles():
    shape, values = (3, 40, 40), 4800
    images = random_images(torch.Generator().manual_seed(0), 3, shape, torch.uint8)
    x = images[:1].float() / 127.5 - 1
    near = (torch.arange(values) - torch.arange(values)[:, None]).abs() < 9
    expected = ops.masked_posterior_mean(x.double(), images, near, 0.5, backend="reference")

    def run() -> None:
        found = ops.masked_posterior_mean(
            x, images, near, 0.5, backend="reference", memory_budget="32MB"
        )
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)

    # As a whole the weights are 92 MB of numbers, made of 23 MB of bytes.
    assert 2**23 < peak_of(run) < 2**25


def test_small_calls_do_with_any_budget():
    images = random_images(torch.Generator().manual_seed(0), 20, SHAPE, torch.uint8)
    x = images[:1].float() / 127.5 - 1
    data = pf.TrainingSet(images)
    expected = pf.LocalDenoiser(data, 3, backend="reference")(x, 0.5)
    found = pf.LocalDenoiser(data, 3, backend="reference", memory_budget=1)(x, 0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def decomposing(data: pf.TrainingSet, budget: str | None) -> dict[str, Callable[[], object]]:
    """What makes moments and eigenvectors of a set, within a budget."""
    x = torch.zeros(1, *data.image_shape)
    return {
        "certified": lambda: pf.CertifiedSubset(pf.OptimalDenoiser(data, memory_budget=budget))(
            x, 0.5
        ),
        "pca": lambda: pf.PCALocalityDenoiser(data, memory_budget=budget)(x, 0.5),
    }


def test_moments_of_a_given_budget_are_refused_before_work(monkeypatch):
    """D = 3,072 took 449 MB at a budget of 64 MB."""
    shape = (3, 32, 32)
    images = random_images(torch.Generator().manual_seed(0), 4, shape, torch.uint8)
    # Few images have no covariance made.
    data = pf.TrainingSet(images.repeat(1000, 1, 1, 1))

    def work(*_: object, **__: object) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(pf.Moments, "_take", work)
    monkeypatch.setattr("pyflocality.moments.basis._of_images", work)
    least = {
        "pca": "for the masks of 3072 values",
        "certified": "for components of 4000 images of 3072 values",
        "wiener": "for components of 4000 images of 3072 values",
    }
    for name, run in decomposing(data, "64MB").items():
        with pytest.raises(ValueError, match=rf"must be at least \d+MB {least[name]}"):
            run()
    # The default has them on top.
    monkeypatch.delenv("PYFLOCALITY_MEMORY_BUDGET", raising=False)
    large = pf.TrainingSet(images.repeat(1, 1, 2, 2))
    for run in [*decomposing(large, None).values(), lambda: pf.WienerDenoiser(large)]:
        with pytest.raises(AssertionError, match="worked"):
            run()
    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", "64MB")
    for name, run in [
        *decomposing(data, None).items(),
        ("wiener", lambda: pf.WienerDenoiser(data)),
    ]:
        with pytest.raises(ValueError, match=f"{least[name]}.*PYFLOCALITY_MEMORY_BUDGET"):
            run()


def test_moments_that_are_at_hand_need_no_budget():
    images = random_images(torch.Generator().manual_seed(0), 900, (3, 16, 16), torch.uint8)
    data, values = pf.TrainingSet(images), 768
    moments, x = pf.Moments.from_data(data), torch.zeros(1, 3, 16, 16)
    subset = pf.CertifiedSubset(pf.OptimalDenoiser(data, memory_budget=2**20), moments=moments)
    least = -(-40 * values**2 // 2**20)
    with pytest.raises(ValueError, match=f"`memory_budget` must be at least {least}MB"):
        subset(x, 0.5)
    moments.eigh()
    expected = pf.OptimalDenoiser(data)(x, 0.5)
    torch.testing.assert_close(subset(x, 0.5), expected, rtol=0, atol=1e-3)
    # A tile takes less than 16 MB, which are always allowed.
    pf.PCALocalityDenoiser(data, moments=moments, memory_budget=2**20)(x, 0.5)


def test_the_pyramid_is_made_within_the_budget():
    """Its blocks took 64 MB whatever the budget."""
    images = random_images(torch.Generator().manual_seed(0), 8000, (3, 8, 8), torch.uint8)
    data, budget = pf.TrainingSet(images), 2**22
    # The pyramid itself lies in a file then.
    peak = peak_of(lambda: pf.MultiscaleDenoiser(data, 1, 3, memory_budget=budget))
    assert budget / 10 < peak < 1.02 * budget
