"""The GPU suite: its dry run goes through every case, and nothing that breaks loses the rest."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.kernels import gpu_checks, gpu_machine, gpu_start, gpu_worker
from benchmarks.kernels.gpu_cases import gpu_cases
from pyflocality.backends import configuration

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.slow
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
        assert record["busy"] == {"unavailable": "a dry run has no CUDA device"}
        assert {"peak_extra_bytes", "peak_with_kept_bytes"} <= set(record)
        if record["op"] != "ddim":
            assert record["flops"] > 0 and record["bytes"] > 0
        for mark in record["yardsticks"].values():
            assert "failed" not in mark, mark
            assert "unavailable" in mark or mark["ratio"]["median"] > 0


@pytest.mark.slow
@needs_triton
def test_the_report_says_where_and_with_what(dry_run):
    report, printed = dry_run
    for key in ("commit", "torch", "triton", "cuda", "gpu", "python"):
        assert key in report["machine"]
    assert {"clocks.sm", "clocks.mem"} <= set(report["gpu_before"])
    assert "no number means anything" in printed
    for precision in ("exact", "auto"):
        assert f"steps at B = 8, precision '{precision}': " in printed
        assert f"PCA-locality by DDIM at B = 8, precision '{precision}': " in printed
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
def test_one_case_of_each_kind_is_compared_on_the_whole_set(dry_run):
    report, _ = dry_run
    compared = set()
    for record in report["results"]:
        if record["status"] != "ok":
            continue
        whole = record["check"]["whole"]
        if "unchecked" in whole:
            assert whole == {"unchecked": "another case of its kind is compared"}
            continue
        assert whole["error"] <= whole["budget"] <= 0.1
        assert whole["images"] == record["images"]
        compared.add(tuple(whole["kind"]))
    assert {kind[0] for kind in compared} == {
        record["op"] for record in report["results"] if record["status"] == "ok"
    }
    assert ("ddim", "triton", "cifar", "exact") in compared
    assert ("ddim", "triton", "cifar", "auto") in compared


@needs_triton
def test_first_calls_are_timed_in_new_processes(dry_run):
    report, printed = dry_run
    (calls,) = report["start"].values()
    assert set(calls) == {"compiled", "cached"}
    for call in calls.values():
        assert call["first_seconds"] > 0 and call["second_seconds"] > 0, call
    assert "first call of masked_posterior" in printed


def test_every_kernel_for_gpus_has_a_case():
    served = configuration()["operations"].items()
    kernels = {(op, name) for op, names in served for name in names if name in GPU_BACKENDS}
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


@pytest.mark.parametrize("few", [False, True])
def test_each_kind_comes_early(few):
    kinds = [case.kind for case in gpu_cases(few)]
    first = kinds[: len(set(kinds))]
    assert len(set(first)) == len(first)


def suite_options(out: Path, *arguments: str) -> argparse.Namespace:
    words = ["--dry-run", "--no-start", "--no-tests", "--commit", "abc", "--out", str(out)]
    return gpu_suite._parser().parse_args([*words, "--case", "global_posterior/", *arguments])


# Runs cases until one with a word in its name, in which it does something else. It imports little,
# so that it begins at once.
WORKER = """
import json, os, sys, time
words, names, word, what = json.loads(sys.argv[1]), *sys.argv[2:]
assert 0 < words["seconds"] <= 510
report = json.load(open(words["out"]))
def write():
    with open(words["out"] + ".new", "w") as file:
        json.dump(report, file)
    os.replace(words["out"] + ".new", words["out"])
for name in sorted(set(json.loads(names)) - {one["id"] for one in report["results"]}):
    report["running"] = name
    write()
    if word in name:
        exec(what)
    del report["running"]
    record = {"id": name, "status": "unavailable", "reason": str(os.getpid())}
    report["results"].append(record)
    write()
