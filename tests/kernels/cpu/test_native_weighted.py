"""The native scan with weights of inputs: float64 truth, every way through it, same bits."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS
from native_cpu import needs_cpu
from torch import Tensor
from truth import noisy_batch, random_images

import pyflocality as pf
from pyflocality._support.native import native_module
from pyflocality.backends import BackendUnavailableError, trace_backends
from pyflocality.kernels.cpu import masked_posterior
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize
from pyflocality.weights import QueryWeights

pytestmark = needs_cpu
SIGMA, ALPHA = torch.tensor([0.2, 1.5, 0.4]), 0.9
LEVEL = SIGMA, ALPHA


def weights_of(values: int) -> Tensor:
    """Weights that fall from every output on, with blocks of none, and a dense output."""
    place = torch.arange(values)
    weights = 0.8 ** (place - place[:, None]).abs().float()
    weights[weights < 0.05] = 0.0
    if values > 24:
        weights[8:16], weights[20] = 0.0, 1 / 3
    return weights


def case(
    count: int, shape: tuple[int, int, int], stored: torch.dtype, rng: torch.Generator
) -> tuple[Tensor, Tensor, QueryWeights]:
    images = random_images(rng, count, shape, stored)
    x = noisy_batch(images, 3, 0.4, ALPHA, rng).float()
    return x, images, QueryWeights(weights_of(x[0].numel()))


def truth(x: Tensor, answered: Tensor, images: Tensor, weights: QueryWeights) -> Tensor:
    """The formula in float64, [B, C, H, W]."""
    values, by_input = in_units(images).flatten(1), weights.dense(torch.float64).T
    rows = []
    for noisy, sigma in zip(x.double().flatten(1), SIGMA.double(), strict=True):
        distance = (noisy - ALPHA * values).square() @ by_input
        posterior = torch.softmax(-distance / (2 * sigma**2), 0)
        rows.append((posterior * answered.double().flatten(1)).sum(0))
    return torch.stack(rows).view(x.shape)


def in_units(images: Tensor) -> Tensor:
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()


@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 31, 127, 1025])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 3), (3, 5, 7)])
def test_answers_are_the_formula(shape, count, stored, rng):
    x, images, weights = case(count, shape, stored, rng)
    with trace_backends() as ran:
        found = pf.ops.masked_posterior_mean(x, images, weights, *LEVEL)
    assert ran == [("masked_posterior", "cpu")]
    exact = truth(x, in_units(images), images, weights)
    rounded = pf.ops.masked_posterior_mean(x, images, weights, *LEVEL, backend="reference")
    error, other = ((one.double() - exact).abs().max() for one in (found, rounded))
    # Twice the error of the reference in float32, and some roundings of the largest answer.
    assert error <= 2 * other + 1e-6


@pytest.mark.parametrize("with_image", [False, True])
def test_values_are_the_formula(with_image, rng):
    x, images, weights = case(300, (3, 5, 7), torch.uint8, rng)
    values = torch.randn(300, 2, 3, 5, 7, generator=rng)
    options = {"values": values, "with_image": with_image}
    found = pf.ops.masked_posterior_mean(x, images, weights, *LEVEL, backend="cpu", **options)
    answered = [in_units(images)] * with_image + [values[:, 0], values[:, 1]]
    for a, one in enumerate(answered):
        exact = truth(x, one, images, weights)
        torch.testing.assert_close(found[:, a].double(), exact, rtol=0, atol=1e-4)
    if with_image:
        alone = pf.ops.masked_posterior_mean(x, images, weights, *LEVEL, backend="cpu")
        assert torch.equal(found[:, 0], alone)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_number_of_threads(isa, rng):
    x, images, weights = case(2000, (3, 5, 7), torch.uint8, rng)
    exact, found = truth(x, in_units(images), images, weights), []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        problem = posterior_problem(x, images, *LEVEL)
        state = masked_posterior.scan(problem, weights, instruction_set=isa)
        found.append(finalize(state)[..., 0].view(x.shape))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=1e-4)


def test_chunks_batches_and_bands_answer_the_same_bits(rng, monkeypatch):
    x, images, weights = case(1100, (3, 5, 7), torch.uint8, rng)
    answer = pf.ops.masked_posterior_mean
    whole = answer(x, images, weights, *LEVEL, backend="cpu")
    alone = [answer(x[b : b + 1], images, weights, SIGMA[b], ALPHA) for b in range(3)]
    assert torch.equal(torch.cat(alone), whole)
    tight = answer(x, images, weights, *LEVEL, backend="cpu", memory_budget=20_000)
    assert torch.equal(tight, whole)
    monkeypatch.setattr(masked_posterior, "_BAND_BYTES", 4 * 105 * 21 * 2)
    banded = answer(x, images, QueryWeights(weights_of(105)), *LEVEL, backend="cpu")
    assert torch.equal(banded, whole)


def test_ones_and_zeros_answer_as_masks(rng):
    x, images, weights = case(500, (3, 5, 7), torch.uint8, rng)
    mask = weights.dense(torch.float32) > 0
    as_mask = pf.ops.masked_posterior_mean(x, images, mask, *LEVEL, backend="cpu")
    as_weights = pf.ops.masked_posterior_mean(x, images, mask.float(), *LEVEL, backend="cpu")
    torch.testing.assert_close(as_weights, as_mask, rtol=0, atol=2e-5)


def test_log_sum_exps_are_those_of_the_reference(rng):
    x, images, weights = case(500, (3, 5, 7), torch.uint8, rng)
    with trace_backends() as ran:
        found = pf.ops.posterior_log_sum_exp(x, images, *LEVEL, weights=weights)
    assert ran == [("masked_posterior", "cpu")]
    options = {"weights": weights, "backend": "reference"}
    exact = pf.ops.posterior_log_sum_exp(x.double(), images, *LEVEL, **options)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


def test_signed_weights_and_derivatives_are_refused_by_name(rng):
    x, images, weights = case(50, (3, 5, 7), torch.uint8, rng)
    signed = QueryWeights(-weights.dense(torch.float32), signed=True)
    assert signed.is_signed and not weights.is_signed
    with pytest.raises(BackendUnavailableError, match="weights that are not negative"):
        pf.ops.masked_posterior_mean(x, images, signed, *LEVEL, backend="cpu")
    for derivative in (pf.ops.masked_posterior_jvp, pf.ops.masked_posterior_vjp):
        with pytest.raises(BackendUnavailableError, match="it serves masks .* are not boolean"):
            derivative(x, x[None], images, weights, *LEVEL, backend="cpu")


@pytest.mark.parametrize(
    ("weights", "answers", "message"),
    [
        (torch.ones(4), [0], r"`weights` must have shape \[Q, D\]"),
        (torch.ones(2, 3), [0], "`answers` must name an input for each of 2 outputs"),
        (torch.ones(2, 3), [0, 3], "`answers` must name inputs below 3"),
    ],
)
def test_wrong_weights_are_refused(weights, answers, message):
    with pytest.raises(ValueError, match=message):
        native_module().InputWeights(weights.numpy(), answers)
