"""The cache of decoded images: hits, damage, failures; and how the decoding runs."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import warnings
import zipfile

import numpy as np
import pytest
from cached_sources import ZIP_LABELS, ZIP_ORDER, check_cached_zip, damage_entry
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
