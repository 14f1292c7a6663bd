"""The cache of decoded images: hits, damage, failures; and how the decoding runs."""

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
import threading
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from sealed_json import sealed, unsealed
from source_files import (
    COLOUR,
    GREY,
    assert_images,
    encoded,
    load,
    save_npy,
    truncate,
    write_tree,
)

from pyflocality.data import TrainingSet
from pyflocality.sources import cache, images, npy

RNG = np.random.default_rng(5)


@pytest.fixture
def cached_zip(tmp_path, monkeypatch):
    """A zip that is large enough to be cached, and where."""
    monkeypatch.setattr(cache, "MIN_IMAGES", 5)
    files = {f"{index % 2}/{index}.png": encoded(GREY[index]) for index in range(6)}
    return write_tree(tmp_path / "set", files, "zip"), tmp_path / "cache"


ZIP_ORDER, ZIP_LABELS = [0, 2, 4, 1, 3, 5], [0, 0, 0, 1, 1, 1]


def check_cached_zip(data):
    assert_images(data, GREY[ZIP_ORDER][:, None])
    assert data.labels.tolist() == ZIP_LABELS
    assert (data.label_names, data.name) == (("0", "1"), "set.zip")
    assert "memory-mapped" in repr(data)


def forbid_decoding(monkeypatch):
    def decode(self, name):
        raise AssertionError(f"{name} was decoded")

    monkeypatch.setattr(images._Decoder, "decode", decode)


def test_a_decoded_zip_is_mapped_and_found_again(cached_zip, monkeypatch):
    path, folder = cached_zip
    check_cached_zip(load(path, cache_dir=folder))
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".npy"]
    forbid_decoding(monkeypatch)
    data = load(path, cache_dir=folder)
    check_cached_zip(data)
    check_cached_zip(pickle.loads(pickle.dumps(data)))
    # The key is made of the content of a zip, not of its place.
    moved = path.rename(path.with_name("moved.zip"))
    assert load(moved, cache_dir=folder).content_key() == data.content_key()
    for arguments in ({"resolution": 3}, {"channels": 3}):
        with pytest.raises(AssertionError, match="was decoded"):
            load(moved, cache_dir=folder, **arguments)


def test_a_changed_source_is_decoded_again(cached_zip):
    path, folder = cached_zip
    load(path, cache_dir=folder)
    files = {f"{index % 2}/{index}.png": encoded(255 - GREY[index]) for index in range(6)}
    write_tree(path.with_suffix(""), files, "zip")
    assert_images(load(path, cache_dir=folder), 255 - GREY[ZIP_ORDER][:, None])


