"""Damaged, cut and hostile files: an error that names the file, or exactly the images."""

from __future__ import annotations

import gzip
import os
import re
import signal
import socket
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_files import GREY, assert_images, encoded, load, write_tree
from test_archive_names import FAT, member, write_zip
from test_tar_shards import info, write_tar

from pyflocality.packing import pack, verify
from pyflocality.sources import folder, tar_shards
from pyflocality.sources.base import Request

PNG = [encoded(image) for image in GREY]
NAMES = ["cat/0.png", "cat/1.png", "dog/2.png"]


def content(path, module, labels=True):
    """Files and classes of an archive, read to the last byte."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with module.open_files(path, Request()) as found:
            read = [_read(found, name) for name in found.names]
            return read, found.labels.tolist() if labels else None, found.label_names


def _read(files, name):
    try:
        return files.read(name)
    except ValueError as error:
        # As the decoder does.
        raise ValueError(f"{files.path(name)}: {error}") from error


def flips(whole: bytes, positions, bits) -> Iterator[bytes]:
    for position in positions:
        for bit in bits(position):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            yield bytes(damaged)


def check_damage(path, module, damaged, needed) -> None:
    """Every version has the content of the whole file or raises; `needed` of them must raise."""
    expected, refused = content(path, module), 0
    for version in damaged:
        path.write_bytes(version)
        try:
            found = content(path, module)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert found == expected
    assert refused >= needed


ZIPS = {
    "plain": lambda path: write_zip(path, zip(NAMES, PNG, strict=False)),
    "windows": lambda path: write_zip(
        path, [(member(n.replace("/", "\\"), FAT), p) for n, p in zip(NAMES, PNG, strict=False)]
    ),
    "more": lambda path: write_zip(
        path, [("cat/", b""), *zip(NAMES, PNG, strict=False), ("notes", b"text")]
    ),
}


def zip_headers(path):
    """Positions of all bytes that are not content."""
    with zipfile.ZipFile(path) as archive:
        positions = set(range(archive.start_dir, path.stat().st_size))
        for entry in archive.infolist():
            start = entry.header_offset
            positions |= set(range(start, start + 30 + len(entry.orig_filename)))
    return sorted(positions)


def test_a_flipped_bit_of_a_zip(tmp_path):
    """Entries had been lost: 16 images of 200 were a set."""
    path = ZIPS["more"](tmp_path / "set.zip")
    whole, positions = path.read_bytes(), zip_headers(path)
    damaged = flips(whole, positions, lambda position: [position % 8])
    check_damage(path, folder, damaged, len(positions) // 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ZIPS)
def test_every_flipped_bit_of_a_zip(tmp_path, kind):
    path = ZIPS[kind](tmp_path / "set.zip")
    whole, positions = path.read_bytes(), zip_headers(path)
    check_damage(path, folder, flips(whole, positions, lambda _: range(8)), 5 * len(positions))


def test_a_flipped_bit_of_an_npz(tmp_path):
    """Labels had been lost with the name of their member."""
    path = tmp_path / "set.npz"
    np.savez(path, images=GREY, labels=np.arange(6))
    whole, positions, refused = path.read_bytes(), zip_headers(path), 0
    for damaged in flips(whole, positions, lambda position: [position % 8]):
        path.write_bytes(damaged)
        try:
            data = load(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert_images(data, GREY[:, None])
            assert data.labels.tolist() == list(range(6))
    assert refused > len(positions) // 2


def test_every_cut_of_a_zip(tmp_path):
    path = ZIPS["plain"](tmp_path / "set.zip")
    whole = path.read_bytes()
    check_damage(path, folder, (whole[:end] for end in range(len(whole))), len(whole))


def tar_with_classes(path):
    members = []
    for number, name in enumerate(NAMES):
        members += [(name, PNG[number]), (name.replace("png", "cls"), b"%d" % number)]
    return write_tar(path, [*members, (info("dog/3.png", tarfile.LNKTYPE, NAMES[0]), b"")][:-1])


def tar_headers(path):
    """Positions of all bytes of headers, and some of the end."""
    with tarfile.open(path) as archive:
        starts = [entry.offset for entry in archive]
        end = archive.offset
    return [at + step for at in starts for step in range(512)] + [*range(end, end + 1024, 31)]


def test_a_flipped_bit_of_a_tar(tmp_path):
    """28 of 60 flips made a shorter set of it."""
    path = tar_with_classes(tmp_path / "set.tar")
    whole, positions = path.read_bytes(), tar_headers(path)
    damaged = flips(whole, positions[::2], lambda position: [position % 8])
    check_damage(path, tar_shards, damaged, len(positions) // 2 - 20)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_flipped_bit_of_a_long_name(tmp_path, form):
    """It has no checksum, but the header after it has the same beginning."""
    names = [f"{folder}/{'n' * 110}.png" for folder in ("cat", "dog")]
    path = write_tar(tmp_path / "set.tar", zip(names, PNG, strict=False), format=form)
    whole = path.read_bytes()
    start = whole.index(b"n" * 101)
    first = whole.rindex(b"\0", 0, start) + 1
    positions = range(first, start + 90)
    damaged = flips(whole, positions, lambda position: [position % 7])
    check_damage(path, tar_shards, damaged, len(positions) - 3)


@pytest.mark.slow
def test_every_flipped_bit_of_a_tar(tmp_path):
    path = tar_with_classes(tmp_path / "set.tar")
    whole, positions = path.read_bytes(), tar_headers(path)
    check_damage(path, tar_shards, flips(whole, positions, lambda _: range(8)), 7 * len(positions))


def test_every_cut_of_a_tar(tmp_path):
    """Cut between two members it had been a whole archive."""
    path = tar_with_classes(tmp_path / "set.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = max(entry.offset_data for entry in archive) + 512
    cuts = [*range(0, end + 1024, 64), *range(1, end, 61)]
    check_damage(path, tar_shards, (whole[:cut] for cut in cuts), len(cuts))
    check_damage_is_none = [whole[:cut] for cut in range(end + 1024, len(whole), 512)]
    path.write_bytes(whole)
    check_damage(path, tar_shards, check_damage_is_none, 0)


def test_damage_ends_pack_and_the_command_alike(tmp_path, capsys):
    from pyflocality.cli import main

    path = tar_with_classes(tmp_path / "set.tar")
    path.write_bytes(path.read_bytes()[: 2 * 1024])
    with pytest.raises(ValueError, match=r"set\.tar: not a readable tar archive: .*it was cut"):
        pack(path, tmp_path / "out", progress=False)
    assert main(["pack", str(path), str(tmp_path / "out")]) == 2
    assert "it was cut" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Zips that say one thing twice, or hide something


def test_joined_and_prefixed_zips(tmp_path):
    first = write_zip(tmp_path / "a.zip", [("a.png", PNG[0])]).read_bytes()
    second = write_zip(tmp_path / "b.zip", [("b.png", PNG[1])]).read_bytes()
    path = tmp_path / "set.zip"
    path.write_bytes(first + second)
    with pytest.raises(ValueError, match=r"set\.zip: .*holds another archive in front"):
        load(path)
    # A program that unpacks itself.
    path.write_bytes(b"MZ program PK\x03\x04" + bytes(5000) + second)
    assert_images(load(path), GREY[1:2, None])
    # From a pipe, in whole blocks.
    path.write_bytes(second + bytes(10240 - len(second) % 10240))
    assert_images(load(path), GREY[1:2, None])
    path.write_bytes(second + b"\n")
    with pytest.raises(ValueError, match=r"set\.zip: .*damaged: 1 bytes more or less"):
        load(path)


@pytest.mark.parametrize("method", [0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_method(tmp_path, method):
    path, large = tmp_path / "set.zip", encoded(np.tile(GREY[1], (1, 1)).repeat(64, 0), "BMP")
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", PNG[0])
        archive.writestr("b.bmp", large)
    assert content(path, folder, labels=False)[0] == [PNG[0], large]
    whole = bytearray(path.read_bytes())
    whole[60] ^= 255
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"set\.zip: a\.png: damaged: "):
        content(path, folder, labels=False)


def test_members_in_one_place_are_refused(tmp_path):
    """The small archives that expand without end."""
    path = write_zip(tmp_path / "set.zip", [("a.png", PNG[0]), ("b.png", PNG[1])])
    with zipfile.ZipFile(path) as archive:
        second = archive.infolist()[1].header_offset
    whole = path.read_bytes()
    path.write_bytes(whole.replace(struct.pack("<L", second) + b"b.png", bytes(4) + b"b.png"))
    with pytest.raises(ValueError, match=r"set\.zip: .*two of its members lie in the same place"):
        load(path)


def test_encrypted_and_unknown_members_are_named(tmp_path):
    path = write_zip(tmp_path / "set.zip", [("a.png", PNG[0])])
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")
    for at, value, message in (
        (entry + 8, 1, r"'a\.png' is encrypted"),
        (entry + 10, 99, r"'a\.png' is compressed by method 99, expected stored, deflate"),
    ):
        damaged = bytearray(whole)
        damaged[at] = value
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"set\.zip: .*{message}"):
            load(path)


@pytest.mark.parametrize("size", [1, 2**40])
def test_a_zip_of_other_sizes_than_it_says(tmp_path, size):
    path = write_zip(tmp_path / "set.zip", [("a.png", PNG[0])])
    whole = path.read_bytes()
    for at in (whole.index(b"PK\x03\x04") + 22, whole.index(b"PK\x01\x02") + 24):
        whole = whole[:at] + struct.pack("<L", size % 2**32 or 2**31) + whole[at + 4 :]
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"set\.zip: a\.png: cannot be decoded"):
        load(path)


# What expands to far more than it should


def refused_in_little_memory(path, message):
    """Not more than a few MiB are taken until it is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


