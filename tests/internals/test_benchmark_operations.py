"""Benchmarks of operations that are put in place of real ones."""

from __future__ import annotations

import pytest
import torch

import pyflocality as pf
from benchmarks.kernels import runner
from benchmarks.kernels.registry import FULL, QUICK, Case, cases
from benchmarks.kernels.sets import BenchmarkSet
from benchmarks.publish.summary import summarise
from pyflocality.backends.selection import OPERATIONS, Implementation, select
from pyflocality.ops.operation import OPERATIONS as DECLARATIONS
from pyflocality.posterior.call import Call
from pyflocality.storage.reader import training_values

WINDOW = Case("local_score", "window_posterior", 300, 2, timestep=400, window=3)


@pytest.fixture(scope="module")
def data() -> BenchmarkSet:
    """A small synthetic set."""
    return BenchmarkSet.build(QUICK.images, QUICK.shape, None)


def test_a_wrong_result_is_never_timed(data, monkeypatch):
    module = "pyflocality.kernels.cpu.window_posterior"
    right = OPERATIONS["window_posterior"]["cpu"].load()

    def zeros(*arguments, **options):
        state = right(*arguments, **options)
        return state._replace(weighted=torch.zeros_like(state.weighted))

    monkeypatch.setattr(f"{module}.scan", zeros)
    monkeypatch.setattr(runner, "time_in_turns", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(runner.CheckError, match="local_score/window_posterior.*is wrong by"):
        runner.run_case(WINDOW, data)


def test_every_declared_operation_has_a_case():
    timed = {case.op for case in cases(FULL)}
    for operation in DECLARATIONS.values():
        for kind, variant in operation.variants.items():
            if kind == "scan" or "cpu" in variant.backends:
                assert operation.variant_name(kind) in timed


def test_derivatives_are_timed_once_they_are_there(monkeypatch):
    op = "masked_posterior_jvp"
    monkeypatch.delitem(OPERATIONS, op, raising=False)
    assert all(case.op != op for case in cases(FULL))
    monkeypatch.setitem(OPERATIONS, op, {"cpu": Implementation("nowhere", "nothing")})
    found = [case for case in cases(FULL) if case.op == op]
    assert found and all(case.tangents == 8 for case in found)


def test_derivatives_run_beside_the_plain_operation(data, monkeypatch):
    op = "global_posterior_jvp"

    def derivative(x, tangents, images, sigma, alpha, *, backend):
        select(op, Call(x.device, x.dtype), backend)
        values = training_values(images, x.dtype).flatten(1)

        def mean(x):
            squares = (x.flatten(1)[:, None] - alpha * values).square().sum(2)
            return (torch.softmax(-squares / (2 * sigma**2), 1) @ values).reshape(x.shape)

        products = [torch.func.jvp(mean, (x,), (tangent,))[1] for tangent in tangents]
        return mean(x), torch.stack(products)

    anywhere = Implementation("pyflocality.ops", "global_posterior_mean")
    monkeypatch.setitem(OPERATIONS, op, {"cpu": anywhere, "reference": anywhere})
    monkeypatch.setattr(pf.ops, op, derivative, raising=False)
    case = Case("tangents", op, 40, 2, timestep=400, tangents=2, yardsticks=("no_tangents",))
    record = runner.run_case(case, data)
    assert record["id"] == "tangents/global_posterior_jvp/cpu/N40-B2-t400-K2"
    # 5 operations a value, and for each of the two tangents 4.
    assert record["flops"] == (5 + 2 * 4) * 432 * 80 == 449_280
    assert record["bytes"] == 40 * 432 + (2 * 2 + 2 * 2 * 2) * 432 * 4
    (entry,) = summarise([record])
    ratio = record["yardsticks"]["no_tangents"]["ratio"]["median"]
    assert entry["bar"] == "<= 3.9" and entry["value"] == pytest.approx(1 / ratio)
