"""PCA locality with soft weights: its answers, and which backends serve them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from truth import random_images

import pyflocality as pf
from pyflocality.backends import BackendUnavailableError

SHAPE = (2, 6, 7)


def case() -> tuple[pf.TrainingSet, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = random_images(generator, 300, SHAPE, torch.uint8)
    images[..., 1:] = images[..., :-1] // 2 + images[..., 1:] // 2
    data = pf.TrainingSet(images)
    noise = torch.randn(3, *SHAPE, generator=generator)
    return data, 0.9 * data.values(0, 3) + 0.4 * noise


def truth(data: pf.TrainingSet, x: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    """The model as the docstring states it, in float64."""
    values = data.values(0, len(data), dtype=torch.float64).flatten(1).numpy()
    answers = []
    for noisy in x.double().flatten(1).numpy():
        squares = (noisy - 0.9 * values) ** 2
        logits = -(squares @ weights.T) / (2 * 0.4**2)
        posterior = np.exp(logits - logits.max(0))
        answers.append((posterior * values).sum(0) / posterior.sum(0))
    return np.stack(answers).reshape(x.shape)


@pytest.mark.parametrize("softness", [0.25, 1.0])
def test_answers_are_the_formula(softness):
    data, x = case()
    denoiser = pf.PCALocalityDenoiser(data, 0.05, softness=softness)
    weights = denoiser.weights_at(0.4, 0.9)
    expected = truth(data, x, weights.dense(torch.float64).numpy())
    # As rounded as answers of masks: float32 sums of 84 squares, times 1 / (2 sigma^2).
    np.testing.assert_allclose(denoiser(x, 0.4, 0.9).numpy(), expected, rtol=0, atol=1e-5)
    double = denoiser(x.double(), 0.4, 0.9).numpy()
    np.testing.assert_allclose(double, expected, rtol=0, atol=1e-12)
    hard = pf.PCALocalityDenoiser(data, 0.05)(x.double(), 0.4, 0.9).numpy()
    assert np.abs(hard - expected).max() > 1e-2


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_softness_0_is_the_model_of_masks_to_the_bit(backend):
    data, x = case()
    with pf.use_backend(backend):
        plain = pf.PCALocalityDenoiser(data, 0.05)(x, 0.4, 0.9)
        assert torch.equal(pf.PCALocalityDenoiser(data, 0.05, softness=0)(x, 0.4, 0.9), plain)


def test_every_chunk_and_batch_answers_the_same():
    data, x = case()
    denoiser = pf.PCALocalityDenoiser(data, 0.05, softness=0.5)
    whole = denoiser(x.double(), 0.4, 0.9)
    tight = pf.PCALocalityDenoiser(data, 0.05, softness=0.5, memory_budget=2**16)
    torch.testing.assert_close(tight(x.double(), 0.4, 0.9), whole, rtol=0, atol=1e-13)
    alone = torch.cat([denoiser(one[None].double(), 0.4, 0.9) for one in x])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-13)


@needs_cpu
def test_kernels_serve_the_model_and_leave_its_derivatives_to_the_reference():
    data, x = case()
    denoiser = pf.PCALocalityDenoiser(data, 0.05, softness=0.5)
    with pf.trace_backends() as ran:
        denoiser(x, 0.4, 0.9)
        denoiser.jvp(x, x[None], 0.4, 0.9)
        denoiser.vjp(x, x[None], 0.4, 0.9)
    backends = dict(ran)
    assert backends["masked_posterior"] == "cpu"
    assert backends["masked_posterior_jvp"] == backends["masked_posterior_vjp"] == "reference"
    denoiser = pf.PCALocalityDenoiser(data, 0.05, softness=0.5, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="it serves masks .* are not boolean"):
        denoiser.jvp(x, x[None], 0.4, 0.9)


def test_softness_is_told():
    data, _ = case()
    assert "softness=0.5" in repr(pf.PCALocalityDenoiser(data, 0.05, softness=0.5))
    assert "softness" not in repr(pf.PCALocalityDenoiser(data, 0.05))
