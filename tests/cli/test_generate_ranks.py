"""`generate` under torchrun: the images of one process, written and told once, whoever dies."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pyflocality as pf
from pyflocality.cli import main

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here"
)

WORKER = Path(__file__).parents[1] / "helpers" / "generate_worker.py"
STEPS = 6
FILES = ["run.json", "samples.npy", "samples.png", "trajectory.png"]
# Each as one process runs it; what the ranks divide comes on top.
CASES = {
    "local": ["--denoiser", "local", "--window", "3"],
    "class": ["--threshold", "0.1", "--label", "1", "--global-share", "0.3"],
    "flipped": ["--denoiser", "optimal", "--flip"],
    "calibrated": ["--calibration", "CHOICES"],
    # Rank 0 calibrates, or finds what is kept, for all.
    "open": [],
}
SAMPLES = {
    **CASES,
    "golden": ["--denoiser", "local", "--window", "3", "--subset", "golden"],
    # Fewer images than ranks.
    "few": ["--denoiser", "optimal", "--label", "3"],
    "nearest": ["--denoiser", "nearest"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A set of 60 images 6x6 of three classes and the last one of a class of its own."""
    path = tmp_path_factory.mktemp("set") / "tiny.npz"
    images = np.random.default_rng(8).integers(0, 256, (60, 1, 6, 6), np.uint8)
    np.savez(path, images=images, labels=[*(np.arange(59) % 3), 3])
    _choices().save(path.with_name("choices.json"))
    return path


