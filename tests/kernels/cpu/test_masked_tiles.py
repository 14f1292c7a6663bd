"""Masks that are taken by tiles of outputs: the same answers, whether held or made when used."""

from __future__ import annotations

import pytest
import torch
from native_cpu import needs_cpu
from torch import Tensor
from truth import noisy_batch, random_images

import pyflocality as pf
from pyflocality.backends import trace_backends
from pyflocality.kernels.cpu import masked_posterior
from pyflocality.moments.mask_tiles import MadeMasks
from pyflocality.posterior.tiles import output_bands
from pyflocality.weights import QueryWeights

SHAPE = (3, 12, 7)
VALUES = 252
SIGMA, ALPHA = torch.tensor([0.2, 1.5, 0.4]), 0.9
OPERATIONS = ("mean", "jvp", "vjp", "log_sum_exp")


def masks() -> Tensor:
    """Masks of near values, a few of them dense, one of all values and one of none."""
    generator = torch.Generator().manual_seed(5)
    place = torch.arange(VALUES)
    chosen = (place - place[:, None]).abs() < 11
    chosen ^= torch.rand(VALUES, VALUES, generator=generator) < 0.04
    chosen[40:50] = torch.rand(10, VALUES, generator=generator) < 0.9
    chosen[100], chosen[101] = True, False
    return chosen


def answers(
    operation: str, weights: QueryWeights, stored: torch.dtype, **options: object
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = random_images(generator, 1300, SHAPE, stored)
    x = noisy_batch(images, 3, 0.5, ALPHA, generator)
    directions = torch.randn(2, *x.shape, generator=generator, dtype=x.dtype)
    if options["backend"] == "cpu":
        x, directions = x.float(), directions.float()
    given = (images, weights, SIGMA, ALPHA)
    if operation == "mean":
        return pf.ops.masked_posterior_mean(x, *given, **options)
    if operation == "jvp":
        return pf.ops.masked_posterior_jvp(x, directions, *given, **options)[1]
    if operation == "vjp":
        return pf.ops.masked_posterior_vjp(x, directions, *given, **options)
    found = pf.ops.posterior_log_sum_exp(x, images, SIGMA, ALPHA, weights=weights, **options)
    return found


@pytest.fixture(params=["held", "made"])
def weights(request) -> QueryWeights:
    held = QueryWeights(masks())
    if request.param == "held":
        return held
    return MadeMasks(held.shape, lambda outputs: held.bits[outputs.numpy()])


# Bits of an output take 32 bytes: one band of all rows, some of several rows, bands of a row.
@pytest.mark.parametrize("tile_bytes", [2**20, 32 * 21 * 5, 1])
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("operation", OPERATIONS)
@needs_cpu
def test_native_tiles_against_the_reference(operation, stored, tile_bytes, weights, monkeypatch):
    monkeypatch.setattr(masked_posterior, "_BAND_BYTES", tile_bytes)
    whole = QueryWeights(masks())
    exact = answers(operation, whole, stored, backend="reference")
    with trace_backends() as ran:
        found = answers(operation, weights, stored, backend="cpu")
    assert {backend for _, backend in ran} == {"cpu"}
    tolerance = {"mean": 2e-5, "jvp": 5e-3, "vjp": 5e-3, "log_sum_exp": 2e-4}[operation]
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=tolerance)
    # Whether masks are held does not matter, to the bit.
    assert torch.equal(found, answers(operation, whole, stored, backend="cpu"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tiles_of_the_reference(operation, weights, monkeypatch):
    from pyflocality.reference import masked_posterior as reference

    exact = answers(operation, QueryWeights(masks()), torch.uint8, backend="reference")
    monkeypatch.setattr(reference, "ALWAYS_ALLOWED", 0)
    # Numbers and bytes of two rows of outputs, twice.
    budget = 2 * 2 * 21 * VALUES * 9
    monkeypatch.setattr("pyflocality.posterior.problem.check_least", lambda *_: None)
    found = answers(operation, weights, torch.uint8, backend="reference", memory_budget=budget)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-11)


def test_bands_are_whole_rows_of_all_channels():
    bands = output_bands((3, 10, 4), 100, 100 * 3 * 4 * 4)
    assert [len(band) for band in bands] == [48, 48, 24]
    first = bands[0].view(3, 4, 4)
    assert torch.equal(first[:, 0, 0], torch.tensor([0, 40, 80])) and first[0, 3, 3] == 15
    assert torch.equal(torch.cat(bands).sort().values, torch.arange(120))
    assert len(output_bands((3, 10, 4), 100, 1)) == 10


def test_facts_of_made_masks_are_those_of_all():
    held = QueryWeights(masks())
    asked: list[int] = []

    def make(outputs: Tensor):
        asked.extend(outputs.tolist())
        return held.bits[outputs.numpy()]

    made = MadeMasks(held.shape, make)
    made.tile(torch.arange(100))
    assert made.density == pytest.approx(held.density) and sorted(asked) == list(range(VALUES))
    assert torch.equal(made.empty, held.empty) and torch.equal(made.answered, held.answered)
    assert len(asked) == VALUES
    assert torch.equal(made.row(-1), held.row(VALUES - 1))
    assert torch.equal(made.dense(torch.bool), held.dense(torch.bool))


def test_posteriors_of_filters_need_all_masks():
    held = QueryWeights(masks())
    made = MadeMasks(held.shape, lambda outputs: held.bits[outputs.numpy()])
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="`weights` must be held as a whole"):
        pf.ops.filtered_posterior_mean(x, x, made, held, 0.5)
