"""The reproduction on another device than the CPU: a pretended one."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import pyflocality as pf
from pyflocality import cli

pytest.importorskip("matplotlib", reason="the commands draw with matplotlib")

from pretended_gpu import DEVICE, OnDevice, pretended_gpu  # noqa: E402
from tiny_sets import SHAPE, write_network, write_sets  # noqa: E402

from pyflocality.benchmarks.reproduce import (  # noqa: E402
    denoising,
    diagnosis,
    fields,
    methods,
    runs,
    study,
    sweeps,
    table,
    windows,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CANDIDATES = (pf.Candidate("wiener"), pf.Candidate("patch-set", window=3, slope=0.25))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    write_sets(folder)
    for seed, name in enumerate("ab"):
        write_network(folder / f"{name}.safetensors", seed)
    return folder


@pytest.fixture
def there(monkeypatch):
    """--device meta is the pretended GPU; sizes are small, and pictures, which take long, left out.

    Holds the shapes of the noisy images that were answered there.
    """
    plain = study.parse_device
    for module in (study, table):
        monkeypatch.setattr(
            module, "parse_device", lambda name: DEVICE if name == "meta" else plain(name)
        )
    monkeypatch.setitem(table.table_text.MEMORY, "meta", "nothing")
    monkeypatch.setattr(table, "perform_apart", runs.perform)
    monkeypatch.setattr(methods, "LOADER_BATCH", 7)
    for module in (diagnosis, sweeps, table, windows):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(fields, "LEVELS", 2)
    monkeypatch.setattr(denoising, "TIMES", (50, 400))
    monkeypatch.setattr(denoising, "draw", lambda *_: None)
    for name in ("sweeps", "why", "samples"):
        monkeypatch.setattr(sweeps.sweeps_draw, name, lambda *_: None)
    for name, value in {
        "TEMPERATURES": (2.0,),
        "THRESHOLDS": (1.0,),
        "FURTHER_THRESHOLDS": (),
        "ORDERS": (2,),
        "BATCHES": (7,),
        "DIAGNOSED": (7,),
        "FURTHER": 7,
    }.items():
        monkeypatch.setattr(sweeps, name, value)
    answered, forward = [], pf.denoisers.base.Denoiser.forward

    def counted(self, x, *level):
        if isinstance(x, OnDevice):
            answered.append(tuple(x.shape))
        return forward(self, x, *level)

    monkeypatch.setattr(pf.denoisers.base.Denoiser, "forward", counted)
    return answered


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpu():
        there = torch.arange(6.0).to(DEVICE)
        assert there.device == DEVICE and (2 * there + torch.tensor(1.0)).tolist()[-1] == 11
        assert torch.equal(there[torch.tensor([0, 5])].cpu(), torch.tensor([0.0, 5.0]))
        with pytest.raises(RuntimeError, match="one device"):
            there + torch.ones(6)
        with pytest.raises(RuntimeError, match="one device"):
            torch.ones(6)[torch.arange(3, device=DEVICE)]
        with pytest.raises(RuntimeError):
            there.numpy()


def shared(folder, *more):
    return [
        *("--network", str(folder / "a.safetensors"), "--threshold", "0.3", "--samples", "2"),
        *("--no-progress", *more),
    ]


def close(found, expected, path=""):
    """The same figures but for rounding, and for times."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected.keys() - {"seconds", "seconds_per_step"}:
            close(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for k, (one, other) in enumerate(zip(found, expected, strict=True)):
            close(one, other, f"{path}/{k}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=5e-3, abs=2e-3), path
    elif path.endswith("/field"):
        close([float(one) for one in found.split()], [float(one) for one in expected.split()], path)
    else:
        assert found == expected, path


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (sweeps, ("--seeds", "1")),
        (denoising, ("--test",)),
        (fields, ("--steps", "2")),
    ],
)
def test_studies_elsewhere_are_those_here(folder, tmp_path, there, module, more):
    source = str(folder / "set.npz")
    if module is denoising:
        # The pretended GPU has no lists of places, by which a calibration goes on.
        choices = tmp_path / "choices.json"
        data = methods.load_mixed(source, progress=False)
        pf.calibrate(data, candidates=CANDIDATES, progress=False).save(choices)
        more = [*more, source, "--calibration", str(choices)]
    here, elsewhere = tmp_path / "here.json", tmp_path / "there.json"
    arguments = shared(folder, "--source", source, *more)
    assert module.main([*arguments, "--out", str(here)]) == 0
    assert not there
    with pretended_gpu():
        assert module.main([*arguments, "--out", str(elsewhere), "--device", "meta"]) == 0
    assert there
    found, expected = (json.loads(path.read_text()) for path in (elsewhere, here))
    assert (found["device"], expected["device"]) == ("meta", "cpu")
    if module is fields:
        # Where a model recites its field is next to nothing, and looks like rounding.
        found, expected = (
            {"results": [one for one in report["results"] if one["t"] > 0]}
            for report in (found, expected)
        )
    close(found["results"], expected["results"])


