"""Tar archives: what they can hold is taken right or refused, and told where it is not taken."""

from __future__ import annotations

import io
import os
import re
import resource
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
from source_files import GREY, assert_images, encoded, load

from pyflocality.packing import pack
from pyflocality.sources.base import Request
from pyflocality.sources.tar_shards import open_files

PNG = [encoded(image) for image in GREY]


def info(name, kind=tarfile.REGTYPE, link=""):
    """A member of a type of its own."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def write_tar(path, members, **options):
    """A tar of (TarInfo or name, content)."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for entry, content in members:
            member = info(entry) if isinstance(entry, str) else entry
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def packed(path, **arguments):
    """The set of a source by way of `pack`."""
    out = path.parent / f"packed of {path.name}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(pack(path, out, progress=False, **arguments))


def refused(path, message, **arguments):
    out = path.parent / "refused"
    with pytest.raises(ValueError, match=message):
        pack(path, out, progress=False, **arguments)
    assert not out.exists()


SAMPLES = [("1.cls", b"3"), ("1.png", PNG[0]), ("2.png", PNG[1]), ("2.cls", b" 4\n")]


def test_hard_links_and_symbolic_links(tmp_path):
    """GNU tar stores a file with two names once; links had been passed over in silence."""
    members = [
        *SAMPLES,
        (info("a/3.png", tarfile.LNKTYPE, "./1.png"), b""),
        (info("a/3.cls", tarfile.LNKTYPE, "/2.cls"), b""),
        (info("a/4.png", tarfile.SYMTYPE, "../2.png"), b""),
        (info("a/4.cls", tarfile.SYMTYPE, "3.cls"), b""),
    ]
    data = packed(write_tar(tmp_path / "set.tar", members))
    assert_images(data, GREY[[0, 1, 0, 1], None])
    assert data.labels.tolist() == [3, 4, 4, 4]


@pytest.mark.parametrize(
    ("name", "kind", "target", "message"),
    [
        ("3.png", tarfile.LNKTYPE, "9.png", "'3.png' is a link to '9.png', which is no file"),
        ("3.png", tarfile.SYMTYPE, "/1.png", "'3.png' is a link to something outside"),
        ("3.png", tarfile.SYMTYPE, "../1.png", "'3.png' is a link to something outside"),
        ("3.png", tarfile.SYMTYPE, "3.png", "'3.png' is a link to '3.png', which is no file"),
        ("1.cls", tarfile.SYMTYPE, "9.cls", "'1.cls' is a link to '9.cls', which is no file"),
        ("b", tarfile.SYMTYPE, "a", "'b' is a link to the folder 'a'"),
        ("3.png", tarfile.FIFOTYPE, "", "'3.png' is a device or a pipe"),
        ("3.png", tarfile.CHRTYPE, "", "'3.png' is a device or a pipe"),
        ("3.png", tarfile.GNUTYPE_SPARSE, "", r"'3.png' is a file stored with holes \(sparse\)"),
        ("3.png", b"M", "", "'3.png' is a member of type b'M'"),
    ],
)
def test_members_that_cannot_be_taken(tmp_path, name, kind, target, message):
    members = [("a/1.png", PNG[0]), (info(name, kind, target), b"")]
    refused(write_tar(tmp_path / "set.tar", members), rf"set\.tar: {message}")


def test_a_sample_of_several_images_is_refused(tmp_path):
    """The masks beside pictures had become pictures of the set."""
    for members in ([*SAMPLES, ("1.seg.png", PNG[2])], [("1.png", PNG[0]), ("1.jpg", PNG[1])]):
        path = write_tar(tmp_path / "set.tar", members)
        refused(path, r"set\.tar: one sample has several images, 'set\.tar/1\.png' and 'set")


def test_numbers_with_dots_are_of_the_name(tmp_path):
    members = [("cat.0.png", PNG[0]), ("cat.1.png", PNG[1]), ("2021.01.02.png", PNG[2])]
    assert_images(packed(write_tar(tmp_path / "set.tar", members)), GREY[:3, None])
    classes = [("cat.0.cls", b"5"), ("cat.1.x.cls", b"6"), ("2021.01.02.cls", b"7")]
    data = packed(write_tar(tmp_path / "labelled.tar", members + classes))
    assert data.labels.tolist() == [5, 6, 7]


def test_what_a_mac_adds_is_not_of_the_samples(tmp_path):
    """Resource forks of `.cls` files were taken for two classes of one sample."""
    forks = [(f"._{name}", b"\0\5\x16\7") for name, _ in SAMPLES]
    path = write_tar(tmp_path / "set.tar", [*forks, *SAMPLES, (".DS_Store", b"")])
    assert packed(path).labels.tolist() == [3, 4]


