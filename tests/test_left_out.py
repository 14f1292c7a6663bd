"""Names in messages, and the warning about what a set does not take."""

from __future__ import annotations

import warnings

import pytest

from pyflocality._text import printable
from pyflocality.sources.left_out import LeftOut


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat/1.png", "cat/1.png"),
        ("C:\\cat\\1.png", "C:\\cat\\1.png"),
        ("каt 猫 é e\u0301", "каt 猫 é e\u0301"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\nb\r\t\0", r"a\nb\r\t\x00"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202egnp.\u2066", r"\u202egnp.\u2066"),
        ("a\u200bb\ufeff\u00ad", r"a\u200bb\ufeff\xad"),
        ("\u2028\u2029\u0085", r"\u2028\u2029\x85"),
        ("\udcff.png", r"\udcff.png"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_does_not_show_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    shown.encode("utf-8")


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
