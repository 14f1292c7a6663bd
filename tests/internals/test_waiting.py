"""Calls that hold the main thread for long are interrupted at once."""

from __future__ import annotations

import contextvars
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import pyflocality as pf
from pyflocality._support import progress
from pyflocality._support import waiting as _waiting
from pyflocality._support.waiting import interruptible
from pyflocality.moments import eigen


def test_results_and_errors_are_those_of_the_call():
    value = contextvars.ContextVar("value", default=1)
    value.set(2)
    assert interruptible(value.get) == 2
    assert interruptible(threading.current_thread) is not threading.main_thread()
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert interruptible(torch.get_num_threads) == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_another_thread_calls_by_itself():
    found = []
    thread = threading.Thread(target=lambda: found.append(interruptible(threading.current_thread)))
    thread.start()
    thread.join()
    assert found == [thread]


def test_an_interruption_does_not_wait():
    done = threading.Event()
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: done.wait(60))
    assert time.monotonic() - start < 30
    assert _waiting.has_abandoned_calls()
    done.set()
    for end in _waiting._abandoned:
        assert end.wait(60)
    assert not _waiting.has_abandoned_calls()


def test_eigenvectors_are_found_in_a_thread_where_they_take_long(monkeypatch):
    images = torch.randint(0, 256, (40, 1, 6, 6), generator=torch.Generator().manual_seed(1))
    found = pf.Moments.from_data(images.to(torch.uint8))
    plain = found.eigh()
    threads = []

    def noted(call, *meanwhile):
        threads.append(interruptible(threading.current_thread))
        return interruptible(call, *meanwhile)

    monkeypatch.setattr(eigen, "_LONG_EIGH", 36)
    monkeypatch.setattr(progress, "interruptible", noted)
    again = pf.Moments.from_data(images.to(torch.uint8)).eigh()
    assert threads and threads[0] is not threading.main_thread()
    assert torch.equal(plain.values, again.values) and torch.equal(plain.vectors, again.vectors)


SCRIPT = """
import sys, numpy, time, torch
from pyflocality.cli import main
real = torch.linalg.eigh
def eigh(matrix):
    print("solving", file=sys.stderr, flush=True)
    # Many seconds in LAPACK.
    return real(torch.randn(4000, 4000, dtype=torch.float64))
torch.linalg.eigh = eigh
sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_the_command_line_answers_signals_inside_the_eigensolver(number, tmp_path):
    import numpy as np

    images = np.random.default_rng(4).integers(0, 256, (600, 24, 24), np.uint8)
    np.save(tmp_path / "images.npy", images)
    words = ["moments", str(tmp_path / "images.npy"), "--out", str(tmp_path / "m.safetensors")]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words, "--no-progress"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "solving\n"
    time.sleep(0.5)
    process.send_signal(number)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    spent = time.monotonic() - start
    told = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert (process.returncode, errors) == (128 + number, f"pyflocality: {told}\n")
    # Far less than the solver takes.
    assert spent < 20
    assert os.listdir(tmp_path) == ["images.npy"]
