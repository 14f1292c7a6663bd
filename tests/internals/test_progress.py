"""Bars that no stream can stop."""

from __future__ import annotations

import io
import os
import sys

import pytest

from pyflocality._support import progress as _progress
from pyflocality._support.progress import progress_bar


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(_progress, "_DELAY_SECONDS", 0.0)


class Broken(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "missing": lambda: None,
    "closed": closed,
    "reader gone": lambda: Broken(BrokenPipeError(32, "Broken pipe")),
    "full": lambda: Broken(OSError(28, "No space left on device")),
    "hung up": lambda: Broken(OSError(5, "Input/output error")),
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"),
    "no descriptor": io.StringIO,
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_bar_ends_no_job(name, monkeypatch):
    monkeypatch.setattr(sys, "stderr", STREAMS[name]())
    seen = []
    for item in progress_bar(range(3), description="déjà \udcff"):
        seen.append(item)
    assert seen == [0, 1, 2]


def test_a_bar_of_a_full_device(monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in progress_bar(range(2), description="full"):
            pass
        monkeypatch.undo()
        # What is left in its buffer cannot be written at the end either.
        with pytest.raises(OSError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_descriptions_are_fit_to_be_shown(capsys):
    for _ in progress_bar(range(2), description="a\x1b[31m\u202eb"):
        pass
    shown = capsys.readouterr().err
    assert "a\\x1b[31m\\u202eb" in shown and "\x1b[31m" not in shown
