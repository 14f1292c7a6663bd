"""Packed sets that are damaged, changed or of somebody else."""

from __future__ import annotations

import os
import re
import zlib

import numpy as np
import pytest
from packing_files import COUNT
from sealed_json import sealed

import pyflocality as pf
from pyflocality import packing
from pyflocality.packing import pack, verify
from pyflocality.sources import packed


def test_a_damaged_journal_is_named(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "packing.jsonl").write_text("scratched\n")
    with pytest.raises(ValueError, match=re.escape(f"{out / 'packing.jsonl'}: damaged")):
        pack(folder, out, progress=False)


def test_a_journal_of_fewer_images_is_found(folder, tmp_path, monkeypatch):
    """One digit in its first line, and the set was packed short of some images."""
    out = tmp_path / "out"
    monkeypatch.setattr(packing, "_decode", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        pack(folder, out, progress=False)
    monkeypatch.undo()
    journal = out / "packing.jsonl"
    text = journal.read_text()
    assert f'"shape": [{COUNT}' in text
    for damaged in (
        text.replace(f'"shape": [{COUNT}', f'"shape": [{COUNT - 1}'),
        text.replace('"shape": [', '"shape": [['),
        text.replace('"key": ', '"kez": '),
        "[" * 100_000 + "\n",
        "[]\n",
    ):
        journal.write_text(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{journal}: damaged")):
            pack(folder, out, progress=False)
    journal.write_text(text)
    pack(folder, out, progress=False)
    assert len(pf.TrainingSet.load(out)) == COUNT


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "manifest.json"])
def test_damage_is_found(name, folder, tmp_path, few_a_block):
    out = pack(folder, tmp_path / "out", progress=False)
    content = bytearray((out / name).read_bytes())
    content[-20] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(out / name))):
        pf.TrainingSet.load(out)
    if name == "images.npy":
        with pytest.raises(ValueError, match="images 20 to 22 do not match"):
            pack(folder, out, progress=False)
        (out / name).write_bytes(content[:-1])
        with pytest.raises(ValueError, match="damaged: has"):
            pf.TrainingSet.load(out)


@pytest.mark.parametrize("change", [(b"(23,", b"(21,"), (b"|u1", b"|i1"), (b"}", b"{")])
def test_an_array_with_another_header_is_not_gone_on_with(
    change, folder, tmp_path, few_a_block, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(packing, "replacing", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        pack(folder, out, progress=False)
    monkeypatch.undo()
    content = (out / "images.npy").read_bytes()
    assert change[0] in content
    (out / "images.npy").write_bytes(content.replace(*change, 1))
    with pytest.raises(ValueError, match=re.escape(f"{out / 'images.npy'}: damaged: its header")):
        pack(folder, out, progress=False)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shape": [21, 3, 5, 7]}, r"images\.npy: damaged: has uint8 \[23, .*expected uint8 \[21,"),
        ({"shape": [23, 3, 8]}, r"manifest\.json: not a manifest: 'shape' must be 4 positive"),
        ({"shape": [23, 3, 8, True]}, r"'shape' must be 4 positive whole numbers"),
        ({"label_names": {"0": "cat"}}, r"'label_names' must be strings or null, got dict"),
        ({"bytes": "many"}, r"'bytes' must be a whole number, not negative, got 'many'"),
        ({"checksum": 1e400}, r"'checksum' must be a whole number"),
        ({"blocks_crc32": [[[]]]}, r"'blocks_crc32' must be whole numbers"),
        ({"version": [1]}, r"has version \[1\] of the format"),
    ],
)
def test_a_manifest_of_wrong_kinds_is_named(change, said, folder, tmp_path):
    """Its checksum is right: it was not damaged, but written by somebody else."""
    out = pack(folder, tmp_path / "out", progress=False)
    manifest = packed.read_manifest(out)
    (out / "manifest.json").write_text(sealed(manifest | change))
    with pytest.raises(ValueError, match=re.escape(str(out)) + r".*" + said):
        pf.TrainingSet.load(out)
    text = sealed(manifest)
    for damaged in ("[" * 100_000, "[1, 2]", "{}", text[:-30], text.replace("cat", "cow")):
        damaged = damaged if "pyflocality" in damaged else damaged + " pyflocality-packed-set"
        (out / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{out / 'manifest.json'}: damaged, or")):
            packed.read_manifest(out)


@pytest.mark.parametrize("labels", [np.zeros(22, np.int64), np.zeros(23, np.int32)])
def test_labels_that_do_not_fit_are_named(labels, folder, tmp_path):
    out = pack(folder, tmp_path / "out", progress=False)
    manifest = packed.read_manifest(out)
    np.save(out / "labels.npy", labels)
    crc = zlib.crc32((out / "labels.npy").read_bytes())
    (out / "manifest.json").write_text(sealed(manifest | {"labels_crc32": crc}))
    with pytest.raises(ValueError, match=r"labels\.npy: damaged: has int.*expected int64 \[23\]"):
        pf.TrainingSet.load(out)


def test_finished_blocks_that_changed_are_found(folder, tmp_path, few_a_block, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(packing, "replacing", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        pack(folder, out, progress=False)
    monkeypatch.undo()
    content = bytearray((out / "images.npy").read_bytes())
    content[128] ^= 1
    (out / "images.npy").write_bytes(content)
    with pytest.raises(ValueError, match="images 0 to 3 do not match"):
        pack(folder, out, progress=False)


def test_other_contents_are_left_alone(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        pack(folder, out, progress=False)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]
    done = pack(folder, tmp_path / "done", progress=False)
    with pytest.raises(FileExistsError, match="of another source or of other options"):
        pack(folder, done, resolution=4, progress=False)


def test_links_are_replaced_and_nothing_is_written_through_them(
    folder, pixels, tmp_path, few_a_block, monkeypatch
):
    whole = pack(folder, tmp_path / "whole", progress=False)
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    out = tmp_path / "out"

    def begin():
        """A set of which two blocks are finished."""
        flushed = packing._flush
        count = 0

        def stop(file):
            nonlocal count
            flushed(file)
            count += 1
            if count == 6:
                raise KeyboardInterrupt

        monkeypatch.setattr(packing, "_flush", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, out, progress=False)
        monkeypatch.setattr(packing, "_flush", flushed)
        assert sorted(os.listdir(out)) == ["images.npy", "packing.jsonl"]

    for name in ("images.npy", "packing.jsonl", "labels.npy"):
        for link in (os.symlink, os.link):
            begin()
            precious = tmp_path / "precious"
            if (out / name).exists():
                (out / name).rename(precious)
            else:
                precious.write_bytes(b"precious")
            before = precious.read_bytes()
            link(precious, out / name)
            assert pack(folder, out, progress=False) == out
            assert precious.read_bytes() == before, (name, link)
            assert {path.name: path.read_bytes() for path in out.iterdir()} == contents
            assert not any(path.is_symlink() for path in out.iterdir())
            for path in (*out.iterdir(), precious):
                path.unlink()


def test_a_pipe_in_place_of_the_images_is_replaced(folder, tmp_path, monkeypatch):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    out = tmp_path / "out"
    out.mkdir()
    (out / "packing.jsonl").touch()
    os.mkfifo(out / "images.npy")
    pack(folder, out, progress=False)
    verify(out, progress=False)
