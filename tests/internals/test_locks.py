"""Locks: one holder at a time, whatever ends it; files of writers that are gone are removed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyflocality._support import locks as _locks
from pyflocality._support.locks import (
    HeldError,
    hold,
    locked,
    remove_abandoned,
    replacing,
    twins_of,
)

pytestmark = pytest.mark.skipif(_locks.fcntl is None, reason="there are no such locks here")

# By the module's file: a process that imports torch takes seconds to start.
HOLDER = """
import runpy, sys
from pathlib import Path
with runpy.run_path(sys.argv[1])["locked"](Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder():
    """Starts a process that holds a lock until it is told to go on."""
    started = []

    def start(path):
        child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, _locks.__file__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lock_is_held_by_one_process_and_free_once_it_is_gone(tmp_path, holder, kind):
    path = tmp_path if kind == "folder" else tmp_path / ".work.lock"
    for end in (lambda child: child.communicate("\n"), lambda child: child.kill() or child.wait()):
        child = holder(path)
        with pytest.raises(HeldError, match="another process holds the lock"):
            with locked(path):
                pass
        end(child)
        with locked(path) as has_locks:
            assert has_locks
        assert list(tmp_path.iterdir()) == []


def test_who_waits_is_told_after_a_second(tmp_path, holder, caplog):
    path = tmp_path / ".work.lock"
    child = holder(path)
    timer = threading.Timer(1.3, child.communicate, ("\n",))
    timer.start()
    with locked(path, waiting_for="decodes the images"):
        pass
    timer.join()
    assert caplog.messages == ["waiting for another process that decodes the images"]
    caplog.clear()
    with locked(path, waiting_for="decodes the images"):
        pass
    assert caplog.messages == [] and list(tmp_path.iterdir()) == []


def test_threads_take_turns_although_each_removes_the_file(tmp_path):
    path, inside, most = tmp_path / ".work.lock", [], []

    def work():
        for _ in range(30):
            with locked(path, waiting_for="works"):
                inside.append(None)
                most.append(len(inside))
                time.sleep(0.0002)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120 and max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_content_is_never_removed(tmp_path):
    path = tmp_path / "thesis"
    path.write_text("all of it")
    with locked(path):
        pass
    assert path.read_text() == "all of it"


def test_a_lock_file_is_no_way_to_write_through_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / ".work.lock"
    link.symlink_to(target)
    with pytest.raises(OSError):
        with locked(link):
            pass
    assert not target.exists() and link.is_symlink()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_hold_on_to_the_lock(tmp_path):
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_worked_on_without(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(_locks.fcntl, "flock", unsupported)
    with locked(tmp_path / ".work.lock") as has_locks:
        assert not has_locks
    monkeypatch.setattr(_locks, "fcntl", None)
    with locked(tmp_path / ".work.lock") as has_locks:
        assert not has_locks
    assert list(tmp_path.iterdir()) == []


def test_files_are_abandoned_when_nobody_holds_them(tmp_path, monkeypatch):
    free, held = (tmp_path / f"{name}.tmp" for name in ("free", "held"))
    for path in (free, held):
        path.write_bytes(b"half")
    with open(held, "r+b") as file:
        hold(file.fileno())
        remove_abandoned([free, held, tmp_path / "none.tmp"])
        assert list(tmp_path.iterdir()) == [held]
    # Without locks age has to tell.
    monkeypatch.setattr(_locks, "fcntl", None)
    remove_abandoned([held])
    assert held.exists()
    os.utime(held, (time.time() - 90_000,) * 2)
    remove_abandoned([held])
    assert not held.exists()


def test_what_is_being_written_is_never_taken_for_abandoned(tmp_path):
    """A file is made and then locked; who looks for abandoned ones may come in between."""
    path, done = tmp_path / "entry", threading.Event()

    def sweep():
        while not done.is_set():
            remove_abandoned(twins_of(path))

    sweepers = [threading.Thread(target=sweep) for _ in range(3)]
    for thread in sweepers:
        thread.start()
    try:
        for number in range(60):
            with replacing(path) as file:
                file.write(b"%d" % number)
            assert path.read_bytes() == b"%d" % number
    finally:
        done.set()
        for thread in sweepers:
            thread.join()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 217, "x" * 218, "x" * 255, "\N{SNOWMAN}" * 80])
def test_names_as_long_as_can_be_are_written(tmp_path, name):
    with replacing(tmp_path / name, 0o640) as file:
        assert list(twins_of(tmp_path / name)) == [Path(file.name)]
        assert len(os.fsencode(name)) > 217 or name in file.name
        file.write(b"all of it")
    assert (tmp_path / name).read_bytes() == b"all of it"
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) & ~0o640 == 0


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path, elsewhere = tmp_path / "entry", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    path.symlink_to(elsewhere)
    with pytest.raises(ZeroDivisionError):
        with replacing(path) as file:
            file.write(b"half")
            raise ZeroDivisionError
    assert path.is_symlink() and len(list(tmp_path.iterdir())) == 2
    with replacing(path) as file:
        file.write(b"all of it")
    assert not path.is_symlink() and elsewhere.read_text() == "precious"


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_meanwhile_is_not_replaced_unasked(tmp_path, monkeypatch, links):
    def without(*_):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(_locks.os, "link", without)
    path = tmp_path / "result"
    for meanwhile in (lambda: path.write_text("theirs"), lambda: path.symlink_to("nowhere")):
        with pytest.raises(FileExistsError, match="result"):
            with replacing(path, force=False) as file:
                file.write(b"ours")
                meanwhile()
        assert list(tmp_path.iterdir()) == [path] and path.is_symlink() != path.is_file()
        with replacing(path) as file:
            file.write(b"ours")
        assert path.read_bytes() == b"ours"
        path.unlink()
    with replacing(path, force=False) as file:
        file.write(b"ours")
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_nlink == 1
