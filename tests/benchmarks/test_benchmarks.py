"""Benchmarks: checked before timed, the right backend, honest numbers, nothing overwritten."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pyflocality as pf
from benchmarks import cpu_suite
from benchmarks.kernels import baselines, runner
from benchmarks.kernels.registry import DDIM_STEPS, FULL, QUICK, Case, cases
from benchmarks.kernels.sets import BenchmarkSet, natural_images
from benchmarks.kernels.workload import Yardstick
from benchmarks.kernels.workloads import make_workload
from benchmarks.publish.plots import curves, draw
from benchmarks.publish.summary import summarise, table
from pyflocality.backends import machine_reason
from pyflocality.ops import (
    global_posterior_mean,
    masked_posterior_mean,
    window_posterior_mean,
)
from pyflocality.weights import QueryWeights

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    machine_reason("cpu") is not None, reason=str(machine_reason("cpu"))
)

WINDOW = Case("local_score", "window_posterior", 300, 2, timestep=400, window=3)


@pytest.fixture(scope="module")
def data() -> BenchmarkSet:
    """A small synthetic set."""
    return BenchmarkSet.build(QUICK.images, QUICK.shape, None)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The results file of a quick run, and what it holds."""
    out = tmp_path_factory.mktemp("results") / "quick.json"
    assert cpu_suite.main(["--quick", "--out", str(out)]) == 0
    return out, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_quick_run_writes_every_field(report):
    out, found = report
    assert found["quick"] and found["complete"] and found["suite"] == "cpu"
    assert found["date"].endswith("+00:00")
    for key in ("cpu", "cores", "threads", "memory_gib", "os", "python", "torch", "commit"):
        assert key in found["machine"]
    assert found["machine"]["pyflocality"] == pf.__version__
    assert found["data"]["images"] == QUICK.images and found["data"]["shape"] == [3, 12, 12]
    prepared = found["preparation_seconds"]
    for key in ("moments", "eigenvectors", "masks t=900", "schedule t=900"):
        assert prepared[key] > 0
    assert [result["id"] for result in found["results"]] == [case.id for case in cases(QUICK)]
    for result in found["results"]:
        seconds = result["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert len(seconds["all"]) == result["repetitions"]
        assert result["gflops_per_second"] == pytest.approx(
            result["flops"] / seconds["median"] / 1e9
        )
        assert result["check"]["error"] <= result["check"]["budget"]
        assert result["yardsticks"] and set(result["missing"]) <= {"faiss"}
        assert result["values"] == np.prod(result["shape"]) in (3 * 12 * 12, 3 * 8 * 8)
    assert set(found["rates"]) == {"matmul_gflops_per_second", "copy_gbytes_per_second"}
    assert not cpu_suite.unfinished_twin(out).exists()
    assert not out.with_name(out.name + ".part").exists()


@pytest.mark.slow
def test_results_name_no_host_and_no_path(report):
    out, _ = report
    text = out.read_text(encoding="utf-8")
    for secret in (str(out.parent), str(ROOT), str(Path.home()), f'"{socket.gethostname()}"'):
        assert secret not in text


@pytest.mark.slow
def test_eager_times_are_scaled_to_all_images(report):
    result = next(r for r in report[1]["results"] if r["suite"] == "pca_locality")
    eager = result["yardsticks"]["eager"]
    assert eager["measured_share"] == QUICK.eager_images / QUICK.images
    assert "scaled to 1000" in eager["note"]
    assert eager["ratio"]["median"] == pytest.approx(
        eager["seconds"]["median"] / result["seconds"]["median"]
    )


@pytest.mark.slow
def test_summary_is_of_sums_and_judges_full_runs_only(report):
    results = report[1]["results"]
    assert all(entry["bar"] is None for entry in report[1]["summary"])
    steps = [r for r in results if r["suite"] == "pca_locality"]
    mine = sum(r["seconds"]["median"] for r in steps)
    eager = sum(r["yardsticks"]["eager"]["seconds"]["median"] for r in steps)
    entry = next(e for e in summarise(steps) if "eager" in e["what"])
    assert entry["value"] == pytest.approx(eager / mine)
    # Three of the ten steps say nothing about the ten.
    assert entry["bar"] is None
    ten = [{**steps[0], "timestep": timestep} for timestep in DDIM_STEPS]
    beside = steps[0]["yardsticks"]
    slow = {**beside, "eager": {**beside["eager"], "seconds": {"median": 7.9 * mine}}}
    times = dict.fromkeys(("median", "p20", "p80"), mine)
    ten = [{**r, "seconds": times, "yardsticks": slow} for r in ten]
    entry = next(e for e in summarise(ten) if "eager" in e["what"])
    assert entry["bar"] == ">= 8" and entry["reached"] is False
    assert "NOT REACHED" in table(ten, [entry])


@pytest.mark.slow
def test_picture_of_the_scaling_curves(report):
    pytest.importorskip("matplotlib")
    out, found = report
    lines = curves(found["results"], "batch")
    assert [r["batch"] for r in lines["masked_posterior"]] == [1, 8]
    # A covariance has no noisy images.
    assert "covariance" not in lines
    assert [r["threads"] for r in curves(found["results"], "threads")["covariance"]] == [1, 2]
    assert [r["values"] for r in curves(found["results"], "values")["covariance"]] == [192, 432]
    windows = curves(found["results"], "window")
    assert list(windows) == ["window_posterior"]
    assert [r["window"] for r in windows["window_posterior"]] == [3, 7, 15]
    picture = draw(out)
    assert picture == out.with_suffix(".png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_result_that_is_not_a_number_is_wrong(data, monkeypatch):
    workload = make_workload(WINDOW, data)
    right = workload.answers

    def broken(images, backend, dtype=torch.float32):
        (answer,) = right(images, backend, dtype)
        return (answer * torch.nan if backend == "cpu" else answer,)

    monkeypatch.setattr(workload, "answers", broken)
    with pytest.raises(runner.CheckError, match="nan"):
        runner.check_workload(workload)


def test_one_wrong_sum_of_a_covariance_is_wrong(data, monkeypatch):
    workload = make_workload(Case("covariance", "covariance", 50), data)
    right = workload.answers

    def off_by_one(images, backend, dtype=torch.float32):
        gram, total = right(images, backend, dtype)
        gram[3, 7] += backend == "cpu"
        return gram, total

    assert runner.check_workload(workload)["error"] == 0
    monkeypatch.setattr(workload, "answers", off_by_one)
    with pytest.raises(runner.CheckError):
        runner.check_workload(workload)


def test_a_wrong_yardstick_is_an_error(data):
    workload = make_workload(WINDOW, data)
    wrong = Yardstick(lambda: None, 1.0, "zeros", lambda values: torch.zeros_like(workload.x))
    with pytest.raises(runner.CheckError, match="the yardstick eager is wrong"):
        runner.check_yardsticks(workload, {"eager": wrong})


def test_another_backend_is_an_error(data, monkeypatch):
    right = window_posterior_mean

    def elsewhere(*arguments, **options):
        return right(*arguments, **{**options, "backend": "reference"})

    monkeypatch.setattr(pf.ops, "window_posterior_mean", elsewhere)
    expected = "expected window_posterior on cpu, ran: window_posterior on reference"
    with pytest.raises(runner.WrongBackendError, match=expected):
        runner.run_case(WINDOW, data)


def test_nothing_that_ran_is_an_error():
    with pytest.raises(runner.WrongBackendError, match="ran: nothing"):
        runner.assert_backend(WINDOW, [])


def test_turns_alternate_and_the_first_round_does_not_count():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = runner.time_in_turns(functions, 2)
    assert order == ["A", "B"] * 3
    assert [len(seconds[name]) for name in "AB"] == [2, 2]


def test_threads_are_set_and_put_back(data):
    before = torch.get_num_threads()
    record = runner.run_case(replace(WINDOW, threads=before + 1, repetitions=1), data)
    assert record["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_operations_and_bytes_by_hand(data):
    """D = 3 * 12 * 12 = 432, N B = 300 * 2 = 600."""
    window = make_workload(WINDOW, data).work()
    assert window.flops == (5 * 432 + 6 * 144) * 600 == 1_814_400
    assert window.bytes == 300 * 432 + 2 * (2 * 432 * 4) == 136_512
    optimal = make_workload(replace(WINDOW, op="global_posterior", window=None), data).work()
    assert optimal.flops == 5 * 432 * 600 == 1_296_000
    covariance = make_workload(Case("covariance", "covariance", 300), data).work()
    assert covariance.flops == 300 * 432 * 433 == 56_116_800
    assert covariance.bytes == 300 * 432 + 16 * (432**2 + 432) == 3_122_496


def test_operations_of_masks_by_hand(monkeypatch):
    """Every value listens to itself: a term each; tiles share nothing."""
    data = BenchmarkSet.build(300, QUICK.shape, None)
    eye = QueryWeights(torch.eye(432).bool())
    monkeypatch.setattr(data, "weights", lambda timestep, softness=0.0: eye)
    case = replace(WINDOW, op="masked_posterior", window=None)
    masked = make_workload(case, data)
    assert masked.work().flops == (7 * 432 + 432) * 600
    # 3 x 9 tiles of 16 outputs, 16 inputs in their fringe.
    assert masked.facts()["core_fringe_terms"] == 27 * 16 * 16
    same, tiles = (masked.yardstick(f"matmul_{kind}") for kind in ("same_terms", "core_fringe"))
    # [300, 432] x [432, 2] is 259,200 multiply-adds, as many as there are terms.
    assert same.share == 300 * 432 * 2 / (432 * 600) == 1.0
    assert tiles.run().shape == (300, 27 * 16 * 16 * 2 // 432)


def test_core_and_fringe_of_cut_tiles():
    """Images of 5 x 5: tiles of 4 x 4, 4 x 1, 1 x 4 and 1 x 1 outputs."""
    mask = torch.zeros(25, 25, dtype=torch.bool)
    mask[:, :10] = True
    mask[7, 20] = True
    # Four cores of 10; output 7 lies in the large tile.
    assert baselines.core_fringe_terms(mask, (1, 5, 5)) == 4 * 10 + 16


@pytest.mark.parametrize("chunk", [None, 7])
def test_eager_algorithms_answer_as_the_reference(data, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(baselines, "LOADER_BATCH", chunk)
        monkeypatch.setattr(baselines, "_images", lambda bytes_per_image: chunk)
    images, timestep = data.images[:60], 400
    values = pf.TrainingSet(images).values()
    x, (alpha, sigma) = data.queries(timestep, 3), data.level(timestep)
    weights = data.weights(timestep)
    mask = weights.dense(torch.float32).T
    options = {"backend": "reference", "dtype": torch.float64}
    pairs = [
        (
            baselines.masked_einsum(x, values, mask, sigma, alpha),
            masked_posterior_mean(x, images, weights, sigma, alpha, **options),
        ),
        (
            baselines.global_broadcast(x, values, sigma, alpha),
            global_posterior_mean(x, images, sigma, alpha, **options),
        ),
        *(
            (
                eager(x, values, 5, sigma, alpha),
                window_posterior_mean(x, images, 5, sigma, alpha, **options),
            )
            for eager in (
                baselines.window_unfolded_patches,
                baselines.window_unfolded_differences,
            )
        ),
    ]
    for found, exact in pairs:
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_images_are_cut_to_their_middle(data):
    cut = data.cropped(8)
    assert torch.equal(cut.images, data.images[..., 2:10, 2:10])
    assert data.cropped(8) is cut
    workload = make_workload(replace(WINDOW, side=8), data)
    assert workload.values == 3 * 8 * 8 and workload.x.shape == (2, 3, 8, 8)
    assert workload.case.id == "local_score/window_posterior/cpu/N300-B2-t400-k3-S8"


def test_read_bytes_reads_all_of_them():
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 1, 3, 4)
    expected = images.flatten().view(torch.int64).sum()
    assert baselines.read_bytes(images) == expected


def test_synthetic_images_are_like_photographs():
    images = natural_images(1500, (3, 16, 16))
    assert images.dtype == torch.uint8 and images.shape == (1500, 3, 16, 16)
    assert torch.equal(natural_images(40, (3, 16, 16)), images[:40])
    values = images.double()
    assert 45 < values.std() < 65
    planes = values.transpose(0, 1).flatten(1)
    assert torch.corrcoef(planes)[0, 1] == pytest.approx(0.9, abs=0.03)
    across = torch.corrcoef(torch.stack([values[..., :-1].flatten(), values[..., 1:].flatten()]))
    far = torch.corrcoef(torch.stack([values[..., 0].flatten(), values[..., -1].flatten()]))
    # Neighbours agree, and the image does not go on periodically.
    assert across[0, 1] == pytest.approx(0.9, abs=0.03) and far[0, 1] < 0.4


def test_queries_are_not_in_the_set(data):
    alpha, sigma = data.level(0)
    x = data.queries(0, 4)
    assert torch.equal(x, data.queries(0, 4))
    values = pf.TrainingSet(data.images).values()
    distance = (x[:, None] / alpha - values).flatten(2).square().mean(2).min(1).values
    assert (distance > 10 * (sigma / alpha) ** 2).all()


def test_names_of_cases_are_unique_and_complete():
    full = cases(FULL)
    assert len({case.id for case in full}) == len(full)
    steps = [case for case in full if case.suite == "pca_locality"]
    assert [case.timestep for case in steps] == list(DDIM_STEPS)
    assert steps[0].id == "pca_locality/masked_posterior/cpu/N50000-B8-t900"
    windows = [case.window for case in full if case.suite == "local_score"]
    assert windows == [3, 5, 7, 9, 15]
    scaling = [case for case in full if case.suite == "scaling"]
    for op in ("masked_posterior", "window_posterior", "global_posterior", "covariance"):
        assert max(case.images for case in scaling if case.op == op) == 50_000
        assert {case.threads for case in scaling if case.op == op} == {1, 2}


def test_an_existing_file_is_not_overwritten(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.json"
    out.write_text("precious", encoding="utf-8")
    monkeypatch.setattr(cpu_suite, "machine_rates", dict)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_suite, "run_suite", lambda *_, **__: pytest.fail("it ran"))
        with pytest.raises(SystemExit) as stop:
            cpu_suite.main(["--quick", "--out", str(out)])
    assert stop.value.code == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "precious"
    arguments = ["--quick", "--out", str(out), "--force", "--case", "optimal/"]
    assert cpu_suite.main(arguments) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert {result["suite"] for result in written["results"]} == {"optimal"}
    assert not written["complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--out is required"),
        (["--quick", "--case", "nonesuch", "--out", "x.json"], "nonesuch"),
        (["--quick", "--out", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_said_before_anything_runs(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cpu_suite.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_set_that_is_too_small_is_an_error(tmp_path):
    archive = tmp_path / "few.npy"
    np.save(archive, np.zeros((10, 3, 12, 12), np.uint8))
    with pytest.raises(ValueError, match=r"few\.npy: expected at least 20 images"):
        BenchmarkSet.build(20, (3, 12, 12), archive)
    cut = BenchmarkSet.build(10, (3, 8, 8), archive)
    assert cut.images.shape == (10, 3, 8, 8)
