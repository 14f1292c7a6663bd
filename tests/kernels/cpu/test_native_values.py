"""Native kernels that answer value images: float64 truth, every way through them, same bits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from instruction_sets import ISAS
from native_cpu import needs_cpu
from torch import Tensor
from value_problems import OPS, ValueProblem

import pyflocality as pf
from pyflocality.backends import trace_blocks
from pyflocality.backends.selection import Implementation
from pyflocality.ops.operation import OPERATIONS

pytestmark = needs_cpu
SERVED = [
    (op, kind)
    for op in OPS
    for kind, variant in OPERATIONS[op].variants.items()
    if "cpu" in variant.backends and variant.backends["cpu"].answers_values
]
NAMES = {"scan": "mean", "jvp": "jvp", "vjp": "vjp"}


def exact(problem: ValueProblem, op: str, kind: str, with_image: bool, against: Tensor) -> list:
    """The formulas' answers of a variant."""
    mean = problem.truth(op, with_image)
    if kind == "scan":
        return [mean]
    if kind == "jvp":
        return [mean, problem.truth(op, with_image, along=problem.tangents)]
    return [problem.truth(op, with_image, against=against)]


def answers(
    problem: ValueProblem, op: str, kind: str, against: Tensor, backend: str, **options: object
) -> tuple[Tensor, ...]:
    """What a backend answers, in float32."""
    along = {"scan": (), "jvp": (problem.tangents,), "vjp": (against,)}[kind]
    return problem.found(op, NAMES[kind], torch.float32, *along, backend=backend, **options)


def assert_close(found: Tensor, true: np.ndarray, rounded: Tensor) -> None:
    """Twice the error of the reference in float32, and some roundings of the largest number."""
    assert found.dtype == torch.float32 and found.shape == true.shape
    error, other = (np.abs(one.double().numpy() - true).max(initial=0) for one in (found, rounded))
    assert error <= 2 * other + 1e-5 * max(1.0, np.abs(true).max(initial=0))


@pytest.mark.parametrize(("op", "kind"), SERVED)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(("count", "values"), [(1, 1), (31, 3), (1025, 1)])
def test_answers_are_the_formula(op, kind, stored, with_image, count, values, rng):
    problem = ValueProblem(rng, count, values, stored=stored)
    against = problem.cotangents(values + with_image)
    options = {"with_image": with_image}
    with pf.trace_backends() as ran:
        found = answers(problem, op, kind, against, "auto", **options)
    assert ran == [(OPERATIONS[op].variant_name(kind), "cpu")]
    rounded = answers(problem, op, kind, against, "reference", **options)
    true = exact(problem, op, kind, with_image, against)
    for one, numbers, other in zip(found, true, rounded, strict=True):
        assert_close(one, numbers, other)


@pytest.mark.parametrize(("op", "kind"), SERVED)
def test_the_image_beside_its_values_keeps_its_bits(op, kind, rng):
    problem = ValueProblem(rng, count=100, batch=9)
    against = problem.cotangents(3)
    if kind == "vjp":
        # Nothing is asked of the values.
        against[:, :, 1:] = 0.0
    plain = answers(problem, op, kind, against[:, :, 0], "cpu", values=None)
    both = answers(problem, op, kind, against, "cpu", with_image=True)
    for one, other in zip(plain, both, strict=True):
        # Products of cotangents have their units at another place.
        allowed = 0.0 if kind != "vjp" else 1e-6 * float(one.abs().max())
        image = other if kind == "vjp" else other[..., 0, :, :, :]
        torch.testing.assert_close(image, one, rtol=0, atol=allowed)


@pytest.mark.parametrize(("op", "kind"), SERVED)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(op, kind, isa, rng, monkeypatch):
    load = Implementation.load
    problem = ValueProblem(rng, count=47, batch=9, directions=9)
    against = problem.cotangents(3)
    rounded = answers(problem, op, kind, against, "reference", with_image=True)
    monkeypatch.setattr(
        Implementation, "load", lambda one: functools.partial(load(one), instruction_set=isa)
    )
    found = answers(problem, op, kind, against, "cpu", with_image=True)
    true = exact(problem, op, kind, True, against)
    for one, numbers, other in zip(found, true, rounded, strict=True):
        assert_close(one, numbers, other)


@pytest.mark.parametrize(("op", "kind"), SERVED)
def test_every_chunking_and_number_of_threads(op, kind, rng):
    problem = ValueProblem(rng, count=1700, batch=5)
    against = problem.cotangents(3)
    whole = answers(problem, op, kind, against, "cpu", with_image=True)
    for options in ({"chunk_size": 7}, {"memory_budget": 1}):
        parts = answers(problem, op, kind, against, "cpu", with_image=True, **options)
        for one, other in zip(parts, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        other = answers(problem, op, kind, against, "cpu", with_image=True)
    finally:
        torch.set_num_threads(threads)
    for one, same in zip(whole, other, strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_values_alone_are_those_beside_the_image(op, rng):
    problem = ValueProblem(rng, count=100)
    (alone,) = problem.found(op, "mean", torch.float32, backend="cpu")
    (both,) = problem.found(op, "mean", torch.float32, backend="cpu", with_image=True)
    torch.testing.assert_close(both[:, 1:], alone, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_values_are_read_from_their_file(op, rng, tmp_path):
    problem = ValueProblem(rng, count=1700)
    path = tmp_path / "values.npy"
    np.save(path, problem.values.flatten(1, 2).clamp(-1, 1).numpy())
    held = torch.from_numpy(np.load(path)).unflatten(1, (2, 2))
    problem.values = pf.TrainingSet.load(path, layout="NCHW").images.unflatten(1, (2, 2))
    (whole,) = problem.found(op, "mean", torch.float32, backend="cpu", values=held)
    with trace_blocks() as blocks:
        (found,) = problem.found(op, "mean", torch.float32, backend="cpu", memory_budget=2**16)
    assert sum(block.count for block in blocks if block.from_file) == 1700
    assert max(block.count for block in blocks if block.from_file) < 1700
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
