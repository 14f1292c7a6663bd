"""Names of members as tools write them: zips and tars of one content are one set."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import struct
import tarfile
import unicodedata
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from source_files import GREY, assert_images, encoded, load, write_tree

from pyflocality.data import TrainingSet
from pyflocality.packing import pack
from pyflocality.sources.archive_names import link_target, tidy_name

FAT, UNIX, NTFS = 0, 3, 10
PNG = [encoded(image) for image in GREY]


class RawName(zipfile.ZipInfo):
    """An entry whose name is written as these bytes, without a word about their encoding."""

    raw: bytes | None = None

    def _encodeFilenameFlags(self):
        return (self.raw, self.flag_bits) if self.raw else super()._encodeFilenameFlags()


def member(name, system=UNIX, mode=0, extra=b""):
    """An entry with a name as text, or as bytes of a code page."""
    info = RawName("raw" if isinstance(name, bytes) else name)
    info.filename = name.decode("cp437") if isinstance(name, bytes) else name
    info.raw = name if isinstance(name, bytes) else None
    info.create_system, info.external_attr, info.extra = system, mode << 16, extra
    return info


def write_zip(path, members):
    """A zip of (entry or name, content)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in members:
                archive.writestr(entry, content)
    return path


def write_tar(path, members, **options):
    """A tar of (TarInfo or name, content)."""
    with tarfile.open(path, "w", **options) as archive:
        for entry, content in members:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def classes(data):
    return [data.label_names[label] for label in data.labels.tolist()]


WRITTEN = {
    "plain": ["cat/1.png", "cat/2.png", "dog/1.png"],
    "dots": ["./cat/1.png", "./cat//2.png", "././dog/1.png"],
    "absolute": ["/cat/1.png", "//cat/2.png", "/dog/./1.png"],
    "outside": ["../cat/1.png", "../../cat/2.png", "./../dog/1.png"],
    "backslashes": ["cat\\1.png", "cat\\2.png", "dog\\1.png"],
    "dots and backslashes": [".\\cat\\1.png", "./cat\\2.png", ".\\dog\\\\1.png"],
    "enclosed": ["C:\\set\\cat\\1.png", "C:\\set\\cat\\2.png", "C:\\set\\dog\\1.png"],
    "share": ["\\\\host\\cat\\1.png", "\\\\host\\cat\\2.png", "\\\\host\\dog\\1.png"],
}


@pytest.mark.parametrize("names", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("system", [FAT, UNIX, NTFS])
def test_classes_however_they_are_written(tmp_path, names, system):
    members = [(member(name, system), PNG[index]) for index, name in enumerate(names)]
    data = load(write_zip(tmp_path / "set.zip", members))
    assert_images(data, GREY[:3, None])
    assert classes(data) == ["cat", "cat", "dog"]


@pytest.mark.parametrize("system", [FAT, 6, NTFS, 11, 14])
def test_slashes_and_backslashes_of_windows(tmp_path, system):
    """Directory entries end with a slash even where files have backslashes."""
    names = ["cat/", "cat\\1.png", "dog/", "dog/sub\\1.png", "dog\\"]
    contents = [b"", PNG[0], b"", PNG[1], b""]
    members = [(member(n, system), c) for n, c in zip(names, contents, strict=True)]
    data = load(write_zip(tmp_path / "set.zip", members))
    assert_images(data, GREY[:2, None])
    assert classes(data) == ["cat", "dog"]


def test_a_backslash_in_a_name_of_unix_is_one(tmp_path):
    members = [("cat/a\\b.png", PNG[0]), ("dog/1.png", PNG[1])]
    path = write_zip(tmp_path / "set.zip", members)
    assert classes(load(path)) == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"set\.zip: cat/a\\b\.png: not an image"):
        load(write_zip(path, [("cat/a\\b.png", b"none"), ("cat/c.png", PNG[0])]))


def test_a_backslash_that_nobody_can_read_is_refused(tmp_path):
    members = [(member("cat\\1.png", FAT), PNG[0]), (member("dog/1.png", UNIX), PNG[1])]
    with pytest.raises(ValueError, match=r"set\.zip: cannot tell whether the backslash in 'cat\\"):
        load(write_zip(tmp_path / "set.zip", members))


