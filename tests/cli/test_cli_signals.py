"""Signals, kills and what they leave: started again, the same command makes the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pyflocality import cli

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

COMMANDS = ("generate", "pack", "moments")
# Kills of each command: 20 have been tried by hand, with PYFLOCALITY_KILLS=20.
KILLS = int(os.environ.get("PYFLOCALITY_KILLS", "3"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of images to be decoded, and an array of others."""
    folder = tmp_path_factory.mktemp("sources")
    values = np.random.default_rng(6)
    (folder / "images").mkdir()
    for number in range(400):
        image = values.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:04d}.png")
    np.save(folder / "array.npy", values.integers(0, 256, (2000, 20, 20), np.uint8))
    return folder


def words(command, sources, folder):
    """A command whose results are all in a folder."""
    return {
        "generate": ["generate", sources / "array.npy", "--out", folder / "out"]
        + ["--denoiser", "local", "--window", "5", "-n", "2", "--steps", "6"],
        "pack": ["pack", sources / "images", folder / "out"],
        "moments": ["moments", sources / "array.npy", "--out", folder / "m.safetensors"]
        + ["--picture", folder / "m.png"],
    }[command]


def started(arguments, *, cache, **options):
    variables = {"OMP_NUM_THREADS": "1", "PYFLOCALITY_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "pyflocality", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
        **options,
    )


def wait_for_work(command, process, folder):
    """Until the start of Python is over: the command speaks, or its folder is there."""
    if command != "pack":
        assert process.stderr.readline().startswith("loading")
        return
    while not (folder / "out" / "packing.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.002)


def contents(folder):
    """Digest of every file by name; a record holds times, so what it says of the rest counts."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        content = path.read_bytes()
        if path.name == "run.json":
            record = json.loads(content)
            content = json.dumps([record["sampling"], record["nearest"], record["files"]]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    """What each command makes, and how long it takes once Python has started."""
    made = {}
    for command in COMMANDS:
        folder = tmp_path_factory.mktemp("undisturbed")
        process = started(words(command, sources, folder), cache=sources / "cache")
        wait_for_work(command, process, folder)
        start = time.monotonic()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        made[command] = contents(folder), time.monotonic() - start
    return made


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_time_the_same_command_makes_the_same(
    command, sources, undisturbed, tmp_path, record_property
):
    expected, seconds = undisturbed[command]
    moments = random.Random(command)
    killed = 0
    for attempt in range(KILLS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = started(words(command, sources, folder), cache=sources / "cache")
        wait_for_work(command, process, folder)
        time.sleep(moments.uniform(0.0, 1.0) * seconds)
        killed += process.poll() is None
        process.kill()
        process.communicate()
        process = started(words(command, sources, folder), cache=sources / "cache")
        _, errors = process.communicate(timeout=300)
        # A run that ended just before it could be killed has told of its results.
        done = process.returncode == 2 and "already there" in errors
        assert process.returncode == 0 or done, errors
        assert contents(folder) == expected, attempt
    record_property("killed", killed)
    assert killed or KILLS < 5
    hidden = [path for path in (sources / "cache").rglob(".*") if path.is_file()]
    assert not hidden


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("generate", "SIGTERM"),
        pytest.param("pack", "SIGHUP", marks=pytest.mark.slow),
        pytest.param("moments", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("generate", "SIGHUP", marks=pytest.mark.slow),
        pytest.param("generate", "SIGINT", marks=pytest.mark.slow),
        pytest.param("pack", "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_signals_clean_up(command, name, sources, tmp_path):
    number = getattr(signal, name)
    process = started(words(command, sources, tmp_path), cache=sources / "cache")
    wait_for_work(command, process, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    told = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1] == f"pyflocality: {told}"
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    # What the next run goes on with, and nothing else.
    assert all(n.endswith(".answers") or n in ("images.npy", "packing.jsonl") for n in left), left


def test_what_nohup_ignores_is_ignored(sources, tmp_path):
    process = started(
        words("generate", sources, tmp_path),
        cache=sources / "cache",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for_work("generate", process, tmp_path)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_second_run_is_refused_while_the_first_goes_on(sources, tmp_path, capsys):
    first = started(words("generate", sources, tmp_path), cache=sources / "cache")
    wait_for_work("generate", first, tmp_path)
    first.send_signal(signal.SIGSTOP)
    arguments = [str(word) for word in words("generate", sources, tmp_path)]
    assert cli.main([*arguments, "--force"]) == 2
    assert "another process is writing it" in capsys.readouterr().err
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert cli.main(arguments) == 2
    assert "--force" in capsys.readouterr().err


def test_a_signal_after_the_end_does_not_replace_the_exit_code():
    program = """
import atexit, sys, time
from pyflocality.cli import main
atexit.register(lambda: (print("going", flush=True), sys.stdin.readline()))
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--version"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("pyflocality ")
    assert process.stdout.readline() == "going\n"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    assert process.communicate("\n", timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_somebody_who_waits_for_a_computation_is_told_so(again, sources, tmp_path):
    script = """
import hashlib, sys
from pyflocality import Moments
from pyflocality.cli import main
def long(*arguments, **options):
    print("working", file=sys.stderr, flush=True)
    # One step of Python, of seconds, during which other threads run.
    hashlib.pbkdf2_hmac("sha256", b"", b"", ROUNDS)
Moments.from_data = long
sys.exit(main())
"""
    rounds = 100_000_000 if again else 12_000_000
    process = subprocess.Popen(
        [sys.executable, "-c", script.replace("ROUNDS", str(rounds))]
        + [str(word) for word in words("moments", sources, tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stderr.readline() != "working\n":
        assert process.poll() is None
    # It says so a moment before.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    waiting = "pyflocality: interrupted: waiting for the computation at hand; once more to quit\n"
    assert process.stderr.readline() == waiting
    if again:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    told = "pyflocality: interrupted" + " amid a computation" * again
    assert (process.returncode, errors) == (130, f"{told}\n")
    left = [path.name for path in tmp_path.iterdir()]
    assert bool(left) == again
    if again:
        done = started(words("moments", sources, tmp_path), cache=sources / "cache")
        done.communicate(timeout=120)
        names = ["m.basis.safetensors", "m.png", "m.safetensors"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