def test_the_table_elsewhere_is_that_here(folder, tmp_path, there, capsys):
    names = "wiener,local,pca-locality-batch-mean,golden-random,multiscale,nearest"
    arguments = ["reproduce", str(folder / "set.npz"), "--json", "--methods", names]
    arguments += shared(folder)
    records = []
    for device in ("cpu", "meta"):
        out = ("--out", str(tmp_path / device), "--device", device)
        with pretended_gpu():
            assert cli.main([*arguments, *out]) == 0, capsys.readouterr().err
        records.append(json.loads(capsys.readouterr().out))
        # Nothing ran there yet when the CPU's were done.
        assert bool(there) == (device == "meta")
    here, elsewhere = records
    assert (elsewhere["device"], elsewhere["memory"]) == ("meta", "nothing")
    close(elsewhere["windows"], here["windows"])
    for row, expected in zip(elsewhere["table"], here["table"], strict=True):
        close(row["against"], expected["against"], row["name"])
    assert set(there) >= {(2, *SHAPE), (16, *SHAPE)}


def test_kept_runs_of_the_cpu_are_found_again_and_no_others(tmp_path, monkeypatch):
    monkeypatch.delenv("PYFLOCALITY_BACKEND", raising=False)
    gpu = ["H100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu[0])
    common, settings = {"images": "key", "steps": 10}, {"model": "optimal"}
    told = {"pyflocality": pf.__version__, **common, "settings": settings}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    path = runs.KeptRuns(tmp_path, common, CPU).path("optimal", settings)
    assert path.name == f"optimal-{key}.npz"
    other = runs.KeptRuns(tmp_path, common, CUDA).path("optimal", settings)
    assert other != path
    assert other == runs.KeptRuns(tmp_path, common, torch.device("cuda:0")).path(
        "optimal", settings
    )
    # Nor those of another GPU or backend.
    gpu[0] = "H200"
    assert other != runs.KeptRuns(tmp_path, common, CUDA).path("optimal", settings)
    monkeypatch.setenv("PYFLOCALITY_BACKEND", "reference")
    assert path != runs.KeptRuns(tmp_path, common, CPU).path("optimal", settings)
    monkeypatch.setenv("PYFLOCALITY_BACKEND", "auto")
    assert path == runs.KeptRuns(tmp_path, common, CPU).path("optimal", settings)


def test_multiples_keep_the_threshold_that_was_asked():
    odd = 0.012345678912
    assert sweeps.multiples(odd, (0.2, 1.0, 100.0)) == [0.00246914, odd]
    assert sweeps.multiples(0.005, (0.2, 1.0)) == [0.001, 0.005]


def test_sweeps_need_a_positive_threshold(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweeps.main(
            ["--source", "s", "--network", "n", "--out", str(tmp_path / "o"), "--threshold", "0"]
        )
    assert "--threshold must be positive" in capsys.readouterr().err


def test_runs_on_a_gpu_are_timed_warm_and_tell_its_memory(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1234)
    # There is none to bring anything to.
    monkeypatch.setattr(runs.Request, "on_device", lambda self: self)
    build, forward = methods.build, pf.OptimalDenoiser.forward

    def built(*given):
        seen.append("build")
        return build(*given)

    def called(*given):
        seen.append("call")
        return forward(*given)

    monkeypatch.setattr(methods, "build", built)
    monkeypatch.setattr(pf.OptimalDenoiser, "forward", called)
    data = methods.load_mixed(str(folder / "set.npz"), progress=False)
    noise = runs.starting_noise(SHAPE, 2, 0)
    request = runs.Request({"model": "optimal"}, data, None, None, noise, 2, False, CUDA)
    run = runs.perform(request)
    # Memory counts from before the call that compiles the kernels, times after it.
    warm_up = ["build", "call"]
    assert [one for one in seen if one != "synchronize"] == ["reset", *warm_up, *warm_up, "call"]
    assert seen[:5] == ["reset", *warm_up, "synchronize", "build"]
    assert run.facts["extra_memory_bytes"] == 234 and len(run.facts["seconds"]) == 2


def test_moments_move(folder):
    moments = pf.Moments.from_data(methods.load_mixed(str(folder / "set.npz"), progress=False))
    assert moments.to("cpu") is moments
    with pretended_gpu():
        bare = moments.to(DEVICE)
        values = moments.eigh().values
        moved = moments.to(DEVICE)
        assert moved.count == moments.count and moved.image_shape == SHAPE
        for one in (bare, moved):
            assert one.eigh().vectors.device == one.mean.device == DEVICE
            torch.testing.assert_close(one.covariance.cpu(), moments.covariance)
            torch.testing.assert_close(one.eigh().values.cpu(), values)
        assert moved.content_key() == moments.content_key()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_devices_that_are_none(folder, tmp_path, capsys, device):
    source, out = str(folder / "set.npz"), tmp_path / "out"
    more = shared(folder, "--device", device, "--out", str(out))
    assert cli.main(["reproduce", source, *more]) == 2
    assert "`--device` must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fields.main(["--source", source, *more])
    assert "`device` must be" in capsys.readouterr().err
    assert not out.exists()
