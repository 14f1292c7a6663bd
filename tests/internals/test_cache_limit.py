"""The cache's bytes: left piece by piece, checked, mapped where large; how much of them may be."""

from __future__ import annotations

import io
import os
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pyflocality as pf
from pyflocality._support import caller
from pyflocality.storage import blobs, limit
from pyflocality.storage.blobs import BlobWriter, read_blob, write_blob

HEADER = 64


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(caller, "_told", set())


@pytest.fixture
def folder():
    """The cache folder, which the tests' environment names."""
    return Path(os.environ["PYFLOCALITY_CACHE_DIR"])


def name_of(number: int) -> str:
    return f"masks/{number:032x}.bits"


def leave(number: int, size: int = 1000, used: int | None = None) -> Path:
    """An entry with content, used at a time in seconds."""
    assert write_blob(name_of(number), bytes([number % 256]) * size)
    path = Path(os.environ["PYFLOCALITY_CACHE_DIR"]) / name_of(number)
    if used is not None:
        os.utime(path, (used, used))
    return path


def told(action) -> list[str]:
    """The warnings of an action."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


def test_pieces_at_any_place_make_the_whole():
    content = np.arange(1000, dtype=np.float64)
    with BlobWriter(name_of(1), content.nbytes) as blob:
        blob.write(content[500:], at=4000)
        blob.write(content[:200], at=0)
        # Behind the last ones.
        blob.write(content[200:500])
    assert blob.kept
    np.testing.assert_array_equal(read_blob(name_of(1), 8000).view(np.float64), content)
    np.testing.assert_array_equal(read_blob(name_of(1)).view(np.float64), content)


def test_what_is_written_and_mapped_is_never_held_whole(monkeypatch):
    """64 MiB go through less than 4 MiB, and come back as a map."""
    size, piece = blobs.MAPPED, np.arange(2**20, dtype=np.uint32).view(np.uint8)
    tracemalloc.start()
    try:
        with BlobWriter(name_of(1), size) as blob:
            for _ in range(size // len(piece)):
                blob.write(piece)
        content = read_blob(name_of(1), size)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
    assert isinstance(content, np.memmap)
    np.testing.assert_array_equal(content[-len(piece) :], piece)
    # Numbers of any dtype lie at their places.
    assert content.ctypes.data % 64 == 0
    # A change is the reader's own.
    content[0] = 99
    assert read_blob(name_of(1), size)[0] == 0


@pytest.mark.parametrize("start", [-1, 1, 2**62])
def test_bytes_beyond_the_end_are_refused(start):
    with pytest.raises(ValueError, match="`at`"), BlobWriter(name_of(1), 10) as blob:
        blob.write(bytes(10), at=start)
    assert read_blob(name_of(1)) is None


def test_a_block_that_ends_early_leaves_nothing(folder):
    with BlobWriter(name_of(1), 10) as blob:
        blob.write(bytes(9))
    assert not blob.kept
    with pytest.raises(RuntimeError, match="mine"), BlobWriter(name_of(1), 10) as blob:
        blob.write(bytes(10))
        raise RuntimeError("mine")
    assert not blob.kept
    assert list((folder / "masks").iterdir()) == []


def test_a_disk_that_gets_full_leaves_nothing_and_is_told_once(folder, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            if len(content) > HEADER:
                raise OSError(28, os.strerror(28))
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = blobs.replacing

    class replacing:  # noqa: N801
        def __init__(self, path):
            self.inner = real(path)

        def __enter__(self):
            return Full(self.inner.__enter__())

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(blobs, "replacing", replacing)
    kept = []
    messages = told(lambda: kept.extend(write_blob(name_of(n), bytes(100)) for n in range(3)))
    assert kept == [False] * 3
    assert len(messages) == 1 and os.strerror(28) in messages[0]
    assert list((folder / "masks").iterdir()) == []


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b + b"\0",
        lambda b: b[:-1] + b"\xff",
        lambda b: b[:10],
        lambda b: b"",
        lambda b: b"X" + b[1:],
    ],
)
def test_damage_is_told(mapped, damage, monkeypatch):
    monkeypatch.setattr(blobs, "MAPPED", 0 if mapped else 2**30)
    path = leave(1)
    assert isinstance(read_blob(name_of(1), 1000), np.memmap) == mapped
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged and made anew"):
        assert read_blob(name_of(1), 1000) is None


def test_another_size_than_is_expected_is_damage():
    leave(1)
    with pytest.warns(UserWarning, match="damaged"):
        assert read_blob(name_of(1), 999) is None


def test_what_was_used_longest_ago_goes_first(folder, monkeypatch):
    paths = [leave(number, used=1000 + number) for number in range(4)]
    # A use counts, a look does not.
    assert read_blob(name_of(0), 1000) is not None
    assert len(limit.entries_of(folder)) == 4
    size = 1000 + HEADER
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", str(4 * size))
    leave(4)
    assert [path.exists() for path in paths] == [True, False, True, True]
    # What is written brings as many as it needs.
    leave(5, size=2 * size - HEADER)
    assert [path.exists() for path in paths] == [True, False, False, False]
    assert sum(entry.size for entry in limit.entries_of(folder)) <= 4 * size


def test_what_does_not_fit_is_told_once_and_removes_nothing(monkeypatch):
    path = leave(1)
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "1999")
    kept = []
    messages = told(lambda: kept.extend(write_blob(name_of(2), bytes(2000)) for _ in range(2)))
    assert kept == [False, False] and path.exists()
    assert len(messages) == 1
    assert "2.06 kB are not cached, the limit is 2 kB: give more by" in messages[0]
    assert "PYFLOCALITY_CACHE_LIMIT" in messages[0]


def test_a_limit_of_zero_keeps_nothing_and_says_nothing(monkeypatch):
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "0")
    kept = []
    assert told(lambda: kept.append(write_blob(name_of(1), b"payload"))) == []
    assert kept == [False] and read_blob(name_of(1)) is None


def test_a_limit_that_cannot_be_read_is_told_once(monkeypatch):
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "much")
    messages = told(lambda: [write_blob(name_of(n), b"payload") for n in range(2)])
    assert len(messages) == 1
    assert "PYFLOCALITY_CACHE_LIMIT must be bytes or a string like '2GB'" in messages[0]
    with pytest.raises(ValueError, match="PYFLOCALITY_CACHE_LIMIT"):
        limit.cache_limit_bytes()


def test_the_limit_in_force(monkeypatch):
    assert limit.cache_limit_bytes() == 20 * 2**30
    for text, size in (("", 20 * 2**30), ("512M", 2**29), ("0", 0), ("1.5GB", 3 * 2**29)):
        monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", text)
        assert limit.cache_limit_bytes() == size


@pytest.mark.skipif(os.name == "nt", reason="the system keeps what is open there")
def test_what_is_mapped_stays_until_nobody_maps_it(folder, monkeypatch):
    monkeypatch.setattr(blobs, "MAPPED", 100)
    path = leave(1, used=1000)
    content = read_blob(name_of(1), 1000)
    part = content[500:]
    del content
    other = leave(2, used=2000)
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "2500")
    leave(3)
    # The other one went in its place, though it was used later.
    assert path.exists() and not other.exists()
    messages = told(lambda: write_blob(name_of(4), bytes(2000)))
    assert path.exists()
    assert "and running processes use 1.06 kB of it" in messages[0]
    gone, kept = limit.remove_all(folder)
    assert [entry.files for entry in kept] == [(path,)] and len(part) == 500
    del part
    gone, kept = limit.remove_all(folder)
    assert [entry.files for entry in gone] == [(path,)] and kept == []
    assert not path.exists()


def test_files_of_others_stay(folder, monkeypatch):
    """The folder may be the user's, and names of theirs may look like ours."""
    ours = leave(1)
    theirs = {
        folder / "masks" / f"{2:032x}.bits": b"something of theirs",
        folder / "masks" / "notes.txt": limit.BLOB_MAGIC,
        folder / "Photos" / f"{3:032x}.bits": limit.BLOB_MAGIC + bytes(100),
        folder / "masks" / "deeper" / f"{3:032x}.bits": limit.BLOB_MAGIC + bytes(100),
        folder / f"{4:032x}.json": b'{"theirs": true}',
        folder / f"{4:032x}.npy": b"no array",
        folder / f"{5:032x}.png": b"\x89PNG",
    }
    for path, content in theirs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    link = folder / "masks" / f"{6:032x}.bits"
    link.symlink_to(folder / "masks" / "notes.txt")
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", "1100")
    leave(7)
    assert not ours.exists()
    gone, kept = limit.remove_all(folder)
    assert [entry.files[0].name for entry in gone] == [f"{7:032x}.bits"] and kept == []
    assert {path: path.read_bytes() for path in theirs} == theirs
    assert link.is_symlink()


