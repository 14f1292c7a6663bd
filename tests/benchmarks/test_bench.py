"""Libraries as yardsticks, interrupted runs, `pyflocality bench` and pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyflocality as pf
from benchmarks import cpu_suite, machine
from benchmarks.kernels import baselines, libraries, runner
from benchmarks.kernels.registry import QUICK, Case
from benchmarks.kernels.sets import BenchmarkSet
from benchmarks.publish.summary import table, times_faster
from pyflocality import cli
from pyflocality.backends import machine_reason

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    machine_reason("cpu") is not None, reason=str(machine_reason("cpu"))
)

WINDOW = Case("local_score", "window_posterior", 300, 2, timestep=400, window=3)


@pytest.fixture(scope="module")
def data() -> BenchmarkSet:
    """A small synthetic set."""
    return BenchmarkSet.build(QUICK.images, QUICK.shape, None)


def optimal(data) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float], torch.Tensor]:
    """Noisy images, values, level, and the optimal denoiser in float64."""
    values = pf.TrainingSet(data.images[:60]).values()
    x, (alpha, sigma) = data.queries(400, 3), data.level(400)
    squares = (x.double()[:, None] - alpha * values.double()).square().flatten(2).sum(2)
    weights = torch.softmax(-squares / (2 * sigma**2), 1)
    return x, values, (sigma, alpha), (weights @ values.double().flatten(1)).reshape(x.shape)


def test_attention_is_the_optimal_denoiser(data):
    x, values, level, exact = optimal(data)
    found = libraries.Attention(values, *level)(x)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_keops_is_the_optimal_denoiser(data):
    pytest.importorskip("pykeops", exc_type=ImportError)
    x, values, level, exact = optimal(data)
    found = libraries.KeOps(values, *level)(x)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3)


def test_faiss_finds_the_nearest(data):
    pytest.importorskip("faiss")
    x, values, (_, alpha), _ = optimal(data)
    squares = (x.double()[:, None] - alpha * values.double()).square().flatten(2).sum(2)
    assert torch.equal(libraries.Faiss(values, alpha)(x), squares.argmin(1, keepdim=True))


@pytest.mark.slow
def test_compiled_runs_generated_code_and_answers_as_the_reference(data):
    from torch._dynamo.utils import counters

    x, values, level, exact = optimal(data)
    counters.clear()
    try:
        found = libraries.compiled(baselines.global_broadcast, x, values, *level)
    except libraries.UnavailableError as error:
        pytest.skip(str(error))
    # One graph, and the compiler made its code or had it in its cache.
    assert counters["stats"]["unique_graphs"] == 1
    inductor = counters["inductor"]
    assert inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_hit"] == 1
    torch.testing.assert_close(found(x, values, *level).double(), exact, rtol=0, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_not_installed_is_recorded(data, monkeypatch):
    for package in ("pykeops", "faiss"):
        monkeypatch.setitem(sys.modules, package, None)

    def fails(*_, **__):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    case = Case("optimal", "global_posterior", 40, 2, timestep=400, repetitions=1)
    case = replace(case, yardsticks=("eager", "compiled", "keops"))
    record = runner.run_case(case, data)
    assert list(record["yardsticks"]) == ["eager"]
    assert record["missing"] == {
        "compiled": "torch.compile cannot run here: RuntimeError: no compiler",
        "keops": "not installed: no package 'pykeops'",
    }
    assert "keops not installed" in table([record], [])
    found = replace(case, op="nearest", suite="nearest", yardsticks=("faiss",))
    record = runner.run_case(found, data)
    assert record["missing"] == {"faiss": "not installed: no package 'faiss'"}


def test_a_wrong_library_is_an_error(data, monkeypatch):
    monkeypatch.setattr(libraries.Attention, "__call__", lambda self, x: torch.zeros_like(x))
    case = Case("optimal", "global_posterior", 40, 2, timestep=400, yardsticks=("attention",))
    with pytest.raises(runner.CheckError, match="the yardstick attention is wrong"):
        runner.run_case(case, data)


def test_times_faster_is_than_the_fastest_eager():
    ratios = {"eager_patches": 9.0, "eager_differences": 4.0, "compiled": 2.0}
    yardsticks = {name: {"ratio": {"median": ratio}} for name, ratio in ratios.items()}
    assert times_faster({"yardsticks": yardsticks}) == 4.0
    assert times_faster({"yardsticks": {}}) is None


def test_rates_by_hand(monkeypatch):
    monkeypatch.setattr(machine, "_shortest", lambda function: 2.0)
    rates = machine.machine_rates()
    assert rates["matmul_gflops_per_second"] == pytest.approx(2048**3 / 1e9)
    # 256 MiB read and as much written in two seconds.
    assert rates["copy_gbytes_per_second"] == pytest.approx(256 * 2**20 / 1e9)


def test_another_checkout_around_an_installation_tells_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git was asked"))
    assert machine.machine_facts()["commit"] is None


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch, capsys):
    case = replace(WINDOW, suite="scaling", repetitions=1)
    chosen = [replace(case, window=window) for window in (3, 5, 7)]
    monkeypatch.setattr(cpu_suite, "machine_rates", lambda: {"matmul": 1.0})
    unfinished = tmp_path / "run.json.unfinished"
    ran = []
    right = runner.run_case

    def interrupted(case, of):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(case.window)
        return right(case, of)

    options = {"quick": True, "unfinished": unfinished, "progress": False}
    monkeypatch.setattr(cpu_suite, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpu_suite.run_suite(chosen, data, QUICK, **options)
    first = json.loads(unfinished.read_text(encoding="utf-8"))
    assert [record["window"] for record in first["results"]] == [3, 5]

    monkeypatch.setattr(cpu_suite, "run_case", lambda case, of: (ran.append(7), right(case, of))[1])
    report = cpu_suite.run_suite(chosen, data, QUICK, **options)
    assert ran == [3, 5, 7] and not unfinished.exists()
    assert report["results"][:2] == first["results"] and report["date"] == first["date"]
    assert report["rates"] == {"matmul": 1.0}
    assert [record["window"] for record in report["results"]] == [3, 5, 7]

    # What another machine left is no use.
    first["machine"]["cpu"] = "another"
    unfinished.write_text(json.dumps(first), encoding="utf-8")
    ran.clear()
    cpu_suite.run_suite(chosen[:1], data, QUICK, **options)
    assert ran == [7] and "of another run" in capsys.readouterr().err


def test_bench_prints_and_writes_what_the_suite_measures(tmp_path, capsys, monkeypatch):
    rates = {"matmul": 1.0}
    monkeypatch.setattr("pyflocality.benchmarks.cpu_suite.machine_rates", lambda: rates)
    assert cli.main(["bench", "--quick", "--filter", "optimal/", "--list"]) == 0
    assert capsys.readouterr().out.split() == [
        f"optimal/global_posterior/cpu/N1000-B{batch}-t400" for batch in (1, 8)
    ]
    out = tmp_path / "bench.json"
    words = ["bench", "--quick", "--filter", "B8-t400-k7-S8", "--out", str(out), "--no-progress"]
    assert cli.main(words) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["rates"] == rates
    (record,) = report["results"]
    printed = capsys.readouterr().out
    assert table(report["results"], report["summary"]) in printed
    assert f"{record['seconds']['median'] * 1e3:.2f}" in printed and "3x8x8" in printed
    assert record["check"]["error"] <= record["check"]["budget"]

    before = out.read_text(encoding="utf-8")
    assert cli.main(words) == 2
    assert "--force" in capsys.readouterr().err and out.read_text(encoding="utf-8") == before
    assert cli.main([*words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_bench_refuses_a_filter_without_cases(capsys):
    assert cli.main(["bench", "--filter", "nonesuch"]) == 2
    assert "`--filter`" in capsys.readouterr().err


@pytest.mark.slow
def test_pytest_benchmark_suite_runs_and_two_runs_compare(tmp_path):
    pytest.importorskip("pytest_benchmark")
    suite = ROOT / "benchmarks" / "bench_cpu.py"
    # A worker of pytest-xdist would switch benchmarks off in the process it starts, too.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    # Behind everything else again, and away from the checkout.
    options = (
        "--import-mode=append",
        "--quick",
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
    )
    storage = f"--benchmark-storage={tmp_path / 'kept'}"
    for name in ("before", "after"):
        saved = (storage, f"--benchmark-save={name}", "-k", "optimal and B8")
        output = run("pytest", str(suite), *options, *saved)
        assert "optimal/global_posterior/cpu/N1000-B8-t400" in output
    compared = run("pytest_benchmark", f"--storage={tmp_path / 'kept'}", "compare", "--columns=min")
    # A line for the case of each run.
    case = "test_case[optimal/global_posterior/cpu/N1000-B8-t400]"
    lines = [line for line in compared.splitlines() if line.startswith(case)]
    assert {line.split()[1].strip("()") for line in lines} == {"0001_before", "0002_after"}
