"""What the command line says reaches any stream, and ends no run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from pyflocality import cli

FILES = ["run.json", "samples.npy", "samples.png", "trajectory.png"]
POSIX = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "tiny.npy"
    np.save(path, np.random.default_rng(2).integers(0, 256, (12, 4, 4), np.uint8))
    return path


def words(source, out, *more):
    return ["generate", source, "--out", out, "-n", 2, "--steps", 2, "--denoiser", "optimal", *more]


def shell(line, **variables):
    """A line of a shell with `pyflocality` in it: exit code, output and errors as bytes."""
    program = f'pyflocality() {{ "{sys.executable}" -m pyflocality "$@"; }}; {line}'
    done = subprocess.run(
        ["bash", "-c", program],
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )
    return done.returncode, done.stdout, done.stderr


LINES = {
    "no standard error": ("2>&-", 0),
    "no standard output": (">&-", 0),
    "nothing at all": (">&- 2>&- <&-", 0),
    "a full device": (">/dev/full", 0),
    "errors to a full device": ("2>/dev/full", 0),
    "the record to a full device": ("--json >/dev/full", 1),
    "a reader that has had enough": ("--json | true; exit ${PIPESTATUS[0]}", 0),
}
QUICK = ("nothing at all", "errors to a full device", "the record to a full device")


@POSIX
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LINES]
)
def test_the_exit_code_tells_of_the_result_alone(name, source, tmp_path):
    line, expected = LINES[name]
    begun = " ".join(map(str, words(source, tmp_path / "out")))
    code, _, errors = shell(f"pyflocality {begun} {line}")
    assert code == expected, errors
    assert b"Traceback" not in errors and b"Exception" not in errors
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    if expected:
        assert errors.endswith(b"pyflocality: error: standard output: No space left on device\n")


@POSIX
def test_an_answer_that_is_nowhere_else_is_missed():
    line = "pyflocality plan --images 9 --shape 1x4x4 --device h100"
    code, stdout, _ = shell(f"{line} > /dev/full; echo $?; {line} | true; echo ${{PIPESTATUS[0]}}")
    assert (code, stdout) == (0, b"1\n0\n")


def test_names_fit_the_encoding(source, tmp_path):
    out = tmp_path / "caf\xe9"
    line = " ".join(map(str, words(source, out)))
    code, stdout, _ = shell(f"pyflocality {line}", PYTHONIOENCODING="ascii:strict")
    assert code == 0 and b"caf\\xe9/run.json" in stdout
    code, stdout, _ = shell(f"pyflocality {line} --force --json", LC_ALL="C", PYTHONUTF8="0")
    assert (
        code == 0
        and json.loads(stdout)["files"] == json.loads((out / "run.json").read_text())["files"]
    )


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_names_cannot_speak_to_the_terminal(run, source, tmp_path, monkeypatch):
    evil = "a\x1b[31m\u202eb\nc"
    code, stdout, _ = run(*words(source, tmp_path / evil))
    assert code == 0
    assert "a\\x1b[31m\\u202eb\\nc/run.json" in stdout and stdout.count("\n") == 2
    code, stdout, _ = run("moments", source, "--out", tmp_path / evil / "m.safetensors", "--json")
    assert code == 0
    names = "m.safetensors", "m.basis.safetensors"
    assert json.loads(stdout)["files"] == [str(tmp_path / evil / name) for name in names]
    for arguments in (
        words(evil, tmp_path / "x"),
        ["generate", source, evil, "--out", "x"],
        [evil],
        words(source, tmp_path / "x", "--label", evil),
        words(source, tmp_path / evil),
    ):
        code, stdout, stderr = run(*arguments)
        assert code == 2 and stdout == ""
        assert "\x1b" not in stderr and "\u202e" not in stderr
        assert stderr.splitlines()[-1].startswith("pyflocality: error: ")
        assert "a\\x1b[31m\\u202eb" in stderr


def test_warnings_are_one_line_each(run, source, tmp_path, monkeypatch):
    import warnings

    def load(*arguments, **options):
        warnings.warn("a\x1b[31m\nb", stacklevel=1)
        raise ValueError("c\nd")

    monkeypatch.setattr("pyflocality.TrainingSet.load", load)
    code, _, stderr = run(*words(source, tmp_path / "x", "--no-progress"))
    assert (code, stderr) == (
        2,
        "pyflocality: warning: a\\x1b[31m b\npyflocality: error: c d\n",
    )


def test_what_is_logged_is_fit_to_be_shown(run, source, tmp_path, monkeypatch):
    def load(*arguments, **options):
        logging.getLogger("pyflocality").warning("waiting for %s", "a\x1b[31m\nb")
        raise ValueError("refused")

    monkeypatch.setattr("pyflocality.TrainingSet.load", load)
    _, _, stderr = run(*words(source, tmp_path / "x", "--no-progress"))
    assert stderr == "pyflocality: waiting for a\\x1b[31m b\npyflocality: error: refused\n"


def test_mistakes_of_the_parser_are_one_line(run):
    for arguments, expected in (
        (["generate"], "Missing argument 'SOURCE'"),
        (["generate", "x", "--out", "y", "--n", "many"], "'--n'"),
        (["nonsense"], "No such command 'nonsense'"),
    ):
        code, stdout, stderr = run(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)
        assert stderr.startswith("pyflocality: error: ") and expected in stderr
        assert "--help)" in stderr
    code, stdout, stderr = run()
    assert (code, stderr) == (2, "") and "generate" in stdout