def test_a_changed_folder_is_decoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MIN_IMAGES", 2)
    files = {f"{index}.bmp": encoded(GREY[index], "BMP") for index in range(3)}
    folder = write_tree(tmp_path / "set", files, "folder")
    assert "memory-mapped" in repr(load(folder))
    os.utime(folder / "1.bmp", ns=(1, 1))
    (folder / "1.bmp").write_bytes(encoded(GREY[5], "BMP"))
    assert_images(load(folder), GREY[[0, 5, 2]][:, None])
    # A copy with the same names, sizes and times is not taken for the original.
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    shutil.copystat(folder / "0.bmp", twin / "0.bmp")
    status = os.stat(twin / "1.bmp")
    (twin / "1.bmp").write_bytes(encoded(GREY[4], "BMP"))
    os.utime(twin / "1.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_images(load(twin), GREY[[0, 4, 2]][:, None])


def damage_values(array, entry):
    content = bytearray(array.read_bytes())
    content[-7] ^= 1
    array.write_bytes(content)


def damage_size(array, entry):
    truncate(array)


def damage_entry(array, entry):
    truncate(entry)


def damage_labels(array, entry):
    content = entry.read_text()
    assert '"labels": [0, 0, 0, 1, 1, 1]' in content
    entry.write_text(content.replace('"labels": [0, 0, 0', '"labels": [0, 0, 1'))


def damage_version(array, entry):
    entry.write_text(entry.read_text().replace('"version": ', '"version": 9'))


def damage_all(array, entry):
    entry.write_text("[]")


def damage_nesting(array, entry):
    entry.write_text("[" * 100_000)


def rewritten(entry, **changes):
    """An entry with other fields and the right checksum: written by somebody else."""
    found = unsealed(entry.read_text())
    entry.write_text(sealed(found | changes))


def damage_kinds(array, entry):
    rewritten(entry, labels={"0": 1})


def damage_names(array, entry):
    rewritten(entry, label_names=[["0"], ["1"]])


def damage_size_kind(array, entry):
    rewritten(entry, bytes="all")


def checksum_of(path):
    with open(path, "rb") as file:
        return npy.checksum(file)


def damage_label_count(array, entry):
    rewritten(entry, labels=[0, 0, 0])


def damage_shape(array, entry):
    """Fewer images, under checksums that are right."""
    images = np.load(array)
    np.save(array, images[:4])
    crc = checksum_of(array)
    rewritten(entry, bytes=array.stat().st_size, checksum=crc, labels=[0] * 4)


def damage_dtype(array, entry):
    np.save(array, np.load(array).view(np.int8))
    rewritten(entry, checksum=checksum_of(array))


def damage_by_a_link(array, entry):
    """What a link leads to is somebody else's, whatever it holds."""
    array.rename(array.with_suffix(".elsewhere"))
    array.symlink_to(array.with_suffix(".elsewhere"))


def damage_by_a_pipe(array, entry):
    entry.unlink()
    os.mkfifo(entry)


def damage_owner(array, entry):
    entry.chmod(0o666)


def remove_array(array, entry):
    array.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_values,
        damage_size,
        damage_entry,
        damage_labels,
        damage_version,
        damage_all,
        damage_nesting,
        damage_kinds,
        damage_names,
        damage_size_kind,
        damage_label_count,
        damage_shape,
        damage_dtype,
        damage_by_a_link,
        damage_by_a_pipe,
        damage_owner,
        remove_array,
    ],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(cached_zip, monkeypatch, damage):
    path, folder = cached_zip
    load(path, cache_dir=folder)
    (array,), (entry,) = folder.glob("*.npy"), folder.glob("*.json")
    damage(array, entry)
    with pytest.warns(UserWarning, match=rf"{entry}: the cached images ") as told:
        check_cached_zip(load(path, cache_dir=folder))
    foreign = damage in (damage_by_a_link, damage_by_a_pipe, damage_owner)
    assert ("cannot be used" if foreign else "are damaged") in str(told[0].message)
    assert len(told) == 1
    forbid_decoding(monkeypatch)
    check_cached_zip(load(path, cache_dir=folder))


def test_an_unwritable_cache_leaves_the_images_in_memory(cached_zip):
    path, folder = cached_zip
    folder.write_text("a file where the cache should be")
    with pytest.warns(UserWarning) as told:
        data = load(path, cache_dir=folder)
        load(path, cache_dir=folder)
    assert len(told) == 1
    text = str(told[0].message)
    assert text.startswith(f"nothing is cached: {folder} is no folder: ")
    assert "PYFLOCALITY_CACHE_DIR" in text
    assert_images(data, GREY[ZIP_ORDER][:, None])
    assert data.labels.tolist() == ZIP_LABELS
    assert "memory-mapped" not in repr(data)


