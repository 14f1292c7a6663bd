"""Parts of the command line by themselves."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import signal
from typing import get_type_hints

import pytest
import torch

import pyflocality
from pyflocality import cli, denoisers
from pyflocality._support import signals as _signals
from pyflocality._support import streams as _streams
from pyflocality._support.devices import parse_device
from pyflocality._support.outputs import Outputs
from pyflocality.cli import _recorded, main
from pyflocality.cli._compare import compare
from pyflocality.cli._denoisers import DENOISERS
from pyflocality.cli._errors import show_traceback
from pyflocality.cli._generate import generate
from pyflocality.cli._options import parse_window


def test_the_table_of_denoisers_fits_library_and_command():
    parameters = inspect.signature(generate).parameters
    for entry in DENOISERS.values():
        accepted = set(inspect.signature(getattr(pyflocality, entry.class_name)).parameters)
        if "options" in accepted:
            accepted |= set(get_type_hints(denoisers.DenoiserOptions))
        assert set(entry.options) <= set(parameters)
        assert set(entry.options.values()) <= accepted


def test_commands_take_groups_of_options():
    for command in (info.callback for info in cli.app.registered_commands):
        grouped, flat = inspect.unwrap(command), inspect.signature(command).parameters
        own = inspect.signature(grouped).parameters
        assert len(own) <= 10, command.__name__
        groups = [
            kind for kind in get_type_hints(grouped).values() if dataclasses.is_dataclass(kind)
        ]
        options = {field.name for group in groups for field in dataclasses.fields(group)}
        assert set(flat) <= set(own) | options, command.__name__


def test_the_help_tells_options_in_one_order():
    """What is asked for first stands first, whichever group declares or inherits an option."""
    options = list(inspect.signature(generate).parameters)
    named = ["out", "denoiser", "threshold", "flip", "n", "steps", "seed", "resolution", "device"]
    assert options[0] == "out"
    assert [option for option in options if option in named] == named


def test_windows_and_devices_are_read():
    assert parse_window("7") == 7
    assert parse_window("10:15, 0.5:3") == ((10.0, 15), (0.5, 3))
    assert parse_device("cpu") == torch.device("cpu")


def test_outputs_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "a" / "x.txt", tmp_path / "b" / "y.txt"]
    with pytest.raises(RuntimeError), Outputs(paths, force=False) as outputs:
        outputs.temporary[paths[0]].write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with Outputs(paths, force=False) as outputs:
        for path in paths:
            outputs.temporary[path].write_text(path.name)
        assert not any(path.exists() for path in paths)
        outputs.commit()
    assert [path.read_text() for path in paths] == ["x.txt", "y.txt"]
    assert [os.listdir(path.parent) for path in paths] == [["x.txt"], ["y.txt"]]
    paths[0].unlink()
    paths[0].mkdir()
    with pytest.raises(IsADirectoryError, match="x.txt"):
        Outputs(paths, force=True).__enter__()


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(OSError) as caught, Outputs([tmp_path / "x"], force=False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"[Errno {errno.ENOSPC}] No space left on device: {str(tmp_path)!r}"
    with pytest.raises(OSError) as caught, Outputs([tmp_path / "x"], force=False):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    assert caught.value.filename is None


def test_both_commands_take_every_option_of_the_models():
    for command in (generate, compare):
        parameters = inspect.signature(command).parameters
        for entry in DENOISERS.values():
            assert set(entry.options) <= set(parameters)
            assert set(entry.required) <= set(entry.options)


def test_handlers_are_put_back_and_those_of_others_stay():
    def mine(*_):
        raise AssertionError

    before = {name: signal.getsignal(getattr(signal, name)) for name in _signals._DEFAULTS}
    signal.signal(signal.SIGTERM, mine)
    try:
        with _signals.ended_by_signals():
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) is not before["SIGHUP"]
            with pytest.raises(_signals.Ended) as ended:
                signal.raise_signal(signal.SIGHUP)
            assert _signals.last_word(ended.value) == ("ended by SIGHUP", 129)
        with _signals.ended_by_signals():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                # The second one does not cut off what is done about the first.
                signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before["SIGTERM"])
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in before}
    assert _signals.last_word(KeyboardInterrupt()) == ("interrupted", 130)


def test_a_forgiving_stream_passes_on_what_it_can():
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    door = _streams.Forgiving(stream)
    door.write("caf\xe9 \u4e2d\n")
    door.flush()
    assert stream.buffer.getvalue() == b"caf\xe9 \\u4e2d\n"
    assert door.failure is None and door.encoding == "latin-1" and not door.isatty()
    stream.close()
    door.write("lost")
    assert isinstance(door.failure, ValueError)


def test_a_disk_too_full_for_answers_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_recorded, "open", full, raising=False)
    words = ["generate", "digits", "--out", str(tmp_path / "out"), "--denoiser", "local"]
    assert main([*words, "--window", "3", "--n", "2", "--steps", "6", "--no-progress"]) == 0
    assert capsys.readouterr().err.count("could not be resumed") == 1


def test_faults_are_fit_to_be_shown(capsys):
    try:
        raise RuntimeError("a\x1b[31m\u202e")
    except RuntimeError as error:
        show_traceback(RuntimeError, error, error.__traceback__)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("RuntimeError: a\\x1b[31m\\u202e\n")
