"""What every declared operation keeps, on every backend that can run here."""

from __future__ import annotations

import pytest
import torch
from every_operation import Problem, variants

import pyflocality as pf
from pyflocality.ops.operation import OPERATIONS


@pytest.mark.parametrize(("name", "kind", "backend"), variants())
def test_answers_are_those_of_the_reference_in_float64(name, kind, backend):
    problem = Problem(name)
    with pf.trace_backends() as ran:
        found = problem.answers(kind, backend, torch.float32)
    assert ran == [(problem.operation.variant_name(kind), backend)]
    exact = problem.answers(kind, "reference")
    rounded = problem.answers(kind, "reference", torch.float32)
    for one, true, other in zip(found, exact, rounded, strict=True):
        assert one.dtype == torch.float32 and one.shape == true.shape
        scale = max(1.0, float(true.abs().max()))
        budget = 2 * float((other.double() - true).abs().max()) + 1e-5 * scale
        assert float((one.double() - true).abs().max()) <= budget


@pytest.mark.parametrize(("name", "kind", "backend"), variants())
def test_parts_of_the_set_and_empty_batches_are_served(name, kind, backend):
    whole, parts = (
        Problem(name).answers(kind, backend, torch.float32, **options)
        for options in ({}, {"chunk_size": 7})
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    empty = Problem(name, batch=0)
    for one in empty.answers(kind, backend, torch.float32):
        assert one.numel() == 0


@pytest.mark.parametrize(
    "name",
    [name for name, one in sorted(OPERATIONS.items()) if {"jvp", "vjp"} <= set(one.variants)],
)
def test_derivatives_are_transposed_to_one_another(name):
    problem = Problem(name)
    _, along = problem.answers("jvp", "reference")
    (back,) = problem.answers("vjp", "reference")
    left = torch.einsum("kbchw,lbchw->klb", problem.directions, along)
    right = torch.einsum("kbchw,lbchw->klb", back, problem.directions)
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name, kind, backend in variants()
        if kind == "scan" and OPERATIONS[name].answers_state
    ],
)
def test_log_sum_exps_are_those_of_the_reference(name, backend):
    problem = Problem(name)
    found = problem.log_sum_exp(backend)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, problem.log_sum_exp("reference"), rtol=1e-5, atol=1e-4)
