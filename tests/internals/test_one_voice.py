"""Ranks tell one error once, whoever dies."""

from __future__ import annotations

import signal
import sys

import pytest

import pyflocality as pf
from pyflocality.cli import _ranks


def failing(words, code=2):
    def run():
        print("on standard output")
        sys.stderr.write(words)
        return code

    return run


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(_ranks, "_PATIENCE", 1.0)


def test_others_fail_silently_where_rank_0_failed_alike(as_rank, capsys):
    as_rank(0)
    assert _ranks.one_voice(failing("a warning\nno such set\n")) == 2
    assert capsys.readouterr() == ("on standard output\n", "a warning\nno such set\n")
    as_rank(1)
    assert _ranks.one_voice(failing("no such set\n")) == 2
    assert capsys.readouterr() == ("", "")
    assert _ranks.one_voice(failing("no memory\n", 1)) == 1
    assert capsys.readouterr() == ("", "no memory\n")
    assert _ranks.one_voice(failing("only a warning\n", 0)) == 0
    assert capsys.readouterr() == ("", "")

    def lost():
        raise pf.distributed.RankLostError("rank 1 is alone")

    assert _ranks.one_voice(lost) == 1
    assert capsys.readouterr() == ("", "")


def test_others_speak_where_rank_0_does_not(as_rank, capsys):
    as_rank(1)
    assert _ranks.one_voice(failing("no such set\n")) == 2
    assert capsys.readouterr() == ("", "no such set\n")


def test_a_rank_without_a_store_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert _ranks.one_voice(failing("no such set\n")) == 2
    assert capsys.readouterr() == ("", "no such set\n")


def test_being_told_to_end_is_an_error_unless_there_is_one():
    before = signal.signal(signal.SIGTERM, _ranks._told_to_end)
    try:
        with pytest.raises(pf.distributed.RankLostError, match="told to end"):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(ValueError, match="on its way"):
            try:
                raise ValueError("on its way")
            finally:
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