@pytest.mark.parametrize("code", [13, 30])
def test_a_folder_that_cannot_be_written_to_is_told_once(cached_zip, monkeypatch, code):
    """What is in it is read; what is not stays in memory."""
    path, folder = cached_zip
    load(path, cache_dir=folder)
    opened = os.open

    def read_only(name, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), name)
        return opened(name, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_cached_zip(load(path, cache_dir=folder))
    with pytest.warns(UserWarning) as told:
        for _ in range(2):
            assert load(path, cache_dir=folder, resolution=2).image_shape == (1, 2, 2)
    assert len(told) == 1
    assert f"{folder} cannot be written to ({os.strerror(code)})" in str(told[0].message)


def test_a_full_disk_leaves_the_images_in_memory(cached_zip, monkeypatch):
    path, folder = cached_zip

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device") as told:
        for _ in range(2):
            assert_images(load(path, cache_dir=folder), GREY[ZIP_ORDER][:, None])
    assert len(told) == 1
    assert list(folder.iterdir()) == []


def test_a_failed_run_leaves_no_files(cached_zip):
    path, folder = cached_zip
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("1/9.png", b"no image")
    with pytest.raises(ValueError, match=r"set\.zip: 1/9\.png: not an image"):
        load(path, cache_dir=folder)
    assert list(folder.iterdir()) == []


def test_small_sets_are_not_cached(cached_zip, monkeypatch):
    path, folder = cached_zip
    monkeypatch.setattr(cache, "MIN_IMAGES", 7)
    assert "memory-mapped" not in repr(load(path, cache_dir=folder))
    assert not folder.exists()
    # A few large files are worth it, though.
    monkeypatch.setattr(cache, "MIN_SOURCE_BYTES", 100)
    assert "memory-mapped" in repr(load(path, cache_dir=folder))


def test_a_grey_set_that_turns_out_to_be_colour_is_cached_as_colour(cached_zip):
    path, folder = cached_zip
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("1/9.png", encoded(COLOUR[0]))
    for _ in range(2):
        data = load(path, cache_dir=folder)
        np.testing.assert_array_equal(data.images.numpy()[-1], COLOUR[0])
        np.testing.assert_array_equal(data.images.numpy()[0], [GREY[0]] * 3)
    assert len(list(folder.iterdir())) == 2


def test_converted_npy_files_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MIN_IMAGES", 5)
    path = save_npy(tmp_path, COLOUR)
    data = load(path, channels=1)
    assert "memory-mapped" in repr(data)
    monkeypatch.setattr("pyflocality.sources.arrays.convert_array", None)
    assert load(path, channels=1).content_key() == data.content_key()


def test_the_checksum_of_a_large_file_samples_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(npy, "_BLOCK", 16)
    monkeypatch.setattr(npy, "_MAX_BLOCKS", 4)
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * 10 + 3))
    clean = checksum_of(path)

    def seen(position):
        content = bytearray(16 * 10 + 3)
        content[position] = 1
        path.write_bytes(content)
        return checksum_of(path) != clean

    # Blocks 0, 3, 6 and 10 of 11.
    found = {position // 16 for position in range(163) if seen(position)}
    assert found == {0, 3, 6, 10}


def test_large_images_are_decoded_in_several_threads_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_BLOCK", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    pixels = RNG.integers(0, 256, (20, 64, 65), dtype=np.uint8)
    files = {f"{index:02d}.png": encoded(image) for index, image in enumerate(pixels)}
    threads = set()
    decode = images._Decoder.decode

    def watched(self, name):
        threads.add(threading.get_ident())
        return decode(self, name)

    monkeypatch.setattr(images._Decoder, "decode", watched)
    path = write_tree(tmp_path / "set", files, "zip")
    assert_images(load(path), pixels[:, None])
    assert threads - {threading.get_ident()}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("05b.png", encoded(pixels[0, :9]))
        archive.writestr("15b.png", b"no image")
    with pytest.raises(ValueError, match=r"05b\.png: is 9x65, but 00\.png is 64x65"):
        load(path)


def test_progress_is_shown_or_not(tmp_path, monkeypatch):
    shown = []

    def bar(items, *, description, total, enabled):
        shown.append((description, total, enabled))
        return items

    monkeypatch.setattr(cache, "progress_bar", bar)
    path = write_tree(tmp_path / "set", {"a.png": encoded(GREY[0])}, "zip")
    TrainingSet.load(path)
    load(path)
    assert shown == [("decoding set.zip", 1, True), ("decoding set.zip", 1, False)]


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