BOMB = 80 * 2**20


@pytest.mark.parametrize("head", [b"", PNG[0], PNG[0][:40]])
def test_a_zip_bomb_is_refused(tmp_path, head):
    """A file of 1 MB had taken 2 GB."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.png", "w") as file:
            file.write(head)
            for _ in range(BOMB // 2**20):
                file.write(bytes(2**20))
    refused_in_little_memory(path, r"set\.zip: a\.png: .*expands from \d+ to 838\d+ bytes")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_says_less_than_it_expands_to(tmp_path, method):
    path, piece = tmp_path / "set.zip", b"\x4d" * 2**20
    with zipfile.ZipFile(path, "w", method) as archive:
        with archive.open("a.png", "w") as file:
            for _ in range(BOMB // 2**20 if method != zipfile.ZIP_LZMA else 20):
                file.write(piece)
    whole = path.read_bytes()
    for at in (whole.index(b"PK\x03\x04") + 22, whole.index(b"PK\x01\x02") + 24):
        whole = whole[:at] + struct.pack("<L", 100) + whole[at + 4 :]
    path.write_bytes(whole)
    refused_in_little_memory(path, r"set\.zip: a\.png: .*has more, its entry says 100")


def test_a_dataset_json_bomb_is_refused(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", PNG[0])
        with archive.open("dataset.json", "w") as file:
            for _ in range(BOMB // 2**20):
                file.write(b"[" * 2**20)
    refused_in_little_memory(path, r"dataset\.json: .*bytes, expected \d+ at the most")


def test_a_plain_picture_may_compress_well(tmp_path):
    picture = Image.new("RGB", (4000, 3000), (7, 8, 9))
    path = write_tree(tmp_path / "set", {"a.bmp": encoded(picture, "BMP")}, "zip")
    assert path.stat().st_size < 2**18
    assert load(path, resolution=4).images.flatten(2)[0].unique(dim=1).tolist() == [[7], [8], [9]]


def test_a_gzipped_idx_file_expands_to_what_its_header_says(tmp_path):
    header = b"\0\0\x08\x03" + struct.pack(">3L", 6, 5, 4)
    path = tmp_path / "a-images-idx3-ubyte.gz"
    with gzip.open(path, "wb") as file:
        file.write(header + GREY.tobytes())
        for _ in range(BOMB // 2**20):
            file.write(bytes(2**20))
    refused_in_little_memory(path, r"idx3-ubyte\.gz: .*136 bytes in all, but it has 137 at l")
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3L", 2**20, 32, 32)))
    refused_in_little_memory(path, r"idx3-ubyte\.gz: .*\d+ bytes cannot expand to it")
    path.write_bytes(gzip.compress(header + GREY.tobytes())[:-8] + bytes(8))
    refused_in_little_memory(path, r"idx3-ubyte\.gz: cannot be read: CRC")


# Pipes, sockets and devices


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends a test that waits for somebody to write into a pipe."""

    def stop(*_: object) -> None:
        raise TimeoutError("it was opened")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