@pytest.mark.parametrize("system", [FAT, UNIX])
def test_splits_of_windows_are_not_pooled(tmp_path, system):
    names = ["train\\cat\\1.png", "train\\dog\\1.png", "test\\dog\\1.png"]
    members = [(member(name, system), PNG[index]) for index, name in enumerate(names)]
    path = write_zip(tmp_path / "set.zip", members)
    assert_images(load(path), GREY[:2, None])
    assert_images(load(path, split="test"), GREY[2:3, None])


def test_dataset_json_and_mac_folders_of_windows(tmp_path):
    entries = [["00000/1.png", 7], ["00000\\2.png", 3]]
    members = [
        ("00000\\1.png", PNG[0]),
        ("00000\\2.png", PNG[1]),
        ("__MACOSX\\00000\\._1.png", b"resource fork"),
        ("dataset.json", json.dumps({"labels": entries})),
    ]
    for system in (FAT, UNIX):
        entries = [(member(name, system), content) for name, content in members]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* left out: ")
            data = load(write_zip(tmp_path / "set.zip", entries))
        assert_images(data, GREY[:2, None])
        assert data.labels.tolist() == [7, 3]


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_dataset_json_around_the_folder_of_images(tmp_path, kind):
    """It counted as absent where all images lie in one folder beside it."""
    names = ["set/0/a.png", "set/1/b.png"]
    files = {name: PNG[index] for index, name in enumerate(names)}
    entries = [["./set/0/a.png", 5], ["set//1/b.png", 2]]
    files["dataset.json"] = json.dumps({"labels": entries}).encode()
    assert load(write_tree(tmp_path / "set", files, kind)).labels.tolist() == [5, 2]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([["a.png", 1], ["./a.png", 2]], r"gives 'a\.png' two classes, 1 and 2"),
        ([["a.png", 2**63]], r"class of 'a\.png', got 9223372036854775808"),
        ([["a.png", [1, 0]]], r"class of 'a\.png', got \[1, 0\]"),
        ([["a.png", True]], r"class of 'a\.png', got True"),
        ([["a.png"]], "cannot be read as"),
        ([[1, 1]], "cannot be read as"),
        ({"a.png": 1}, "cannot be read as"),
        (5, "cannot be read as"),
    ],
)
def test_a_dataset_json_of_the_wrong_kind_is_named(tmp_path, entries, message):
    files = {"a.png": PNG[0], "dataset.json": json.dumps({"labels": entries}).encode()}
    for kind in ("folder", "zip"):
        with pytest.raises(ValueError, match=rf"set.*dataset\.json: .*{message}"):
            load(write_tree(tmp_path / "set", files, kind))


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"labels":' * 90_000, b"[]", b"null", b"1"])
def test_a_dataset_json_nested_without_end_is_named(tmp_path, content):
    files = {"a.png": PNG[0], "dataset.json": content}
    for kind in ("folder", "zip"):
        with pytest.raises(ValueError, match=r"set.*dataset\.json: cannot be read as"):
            load(write_tree(tmp_path / "set", files, kind))


def test_images_that_dataset_json_has_and_the_set_has_not_are_told(tmp_path):
    entries = [["a.png", 1], ["b\x1b.png", 2], ["c.png", 2]]
    files = {"a.png": PNG[0], "dataset.json": json.dumps({"labels": entries}).encode()}
    path = write_tree(tmp_path / "set", files, "zip")
    with pytest.warns(UserWarning, match=r"json: 2 left out: .* not there \(first 'b\\x1b\.png'\)"):
        assert load(path).labels.tolist() == [1]


TWICE = [
    ("cat/1.png", "cat/1.png"),
    ("cat/1.png", "./cat/1.png"),
    ("/cat/1.png", "cat//1.png"),
    ("../cat/1.png", "cat/1.png"),
    ("cat/\u00e9.png", "cat/e\u0301.png"),
]


