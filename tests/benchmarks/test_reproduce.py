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

import pyflocality as pf
from pyflocality import cli

pytest.importorskip("matplotlib", reason="the command draws with matplotlib")

from tiny_sets import COUNT, SHAPE, write_network, write_sets  # noqa: E402

from pyflocality.benchmarks.reproduce import (  # noqa: E402
    diagnosis,
    methods,
    networks,
    runs,
    scores,
    sweeps,
    table,
)

SAMPLES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, sorted by class, and two networks."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_sets(folder)
    for seed, name in enumerate("ab"):
        write_network(folder / f"{name}.safetensors", seed)
    return folder


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


def truth(denoiser, x_T):  # noqa: N803
    """Clipped answers of a run in float64, [steps, n, D]."""
    out = pf.sample(denoiser, x_T=x_T.double(), steps=10, progress=False)
    return out.x0.clamp(-1, 1).flatten(2).numpy()


def loaded(folder):
    return methods.load_mixed(str(folder / "set.npz"), progress=False)


def network_truth(path, x_T):  # noqa: N803
    network = networks.load(path)
    network.module.double()
    return truth(network, x_T)


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
    assert here == ["network", "network", "optimal", "wiener"]
    assert [path.name for path in out.iterdir()] == ["runs"]

    here.clear()
    assert cli.main(arguments) == 0
    assert here == ["golden", "patch-set", "multiscale"]
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
    assert here == ["network", "network", "wiener"]


def test_a_damaged_run_is_made_anew(folder, here, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = command(folder, out, "--methods", "wiener", "--force")
    assert cli.main(arguments) == 0
    before = json.loads((out / "reproduce.json").read_text(encoding="utf-8"))
    [kept] = (out / "runs").glob("wiener-*.npz")
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


def test_summary_leaves_out_what_is_no_number():
    values = torch.tensor([1.0, 3.0, -torch.inf, 5.0, torch.nan])
    assert scores.summary(values) == {
        "mean": 3.0,
        "standard_error": pytest.approx(2 / 3**0.5),
        "median": 3.0,
        "left_out": 2,
    }
    assert scores.summary(torch.tensor([2.0]))["standard_error"] is None
    nothing = scores.summary(torch.tensor([torch.nan]))
    assert nothing["mean"] is None and scores.shown(nothing, 3) == "-"
    assert scores.shown(scores.summary(values), 2) == "3.00 ± 1.15"


def test_effective_sizes_are_those_of_the_weights(folder):
    data = loaded(folder)
    denoiser = pf.PCALocalityDenoiser(data, 0.3, dtype=torch.float64, backend="reference")
    alpha, sigma = pf.DDPMSchedule()(100)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = denoiser.weights_at(sigma, alpha).dense(torch.float64)
    squared = (x.flatten(1)[:, None] - alpha * data.values(dtype=torch.float64).flatten(1)) ** 2
    logits = -torch.einsum("qd,bnd->bqn", weights, squared) / (2 * sigma**2)
    exact = logits.softmax(-1)
    parts = logits.split(7, -1)
    mixture = torch.cat([part.softmax(-1) / len(parts) for part in parts], -1)
    # The same in another order: other batches, other sizes.
    order = torch.arange(COUNT).flip(0)
    turned = torch.cat([p.softmax(-1) / len(parts) for p in logits[..., order].split(7, -1)], -1)
    assert (turned.square().sum(-1) / mixture.square().sum(-1) - 1).abs().max() > 0.01

    def batch_mean(images):
        options = {"dtype": torch.float64, "backend": "reference"}
        return pf.PCALocalityDenoiser(images, 0.3, 1.0, "batch_mean", 7, **options)

    models = (denoiser, batch_mean(data), batch_mean(data.subset(order)))
    for model, p in zip(models, (exact, mixture, turned), strict=True):
        found = diagnosis.effective_sizes(model, x, sigma, alpha)
        torch.testing.assert_close(found, 1 / p.square().sum(-1), rtol=1e-6, atol=0)
    # Four batches: no batch mean rests on fewer images.
    assert found.min() >= 4 - 1e-9 and (1 / exact.square().sum(-1)).min() < 2


def test_weighted_quantiles():
    sizes = torch.tensor([[5.0, 1.0, 9.0], [3.0, 2.0, 8.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    # In order 1 (3), 2 (3), 3 (1), 5 (1), 8 (0), 9 (0): 8 in all.
    assert diagnosis.weighted_quantiles(sizes, weights) == [1.0, 2.0, 5.0]


def test_gradient_energy():
    image = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]]])
    assert diagnosis.gradient_energy(image).tolist() == [(9 + 4) / 2 + (1 + 0) / 2]