IDX = b"\0\0\x08\x03" + struct.pack(">3L", 6, 5, 4) + GREY.tobytes()


@pytest.mark.parametrize(
    ("source", "name", "others"),
    [
        ("", "a.png", {"b.png": PNG[0]}),
        ("", "cat/a.jpg", {"cat/b.png": PNG[0]}),
        ("", "dataset.json", {"b.png": PNG[0]}),
        ("a.zip", "a.zip", {}),
        ("a.npy", "a.npy", {}),
        ("a.npz", "a.npz", {}),
        ("a.tar", "a.tar", {}),
        ("a-images-idx3-ubyte", "a-images-idx3-ubyte", {}),
        ("a-images-idx3-ubyte.gz", "a-images-idx3-ubyte.gz", {}),
        ("a-images-idx3-ubyte", "a-labels-idx1-ubyte", {"a-images-idx3-ubyte": IDX}),
        ("", "train-images-idx3-ubyte", {}),
        ("", "a.tar", {"b.txt": b""}),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_refused_unopened(
    tmp_path, in_time, monkeypatch, source, name, others, kind
):
    write_tree(tmp_path / "set", others, "folder")
    special = tmp_path / "set" / name
    special.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(special)
    elif kind == "device":
        special.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(special.parent)
        socket.socket(socket.AF_UNIX).bind(special.name)
    path = tmp_path / "set" / source
    shown = {"pipe": r"a pipe \(FIFO\)", "socket": "a socket", "device": "a device"}[kind]
    message = rf"{re.escape(str(special))}: is {shown}, expected a file"
    readers = [load, lambda path: pack(path, tmp_path / "out", progress=False)]
    for read in readers[".tar" in name : 1 if "idx" in name or ".np" in name else 2]:
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "manifest.json"])
def test_a_pipe_in_a_packed_set(tmp_path, in_time, name):
    source = write_tree(tmp_path / "set", {"cat/a.png": PNG[0]}, "folder")
    out = pack(source, tmp_path / "out", progress=False)
    (out / name).unlink()
    os.mkfifo(out / name)
    for read in (load, verify):
        if read is verify and name == "labels.npy":
            continue
        with pytest.raises(ValueError, match=r"expected a file|holds no images|not packed to its"):
            read(out)


def test_devices_by_name(in_time):
    for path in (Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=rf"{path}: is a device, expected a file"):
            load(path)