@pytest.mark.parametrize(("first", "second"), TWICE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_two_names_that_are_one_are_refused(tmp_path, kind, first, second):
    members = [(first, PNG[0]), (second, PNG[1])]
    if kind == "zip":
        path = write_zip(tmp_path / "set.zip", members)
    else:
        path = write_tar(tmp_path / "set.tar", members)
    with pytest.raises(ValueError, match=rf"set\.{kind}: holds 'cat/..?png' twice"):
        pack(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_upper_and_lower_case_are_two_things(tmp_path):
    members = [("Cat/a.png", PNG[0]), ("cat/A.png", PNG[1]), ("cat/a.png", PNG[2])]
    data = load(write_zip(tmp_path / "set.zip", members))
    assert_images(data, GREY[:3, None])
    assert classes(data) == ["Cat", "cat", "cat"]


def test_accents_of_a_mac_are_letters(tmp_path):
    name = unicodedata.normalize("NFD", "é/1.png")
    entries = json.dumps({"labels": [["é/1.png", 4]]}).encode()
    path = write_tree(tmp_path / "a", {name: PNG[0], "dataset.json": entries}, "zip")
    assert load(path).labels.tolist() == [4]
    for kind in ("zip", "folder"):
        path = write_tree(tmp_path / "b", {name: PNG[0], "ü/2.png": PNG[1]}, kind)
        assert_images(load(path).with_label("é"), GREY[:1, None])
    both = write_tree(tmp_path / "c", {name: PNG[0], "é/1.png": PNG[1]}, "folder")
    with pytest.raises(ValueError, match="holds 'é/1.png' twice"):
        load(both)


def test_backslashes_that_a_tool_has_left_in_a_folder(tmp_path):
    files = {"train\\cat\\1.png": PNG[0], "train\\dog\\1.png": PNG[1], "test\\cat\\1.png": PNG[2]}
    folder = write_tree(tmp_path / "set", files, "folder")
    assert sorted(os.listdir(folder)) == sorted(files)
    data = load(folder)
    assert_images(data, GREY[:2, None])
    assert classes(data) == ["cat", "dog"]


@pytest.mark.parametrize(
    "name", ["cat/../dog/1.png", "a/b/../../../1.png", "cat/..", "x\\..\\1.png"]
)
def test_steps_back_are_refused(tmp_path, name):
    path = write_zip(tmp_path / "set.zip", [(name, PNG[0]), ("1.png", PNG[1])])
    if "\\" in name:
        path = write_zip(path, [(name, PNG[0])])
    with pytest.raises(ValueError, match=r"set\.zip: has a member of the name '.*unsafe"):
        load(path)


def test_a_name_that_ends_at_a_nul_is_refused(tmp_path):
    """`zipfile` takes what stands before the NUL."""
    path = write_zip(tmp_path / "set.zip", [("a.png_.txt", PNG[0])])
    path.write_bytes(path.read_bytes().replace(b"a.png_.txt", b"a.png\0.txt"))
    with pytest.raises(ValueError, match=r"set\.zip: has a member of the name 'a\.png\\x00\.txt'"):
        load(path)


@pytest.mark.parametrize("names", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_classes_of_a_tar_however_they_are_written(tmp_path, names, form):
    path = write_tar(tmp_path / "set.tar", zip(names, PNG, strict=False), format=form)
    data = load(pack(path, tmp_path / "out", progress=False))
    assert_images(data, GREY[:3, None])
    assert classes(data) == ["cat", "cat", "dog"]


# Encodings of names in zips


def test_utf8_without_the_flag(tmp_path):
    """The Finder's archives."""
    names = ["é/1.png".encode(), "猫/1.png".encode()]
    members = [(member(name, UNIX), PNG[index]) for index, name in enumerate(names)]
    assert load(write_zip(tmp_path / "set.zip", members)).label_names == ("é", "猫")


def test_the_code_page_of_dos(tmp_path):
    members = [(member("é/1.png".encode("cp437"), FAT), PNG[0]), (member("z/1.png", FAT), PNG[1])]
    assert load(write_zip(tmp_path / "set.zip", members)).label_names == ("z", "é")


def test_a_letter_that_ends_in_a_backslash(tmp_path):
    """Shift-JIS: two classes must not be taken for two files of one."""
    names = ["ソa/1.png".encode("cp932"), "ソb/1.png".encode("cp932")]
    members = [(member(name, FAT), PNG[index]) for index, name in enumerate(names)]
    with pytest.raises(ValueError, match=r"set\.zip: '.*' is in a code page that is not told"):
        load(write_zip(tmp_path / "set.zip", members))


def test_the_path_in_unicode_counts(tmp_path):
    """Info-ZIP on Windows: a code page beside the name in Unicode."""
    members = []
    for index, name in enumerate(["ソa/1.png", "ソb/1.png"]):
        raw = name.encode("cp932")
        field = struct.pack("<BL", 1, zlib.crc32(raw)) + name.encode()
        extra = struct.pack("<HH", 0x7075, len(field)) + field
        members.append((member(raw, FAT, extra=extra), PNG[index]))
    assert load(write_zip(tmp_path / "set.zip", members)).label_names == ("ソa", "ソb")


# Links, folders and other members


def test_links_in_a_zip(tmp_path):
    link = stat.S_IFLNK | 0o777
    members = [
        ("cat/1.png", PNG[0]),
        (member("dog/1.png", mode=link), b"../cat/1.png"),
        (member("dog/2.png", mode=link), b"./1.png"),
        (member("dog/notes", mode=link), b"/etc/passwd"),
    ]
    path = write_zip(tmp_path / "set.zip", members)
    data = load(path)
    assert_images(data, GREY[[0, 0, 0], None])
    assert classes(data) == ["cat", "dog", "dog"]
    for name, target, message in (
        ("dog/3.png", "/etc/passwd", "'dog/3.png' is a link to something outside"),
        ("dog/3.png", "../../cat/1.png", "'dog/3.png' is a link to something outside"),
        ("dog/3.png", "9.png", "'dog/3.png' is a link to 'dog/9.png', which is no file"),
        ("dog/3.png", "3.png", "'dog/3.png' is a link to 'dog/3.png', which is no file"),
        ("pet", "cat", "'pet' is a link to the folder 'cat'"),
        ("a/pet", "../dog", "'a/pet' is a link to the folder 'dog'"),
    ):
        write_zip(path, [*members, (member(name, mode=link), target)])
        with pytest.raises(ValueError, match=rf"set\.zip: {message}"):
            load(path)


def test_members_that_are_no_files(tmp_path):
    path = tmp_path / "set.zip"
    for kind in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK):
        write_zip(path, [("a.png", PNG[0]), (member("b.png", mode=kind | 0o600), PNG[1])])
        with pytest.raises(ValueError, match=r"set\.zip: .*'b\.png' is a device, a pipe"):
            load(path)
    for name, attributes in (("b/", 0), ("b.png", 0x10)):
        entry = member(name, FAT)
        entry.external_attr = attributes
        write_zip(path, [("a.png", PNG[0]), (entry, PNG[1])])
        with pytest.raises(ValueError, match=rf"set\.zip: .*'{name}' is a folder of \d+ bytes"):
            load(path)


def test_names_in_messages_are_printable(tmp_path):
    name = "\x1b[2J\u202e\n.png"
    shown = re.escape(r"\x1b[2J\u202e\n.png")
    for kind in ("zip", "folder"):
        path = write_tree(tmp_path / "a\x07", {"1.png": PNG[0], name: b"none"}, kind)
        with pytest.raises(ValueError, match=rf"a\\x07.*{shown}: not an image"):
            TrainingSet.load(path, progress=False)


def test_the_name_of_a_set_is_printable(tmp_path):
    path = write_tree(tmp_path / "\x1b[2J", {"1.png": PNG[0]}, "folder")
    for data in (load(path), load(pack(path, tmp_path / "\u202eout", progress=False))):
        assert data.name in (r"\x1b[2J", r"\u202eout")
    assert TrainingSet(GREY, name="a\nb").name == r"a\nb"


def test_tidied_names():
    for name, tidied in (("a/b.png", "a/b.png"), ("./a//b/./c", "a/b/c"), ("/a", "a")):
        assert tidy_name("x", name, False) == tidied
    assert tidy_name("x", "C:a\\b", True) == "C:a/b"
    assert tidy_name("x", "a\\b", False) == "a\\b"
    assert link_target("a/b/c.png", "../d.png") == "a/d.png"
    assert link_target("c.png", "..") is None
    assert np.all([link_target("a/c.png", outside) is None for outside in ("/x", "../../x", "..")])