def zipped(tmp_path: Path, number: int) -> Path:
    """A zip archive of 1,000 images of 8x8, which is decoded into the cache."""
    values = np.random.default_rng(number).integers(0, 256, (1000, 8, 8), np.uint8)
    path = tmp_path / f"images-{number}.zip"
    with zipfile.ZipFile(path, "w") as file:
        for index, image in enumerate(values):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            file.writestr(f"{index:04d}.png", content.getvalue())
    return path


@pytest.mark.skipif(os.name == "nt", reason="the system keeps what is open there")
def test_decoded_sets_count_and_stay_while_they_are_in_use(folder, tmp_path, monkeypatch):
    def load(number):
        return pf.TrainingSet.load(zipped(tmp_path, number), progress=False)

    first = load(1)
    ((files, size),) = [(entry.files, entry.size) for entry in limit.entries_of(folder)]
    assert sorted(path.suffix for path in files) == [".json", ".npy"] and size > 64000
    monkeypatch.setenv("PYFLOCALITY_CACHE_LIMIT", str(size + 1000))
    with pytest.warns(UserWarning, match="64 kB are not cached"):
        second = load(2)
    assert all(path.exists() for path in files)
    # Nothing is amiss with either.
    assert second.images.shape == first.images.shape == (1000, 1, 8, 8)
    assert pf.OptimalDenoiser(first)(first.values(0, 1), 0.1).isfinite().all()
    del first
    third = load(3)
    assert not any(path.exists() for path in files)
    ((files, _),) = [(entry.files, entry.size) for entry in limit.entries_of(folder)]
    # A use of the set is a use of the entry, and leaves its array as it was.
    before = [path.stat().st_mtime_ns for path in files]
    again = load(3)
    after = [path.stat().st_mtime_ns for path in files]
    assert after[0] > before[0] and after[1] == before[1]
    assert (again.images == third.images).all()
    pf.OptimalDenoiser(third)(third.values(0, 1), 0.1)
