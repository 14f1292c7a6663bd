"""The files of a command: one process at a time, whoever is killed and whenever."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
import torch

import pyflocality as pf
from pyflocality._support import journal as _journal
from pyflocality._support import locks as _locks
from pyflocality._support import outputs as _files
from pyflocality._support.journal import BegunRun, Journal
from pyflocality._support.outputs import Outputs

pytestmark = pytest.mark.skipif(_locks.fcntl is None, reason="this system has no locks")

NAMES = ["a.png", "b.npy", "run.json"]


def outputs(folder, *, run="same", force=False, names=NAMES):
    return Outputs([folder / name for name in names], force=force, folder=folder, run=run)


def write(outputs, text):
    for path in outputs.paths:
        outputs.temporary[path].write_text(f"{text} {path.name}")


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def whole(text, names=NAMES):
    return {name: f"{text} {name}" for name in names}


def killed(folder, renamed, *, force=False, run="same"):
    """Kill a process that writes into a folder: at work (None), or after some of the renames."""

    def work():
        done = []

        def replace(source, target):
            if len(done) == renamed:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(target)
            rename(source, target)

        rename = os.replace
        with outputs(folder, run=run, force=force) as begun:
            write(begun, "killed")
            # Like those of a writer that writes files of its own.
            twin = begun.temporary[begun.paths[0]]
            twin.with_name(f".{twin.name}.0123.tmp").write_text("inner")
            if renamed is None:
                os.kill(os.getpid(), signal.SIGKILL)
            _files.os = type("os", (), {**vars(os), "replace": staticmethod(replace)})
            begun.commit()
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = tmp_path / "out"
    killed(folder, None)
    assert len(os.listdir(folder)) == 5
    (folder / ".mine.0123456789abcdef0123456789abcdef.png").write_text("mine")
    with outputs(folder, run="other") as begun:
        assert sorted(contents(folder)) == sorted(
            [".mine.0123456789abcdef0123456789abcdef.png", ".pyflocality.run"]
            + [path.name for path in begun.temporary.values()]
        )
        write(begun, "new")
        begun.commit()
    (folder / ".mine.0123456789abcdef0123456789abcdef.png").unlink()
    assert contents(folder) == whole("new")


@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_killed_amid_the_renames_the_same_command_goes_on(tmp_path, renamed):
    killed(tmp_path, renamed)
    # Interrupted itself, it changes nothing about that.
    with pytest.raises(KeyboardInterrupt), outputs(tmp_path) as begun:
        write(begun, "interrupted")
        raise KeyboardInterrupt
    assert contents(tmp_path).items() >= whole("killed").items()
    killed(tmp_path, None)
    with outputs(tmp_path) as begun:
        write(begun, "new")
        begun.commit()
    assert contents(tmp_path) == whole("new")
    with pytest.raises(FileExistsError, match="--force"), outputs(tmp_path):
        pass
    assert contents(tmp_path) == whole("new")


@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_killed_amid_the_renames_another_command_asks(tmp_path, renamed):
    killed(tmp_path, renamed)
    with pytest.raises(FileExistsError, match="--force"), outputs(tmp_path, run="other"):
        pass
    assert contents(tmp_path).items() >= whole("killed").items()
    # The same command still goes on.
    with outputs(tmp_path) as begun:
        write(begun, "new")
        begun.commit()
    assert contents(tmp_path) == whole("new")


def test_what_has_been_changed_meanwhile_is_asked_for(tmp_path):
    killed(tmp_path, 3)
    (tmp_path / "b.npy").write_text("precious")
    with pytest.raises(FileExistsError, match="b.npy: already there"), outputs(tmp_path):
        pass
    assert (tmp_path / "b.npy").read_text() == "precious"


def test_a_killed_process_that_might_replace_what_was_there(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_text("old")
    killed(tmp_path, 1, force=True)
    with outputs(tmp_path, force=True) as begun:
        assert contents(tmp_path).items() >= whole("killed").items()
        write(begun, "new")
        begun.commit()
    assert contents(tmp_path) == whole("new")


def test_a_killed_process_does_not_replace_what_came_after_it(tmp_path):
    killed(tmp_path, 1)
    (tmp_path / "b.npy").write_text("precious")
    with pytest.raises(FileExistsError, match="b.npy: already there"), outputs(tmp_path):
        pass
    assert (tmp_path / "b.npy").read_text() == "precious"


def test_two_processes_do_not_write_the_same(tmp_path):
    folder = tmp_path / "out"
    with outputs(folder) as begun:
        with pytest.raises(FileExistsError, match="another process is writing it"):
            outputs(folder, force=True).__enter__()
        with pytest.raises(FileExistsError, match="another process is writing it"):
            outputs(folder, names=["c.png"]).__enter__()
        write(begun, "first")
        begun.commit()
    assert contents(folder) == whole("first")


def test_files_of_their_own_in_one_folder_are_written_side_by_side(tmp_path):
    one, other, picture = (tmp_path / name for name in ("one", "other", "picture"))
    with Outputs([one, picture], force=False) as first:
        with Outputs([other], force=False) as second:
            second.temporary[other].write_text("other")
            second.commit()
        for paths in ([one], [picture], [other, picture]):
            with pytest.raises(FileExistsError, match="another process is writing it"):
                Outputs(paths, force=True).__enter__()
        for path in (one, picture):
            first.temporary[path].write_text(path.name)
        first.commit()
    assert contents(tmp_path) == {name: name for name in ("one", "other", "picture")}


def test_what_appeared_while_it_worked_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="b.npy: already there"), outputs(tmp_path) as begun:
        write(begun, "new")
        (tmp_path / "b.npy").write_text("precious")
        begun.commit()
    assert contents(tmp_path) == {"b.npy": "precious"}


def test_a_signal_does_not_cut_the_renames_in_two(tmp_path, monkeypatch):
    rename = os.replace

    def replace(source, target):
        signal.raise_signal(signal.SIGINT)
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with outputs(tmp_path) as begun:
        write(begun, "new")
        begun.commit()
    assert contents(tmp_path) == whole("new")


def test_links_are_replaced_and_nothing_is_written_through_them(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (*NAMES, "dangling"):
        (folder / name).symlink_to(precious if name != "dangling" else tmp_path / "nowhere")
    names = [*NAMES, "dangling"]
    with pytest.raises(FileExistsError, match="dangling"), outputs(folder, names=names):
        pass
    with outputs(folder, names=names, force=True) as begun:
        write(begun, "new")
        begun.commit()
    assert contents(folder) == whole("new", names)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert precious.read_text() == "precious" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "open", "folder", "here"])
def test_what_is_no_file_is_never_replaced(tmp_path, kind):
    path, error, said = tmp_path / "result", FileExistsError, "is a device"
    if kind == "pipe":
        os.mkfifo(path)
        said = r"is a pipe \(FIFO\)"
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "open":
        (tmp_path / "taken").write_text("taken")
        file = open(tmp_path / "taken")
        path.symlink_to(f"/proc/self/fd/{file.fileno()}")
        if not path.exists():
            pytest.skip("this system has no /proc")
        said = "is what a process has open"
    else:
        path = Path(".") if kind == "here" else tmp_path
        error, said = IsADirectoryError, "is a folder"
    before = path.lstat()
    match = f"^{re.escape(str(path))} {said}, expected the name of a file$"
    with pytest.raises(error, match=match), Outputs([path], force=True):
        pass
    images = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    tables = [pf.Moments.from_data(pf.TrainingSet(images)), pf.WindowTable((1.0,), (3,), ((0.5,),))]
    for table in tables:
        with pytest.raises(error, match=match):
            table.save(path, force=True)
    assert path.lstat().st_ino == before.st_ino and path.lstat().st_mode == before.st_mode


def test_a_folder_that_is_a_link_to_nothing_is_said_to_be_none(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for folder in (tmp_path / "link", tmp_path / "link" / "deeper"):
        with pytest.raises(NotADirectoryError, match="link is not a folder$"), outputs(folder):
            pass
    assert os.listdir(tmp_path) == ["link"]


def test_errors_name_the_results_and_not_their_twins(tmp_path):
    folder = tmp_path / "out"
    for error in (
        lambda path: OSError(f"{path} cannot be written: full"),
        lambda path: OSError(errno.EIO, "Input/output error", str(path)),
    ):
        with pytest.raises(OSError, match=re.escape(str(folder / "b.npy"))), outputs(folder) as run:
            raise error(run.temporary[folder / "b.npy"])
    long = "x" * 250
    with pytest.raises(OSError, match=f"too long: '{re.escape(str(folder / long))}'"):
        outputs(folder, names=[long]).__enter__()


def test_a_journal_that_is_not_ours_moves_nothing(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    run = BegunRun("0" * 32, "key", True)
    victim, twin = tmp_path / "victim.txt", tmp_path / f".victim.{run.id}.txt"
    victim.write_text("precious")
    twin.write_text("evil")
    journal = Journal(folder / ".pyflocality.run")
    status = twin.stat()
    journal.begin(run)
    journal.rename(run, {"../victim.txt": (status.st_size, status.st_mtime_ns)})
    for line in ("[]", "{}", "nonsense", '{"id": "*", "key": "", "force": true}', "null", "[1"):
        with open(journal.path, "a") as file:
            file.write(line + "\n")
    assert [found.id for found in journal.runs()] == [run.id]
    with outputs(folder, force=True) as begun:
        write(begun, "new")
        begun.commit()
    assert victim.read_text() == "precious" and twin.read_text() == "evil"
    assert contents(folder) == whole("new")
    # One that is a link is neither read nor written.
    journal.path.symlink_to(victim)
    with pytest.raises(OSError), outputs(folder, force=True):
        pass
    assert victim.read_text() == "precious"


def test_what_another_user_left_is_neither_touched_nor_in_the_way(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    killed(folder, None)
    left = set(os.listdir(folder))

    def denied(path, flags):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os.open(path, flags)

    monkeypatch.setattr(_journal, "no_link", denied)
    with outputs(folder) as begun:
        write(begun, "new")
        begun.commit()
    assert set(os.listdir(folder)) == left | set(NAMES)
    assert {name: (folder / name).read_text() for name in NAMES} == whole("new")


def test_without_locks_results_still_appear_together(tmp_path, monkeypatch):
    monkeypatch.setattr(_locks, "fcntl", None)
    killed(tmp_path, None)
    with outputs(tmp_path) as begun:
        assert not (tmp_path / ".pyflocality.run").exists()
        write(begun, "new")
        begun.commit()
    assert contents(tmp_path).items() >= whole("new").items()