def _choices():
    """A calibration that has one model, then another: of posteriors with a slope, and of masks."""
    local = pf.Candidate("local", window=3, temperature=1.4, slope=0.25)
    candidates = [local, pf.Candidate("pca-locality", threshold=0.1)]
    images = np.random.default_rng(8).integers(0, 256, (60, 1, 6, 6), np.uint8)
    found = pf.calibrate(pf.TrainingSet(images), steps=STEPS, candidates=candidates, progress=False)
    run = dataclasses.replace(found.runs[0], choices=(0, 1) * (STEPS // 2), restored=None)
    return dataclasses.replace(found, runs=(run,))


def arguments(source, out, *more):
    choices = source.with_name("choices.json")
    more = [choices if word == "CHOICES" else word for word in more]
    words = ["generate", source, "--out", out, "-n", 5, "--steps", STEPS, *more]
    return [str(word) for word in words]


# A slope's filter is one product with the batch, which rounds by the batch's size.
ROUNDED = ("calibrated", "open")


def launched(count, *program, cache=None):
    """Start `torchrun`, with a cache of its own where one is given."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ranks = ["--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*torchrun, *ranks, *map(str, program)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1"}
        | ({} if cache is None else {"PYFLOCALITY_CACHE_DIR": str(cache)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(job, seconds=120):
    """Exit code, standard output and standard error of a job, which must end in time."""
    try:
        stdout, stderr = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # torchrun passes it on to the ranks.
        job.terminate()
        job.communicate(timeout=60)
        raise
    return job.returncode, stdout, stderr


def job_file(folder, commands, killed=None, batch=None):
    path = folder / "job.json"
    path.write_text(json.dumps({"commands": commands, "killed": killed, "batch": batch}))
    return path


def record(out):
    return json.loads((out / "run.json").read_text())


def samples(out):
    return np.load(out / "samples.npy")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Folders of the results of one process, by case."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYFLOCALITY_CACHE_DIR", str(folder / "cache"))
            for name, more in SAMPLES.items():
                assert main(arguments(source, folder / name, "--no-progress", *more)) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def job(request, source, tmp_path_factory):
    """Folders of the results of a job, and what it printed."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    commands = [
        arguments(source, folder / kind / name, *more, "--split-over", kind)
        for kind, cases in (("images", CASES), ("samples", SAMPLES))
        for name, more in cases.items()
    ]
    started = launched(request.param, WORKER, job_file(folder, commands), cache=folder / "cache")
    code, stdout, stderr = ended(started)
    assert code == 0, stderr
    return request.param, folder, stdout, stderr


def test_ranks_that_divide_the_images_make_those_of_one_process(job, whole):
    count, folder, _, _ = job
    for name in CASES:
        out = folder / "images" / name
        assert abs(samples(out) - samples(whole / name)).max() < 2e-6 * STEPS, name
        found, expected = record(out), record(whole / name)
        assert found["ranks"] == {"count": count, "split_over": "images"}
        assert expected["ranks"] is None
        assert found["nearest"]["index"] == expected["nearest"]["index"]
        assert found["nearest"]["mirrored"] == expected["nearest"]["mirrored"]
        assert found["recited"] == expected["recited"]
        assert found["data"] == expected["data"]
        assert found["calibrated"] == expected["calibrated"] == ("made" if name == "open" else None)
        assert found["backends"] == expected["backends"]


def test_ranks_that_divide_the_samples_make_the_same_bits(job, whole):
    count, folder, _, _ = job
    for name in SAMPLES:
        out = folder / "samples" / name
        assert record(out)["ranks"] == {"count": count, "split_over": "samples"}
        if name in ROUNDED:
            assert abs(samples(out) - samples(whole / name)).max() < 2e-6 * STEPS
            assert record(out)["denoiser"] == record(whole / name)["denoiser"]
            continue
        assert np.array_equal(samples(out), samples(whole / name)), name
        for picture in ("samples.png", "trajectory.png"):
            assert (out / picture).read_bytes() == (whole / name / picture).read_bytes(), name
        assert len(record(out)["calls"]) == STEPS


def test_rank_0_alone_writes_and_speaks(job):
    _, folder, stdout, stderr = job
    outs = [folder / kind / name for kind in ("images", "samples") for name in CASES]
    for out in outs:
        # Nothing hidden is left, neither temporary files nor kept answers.
        assert sorted(path.name for path in out.iterdir()) == FILES
        assert stdout.count(f"{out}/run.json") == 1
    runs = len(CASES) + len(SAMPLES)
    # Files and time, and whether samples are training images.
    assert len(stdout.splitlines()) == 2 * runs
    assert stderr.count("loading") == stderr.count("sampling 5 images") == runs


@pytest.mark.parametrize(("split", "killed"), [("images", 1), ("samples", 0)])
@pytest.mark.slow
def test_a_killed_rank_ends_the_job_which_then_goes_on(split, killed, source, whole, tmp_path):
    out = tmp_path / "out"
    words = arguments(source, out, *CASES["local"], "--split-over", split)
    # Far below the ten minutes that ranks wait for one that is merely slow.
    job = launched(2, WORKER, job_file(tmp_path, [words], (killed, 4)))
    code, stdout, stderr = ended(job)
    assert code == 1 and stdout == ""
    assert stderr.count("pyflocality: error: ") == 1
    assert "Start the job again with the same options" in stderr
    assert "Signal 9 (SIGKILL)" in stderr
    # The answers of four steps alone; where rank 0 could not clean up, its journal, which the next
    # run reads, and empty files, too.
    left = [path for path in out.iterdir() if path.stat().st_size > 0]
    expected = {".answers", ".run"} if killed == 0 else {".answers"}
    assert {path.suffix for path in left} == expected
    assert killed == 0 or list(out.iterdir()) == left

    code, _, stderr = ended(launched(2, "-m", "pyflocality", *words))
    assert code == 0, stderr
    assert sorted(path.name for path in out.iterdir() if path.stat().st_size > 0) == FILES
    assert (record(out)["resumed_calls"], len(record(out)["calls"])) == (4, STEPS - 4)
    difference = abs(samples(out) - samples(whole / "local")).max()
    assert difference < 2e-6 * STEPS if split == "images" else difference == 0


@pytest.mark.parametrize(("split", "killed"), [("images", 1), ("samples", 0)])
@pytest.mark.slow
def test_batches_go_on_where_a_rank_was_killed(split, killed, source, whole, tmp_path):
    """The first batch of three is done, the second one of two in its third step."""
    out = tmp_path / "out"
    words = arguments(source, out, *CASES["local"], "--split-over", split)
    job = launched(2, WORKER, job_file(tmp_path, [words], (killed, STEPS + 2), batch=3))
    assert ended(job)[0] == 1
    assert {".samples", ".answers"} <= {path.suffix for path in out.iterdir()}
    code, stdout, stderr = ended(launched(2, WORKER, job_file(tmp_path, [words], batch=3)))
    assert code == 0, stderr
    assert sorted(path.name for path in out.iterdir() if path.stat().st_size > 0) == FILES
    assert (record(out)["resumed_samples"], record(out)["resumed_calls"]) == (3, 2)
    assert record(out)["nearest"]["index"] == record(whole / "local")["nearest"]["index"]
    difference = abs(samples(out) - samples(whole / "local")).max()
    assert difference < 2e-6 * STEPS if split == "images" else difference == 0


@pytest.mark.parametrize(
    "mistake",
    [
        "of rank 0",
        pytest.param("of all", marks=pytest.mark.slow),
        pytest.param("of the parser", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_told_once(mistake, source, tmp_path):
    out = tmp_path / "out"
    more = {"of rank 0": [], "of all": ["--label", "7"], "of the parser": ["--seed", "many"]}
    if mistake == "of rank 0":
        out.mkdir()
        (out / "samples.npy").write_text("precious")
    words = arguments(source, out, "--no-progress", *more[mistake])
    code, stdout, stderr = ended(launched(2, "-m", "pyflocality", *words))
    # 1 is torchrun's own, 2 the ranks'.
    assert code == 1 and stdout == "" and "exitcode  : 2" in stderr
    if mistake == "of the parser":
        assert stderr.count("Invalid value for '--seed'") == 1
    else:
        assert stderr.count("pyflocality: error: ") == 1
        assert ("--label" if more[mistake] else "already there") in stderr
    if mistake == "of rank 0":
        assert [path.name for path in out.iterdir()] == ["samples.npy"]
        assert (out / "samples.npy").read_text() == "precious"
    else:
        assert not out.exists()


@pytest.mark.slow
def test_a_set_with_fewer_images_than_ranks_is_refused(source, tmp_path):
    words = arguments(source, tmp_path / "out", *SAMPLES["few"], "--no-progress")
    code, _, stderr = ended(launched(2, "-m", "pyflocality", *words))
    assert code == 1
    assert "`--split-over` must be samples for 2 ranks and a set of 1 images" in stderr
    assert not (tmp_path / "out").exists()


def test_moments_of_a_class_lean_on_those_of_all(source, tmp_path):
    with np.load(source) as archive:
        images, labels = archive["images"], archive["labels"]
    everything = pf.Moments.from_data(pf.TrainingSet(images))
    own = pf.Moments.from_data(pf.TrainingSet(images[labels == 1]))
    expected = pf.sample(
        pf.WienerDenoiser(own.blended(everything, 0.3)),
        5,
        steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    quiet = ["--denoiser", "wiener", "--label", "1", "--no-progress"]
    assert main(arguments(source, tmp_path / "a", *quiet, "--global-share", "0.3")) == 0
    assert abs(samples(tmp_path / "a") - expected.images.numpy()).max() < 1e-6
    assert record(tmp_path / "a")["global_share"] == 0.3
    assert record(tmp_path / "a")["data"]["images"] == 20

    everything.save(tmp_path / "all.safetensors")
    file = ["--moments", str(tmp_path / "all.safetensors")]
    assert main(arguments(source, tmp_path / "b", *quiet, "--global-share", "0.3", *file)) == 0
    assert np.array_equal(samples(tmp_path / "b"), samples(tmp_path / "a"))

    assert main(arguments(source, tmp_path / "c", *quiet, "--global-share", "0")) == 0
    assert main(arguments(source, tmp_path / "d", *quiet)) == 0
    assert np.array_equal(samples(tmp_path / "c"), samples(tmp_path / "d"))
    assert abs(samples(tmp_path / "c") - samples(tmp_path / "a")).max() > 1e-2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--global-share", "0.5"], "`--global-share` is of a class: it needs `--label`"),
        (["--label", "1", "--global-share", "1.5"], "`--global-share` must lie in [0, 1]"),
        (["--label", "1", "--global-share", "nan"], "`--global-share` must lie in [0, 1]"),
        (
            ["--label", "1", "--global-share", "0.5", "--denoiser", "optimal"],
            "`--global-share` is of no use to the denoiser optimal",
        ),
        (["--split-over", "samples"], "`--split-over` is of several ranks"),
    ],
)
def test_wrong_options_are_refused(source, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(arguments(source, tmp_path / "out", *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--denoiser", "nearest"], "`--split-over` must be samples for nearest"),
        (["--subset", "golden"], "`--split-over` must be samples for `--subset`"),
        (
            ["--aggregation", "batch-mean", "--split-over", "images"],
            "`--split-over` must be samples for `--aggregation` batch-mean",
        ),
        (["--device", "cuda:0"], "`--device` must"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(as_rank, source, tmp_path, capsys, more, words):
    as_rank(0)
    assert main(arguments(source, tmp_path / "out", *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
