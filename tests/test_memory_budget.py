"""The memory budget holds what it says, or the call is refused and the least is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peak_memory import peak_of
from truth import random_images

import pyflocality as pf
from pyflocality import ops
from pyflocality._budget import ALWAYS_ALLOWED

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
    # A dense matrix of weights, and the mask that it comes from.
    least = -(-5 * values**2 // 2**20)
    with pytest.raises(ValueError, match=f"`memory_budget` must be at least {least}MB for this"):
        ops.masked_posterior_mean(x, images, weights, 0.5, **options)
    options["memory_budget"] = f"{least + 1}MB"
    ops.masked_posterior_mean(x, images, weights, 0.5, **options)


def test_small_calls_do_with_any_budget():
    images = random_images(torch.Generator().manual_seed(0), 20, SHAPE, torch.uint8)
    x = images[:1].float() / 127.5 - 1
    data = pf.TrainingSet(images)
    expected = pf.LocalDenoiser(data, 3, backend="reference")(x, 0.5)
    found = pf.LocalDenoiser(data, 3, backend="reference", memory_budget=1)(x, 0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert ALWAYS_ALLOWED == 16 * 2**20
