"""Several processes at one cache of decoded images: who decodes, who waits, who is killed."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from cached_sources import check_cached_zip, damage_entry
from source_files import (
    GREY,
    load,
)

from pyflocality.sources import images


@pytest.fixture
def cold_starts(cached_zip, tmp_path):
    """Loads the zip in several processes at a time; which of them decoded, and what they saw."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    path, folder = cached_zip
    decodings = tmp_path / "decodings"
    decode = images._Decoder.decode

    def slow(self, name):
        time.sleep(0.1)
        with open(decodings, "a") as file:
            file.write(f"{os.getpid()}\n")
        return decode(self, name)

    def work(barrier, answers):
        images._Decoder.decode = slow
        barrier.wait()
        data = load(path, cache_dir=folder)
        # The first use compares the file with what was mapped.
        answers.put((data.values().sum().item(), "memory-mapped" in repr(data)))

    def start(count):
        context = multiprocessing.get_context("fork")
        barrier, answers = context.Barrier(count), context.SimpleQueue()
        children = [context.Process(target=work, args=(barrier, answers)) for _ in range(count)]
        for child in children:
            child.start()
        found = [answers.get() for _ in children]
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * count
        return found, decodings.read_text().split()

    return start, path, folder


def test_one_process_decodes_while_others_wait(cold_starts):
    start, path, folder = cold_starts
    found, decodings = start(4)
    expected = (GREY.astype(np.float32) / 127.5 - 1).sum()
    assert len(set(found)) == 1 and found[0] == (pytest.approx(expected, abs=1e-3), True)
    # Each looks at the first image, which tells the shape of all.
    counts = sorted(decodings.count(process) for process in set(decodings))
    assert counts == [1, 1, 1, 1 + len(GREY)]
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_processes_that_are_killed_leave_nothing_to_those_that_wait(cached_zip, times):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    path, folder = cached_zip
    decode, draw = images._Decoder.decode, random.Random(times)

    def work():
        def slow(self, name):
            time.sleep(0.02)
            return decode(self, name)

        images._Decoder.decode = slow
        load(path, cache_dir=folder).values()

    context = multiprocessing.get_context("fork")
    for _ in range(times):
        children = [context.Process(target=work) for _ in range(3)]
        for child in children:
            child.start()
        for child in draw.sample(children, 2):
            time.sleep(draw.random() * 0.2)
            child.kill()
        for child in children:
            child.join()
        codes = sorted(child.exitcode for child in children)
        assert codes[-1] == 0 and set(codes) <= {-signal.SIGKILL, 0}
        check_cached_zip(load(path, cache_dir=folder))
        assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".npy"]
        shutil.rmtree(folder)


def test_a_lock_file_of_a_run_that_was_killed_when_it_was_done(cached_zip):
    path, folder = cached_zip
    load(path, cache_dir=folder)
    (array,) = folder.glob("*.npy")
    (folder / f".{array.stem}.lock").touch()
    check_cached_zip(load(path, cache_dir=folder))
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".npy"]


def test_without_locks_every_process_finishes(cold_starts, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    start, path, folder = cold_starts
    found, _ = start(3)
    assert len(set(found)) == 1
    check_cached_zip(load(path, cache_dir=folder))
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".npy"]


def test_an_entry_that_is_replaced_stays_of_use_to_those_who_map_it(cached_zip):
    path, folder = cached_zip
    data = load(path, cache_dir=folder)
    content = pickle.dumps(data)
    (array,), (entry,) = folder.glob("*.npy"), folder.glob("*.json")
    before, inode = data.values(), array.stat().st_ino
    damage_entry(array, entry)
    with pytest.warns(UserWarning, match="damaged"):
        other = load(path, cache_dir=folder)
    assert array.stat().st_ino != inode
    for twin in (data, other, pickle.loads(content)):
        assert np.array_equal(twin.values(), before)
        assert twin.content_key() == data.content_key()
    # What they map is told when it changes, though.
    with open(array, "r+b") as file:
        file.seek(200)
        file.write(b"x")
    data.values()
    with pytest.raises(ValueError, match="changed"):
        other.values()


def test_what_killed_runs_left_is_removed_by_the_next(cached_zip):
    path, folder = cached_zip
    load(path, cache_dir=folder)
    (array,), (entry,) = folder.glob("*.npy"), folder.glob("*.json")
    key = array.stem
    left = [
        *(f".{key}.npy.0123456789abcdef0123456789abcdef.tmp", f".{key}.lock", f"{key}x1y2z3.tmp"),
        f".{'0' * 32}.npy.0123456789abcdef0123456789abcdef.tmp",
    ]
    others = ["mine.tmp", ".notes.lock"]
    for name in left + others:
        (folder / name).write_bytes(b"half" if name.endswith("tmp") else b"")
    entry.unlink()
    load(path, cache_dir=folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*others, array.name, entry.name]
    )


def killed_while_decoding(path, folder, delay):
    """A process that loads the set, and is killed after so many images."""

    def work():
        decode, decoded = images._Decoder.decode, []

        def dying(self, name):
            if len(decoded) == delay:
                os.kill(os.getpid(), signal.SIGKILL)
            decoded.append(name)
            return decode(self, name)

        images._Decoder.decode = dying
        load(path, cache_dir=folder)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_leaves_nothing_that_the_next_does_not_remove(cached_zip):
    path, folder = cached_zip
    for delay in range(1, 7):
        assert killed_while_decoding(path, folder, delay) == -signal.SIGKILL
        assert any(name.endswith(".tmp") for name in os.listdir(folder))
        check_cached_zip(load(path, cache_dir=folder))
        assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".npy"]
        shutil.rmtree(folder)


RANK = """
import sys
import torch
import torch.distributed
import pyflocality as pf
from pyflocality.sources import cache
cache.MIN_IMAGES = 5
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
data = pf.TrainingSet.load(sys.argv[1], cache_dir=sys.argv[2], progress=False)
assert "memory-mapped" in repr(data)
print(pf.OptimalDenoiser(data)(torch.zeros(1, *data.image_shape), 0.5).sum().item() != 0)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_sixteen_ranks_start_with_a_cold_cache(cached_zip, tmp_path):
    path, folder = cached_zip
    (tmp_path / "rank.py").write_text(RANK)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node=16", str(tmp_path / "rank.py"), str(path), str(folder)]
    run = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("True") == 16, run.stdout
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".npy"]


class Rows(torch.utils.data.Dataset):
    """A set as the workers of a loader get it: pickled. They wait until the entry is replaced."""

    def __init__(self, data, ready):
        self.data, self.ready = data, ready

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        before = self.data.values(index, index + 1)
        (self.ready / str(os.getpid())).touch()
        while not (self.ready / "replaced").exists():
            time.sleep(0.01)
        assert torch.equal(self.data.values(index, index + 1), before)
        return before[0]


@pytest.mark.slow
def test_workers_of_a_loader_read_on_when_the_entry_is_replaced(cached_zip, tmp_path):
    path, folder = cached_zip
    data = load(path, cache_dir=folder)
    expected = data.values()
    loader = torch.utils.data.DataLoader(
        Rows(data, tmp_path), batch_size=3, num_workers=2, multiprocessing_context="spawn"
    )
    batches = iter(loader)
    deadline = time.monotonic() + 300
    while sum(name.isdigit() for name in os.listdir(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (entry,) = folder.glob("*.json")
    damage_entry(None, entry)
    with pytest.warns(UserWarning, match="damaged"):
        load(path, cache_dir=folder)
    (tmp_path / "replaced").touch()
    assert torch.equal(torch.cat(list(batches)), expected)
