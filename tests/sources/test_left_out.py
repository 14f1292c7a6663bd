"""Names in messages, and the warning about what a set does not take."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from pyflocality import TrainingSet
from pyflocality.sources.left_out import LeftOut


def test_one_warning_says_how_many_which_first_and_why():
    left_out = LeftOut("a\x1bset")
    left_out.add("b\n.png", "hidden")
    left_out.add("c.png", "hidden")
    left_out.add("d.txt", "without an image suffix", 7)
    left_out.add("e", "empty")
    with pytest.warns(UserWarning) as caught:
        left_out.warn()
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message) == (
        r"a\x1bset: 10 left out: 2 hidden (first 'b\n.png'); "
        "7 without an image suffix (first 'd.txt'); 1 empty ('e')"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_out.warn()


def test_warnings_are_about_the_call_of_the_user(tmp_path, monkeypatch):
    """They told a line of the library, and not always the same."""
    np.save(tmp_path / "three.npy", np.full((3, 8, 8), 9, np.uint8))
    np.save(tmp_path / "floats.npy", np.zeros((5, 1, 8, 8), np.float32))
    np.save(tmp_path / "many.npy", np.full((1000, 1, 4, 4), 9, np.uint8))
    monkeypatch.setattr("pyflocality._support.caller._told", set())
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "three.npy"))
    for name, told in (
        ("three", "3 grey ones"),
        ("floats", "nothing negative"),
        ("many", "nothing is cached"),
    ):
        with pytest.warns(UserWarning, match=told) as caught:
            TrainingSet.load(tmp_path / f"{name}.npy", resolution=2 if name == "many" else None)
        assert [warning.filename for warning in caught] == [__file__]
