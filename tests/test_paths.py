"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from pyflocality._paths import checked_path


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
