"""Names as they are shown."""

from __future__ import annotations

import pytest

from pyflocality._support.text import bytes_told, printable


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


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (4_714_000_000, "4.71 GB"),
        (309e9, "309 GB"),
        (2.5e13, "25 TB"),
    ],
)
def test_sizes_in_units_of_a_thousand(number, told):
    assert bytes_told(number) == told
