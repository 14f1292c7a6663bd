"""The GPU suite: its dry run goes through every case, and its command line refuses nonsense."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_cases import gpu_cases
from pyflocality._backends import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
GPU_BACKENDS = ("triton", "cuda")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package 'triton' is not installed"
)


def run_suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """What a dry run writes and prints."""
    out = tmp_path_factory.mktemp("results") / "dry.json"
    done = run_suite("--dry-run", "--no-tests", "--budget", "1500", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


@needs_triton
def test_every_case_runs_or_tells_why_not(dry_run):
    report, _ = dry_run
    assert report["dry_run"] and report["results"]
    for record in report["results"]:
        if record["backend"] == "cuda":
            assert record["status"] == "unavailable"
            assert record["reason"] == "a dry run has no CUDA device"
            continue
        assert record["status"] == "ok", record
        assert record["check"].get("error", 0) <= record["check"].get("budget", 0)
        assert record["seconds"]["p20"] <= record["seconds"]["median"] <= record["seconds"]["p80"]
        for mark in record["yardsticks"].values():
            assert "failed" not in mark, mark
            assert "unavailable" in mark or mark["ratio"]["median"] > 0


@needs_triton
def test_the_report_says_where_and_with_what(dry_run):
    report, printed = dry_run
    for key in ("commit", "torch", "triton", "cuda", "gpu", "python"):
        assert key in report["machine"]
    assert {"clocks.sm", "clocks.mem"} <= set(report["gpu_before"])
    assert "no number means anything" in printed
    assert "steps at B = 8, precision 'exact': " in printed
    assert "steps at B = 8, precision 'auto': " in printed
    for record in report["results"]:
        assert record["id"] in printed


@needs_triton
def test_each_operation_of_the_kernels_has_a_case(dry_run):
    report, _ = dry_run
    found = {(record["op"], record["backend"]) for record in report["results"]}
    assert found >= {
        ("masked_posterior", "triton"),
        ("global_posterior", "triton"),
        ("equivariant_posterior", "triton"),
        ("covariance", "triton"),
        ("masked_posterior_jvp", "triton"),
        ("global_posterior_jvp", "triton"),
        ("window_posterior", "cuda"),
        ("window_posterior_jvp", "cuda"),
        ("window_posterior_vjp", "cuda"),
        ("patch_set", "cuda"),
        ("ddim", "triton"),
    }
    beside = {name for record in report["results"] for name in record.get("yardsticks", ())}
    assert beside >= {"matmul", "copy", "eager", "compiled", "keops", "without_tangents"}
    assert {record["id"].split("/")[2].split("-")[0] for record in report["results"]} == {
        "cifar",
        "64x64",
        "mnist",
    }


@needs_triton
def test_first_calls_are_timed_in_new_processes(dry_run):
    report, printed = dry_run
    (calls,) = report["start"].values()
    assert set(calls) == {"compiled", "cached"}
    for call in calls.values():
        assert call["first_seconds"] > 0 and call["second_seconds"] > 0, call
    assert "first call of masked_posterior" in printed


def test_every_kernel_for_gpus_has_a_case():
    kernels = {
        (op, name) for op, table in OPERATIONS.items() for name in table if name in GPU_BACKENDS
    }
    assert {(case.op, case.backend) for case in gpu_cases()} == kernels | {("ddim", "triton")}


@pytest.mark.parametrize("few", [False, True])
def test_coarser_arithmetic_is_timed_beside_the_exact_one(few):
    cases = gpu_cases(few)
    assert len({case.id for case in cases}) == len(cases)
    coarser = [case for case in cases if case.precision == "auto"]
    assert {case.op for case in coarser} == {"masked_posterior", "ddim", "equivariant_posterior"}
    exact = {case.id for case in cases} - {case.id for case in coarser}
    assert {case.id.removesuffix("-auto") for case in coarser} <= exact


def test_results_are_not_overwritten(tmp_path):
    out = tmp_path / "there.json"
    out.write_text("kept")
    done = run_suite("--dry-run", "--out", str(out))
    assert done.returncode == 2 and "--force" in done.stderr
    assert out.read_text() == "kept"


def test_unknown_cases_and_folders_are_refused(tmp_path):
    done = run_suite("--dry-run", "--case", "nothing", "--out", str(tmp_path / "a.json"))
    assert done.returncode == 2 and "no case" in done.stderr
    done = run_suite("--dry-run", "--out", str(tmp_path / "missing" / "a.json"))
    assert done.returncode == 2 and "no folder" in done.stderr
