"""A new operation takes one declaration and one reference: everything else follows."""

from __future__ import annotations

import sys
from dataclasses import replace

import every_operation
import pytest
import torch

import pyflocality as pf
from benchmarks.kernels import runner
from benchmarks.kernels.gpu_cases import gpu_cases
from benchmarks.kernels.registry import QUICK, cases
from benchmarks.kernels.sets import BenchmarkSet
from pyflocality import reference
from pyflocality.backends import configuration, selection
from pyflocality.backends.report import backend_table
from pyflocality.cli import main
from pyflocality.ops import operation as declarations
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair
from pyflocality.planner import Setting, cost_of, models, seconds_of

NAME = "strided_posterior"
REFERENCE = '''
"""Posterior mean over every so many columns."""

import torch

from pyflocality.posterior import state as posterior


def scan(problem, stride):
    """One query that answers all values."""
    x, scale = problem.x, posterior.finite_factor(problem.scale, problem.x.dtype)
    values = problem.images[0].numel()
    state = posterior.init(len(x), 1, values, x)
    for images in problem.chunks(problem.images_at_a_time(4 * len(x) * values * 8)):
        gaps = x[:, None] - problem.alpha.to(x.dtype)[:, None, None, None, None] * images
        distance = gaps[..., ::stride].square().flatten(2).sum(2)[..., None]
        flat = images.flatten(1)
        weigh = lambda weights, flat=flat: torch.matmul(weights[:, None, :, 0], flat)
        state = posterior.update(state, distance, scale, weigh)
    return state
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The operation: a reference in a file, and its declaration."""
    (tmp_path / f"{NAME}.py").write_text(REFERENCE, encoding="utf-8")
    monkeypatch.setattr(reference, "__path__", [*reference.__path__, str(tmp_path)])
    monkeypatch.setitem(declarations.OPERATIONS, NAME, None)
    for name in (NAME, f"{NAME}_jvp"):
        monkeypatch.setitem(selection.OPERATIONS, name, {})
        del selection.OPERATIONS[name]
    yield declare(
        Operation(
            NAME,
            {"scan": Variant({"reference": Served()}, per_pair(lambda s: 5 * s.values))},
            parameters=("stride",),
            check=lambda shape, stride: (int(stride),),
            example=lambda size, generator: (2,),
            model="strided",
        )
    )
    sys.modules.pop(f"pyflocality.reference.{NAME}", None)
    selection._file_of.cache_clear()


@pytest.fixture
def given(rng):
    """Noisy images and training images."""
    images = torch.randint(0, 256, (40, 1, 4, 6), generator=rng, dtype=torch.uint8)
    return torch.randn(2, 1, 4, 6, generator=rng), images


def test_it_is_chosen_and_answers(toy, given):
    x, images = given
    with pf.trace_backends() as ran:
        found = toy.mean(x, images, (1,), 0.5, 0.9, None, {})
        one_pixel = toy.mean(x, images, (6,), 1e6, 0.9, None, {})
    assert ran == [(NAME, "reference")] * 2
    torch.testing.assert_close(found, pf.ops.global_posterior_mean(x, images, 0.5, 0.9))
    mean = pf.TrainingSet(images).values(0, 40).mean(0)
    torch.testing.assert_close(one_pixel, mean.expand_as(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(pf.BackendUnavailableError, match="it has no implementation") as caught:
        toy.mean(x, images, (1,), 0.5, 0.9, "cpu", {})
    assert caught.value.available == ("reference",)


def test_it_has_log_sum_exps(toy, given):
    x, images = given
    found = toy.log_sum_exp(x, images, (1,), 0.5, 0.9, None, {})
    whole = pf.ops.posterior_log_sum_exp(x, images, 0.5, 0.9, backend="reference")
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


def test_it_is_planned(toy, capsys):
    setting = Setting(10, (1, 9, 9), 2)
    assert "strided" in models()
    assert cost_of("strided", setting).flops == 10 * 2 * 5 * 81
    assert 0 < seconds_of("strided", setting) < 5
    assert main(["plan", "--images", "10", "--shape", "1x9x9", "--device", "h200"]) == 0
    assert "strided" in capsys.readouterr().out


def test_it_is_reported(toy, capsys):
    assert configuration()["operations"][NAME] == ["reference"]
    (row,) = [line for line in backend_table().splitlines() if f"`{NAME}`" in line]
    assert row.startswith("| `reference` |")
    pf.show_config()
    assert NAME in capsys.readouterr().out


def test_it_is_tested(toy):
    assert (NAME, "scan", "reference") in every_operation.variants()
    exact = every_operation.Problem(NAME).answers("scan", "reference")
    found = every_operation.Problem(NAME).answers("scan", "reference", torch.float32)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-4, atol=1e-5)


def test_it_is_timed(toy):
    (case,) = [case for case in cases(QUICK) if case.op == NAME]
    data = BenchmarkSet.build(40, (1, 6, 6), None)
    record = runner.run_case(replace(case, images=40, batch=2, check_images=7), data)
    assert record["flops"] == 40 * 2 * 5 * 36 and record["backend"] == "reference"


def test_kernels_for_gpus_are_timed(toy):
    assert all(case.op != NAME for case in gpu_cases())
    served = Served("float32_limits")
    scan = replace(toy.variants["scan"], backends={"triton": served, "reference": Served()})
    declare(replace(toy, variants={"scan": scan, "jvp": scan}))
    cases = {case.op: case for case in gpu_cases(few=True) if NAME in case.op}
    assert set(cases) == {NAME, f"{NAME}_jvp"}
    assert {case.backend for case in cases.values()} == {"triton"}
    assert cases[f"{NAME}_jvp"].tangents == 8