def test_a_compressed_archive_beside_images_is_left_out(tmp_path):
    """It is what they were unpacked from, as a rule."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.tar.gz").write_bytes(b"")
    refused(folder, "holds no images.*compressed tar archives are not read: decompress them")
    (folder / "a.png").write_bytes(PNG[0])
    told = r"set: 1 left out: 1 without the suffix of an image \('set\.tar\.gz'\)"
    with pytest.warns(UserWarning, match=told):
        assert_images(load(pack(folder, tmp_path / "out", progress=False)), GREY[:1, None])
    write_tar(folder / "set.tar", SAMPLES)
    refused(folder, r"set\.tar\.gz: compressed tar archives are not read: decompress them")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("1.cls", b"3"), "holds '1.cls' twice"),
        (("./1.cls", b"3"), r"holds '1.cls' twice, once as '\./1\.cls'"),
        (("1.png", PNG[3]), "holds '1.png' twice"),
        (("1.x.cls", b"3"), "sample 'set.tar/1' has two .cls files"),
    ],
)
def test_repeated_members_are_refused(tmp_path, extra, message):
    refused(write_tar(tmp_path / "set.tar", [*SAMPLES, extra]), rf"set\.tar: {message}")


@pytest.mark.parametrize("text", [b"", b"cat", b"1.0", b"1_0", b"9" * 19, b"1 2", b"7" * 2**20])
def test_a_class_that_is_no_number_is_named(tmp_path, text):
    path = write_tar(tmp_path / "set.tar", [("1.png", PNG[0]), ("1.cls", text)])
    refused(path, r"set\.tar/1\.cls holds b?.*, expected the number of a class")


def test_what_belongs_to_no_image_is_told(tmp_path):
    members = [
        *SAMPLES,
        ("1.json", b"{}"),
        (".hidden.png", PNG[2]),
        ("__MACOSX/._1.png", PNG[3]),
        ("3.npy", b"array"),
        ("3.cls", b"3"),
        (info("pipe", tarfile.FIFOTYPE), b""),
        (info("folder.png", tarfile.DIRTYPE), b""),
    ]
    path = write_tar(tmp_path / "set.tar", members)
    told = r"set\.tar: 4 left out: 1 hidden \('set\.tar/\.hidden\.png'\); 3 belonging to no image"
    with pytest.warns(UserWarning, match=told) as caught:
        out = pack(path, tmp_path / "out", progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    data = load(out)
    assert_images(data, GREY[:2, None])
    assert data.labels.tolist() == [3, 4]


def test_splits_and_classes_are_those_of_a_zip(tmp_path):
    names = ["set/train/cat/1.png", "set/train/dog/1.png", "set/test/dog/2.png"]
    path = write_tar(tmp_path / "set.tar", zip(names, PNG, strict=False))
    data = packed(path)
    assert_images(data, GREY[:2, None])
    assert data.label_names == ("cat", "dog")
    assert_images(load(pack(path, tmp_path / "b", split="test", progress=False)), GREY[2:3, None])
    description = ("d/dataset.json", b'{"labels": [["1.png", 7], ["2.png", 5]]}')
    path = write_tar(tmp_path / "b.tar", [("d/2.png", PNG[0]), ("d/1.png", PNG[1]), description])
    data = packed(path)
    assert_images(data, GREY[:2, None])
    assert data.labels.tolist() == [5, 7]


def test_shards_of_two_splits_are_not_pooled(tmp_path):
    folder = tmp_path / "set"
    for number, name in enumerate(["a-train-0.tar", "a-train-1.tar", "a-val-0.tar"]):
        write_tar(folder / name, [("1.png", PNG[number])])
    assert_images(packed(folder), GREY[:2, None])
    out = pack(folder, tmp_path / "b", split="val", progress=False)
    assert_images(load(out), GREY[2:3, None])
    refused(folder, "`split` must be one of 'train', 'val'", split="test")
    write_tar(folder / "b.tar", [("1.png", PNG[3])])
    refused(folder, r"cannot tell which split 'b\.tar' belongs to")


def test_what_lies_beside_shards(tmp_path):
    folder = tmp_path / "set"
    write_tar(folder / "0.tar", SAMPLES)
    for name in ("0.json", "0.parquet", ".0.tar"):
        (folder / name).write_bytes(b"{}")
    (folder / "more").mkdir()
    (folder / ".DS_Store").write_bytes(b"")
    told = r"set: 4 left out: 4 beside the tar archives \(first '\.0\.tar'\)"
    with pytest.warns(UserWarning, match=told):
        data = load(pack(folder, tmp_path / "out", progress=False))
    assert data.labels.tolist() == [3, 4]
    for name in ("a.png", "b.parquet"):
        (folder / name).write_bytes(PNG[0])
        refused(folder, f"set: holds tar archives and other images, in '{name}'")
        (folder / name).unlink()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, form):
    """Longer than a header holds; names and links have headers of their own then."""
    long = "n" * 90 + "/" + "é" * 120
    members = [
        (f"a/{long}.png", PNG[0]),
        (info(f"b/{long}.png", tarfile.LNKTYPE, f"a/{long}.png"), b""),
        (info("c/1.png", tarfile.SYMTYPE, f"../b/{long}.png"), b""),
    ]
    data = packed(write_tar(tmp_path / "set.tar", members, format=form))
    assert_images(data, GREY[[0, 0, 0], None])
    assert data.label_names == ("a", "b", "c")


def test_an_incremental_archive_of_gnu_tar(tmp_path):
    """It notes times where other formats have the beginning of a long name."""
    members = [("cat/1.png", PNG[0]), ("dog/1.png", PNG[1]), (info("cat/", b"D"), b"Y1.png\0\0")]
    path = write_tar(tmp_path / "set.tar", members, format=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    for at in range(0, 6 * 512, 1024):
        content[at + 345 : at + 368] = b"14700000000\x0014700000000"
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 155] = b"%06o\0" % sum(content[at : at + 512])
    path.write_bytes(content)
    data = packed(path)
    assert_images(data, GREY[:2, None])
    assert data.label_names == ("cat", "dog")


def test_a_sparse_file_of_gnu_tar(tmp_path):
    if subprocess.run(["tar", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs tar")
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(2**20)
        file.write(PNG[0])
    for form in ("--posix", "--format=gnu"):
        subprocess.run(["tar", form, "-S", "-cf", "set.tar", "a.png"], cwd=tmp_path, check=True)
        if (tmp_path / "set.tar").stat().st_size < 2**20:
            refused(tmp_path / "set.tar", r"'a\.png' is a file stored with holes")


# Ends


def test_joined_archives_are_refused(tmp_path):
    first = write_tar(tmp_path / "a.tar", SAMPLES).read_bytes()
    second = write_tar(tmp_path / "b.tar", [("5.png", PNG[4])]).read_bytes()
    path = tmp_path / "set.tar"
    path.write_bytes(first + second)
    refused(path, r"set\.tar: not a .*holds data behind the mark of its end, from byte \d+ on")
    path.write_bytes(first + bytes(10_240) + b"x")
    refused(path, r"set\.tar: not a .*holds data behind the mark of its end")
    path.write_bytes(first + bytes(10_240))
    assert_images(packed(path), GREY[:2, None])


def test_headers_that_lead_back_are_refused(tmp_path):
    """A size below zero had the reader go round for ever."""
    path = write_tar(tmp_path / "set.tar", SAMPLES)
    content = bytearray(path.read_bytes())
    at = 1024
    content[at + 124 : at + 136] = b"\xff" * 10 + b"\xfc\x00"
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 155] = b"%06o\0" % sum(content[at : at + 512])
    path.write_bytes(content)
    refused(path, r"set\.tar: not a readable tar archive")


def test_a_shard_that_is_replaced_meanwhile_is_named(tmp_path):
    path = write_tar(tmp_path / "set.tar", [("1.png", PNG[0])])
    with open_files(path, Request()) as labelled:
        write_tar(tmp_path / "other", [("1.png", PNG[3])])
        os.replace(tmp_path / "other", path)
        with pytest.raises(ValueError, match=r"set\.tar: changed while it was read"):
            labelled.read("set.tar/1.png")


def test_more_shards_than_files_may_be_open(tmp_path):
    script = """
import resource, sys
from pyflocality.packing import pack
resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
pack(sys.argv[1], sys.argv[2], progress=False)
"""
    folder = tmp_path / "set"
    for number in range(60):
        image = np.full((4, 4), number, np.uint8)
        write_tar(folder / f"{number:04d}.tar", [("1.png", encoded(image)), ("1.cls", b"1")])
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 40
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", script, str(folder), str(out)], check=True)
    assert load(out).images[:, 0, 0, 0].tolist() == list(range(60))


def test_names_in_messages_are_printable(tmp_path):
    path = write_tar(tmp_path / "set.tar", [("\x1b[2J\n.png", b"none")])
    with pytest.raises(ValueError, match=re.escape(r"set.tar/\x1b[2J\n.png: not an image")):
        pack(path, tmp_path / "out", progress=False)
