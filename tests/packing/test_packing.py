"""Packed sets: every kind of source, interruptions, full disks and damage."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packing_files import COUNT, png

import pyflocality as pf
from pyflocality import packing
from pyflocality.cli import main
from pyflocality.packing import pack, verify


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path, pixels):
    """Two webdataset shards with classes."""
    root = tmp_path / "shards"
    root.mkdir()
    for number, members in enumerate(np.array_split(np.arange(COUNT), 2)):
        with tarfile.open(root / f"shard-{number:04d}.tar", "w") as archive:
            for index in members:
                add(archive, f"sample{index:04d}.cls", str(index % 4).encode())
                add(archive, f"sample{index:04d}.png", png(pixels[index]))
                add(archive, f"sample{index:04d}.json", b"{}")
    return root


def check(out: Path, pixels: np.ndarray, labels: list[int] | None) -> pf.TrainingSet:
    """The set that was packed holds these images and classes, mapped into memory."""
    data = pf.TrainingSet.load(out, progress=False)
    assert torch.equal(data.images, torch.from_numpy(pixels))
    assert (None if data.labels is None else data.labels.tolist()) == labels
    assert "memory-mapped" in repr(data)
    verify(out, progress=False)
    return data


def test_folder(folder, pixels, tmp_path, few_a_block):
    out = pack(folder, tmp_path / "out", progress=False)
    data = check(out, pixels, [0] * 9 + [1] * (COUNT - 9))
    assert data.label_names == ("cat", "dog")
    assert {path.name for path in out.iterdir()} == {"images.npy", "labels.npy", "manifest.json"}
    before = (out / "images.npy").stat().st_mtime_ns
    pack(folder, out, progress=False)
    assert (out / "images.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_sorted_by_label(kind, request, pixels, tmp_path, few_a_block):
    source = request.getfixturevalue(kind)
    found = [index % 4 for index in range(COUNT)] if kind == "shards" else [0] * 9 + [1] * 14
    order = sorted(range(COUNT), key=lambda index: found[index])
    out = pack(source, tmp_path / "out", sort_by_label=True, progress=False)
    data = check(out, pixels[order], sorted(found))
    storage = data.images.untyped_storage().data_ptr()
    for label in set(found):
        part = data.with_label(label)
        wanted = [index for index in range(COUNT) if found[index] == label]
        assert torch.equal(part.images, torch.from_numpy(pixels[wanted]))
        # A part of the map, not a copy.
        assert part.images.untyped_storage().data_ptr() == storage
        assert "memory-mapped" in repr(part)
    with pytest.raises(FileExistsError, match="of other options"):
        pack(source, out, progress=False)


def test_nothing_to_sort_by(pixels, tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "one.png").write_bytes(png(pixels[0]))
    with pytest.raises(ValueError, match="`sort_by_label` must be left out: flat has no labels"):
        pack(tmp_path / "flat", tmp_path / "out", sort_by_label=True, progress=False)


def test_zip(pixels, tmp_path, few_a_block):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index, image in enumerate(pixels):
            archive.writestr(f"{index:03d}.png", png(image))
    check(pack(path, tmp_path / "out", progress=False), pixels, None)


def test_tar_shards(shards, pixels, tmp_path, few_a_block):
    labels = [index % 4 for index in range(COUNT)]
    check(pack(shards, tmp_path / "out", progress=False), pixels, labels)
    first = shards / "shard-0000.tar"
    check(pack(first, tmp_path / "one", progress=False), pixels[:12], labels[:12])


def test_damaged_shards_are_named(shards, tmp_path):
    second = shards / "shard-0001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2 - 100])
    with pytest.raises(ValueError, match=re.escape(str(second))):
        pack(shards, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (shards / "more.tar.gz").touch()
    with pytest.raises(ValueError, match="compressed tar archives are not read"):
        pack(shards, tmp_path / "out", progress=False)


def test_samples_without_class_are_refused(shards, tmp_path, pixels):
    with tarfile.open(shards / "shard-0001.tar", "a") as archive:
        add(archive, "sample9999.png", png(pixels[0]))
    with pytest.raises(ValueError, match="sample9999 has no .cls file"):
        pack(shards, tmp_path / "out", progress=False)


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_datasets_library(layout, pixels, tmp_path, few_a_block, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the library datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    labels = [index % 2 for index in range(COUNT)]
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    cells = [{"bytes": png(image), "path": None} for image in pixels]
    table = datasets.Dataset.from_dict({"picture": cells, "label": labels}, features)
    path = tmp_path / "set"
    if layout == "saved":
        table.save_to_disk(str(path))
    else:
        path.mkdir()
        table.to_parquet(str(path / "train-00000-of-00001.parquet"))
    out = pack(path, tmp_path / "out", progress=False)
    assert check(out, pixels, labels).label_names == ("a", "b")


def test_datasets_library_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").touch()
    with pytest.raises(ImportError, match=r"set is a dataset .* 'pyflocality\[datasets\]'"):
        pack(tmp_path / "set", tmp_path / "out", progress=False)


def test_an_interrupted_run_goes_on(folder, pixels, tmp_path, few_a_block, monkeypatch):
    out = tmp_path / "out"
    decoded = []
    whole = packing.decode_from

    def interrupted(files, request, shape, first):
        for index, image in enumerate(whole(files, request, shape, first), first):
            if index == 14:
                raise KeyboardInterrupt
            decoded.append(index)
            yield image

    monkeypatch.setattr(packing, "decode_from", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, progress=False)
    with pytest.raises(ValueError, match="not packed to its end"):
        pf.TrainingSet.load(out)
    # A block that was cut short while it was written, and a line that was.
    with open(out / "images.npy", "ab") as file:
        file.write(b"half a block")
    with open(out / "packing.jsonl", "a") as file:
        file.write("12")

    firsts = []

    def counted(files, request, shape, first):
        firsts.append(first)
        return whole(files, request, shape, first)

    monkeypatch.setattr(packing, "decode_from", counted)
    pack(folder, out, progress=False)
    # Three blocks of four were finished.
    assert decoded == list(range(14)) and firsts == [12]
    check(out, pixels, [0] * 9 + [1] * (COUNT - 9))


def test_what_systems_leave_in_a_folder_does_not_fill_it(folder, tmp_path):
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    (out / ".DS_Store").write_bytes(b"finder")
    pack(folder, out, progress=False)
    assert len(pf.TrainingSet.load(out)) == COUNT
    verify(out, progress=False)
    assert (out / ".DS_Store").read_bytes() == b"finder"


def test_a_link_to_nothing_is_no_folder_to_pack_into(folder, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link is no folder, expected the name of one"):
        pack(folder, tmp_path / "link", progress=False)
    assert not (tmp_path / "nowhere").exists()


def test_a_full_disk_loses_nothing(folder, pixels, tmp_path, few_a_block, monkeypatch):
    out = tmp_path / "out"
    flushes = []
    whole = packing._flush

    def full(file):
        flushes.append(file.name)
        if len(flushes) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(file)

    monkeypatch.setattr(packing, "_flush", full)
    with pytest.raises(OSError, match=f"No space left .*{re.escape(str(out))}"):
        pack(folder, out, progress=False)
    finished = (out / "packing.jsonl").read_text().count("\n") - 1
    assert finished >= 1
    monkeypatch.setattr(packing, "_flush", whole)
    pack(folder, out, progress=False)
    check(out, pixels, [0] * 9 + [1] * (COUNT - 9))

    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the disk is too full"):
        pack(folder, tmp_path / "other", progress=False)


@pytest.mark.parametrize("written", ["", '{"key": 12'])
def test_a_disk_that_is_full_from_the_start(folder, pixels, tmp_path, monkeypatch, written):
    """Nothing is finished but an empty journal, or the beginning of one: it is begun anew."""
    out = tmp_path / "out"

    def full(file):
        file.seek(0)
        file.truncate()
        file.write(written.encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_flush", full)
        with pytest.raises(OSError, match="No space left"):
            pack(folder, out, progress=False)
    assert [path.name for path in out.iterdir()] == ["packing.jsonl"]
    check(pack(folder, out, progress=False), pixels, [0] * 9 + [1] * (COUNT - 9))


def test_one_process_packs_into_a_folder(folder, pixels, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another process is writing into it"):
        pack(folder, out, progress=False)
    assert not any(out.iterdir())
    os.close(other)
    check(pack(folder, out, progress=False), pixels, [0] * 9 + [1] * (COUNT - 9))


def test_a_run_that_ends_where_colour_was_found_goes_on(folder, pixels, tmp_path, monkeypatch):
    path = folder / "cat" / "000.png"
    path.write_bytes(png(pixels[0][:1]))
    whole = packing.decode_job

    def interrupted(files, request, *, colour):
        if colour:
            raise KeyboardInterrupt
        return whole(files, request, colour=colour)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "decode_job", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, tmp_path / "out", progress=False)
    expected = pixels.copy()
    expected[0] = expected[0, :1]
    check(pack(folder, tmp_path / "out", progress=False), expected, [0] * 9 + [1] * (COUNT - 9))


@pytest.mark.parametrize("text", ["cat\n", "9" * 30])
def test_classes_that_are_no_numbers_are_named(text, pixels, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        add(archive, "first.png", png(pixels[0]))
        add(archive, "first.cls", text.encode())
    with pytest.raises(ValueError, match=r"first\.cls holds .*, expected the number of a class"):
        pack(tmp_path / "shard.tar", tmp_path / "out", progress=False)


def test_colour_found_late(folder, pixels, tmp_path, few_a_block):
    for index in range(6):
        (folder / "cat" / f"{index:03d}.png").write_bytes(png(pixels[index][:1]))
    expected = pixels.copy()
    expected[:6] = expected[:6, :1]
    check(pack(folder, tmp_path / "out", progress=False), expected, [0] * 9 + [1] * 14)


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["pack", str(folder), str(out), "--resolution", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["shape"] == [COUNT, 3, 4, 4] and record["label_names"] == ["cat", "dog"]
    assert len(pf.TrainingSet.load(out)) == COUNT
    assert main(["pack", str(folder), str(tmp_path / "sorted"), "--sort-by-label"]) == 0
    assert main(["pack", str(folder), str(out), "--resolution", "4", "--sort-by-label"]) == 2
    assert "of other options" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "nowhere"), str(out)]) == 2
    assert "`SOURCE` must be the path" in capsys.readouterr().err


def test_a_run_killed_when_all_was_done_leaves_nothing(folder, tmp_path, monkeypatch):
    out = pack(folder, tmp_path / "out", progress=False)
    (out / "packing.jsonl").write_text("of a run that is over\n")
    pack(folder, out, progress=False)
    assert sorted(os.listdir(out)) == ["images.npy", "labels.npy", "manifest.json"]


def test_images_of_0_and_1_are_refused(tmp_path):
    """Masks for example, which would all be black."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(png(np.eye(8, dtype=np.uint8)[None]))
    with pytest.raises(ValueError, match="masks: `images` are uint8 with values of 0 and 1 alone"):
        pack(tmp_path / "masks", tmp_path / "out", progress=False)


def test_a_source_that_is_refused_leaves_no_folder(folder, tmp_path):
    (folder / "cat" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="000.png"):
        pack(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="000.png"):
        pack(folder, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine").is_dir()