def test_sweeps(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "TEMPERATURES", (1.0, 2.0))
    monkeypatch.setattr(sweeps, "THRESHOLDS", (1 / 3, 1.0, 10.0))
    monkeypatch.setattr(sweeps, "FURTHER_THRESHOLDS", (1 / 3,))
    monkeypatch.setattr(sweeps, "FURTHER", 7)
    monkeypatch.setattr(sweeps, "ORDERS", (2,))
    monkeypatch.setattr(sweeps, "BATCHES", (7,))
    monkeypatch.setattr(sweeps, "DIAGNOSED", (7,))
    out = tmp_path / "sweeps.json"
    arguments = [
        *("--source", str(folder / "set.npz"), "--network", str(folder / "a.safetensors")),
        *("--network", str(folder / "b.safetensors"), "--out", str(out), "--no-progress"),
        *("--threshold", "0.3", "--samples", "2", "--seeds", "2"),
    ]
    assert sweeps.main(arguments) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    found = report["results"]["sweeps"]
    assert list(found["temperature"]) == ["1", "2"] and list(found["threshold"]) == ["0.1", "0.3"]
    assert list(found["aggregation"]) == [
        *("exact", "batch_mean 7", "batch_mean 7, order 2"),
        *(sweeps.CLASS_ORDER, "batch_mean 7, threshold 0.1"),
    ]
    # One model under three names.
    assert found["temperature"]["1"]["against"] == found["aggregation"]["exact"]["against"]
    assert found["threshold"]["0.3"]["against"] == found["aggregation"]["exact"]["against"]

    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    noise = torch.cat([torch.randn(2, *SHAPE, generator=generator) for generator in seeds])
    data = loaded(folder)
    options = {"dtype": torch.float64, "backend": "reference"}
    y = network_truth(folder / "b.safetensors", noise)

    def r2(images, *settings):
        u = truth(pf.PCALocalityDenoiser(images, *settings, **options), noise)
        return 1 - ((u - y) ** 2).mean(-1) / y.var(-1, ddof=1)

    mixed = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))
    by_class = data.labels.argsort(stable=True)
    exact, other = r2(data, 0.3), r2(data, 0.1)
    expected = {
        ("temperature", "2"): r2(data, 0.3, 2.0) - exact,
        ("threshold", "0.1"): other - exact,
        ("threshold", "0.3"): exact - exact,
        ("aggregation", "batch_mean 7"): r2(data, 0.3, 1.0, "batch_mean", 7) - exact,
        ("aggregation", "batch_mean 7, order 2"): (
            r2(data.subset(mixed), 0.3, 1.0, "batch_mean", 7) - exact
        ),
        ("aggregation", sweeps.CLASS_ORDER): (
            r2(data.subset(by_class), 0.3, 1.0, "batch_mean", 7) - exact
        ),
        ("aggregation", "batch_mean 7, threshold 0.1"): (
            r2(data, 0.1, 1.0, "batch_mean", 7) - other
        ),
    }
    for (kind, value), difference in expected.items():
        told = found[kind][value]["minus_exact"]["network B"]
        ends, mean = difference[-1], difference.mean(0)
        for record, values in ((told["final"], ends), (told["all_steps"], mean)):
            assert record["mean"] == pytest.approx(values.mean(), abs=5e-3)
            error = values.std(ddof=1) / 2
            assert record["standard_error"] == pytest.approx(error, rel=2e-2, abs=2e-3)
            by_seed = values.reshape(2, 2).mean(1)
            np.testing.assert_allclose(record["by_seed"], by_seed, rtol=0, atol=5e-3)
        assert told["final"]["positive_share"] == pytest.approx((ends > 0).mean())
    assert abs(expected["aggregation", sweeps.CLASS_ORDER]).max() > 0.05
    alpha, sigma = pf.DDPMSchedule()(900)
    dense = pf.PCALocalityDenoiser(data, 0.1).weights_at(sigma, alpha).dense(torch.float64)
    [*_, last] = report["results"]["masks"]["0.1"]
    first = report["results"]["masks"]["0.1"][0]
    assert first["density"] == pytest.approx(float(dense.mean())) and last["t"] == 0
    assert report["results"]["why"]["batches"] == {"batch_mean 7": 4, sweeps.CLASS_ORDER: 4}
    why = report["results"]["why"]["models"]
    assert list(why) == ["network", "exact", "batch_mean 7", sweeps.CLASS_ORDER]
    assert len(why["exact"]) == 10 and why["batch_mean 7"][-1]["effective_sample_size"][0] >= 3.99
    network = networks.load(folder / "a.safetensors")
    network.module.double()
    out_of = pf.sample(network, x_T=noise[:2].double(), steps=10, progress=False)
    alpha, sigma = pf.DDPMSchedule()(300)
    at = out_of.timesteps.tolist().index(300)
    x, target = out_of.x_t[at], out_of.x0[at].clamp(-1, 1)
    sorted_mean = pf.PCALocalityDenoiser(
        data.subset(by_class), 0.3, 1.0, "batch_mean", 7, **options
    )
    plain = pf.PCALocalityDenoiser(data, 0.3, **options)
    apart = [pf.metrics.r2(u(x, sigma, alpha).clamp(-1, 1), target) for u in (sorted_mean, plain)]
    told = why[sweeps.CLASS_ORDER][at]["r2_minus_exact"]
    assert told["mean"] == pytest.approx(float((apart[0] - apart[1]).mean()), abs=2e-3)
    assert abs(told["mean"]) > 0.005 and why["exact"][at]["r2_minus_exact"]["mean"] == 0
    for suffix in (".png", "-why.png", "-samples.png"):
        assert (tmp_path / f"sweeps{suffix}").stat().st_size > 1000

    with pytest.raises(SystemExit):
        sweeps.main(arguments)
    assert "--force replaces it" in capsys.readouterr().err

    def refuse(*_):
        raise AssertionError("nothing is to be made again")

    monkeypatch.setattr(sweeps, "perform", refuse)
    monkeypatch.setattr(diagnosis, "diagnose", refuse)
    assert sweeps.main([*arguments, "--force"]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["results"] == report["results"]


def test_outputs_without_inputs():
    generator = torch.Generator().manual_seed(2)
    values = 0.5 * torch.randn(500, 1, 4, 4, generator=generator)
    # The first value hardly varies, and does so with the second: its row of the filter explodes.
    values[:, 0, 0, 0] = 0.003 * values[:, 0, 0, 1]
    data = pf.TrainingSet(values.clamp(-1, 1))
    moments = pf.Moments.from_data(data)
    [*_, last] = sweeps.masks(data, moments, 0.3)
    scaled = moments.covariance * 0.9999
    filtered = scaled @ (scaled + 1e-4 * torch.eye(16, dtype=torch.float64)).inverse()
    scaled = (filtered / filtered.diagonal()[:, None]).abs()
    kept = scaled >= 0.3 * scaled.max()
    assert last["without_inputs"] == pytest.approx(float((~kept.any(0)).double().mean()))
    assert 0 < last["without_inputs"] < 1
