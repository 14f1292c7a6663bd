"""Sharded sets answer on every rank what the whole set answers; a lost rank ends the job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_worker import (
    ALPHAS,
    COUNT,
    SIGMAS,
    answers,
    arguments,
    split_answers,
    whole_set,
)
from truth import filtered_posterior_mean, values_of, window_weights

import pyflocality as pf

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here"
)

WORKER = Path(__file__).with_name("helpers") / "distributed_worker.py"


def run_ranks(mode: str, count: int, out: Path) -> list[subprocess.Popen[str]]:
    """Start the ranks of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), mode, str(out)],
            env=os.environ | job | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Exit code and what a rank said; it must end in time."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """What the ranks of a job found."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    for process in run_ranks("answers", request.param, out):
        code, said = ended(process, 120)
        assert code == 0, said
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def whole():
    """What the whole set answers in one process."""
    return {
        "cpu": answers(whole_set(torch.uint8), "auto"),
        "float64": answers(whole_set(torch.float64), "reference"),
    }


def test_every_rank_answers_for_the_whole_set(results, whole):
    for kind in ("cpu", "float64"):
        for name, expected in whole[kind].items():
            found = results[0][kind][name]
            # Linear images are float32.
            exact = kind == "float64" and found.dtype == torch.float64 and "sloped" not in name
            tolerance = 1e-12 if exact else 2e-6
            # Derivatives are as large as alpha / sigma^2 times the variance of values and inputs.
            bound = tolerance * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(
                found, expected, rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_all_ranks_hold_the_same_bits(results):
    for other in results[1:]:
        for kind in ("cpu", "float64"):
            for name, expected in results[0][kind].items():
                assert torch.equal(other[kind][name], expected), name


def test_moments_of_bytes_are_exact(results, whole):
    for name in ("mean", "covariance", "count"):
        assert torch.equal(results[0]["cpu"][name], whole["cpu"][name])


def test_answers_are_those_of_the_formula(results):
    x, _, sigma, alpha = arguments()
    data = whole_set(torch.float64)
    weights, answered = window_weights(data.image_shape, 3)
    expected = filtered_posterior_mean(
        x, data.images, weights, answered, sigma.double().numpy(), alpha.double().numpy()
    )
    assert abs(results[-1]["float64"]["local"].numpy() - expected).max() < 1e-6
    mean = values_of(data.images).mean(0)
    assert abs(results[-1]["float64"]["mean"].numpy() - mean).max() < 1e-12
    assert len(SIGMAS) == len(ALPHAS) == len(x)


def test_parts_cover_the_set(results):
    assert sum(result["length"] for result in results) == COUNT
    lengths = [result["length"] for result in results]
    assert max(lengths) - min(lengths) <= 1
    assert f"part {len(results)} of {len(results)}" in results[-1]["repr"]


def test_split_samples_are_those_of_one_process(results):
    expected = split_answers(lambda denoiser: denoiser)
    for result in results:
        assert set(result["split"]) == set(expected)
        for name, found in result["split"].items():
            assert found.dtype == expected[name].dtype
            assert torch.equal(found, expected[name]), name
    assert expected["signs"].all()


def test_equally_near_images_come_in_the_order_of_the_set(results):
    # The first image lies twice in the set, and so do its mirror images.
    ties = results[-1]["cpu"]["ties"]
    assert ties[:, :2].tolist() == [[0, COUNT - 1], [COUNT, 2 * COUNT - 1]]
    assert (results[-1]["cpu"]["ties, distances"][:, :2] < 1e-5).all()


def test_what_would_take_a_part_for_the_whole_is_refused(results):
    told = results[0]["refusals"]
    assert {name: text for name, text in told.items() if text == "answered"} == {}
    for name in ("values", "subset", "key", "batch mean", "nearest"):
        assert "would take it for the whole set" in told[name], told[name]
    assert "`denoiser` must return images like" in told["samples of a shape"]
    assert "cannot differentiate through the join" in told["by sigma"], told["by sigma"]
    assert "`denoiser` must be of a whole set" in told["samples"]
    for name in ("differ", "other operation", "samples differ"):
        assert "called with different arguments" in told[name], told[name]
    assert "sharded already" in told["twice"]
    assert "cannot be pickled" in told["pickle"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["killed", "stuck"])
def test_a_lost_rank_ends_the_others(mode, tmp_path):
    ranks = run_ranks(mode, 2, tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready-1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "ready-1").exists()
    code, said = ended(ranks[0], 30)
    ranks[1].kill()
    ranks[1].communicate()
    assert code != 0
    assert "RankLostError" in said and "has ended or did not answer in time" in said, said


def test_refused_without_a_job(monkeypatch):
    data = whole_set(torch.uint8)
    with pytest.raises(ValueError, match="no process group"):
        pf.distributed.shard(data)
    with pytest.raises(TypeError, match="`data` must be a TrainingSet"):
        pf.distributed.shard(data.images)
    with pytest.raises(ValueError, match="call split_samples inside"):
        pf.distributed.split_samples(pf.OptimalDenoiser(data))
    with pytest.raises(TypeError, match="`denoiser` must be callable"):
        pf.distributed.split_samples(data)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not set"), pf.distributed.ranks():
        pass
    with pytest.raises(ValueError, match="`timeout`"), pf.distributed.ranks(timeout=0):
        pass
