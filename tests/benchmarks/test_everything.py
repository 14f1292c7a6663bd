"""`python -m benchmarks.everything`: its commands, and what becomes of them."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pyflocality import cli

pytest.importorskip("matplotlib", reason="the commands draw with matplotlib")

from tiny_sets import write_network, write_sets  # noqa: E402

from pyflocality.benchmarks import cpu_suite, everything, gpu_suite  # noqa: E402
from pyflocality.benchmarks.machine import machine_facts  # noqa: E402
from pyflocality.benchmarks.oracle.unet import UNet  # noqa: E402
from pyflocality.benchmarks.reproduce import denoising, runs, sweeps, table  # noqa: E402

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SOURCES = ("--mnist", "--mnist-test", "--cifar10", "--cifar10-test")
STEPS = [
    *("cpu suite", "training mnist seed 0", "training mnist seed 1", "training cifar10 seed 0"),
    *("training cifar10 seed 1", "calibration mnist", "calibration cifar10"),
    *("reproduce mnist", "reproduce cifar10", "sweeps mnist"),
    *("sweeps cifar10", "denoising mnist", "denoising cifar10", "fields mnist", "fields cifar10"),
    "report",
]


@pytest.fixture
def arguments(tmp_path):
    """The options that there must be, but for --out: four tiny sets, which are one."""
    write_sets(tmp_path)
    return [word for name in SOURCES for word in (name, str(tmp_path / "set.npz"))]


@pytest.fixture
def commands(monkeypatch):
    """Commands that were started; none runs, but their files appear."""
    found = []

    def execute(command):
        found.append(command)
        return _pretend(command[2:])

    monkeypatch.setattr(everything, "execute", execute)
    return found


def _pretend(words):
    """Write the files of a command, except that of the second network."""
    module, *options = words
    out = Path(options[options.index("--out") + 1])
    if "--seed" in options and options[options.index("--seed") + 1] == "1":
        return 3
    names = {"train": ("unet.safetensors", "log.jsonl"), "pyflocality": table.FILES}
    folder = names.get(module.rpartition(".")[2])
    if folder and "calibrate" not in options:
        out.mkdir(parents=True)
        made = [out / name for name in folder]
    else:
        pictures = ("", "-why", "-samples")
        made = [out, *(out.with_name(f"{out.stem}{name}.png") for name in pictures)]
    for path in made:
        path.write_text("{}", encoding="utf-8")
    return 0


def outcomes(text):
    """What the list at the end tells of each step."""
    lines = text.rstrip().rpartition("\n\n")[2].splitlines()
    return {line[:24].rstrip(): line[24:] for line in lines}


@pytest.mark.slow
def test_the_whole_chain(arguments, tmp_path, monkeypatch, capsys):
    """Every command runs, in this process, but for the suite, which has a test of its own."""
    monkeypatch.setattr(everything, "SETS", {"cifar10": 0.3})
    committed = tmp_path / "committed"
    committed.mkdir()
    suite = max(RESULTS.glob("cpu-*.json"))
    shutil.copy(suite, committed)
    monkeypatch.setattr(everything, "FOLDER", committed)
    monkeypatch.setattr(table, "perform_apart", runs.perform)
    # It takes longer than all that it shows.
    monkeypatch.setattr(denoising, "draw", lambda *given: given[-1].touch())
    few = {"TEMPERATURES": (1.0, 2.0), "THRESHOLDS": (0.5, 1.0), "ORDERS": (2,)}
    for name, values in (few | {"BATCHES": (7,), "DIAGNOSED": (7,)}).items():
        monkeypatch.setattr(sweeps, name, values)

    def execute(command):
        module, *words = command[2:]
        if module == "pyflocality.benchmarks.cpu_suite":
            options = cpu_suite._parser().parse_args(words)
            report = {"suite": "cpu", "quick": True, "data": {"name": "tiny"}}
            report |= {"machine": machine_facts(), "date": "2026-11-22"}
            options.out.write_text(json.dumps(report), encoding="utf-8")
            return 0
        main = cli.main if module == "pyflocality" else importlib.import_module(module).main
        return main(words)

    monkeypatch.setattr(everything, "execute", execute)
    out = tmp_path / "out"
    assert everything.main([*arguments[4:], "--out", str(out), "--quick"]) == 0
    told = outcomes(capsys.readouterr().out)
    assert list(told) == [name for name in STEPS if "mnist" not in name]
    assert set(told.values()) == {"done"}
    [stamp] = {path.name.removeprefix("cpu-")[:-5] for path in out.glob("cpu-*.json")}
    assert re.fullmatch(rf"{machine_facts()['cores']}core-quick-\d{{4}}-\d\d-\d\d", stamp)
    found = json.loads((out / f"reproduce-cifar10-{stamp}.json").read_text(encoding="utf-8"))
    assert found["settings"]["threshold"] == 0.3 and found["settings"]["samples"] == 2
    names = [network["file"] for network in found["networks"]]
    assert names == ["cifar10-seed0.safetensors", "cifar10-seed1.safetensors"]
    networks = out / f"networks-{machine_facts()['cores']}core-quick"
    facts = [UNet.load(networks / name).facts for name in names]
    assert [(one["seed"], one["width"], one["steps"]) for one in facts] == [(0, 8, 20), (1, 8, 20)]
    page = (out / "page" / "index.html").read_text(encoding="utf-8")
    for kind in ("reproduce", "sweeps", "denoising", "fields"):
        assert f"results/{kind}-cifar10-{stamp}.json" in page
    # The committed ones are there, too.
    assert f"results/{suite.name}" in page


def test_what_is_there_is_left_out_and_what_lacks_something_fails(
    arguments, commands, tmp_path, capsys
):
    out = tmp_path / "out"
    whole = [*arguments, "--out", str(out)]
    assert everything.main(whole) == 1
    told = outcomes(capsys.readouterr().out)
    assert list(told) == STEPS
    assert told["cpu suite"] == told["training mnist seed 0"] == told["report"] == "done"
    assert told["training mnist seed 1"] == "failed with exit code 3"
    networks = out / f"networks-{machine_facts()['cores']}core"
    missing = networks / "mnist-seed1.safetensors"
    assert told["fields mnist"] == f"failed, there is no {missing}"
    assert len(commands) == 8

    # A network from elsewhere is what was missing; the folder's day goes on.
    for path in (missing, networks / "cifar10-seed1.safetensors"):
        write_network(path, 1)
    for path in out.glob("cpu-*"):
        path.rename(path.with_name(re.sub(r"\d{4}-\d\d-\d\d", "2026-01-02", path.name)))
    commands.clear()
    assert everything.main(whole) == 0
    told = outcomes(capsys.readouterr().out)
    assert [name for name, outcome in told.items() if outcome == "done"] == STEPS[7:]
    assert told["cpu suite"] == told["training mnist seed 1"] == "skipped, it is there"
    stamp = f"{machine_facts()['cores']}core-2026-01-02"
    assert (out / f"reproduce-cifar10-{stamp}-steps.png").exists()
    commands.clear()
    (out / f"sweeps-mnist-{stamp}-why.png").unlink()
    assert everything.main([*whole, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 and "reproduce.sweeps" in listed[0] and commands == []
    assert everything.main(whole) == 0
    assert [command[2] for command in commands] == [
        *("pyflocality.benchmarks.reproduce.sweeps", "pyflocality.benchmarks.report")
    ]


def test_given_networks_are_not_trained(arguments, commands, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    for seed in (0, 1):
        write_network(given / f"mnist-seed{seed}.safetensors", seed)
    everything.main([*arguments, "--out", str(tmp_path / "out"), "--networks", str(given)])
    trained = [command for command in commands if command[2].endswith("train")]
    assert [command[command.index("--out") + 1][-13:] for command in trained] == [
        *("cifar10-seed0", "cifar10-seed1")
    ]
    [found] = [command for command in commands if command[2].endswith("fields")]
    assert found.count("--network") == 2 and str(given / "mnist-seed1.safetensors") in found


def test_on_a_gpu(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "parse_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = everything._checked([*arguments, "--out", str(tmp_path), "--device", "cuda"])
    steps = {step.name: step for step in everything.steps(found)}
    suite = steps["gpu suite"]
    assert re.fullmatch(r"gpu-h200-\d{4}-\d\d-\d\d.json", suite.makes[0].name)
    options = gpu_suite._parser().parse_args([str(word) for word in suite.words[1:]])
    assert options.cifar10 == options.mnist == arguments[1] and options.budget == 3600
    for name in ("mnist", "cifar10"):
        words = steps[f"training {name} seed 1"].command
        assert words[words.index("--width") + 1] == "64"
    beside = [step for step in steps.values() if step.needs]
    assert len(beside) == 8
    for step in beside:
        words = step.command
        assert words[words.index("--device") + 1] == "cuda"
        threshold = "0.05" if "cifar10" in step.name else "0.005"
        assert words[words.index("--threshold") + 1] == threshold
        assert all("-h200-" in path.name for path in step.makes)

    # Its results are whole also where a case failed, and are none where it was interrupted.
    (part,) = suite.copies
    part.parent.mkdir()
    for code, writes, there in (
        (1, True, False),
        (-2, True, False),
        (3, False, False),
        (3, True, True),
    ):
        part.write_text("old", encoding="utf-8")

        def execute(command, code=code, writes=writes):
            assert not part.exists()
            if writes:
                part.write_text("new", encoding="utf-8")
            return code

        monkeypatch.setattr(everything, "execute", execute)
        told = f"failed with exit code {code}" if writes else f"failed, it left no {part}"
        assert suite.run() == told and suite.makes[0].exists() == there
    assert suite.makes[0].read_text(encoding="utf-8") == "new"


def test_commands_tell_how_they_ended():
    assert everything.execute([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Some GPU", "gpu"),
    ],
)
def test_names_of_machines(monkeypatch, name, expected):
    monkeypatch.setattr(everything, "parse_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert everything.machine_name("cuda:1") == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mnist-test", "nowhere.zip"), "there is no nowhere.zip"),
        (("--networks", "nowhere"), "there is no folder nowhere"),
        (("--networks", "one"), "one/mnist-seed1.safetensors is not a file"),
        (("--out", "one/mnist-seed0.safetensors/out"), "mnist-seed0.safetensors is no folder"),
        (("--minutes", "0"), "--minutes must be positive, got 0"),
        (("--device", "tpu"), "`device` must be cpu or cuda"),
    ],
)
def test_mistakes(arguments, commands, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    write_network(tmp_path / "one" / "mnist-seed0.safetensors", 0)
    with pytest.raises(SystemExit):
        everything.main([*arguments, "--out", str(tmp_path / "out"), *more])
    assert message in capsys.readouterr().err
    assert commands == [] and not (tmp_path / "out").exists()