"""


@pytest.fixture
def broken_worker(tmp_path, monkeypatch):
    """Lets a process of the suite do something in the cases with a word in their names."""
    options, command = suite_options(tmp_path), gpu_suite.Suite._command

    def put(word: str, what: str) -> None:
        def changed(self: gpu_suite.Suite) -> list[str]:
            return [sys.executable, "-c", WORKER, command(self)[-1], names, word, what]

        names = json.dumps([case.id for case in gpu_suite.missing_cases(options, {"results": []})])
        monkeypatch.setattr(gpu_suite.Suite, "_command", changed)

    return put


def test_a_process_that_dies_loses_only_its_case(broken_worker, tmp_path, capfd):
    broken_worker("cifar-B8-t400-R1", "os.kill(os.getpid(), 9)")
    options = suite_options(tmp_path / "a.json")
    report = gpu_suite.Suite(options).run()
    assert report == json.loads(options.out.read_text())
    by_id = {record["id"]: record for record in report["results"]}
    assert set(by_id) == {case.id for case in gpu_cases(few=True) if "global_posterior/" in case.id}
    dead = by_id.pop("global_posterior/triton/cifar-B8-t400-R1")
    assert dead["status"] == "failed" and dead["reason"] == "its process ended with code -9"
    assert {record["status"] for record in by_id.values()} == {"unavailable"}
    # One process before, another one after.
    assert len({record["reason"] for record in by_id.values()}) == 2
    assert "running" not in report
    assert "its process ended with code -9" in capfd.readouterr().out


def test_a_process_that_hangs_is_ended(broken_worker, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_CASE_SECONDS", 5)
    broken_worker("64x64", "time.sleep(600)")
    report = gpu_suite.Suite(suite_options(tmp_path / "a.json")).run()
    dead = [record for record in report["results"] if record["status"] == "failed"]
    assert [record["reason"] for record in dead] == ["its process was killed after 5 s"]
    assert len(report["results"]) > 1


def test_processes_that_all_die_end_the_run(broken_worker, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_MOST_PROCESSES", 2)
    broken_worker("", "os._exit(7)")
    report = gpu_suite.Suite(suite_options(tmp_path / "a.json")).run()
    reasons = [record["reason"] for record in report["results"]]
    assert reasons[:2] == ["its process ended with code 7"] * 2
    assert set(reasons[2:]) == {"no process came to it"}
    broken_worker("none", "")
    report = gpu_suite.Suite(suite_options(tmp_path / "a.json", "--resume")).run()
    told = [one["status"] for one in report["results"]]
    assert told == ["failed"] * 2 + ["unavailable"] * (len(reasons) - 2) and len(reasons) > 2


def test_what_had_no_time_runs_when_the_run_is_resumed(broken_worker, tmp_path):
    out = tmp_path / "a.json"
    report = gpu_suite.Suite(suite_options(out, "--budget", "0")).run()
    assert {record["reason"] for record in report["results"]} == {"no time left"}
    broken_worker("mnist", "os._exit(7)")
    first = gpu_suite.Suite(suite_options(out, "--resume")).run()["results"]
    assert sorted(record["status"] for record in first)[:2] == ["failed", "unavailable"]
    # Nothing is missing any more.
    again = gpu_suite.Suite(suite_options(out, "--resume")).run()["results"]
    assert again == first
    with pytest.raises(ValueError, match="commit"):
        gpu_suite.Suite(suite_options(out, "--resume", "--commit", "other"))
    with pytest.raises(ValueError, match="quick"):
        gpu_suite.Suite(suite_options(out, "--resume", "--quick"))


def worker_of(tmp_path: Path) -> gpu_worker.Worker:
    options = argparse.Namespace(
        out=tmp_path / "a.json", seconds=100, dry_run=True, quick=False, cifar10=None, mnist=None
    )
    return gpu_worker.Worker(options, {"machine": {}, "results": []})


def test_a_broken_context_ends_the_process_and_keeps_what_was_measured(tmp_path, monkeypatch):
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    worker = worker_of(tmp_path)
    cases = [case for case in gpu_cases(few=True) if case.backend == "triton"][:3]
    measured = {"seconds": {"median": 1.0}}

    def measure(case) -> dict:
        if case is cases[1]:
            worker.device = torch.device("cuda")
            monkeypatch.setattr(torch.cuda, "synchronize", broken)
            raise RuntimeError("CUDA error")
        return measured

    monkeypatch.setattr(worker, "_measure", measure)
    monkeypatch.setattr(gpu_worker, "line_of", lambda record: record["id"])
    assert worker.run(cases) == gpu_worker.BROKEN
    first, second = json.loads(worker.options.out.read_text())["results"]
    assert first["status"] == "ok" and first["seconds"] == measured["seconds"]
    assert second["status"] == "failed" and second["reason"] == "RuntimeError: CUDA error"
    assert "illegal memory access" in second["broken"]


def test_a_case_that_breaks_the_context_without_an_error_fails(tmp_path, monkeypatch):
    worker = worker_of(tmp_path)
    monkeypatch.setattr(worker, "_measure", lambda case: {"rounds": 3})
    monkeypatch.setattr(worker, "_broken", lambda: "illegal")
    monkeypatch.setattr(worker, "_unavailable", lambda case: None)
    case = next(case for case in gpu_cases(few=True) if case.backend == "triton")
    record, usable = worker._record(case)
    assert not usable
    assert record["status"] == "failed" and record["reason"] == "illegal" and record["rounds"] == 3


def test_tests_that_take_too_long_or_die_have_failed(monkeypatch):
    program = "import sys, time; print('begun', flush=True); time.sleep({})"
    late = gpu_checks._run([sys.executable, "-c", program.format(60)], 0, {})
    assert late["exit_code"] == 1 and late["tail"] == ["begun", "out of time"]
    commands = {
        "good": [sys.executable, "-c", "print('well')"],
        "dead": [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"],
    }
    runs = gpu_checks._all_of(commands, lambda: 60)
    assert runs["good"]["exit_code"] == 0 and runs["good"]["tail"] == ["well"]
    assert runs["dead"]["exit_code"] == -11 and runs["exit_code"] == 1


@needs_triton
def test_tests_of_both_kinds_of_kernels_are_chosen_without_compile_gates():
    command = [*gpu_checks._PYTEST, "--collect-only", "-p", "no:cacheprovider"]
    folders = ("tests/kernels/triton", "tests/kernels/cuda/test_cuda_gpu.py")
    # Whatever options are set for the tests themselves, names are wanted here.
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, *gpu_checks._CHOSEN, "-m", "", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=variables,
    )
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert not [line for line in chosen if "compile" in line]
    files = {line.split("::")[0] for line in chosen}
    kernels = ("covariance", "equivariant", "global", "global_jvp", "masked", "masked_jvp")
    assert files >= {f"tests/kernels/triton/test_{name}_kernel.py" for name in kernels}
    assert "tests/kernels/cuda/test_cuda_gpu.py" in files


def test_sanitizers_run_where_they_are_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "PATH" in gpu_checks.run_sanitizers(lambda: 60)["unavailable"]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING"\n')
    tool.chmod(0o755)
    found = gpu_checks.run_sanitizers(lambda: 60)
    assert found["memcheck"]["tail"] == ["memcheck 1"]
    assert found["racecheck"]["tail"] == ["racecheck 1"] and found["exit_code"] == 0


def test_busy_time_is_the_sum_of_all_kernels():
    events = [("a", 1.0), ("b", 3.0), ("a", 1.5), ("c", 0.25), ("d", 0.5)]
    found = gpu_machine.busy_times(iter(events))
    assert found["seconds"] == 6.25 and found["launches"] == 5
    assert [one["kernel"] for one in found["longest"]] == ["b", "a", "d"]
    assert found["longest"][1] == {"kernel": "a", "seconds": 2.5, "launches": 2}
    assert "unavailable" in gpu_machine.busy_times([])


def test_busy_time_takes_the_kernels_from_torchs_profiler(monkeypatch):
    kinds, ran = torch.autograd.DeviceType, []

    def event(kind, seconds: float) -> SimpleNamespace:
        times = SimpleNamespace(elapsed_us=lambda: seconds * 1e6)
        return SimpleNamespace(name="scan", device_type=kind, time_range=times)

    class Profile(nullcontext):
        def __init__(self, activities: list) -> None:
            super().__init__(self)

        def events(self) -> list[SimpleNamespace]:
            return [event(kinds.CUDA, 0.5), event(kinds.CPU, 9.0), event(kinds.CUDA, 0.25)]

    timer = gpu_machine.Timer(torch.device("cpu"))
    timer._cuda = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    found = timer.busy(lambda: ran.append(1))
    assert found["seconds"] == 0.75 and found["launches"] == 2 and ran == [1]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profiler_that_fails_is_a_reason(monkeypatch):
    timer = gpu_machine.Timer(torch.device("cpu"))
    timer._cuda = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # Without a GPU torch's profiler refuses, or sees no kernel.
    assert timer.busy(lambda: None)["unavailable"]


def test_first_calls_that_fail_are_records(monkeypatch):
    def prints(text: str) -> None:
        done = subprocess.CompletedProcess([], 0, stdout=text, stderr="")
        monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)

    for text in ("", "no JSON", "[1]", '{"first_seconds": 1}'):
        prints(text)
        assert gpu_start._run("masked_posterior", {}, 50)["failed"]
    prints('warning\n{"first_seconds": 2.0, "second_seconds": 1.0}')
    assert gpu_start._run("masked_posterior", {}, math.inf)["first_seconds"] == 2.0
    found = gpu_start.start_times(["masked_posterior"], lambda: 3.0)
    assert found == {
        "masked_posterior": dict.fromkeys(("compiled", "cached"), {"skipped": "no time left"})
    }
