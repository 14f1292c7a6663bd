"""`pyflocality reproduce` and its sweeps and figures, on tiny sets with tiny networks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from reproduced import loaded, network_truth, truth

import pyflocality as pf
from pyflocality import cli

pytest.importorskip("matplotlib", reason="the command draws with matplotlib")

from tiny_sets import COUNT, SHAPE  # noqa: E402

from pyflocality.benchmarks.reproduce import (  # noqa: E402
    methods,
    networks,
    runs,
    table,
)

SAMPLES = 3


@pytest.fixture
def here(monkeypatch):
    """Runs are made in this process, and counted."""
    made = []

    def perform(request):
        made.append(request.settings["model"])
        return runs.perform(request)

    monkeypatch.setattr(table, "perform_apart", perform)
    monkeypatch.setattr(methods, "LOADER_BATCH", 7)
    return made


def command(folder, out, *more):
    return [
        *("reproduce", str(folder / "set.npz"), "--out", str(out), "--samples", str(SAMPLES)),
        *("--network", str(folder / "a.safetensors"), "--network", str(folder / "b.safetensors")),
        *("--threshold", "0.3", "--no-progress", *map(str, more)),
    ]


def test_table_holds_float64_truth(folder, here, tmp_path, capsys):
    names = "wiener,pca-locality,pca-locality-batch-mean,nearest"
    arguments = command(folder, tmp_path / "out", "--methods", names, "--json")
    assert cli.main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in record["table"]}
    assert list(rows) == ["network A", "network B", *names.split(",")]

    noise = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(0))
    targets = {
        name: network_truth(folder / file, noise)
        for name, file in (("network A", "a.safetensors"), ("network B", "b.safetensors"))
    }
    data = loaded(folder)
    options = {"dtype": torch.float64, "backend": "reference"}
    flat = data.values(dtype=torch.float64).flatten(1).numpy()
    expected = {
        "wiener": truth(pf.WienerDenoiser(data), noise),
        "pca-locality": truth(pf.PCALocalityDenoiser(data, 0.3, **options), noise),
        "pca-locality-batch-mean": truth(
            pf.PCALocalityDenoiser(data, 0.3, 1.0, "batch_mean", 7, **options), noise
        ),
        "network B": targets["network B"],
    }
    for against, y in targets.items():
        distances = ((y[:, :, None] - flat) ** 2).sum(-1)
        expected["nearest"] = flat[distances.argmin(-1)]
        for name, u in expected.items():
            if name == against:
                continue
            mse = ((u - y) ** 2).mean(-1)
            r2 = 1 - mse / y.var(-1, ddof=1)
            for measure, values in (("mse", mse), ("r2", r2)):
                found = rows[name]["against"][against][measure]
                told = found["final"]
                error = values[-1].std(ddof=1) / SAMPLES**0.5
                assert told["mean"] == pytest.approx(values[-1].mean(), rel=2e-3, abs=2e-3)
                assert told["standard_error"] == pytest.approx(error, rel=2e-2, abs=2e-3)
                assert found["all_steps"]["mean"] == pytest.approx(
                    values.mean(), rel=2e-3, abs=2e-3
                )
                steps = [step["mean"] for step in found["steps"]]
                np.testing.assert_allclose(steps, values.mean(-1), rtol=5e-3, atol=2e-3)
    # The two aggregations are different estimators, and the batches are of mixed classes.
    final = [
        rows[name]["against"]["network A"]["mse"]["final"]["mean"]
        for name in ("pca-locality", "pca-locality-batch-mean")
    ]
    # Farther apart than either is allowed to be from its truth.
    assert abs(final[0] - final[1]) > 0.005
    assert not torch.equal(data.labels, data.labels.sort().values)


def test_record_tells_what_was_run_and_names_no_folder(folder, here, tmp_path, capsys):
    out = tmp_path / "out"
    more = (
        "--methods",
        "local,equivariant,equivariant-broken",
        "--els-images",
        6,
        "--els-samples",
        2,
    )
    assert cli.main(command(folder, out, *more)) == 0
    assert "(6 images) (2 samples)" in capsys.readouterr().out
    text = (out / "reproduce.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and str(folder) not in text
    record = json.loads(text)
    network_a, _, local, equivariant, broken = record["table"]
    assert broken["samples"] == 2 and broken["against"] != equivariant["against"]
    assert record["networks"][0]["facts"] == {"seed": 0}
    assert record["networks"][0]["file"] == "a.safetensors"
    assert local["images"] == COUNT and network_a["images"] is None
    assert (equivariant["images"], equivariant["samples"]) == (6, 2)
    assert equivariant["extrapolated_seconds_per_step"] == pytest.approx(
        equivariant["seconds_per_step"] * (COUNT / 6) * (SAMPLES / 2), abs=0.1
    )
    assert [window for _, window in local["settings"]["windows"]] == (
        record["windows"]["local"]["windows"]
    )
    assert equivariant["settings"]["windows"] == local["settings"]["windows"]
    for name in ("samples.png", "steps.png"):
        assert (out / name).stat().st_size > 1000
    assert "local score (LS)" in (out / "table.md").read_text(encoding="utf-8")


def test_an_interrupted_command_goes_on(folder, here, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = command(folder, out, "--methods", "optimal,wiener,patch-set,multiscale,golden")

    def interrupt(request):
        if request.settings["model"] == "golden":
            raise KeyboardInterrupt
        here.append(request.settings["model"])
        return runs.perform(request)

    with monkeypatch.context() as patch:
        patch.setattr(table, "perform_apart", interrupt)
        assert cli.main(arguments) == 130
    # Own runs of the networks first, then their answers to the other's states; of a method, its own
    # run and its answers to the states of both.
    assert here == [*["network"] * 4, *["optimal"] * 3, *["wiener"] * 3]
    assert [path.name for path in out.iterdir()] == ["runs"]

    here.clear()
    assert cli.main(arguments) == 0
    assert here == [*["golden"] * 3, *["patch-set"] * 3, *["multiscale"] * 3]
    first = json.loads((out / "reproduce.json").read_text(encoding="utf-8"))
    assert first["reused_runs"] == ["network A", "network B", "optimal", "wiener"]

    here.clear()
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--force"]) == 0
    again = json.loads((out / "reproduce.json").read_text(encoding="utf-8"))
    assert here == [] and again["table"] == first["table"]
    assert again["windows"] == first["windows"]
    # Other noise, other runs.
    assert cli.main([*arguments, "--force", "--seed", "1", "--methods", "wiener"]) == 0
    assert here == [*["network"] * 4, *["wiener"] * 3]


def test_a_damaged_run_is_made_anew(folder, here, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = command(folder, out, "--methods", "wiener", "--force")
    assert cli.main(arguments) == 0
    before = json.loads((out / "reproduce.json").read_text(encoding="utf-8"))
    [kept] = [path for path in (out / "runs").glob("wiener-*.npz") if "-at-" not in path.name]
    kept.write_bytes(kept.read_bytes()[:500])
    here.clear()
    assert cli.main(arguments) == 0
    assert here == ["wiener"] and "is damaged" in capsys.readouterr().err
    after = json.loads((out / "reproduce.json").read_text(encoding="utf-8"))
    assert after["table"][-1]["against"] == before["table"][-1]["against"]


def test_a_run_of_its_own_process_is_the_same_and_tells_its_memory(folder):
    data = loaded(folder)
    noise = runs.starting_noise(SHAPE, 2, 0)
    request = runs.Request(
        {"model": "optimal"}, data, None, None, noise, 2, False, torch.device("cpu")
    )
    mine, apart = runs.perform(request), runs.perform_apart(request)
    assert torch.equal(mine.x0, apart.x0)
    assert apart.facts["backends"] == mine.facts["backends"] and len(apart.facts["seconds"]) == 2
    memory = apart.facts["extra_memory_bytes"]
    assert memory is None or 0 < memory < 10**9


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or os.name == "nt", reason="signals of POSIX")
def test_an_interruption_ends_the_process_of_a_run(monkeypatch):
    """The pool would wait for the run that nobody wants any more."""
    monkeypatch.setattr(runs, "perform", time.sleep)
    timer = threading.Timer(3.0, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runs.perform_apart(600)
    assert time.monotonic() - start < 60
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="tells processes by /proc")
def test_the_process_of_a_run_ends_with_the_command(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from pyflocality.benchmarks.reproduce import runs\n"
        "runs.perform = time.sleep\n"
        "if __name__ == '__main__':\n"
        "    runs.perform_apart(600)\n"
    )
    command = subprocess.Popen([sys.executable, script])

    def children():
        folders = Path("/proc").glob("[0-9]*")
        return [int(f.name) for f in folders if parent_of(f) == command.pid]

    def parent_of(folder):
        try:
            return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return None

    def wait(condition):
        for _ in range(600):
            if condition():
                return
            time.sleep(0.1)
        raise AssertionError("in vain")

    # The resource tracker and the process itself, once it has imported all that it needs.
    wait(lambda: len(children()) == 2)
    time.sleep(10)
    begun = children()
    command.kill()
    command.wait()
    wait(lambda: not any(Path("/proc", str(process)).exists() for process in begun))


def test_a_process_that_is_ended_is_one_line(folder, tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, *_):
            raise BrokenProcessPool("ended")

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Broken)
    assert cli.main(command(folder, tmp_path / "out", "--methods", "optimal")) == 1
    assert "error: the process that ran network was ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "optimal,unknown"), "`--methods` must be of"),
        (("--methods", "optimal,optimal"), "`--methods` must name one method or more"),
        (("--threshold", "1.5"), "`--threshold`"),
        (("--samples", "0"), "`--samples`"),
        (("--els-images", "0"), "`--els-images`"),
        (("--seed", "-1"), "`--seed`"),
        (("--network", "nowhere.safetensors"), "nowhere.safetensors is not a file"),
    ],
)
def test_mistakes(folder, here, tmp_path, capsys, more, message):
    assert cli.main([*command(folder, tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert here == [] and not (tmp_path / "out").exists()


def test_networks_must_fit_and_differ(folder, tmp_path):
    path = folder / "a.safetensors"
    with pytest.raises(ValueError, match=r"must be for images of shape \(3, 8, 8\)"):
        networks.check_networks([path], (3, 8, 8))
    with pytest.raises(ValueError, match="each network once"):
        networks.check_networks([path, path])
    with pytest.raises(ValueError, match="1 to 8 times"):
        networks.check_networks([])
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="other.safetensors is not a network"):
        networks.check_networks([other])
