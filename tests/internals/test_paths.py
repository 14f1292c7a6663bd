"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

import pyflocality as pf
from pyflocality._support.paths import checked_path
from pyflocality.cli import main


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("~/a/b", Path("~/a/b"), PurePosixPath("~") / "a" / "b"):
        assert checked_path(given, "out") == tmp_path / "a" / "b"
    assert checked_path("~", "out") == tmp_path
    for plain in ("a/~", "./~/x", "x~"):
        assert checked_path(plain, "out") == Path(plain)


def test_a_home_folder_that_is_not_known_is_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = "`out` must be a path, and the ~ of .* stands for no known home folder"
    with pytest.raises(ValueError, match=unknown):
        checked_path("~no-such-user/x", "out")
    Path("~no-such-user").mkdir()
    assert checked_path("~no-such-user/x", "out") == Path("~no-such-user/x")
    Path("~").mkdir()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for given in ("~", "~/x"):
        with pytest.raises(ValueError, match=unknown):
            checked_path(given, "out")


@pytest.mark.parametrize("value", [None, 3, True, b"bytes", ["list"], 1.5, object()])
def test_what_is_no_path_is_refused(value):
    with pytest.raises(TypeError, match="`moments` must be a path"):
        checked_path(value, "moments")


def test_a_path_of_bytes_is_refused():
    class Bytes:
        def __fspath__(self):
            return b"x"

    with pytest.raises(TypeError, match="`out` must be a path"):
        checked_path(Bytes(), "out")


@pytest.mark.parametrize("value", ["", "a\0b", "a\ud800"])
def test_what_cannot_be_a_path_is_refused(value):
    with pytest.raises(ValueError, match="`out` must be a path"):
        checked_path(value, "out")


def test_names_that_are_not_text_are_paths(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    assert checked_path(str(tmp_path / name), "out") == tmp_path / name


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A home folder with a set of images, where the working directory is another one."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    images = np.random.default_rng(3).integers(0, 256, (9, 4, 4), np.uint8)
    np.save(home / "tiny.npy", images)
    (home / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(home / "images" / f"{number}.png")
    return home, here


def test_every_option_knows_the_home_folder(tiny, capsys):
    home, here = tiny
    small = ["-n", "2", "--steps", "2", "--no-progress"]
    for words in (
        ["moments", "~/tiny.npy", "--out", "~/m.safetensors", "--picture=~/m.png"],
        ["generate", "~/tiny.npy", "--out=~/a", "--moments", "~/m.safetensors", *small],
        ["compare", "~/tiny.npy", "--out=~/b", "--moments=~/m.safetensors", "--methods"]
        + ["wiener,optimal", *small],
        ["pack", "~/images", "~/packed"],
    ):
        assert main(words) == 0, capsys.readouterr().err
    assert f"{home}/packed" in capsys.readouterr().out
    assert sorted(os.listdir(home)) == sorted(
        ["a", "b", "images", "m.basis.safetensors", "m.png", "m.safetensors", "packed", "tiny.npy"]
    )
    assert os.listdir(here) == []
    moments = pf.Moments.load("~/m.safetensors")
    moments.save("~/again.safetensors")
    assert (home / "again.safetensors").is_file()
    assert len(pf.TrainingSet.load("~/packed", cache_dir="~/cache")) == 9


COMMANDS = {
    "generate": [["digits", "--out", "PATH"], ["digits", "--out", "o", "--moments", "PATH"]],
    "compare": [["digits", "--out", "PATH"], ["digits", "--out", "o", "--moments", "PATH"]],
    "sensitivity": [["digits", "--out", "PATH"], ["digits", "--out", "o", "--moments", "PATH"]],
    "spectrum": [["digits", "--out", "PATH"], ["digits", "--out", "o", "--moments", "PATH"]],
    "memorize": [["digits", "--out", "PATH"]],
    "moments": [["digits", "--out", "PATH"], ["digits", "--out", "o", "--picture", "PATH"]],
    "pack": [["images", "PATH"], ["PATH", "o"]],
    "bench": [["--quick", "--out", "PATH"]],
    "reproduce": [["digits", "--network", "n", "--out", "PATH"]]
    + [["digits", "--network", "PATH", "--out", "o"]],
}


@pytest.mark.parametrize("path", ["", "a\0b", "~no-such-user/x"])
def test_every_option_refuses_what_is_no_path(path, tiny, capsys):
    home, here = tiny
    for command, cases in COMMANDS.items():
        for words in cases:
            given = [path if word == "PATH" else word for word in words]
            assert main([command, *given]) == 2, (command, words)
            told = capsys.readouterr().err
            assert "must be a path" in told and told.count("\n") == 1, (command, words, told)
    assert os.listdir(here) == [] and sorted(os.listdir(home)) == ["images", "tiny.npy"]
