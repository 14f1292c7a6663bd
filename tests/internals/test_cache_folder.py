"""The cache folder: where it lies, when it is not trusted, and that work goes on without it."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import pytest

from pyflocality._support import caller
from pyflocality.storage import cache as _cache
from pyflocality.storage.blobs import read_blob, write_blob

pytestmark = pytest.mark.skipif(os.name == "nt", reason="owners and permissions of POSIX")
NAME = "masks/" + "0" * 32 + ".bits"


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(caller, "_told", set())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder that is not there yet."""
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept_bytes() -> bytes | None:
    """What is kept."""
    content = read_blob(NAME, 7)
    return None if content is None else content.tobytes()


def keeps() -> bool:
    """Whether bytes are kept."""
    write_blob(NAME, b"payload")
    return kept_bytes() == b"payload"


def refused(said: str) -> None:
    """Nothing is kept, and one warning says why, however often it is tried."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not keeps() and not keeps()
    assert len(told) == 1, [str(warning.message) for warning in told]
    assert said in str(told[0].message)
    assert "PYFLOCALITY_CACHE_DIR" in str(told[0].message)


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, expected in (
        ("/own", "/own"),
        ("~/own", "/home/somebody/own"),
        ("own", str(tmp_path / "own")),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", value)
        assert _cache.default_cache_dir() == Path(expected)
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("PYFLOCALITY_CACHE_DIR")
        else:
            monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", unset)
        monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
        monkeypatch.setattr("sys.platform", "linux")
        assert _cache.default_cache_dir() == Path("/shared/pyflocality")
        for none in ("", None):
            if none is None:
                monkeypatch.delenv("XDG_CACHE_HOME")
            else:
                monkeypatch.setenv("XDG_CACHE_HOME", none)
            assert _cache.default_cache_dir() == Path("/home/somebody/.cache/pyflocality")


@pytest.fixture
def nobody(monkeypatch):
    """A user whom no table knows, without HOME."""
    import pwd

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "PYFLOCALITY_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_a_home_has_no_cache(nobody, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("nothing is cached")
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_is_not_absolute_counts_as_none(monkeypatch, tmp_path):
    """As releases of platformdirs give it that do not raise where no home is known."""
    import platformdirs

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYFLOCALITY_CACHE_DIR")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *a, **o: Path("~/.cache/name"))
    refused("the user's cache folder would be '~/.cache/name'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["~/cache", "~nobody-has-this-name/cache"])
def test_a_home_that_stands_for_nothing(nobody, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", value)
    refused("`PYFLOCALITY_CACHE_DIR` must be a path")
    assert list(tmp_path.iterdir()) == []


def test_without_platformdirs_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("PYFLOCALITY_CACHE_DIR")
    monkeypatch.setitem(__import__("sys").modules, "platformdirs", None)
    refused("no cache folder is known")


def test_the_folders_that_are_made_are_for_their_owner_alone(folder, monkeypatch):
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(folder / "inner"))
    before = os.umask(0)
    try:
        assert keeps()
    finally:
        os.umask(before)
    for path in (folder, folder / "inner", folder / "inner" / "masks"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "inner" / NAME).stat().st_mode) == 0o600


def test_a_link_to_a_folder_of_the_user_is_followed(folder, tmp_path):
    (tmp_path / "disk").mkdir()
    folder.symlink_to(tmp_path / "disk")
    assert keeps()
    assert (tmp_path / "disk" / NAME).is_file()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
@pytest.mark.parametrize("place", ["", "masks"])
def test_a_folder_that_everybody_may_write_to_is_not_used(folder, mode, place):
    (folder / place).mkdir(parents=True)
    assert keeps()
    (folder / place).chmod(mode)
    refused(f"{folder / place} can be written to by everybody")


@pytest.mark.parametrize("place", ["", "masks"])
def test_a_folder_of_somebody_else_is_not_used(folder, monkeypatch, place):
    (folder / place).mkdir(parents=True)
    assert keeps()
    inside, found = str(folder / place), os.stat

    def somebody_elses(path, **options):
        status = found(path, **options)
        if os.fspath(path) != inside:
            return status
        fields = list(status)
        fields[4] = os.geteuid() + 1
        return os.stat_result(fields)

    monkeypatch.setattr(_cache.os, "stat", somebody_elses)
    refused(f"{inside} belongs to another user (number {os.geteuid() + 1})")


def test_a_folder_that_somebody_else_makes_first_is_not_used(folder, monkeypatch):
    """Between the look at it and its making."""
    made = _cache.Path.mkdir

    def others(path, **options):
        made(path)
        path.chmod(0o777)

    monkeypatch.setattr(_cache.Path, "mkdir", others)
    with pytest.warns(UserWarning, match="can be written to by everybody"):
        write_blob(NAME, b"payload")
    assert list(folder.iterdir()) == []


def test_a_folder_of_root_is_used(folder, monkeypatch):
    assert keeps()
    if os.geteuid() == 0:
        monkeypatch.setattr(_cache.os, "geteuid", lambda: 1234)
        assert keeps()


@pytest.mark.parametrize("kind", ["file", "link to nothing", "file in the way"])
def test_what_is_no_folder_is_not_used(folder, monkeypatch, kind):
    if kind == "link to nothing":
        folder.symlink_to(folder.with_name("gone"))
        refused(f"{folder} is a link to nothing")
        return
    folder.write_text("a file")
    if kind == "file in the way":
        monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(folder / "inner"))
        refused(f"{folder / 'inner'} cannot be used (Not a directory)")
    else:
        refused(f"{folder} is no folder")
    assert folder.read_text() == "a file"


@pytest.mark.parametrize("code", [28, 30, 13])
def test_a_disk_that_is_full_or_read_only_is_told_once(folder, monkeypatch, code):
    folder.mkdir()

    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_cache.Path, "mkdir", fail)
    refused(f"cannot be written to ({os.strerror(code)})")
    monkeypatch.undo()


def test_what_is_there_is_read_where_nothing_can_be_written(folder, monkeypatch):
    assert keeps()
    monkeypatch.setattr(_cache, "make_folder", lambda *a: pytest.fail("written to"))
    assert kept_bytes() == b"payload"


def link_outside(path):
    path.rename(path.with_name("outside"))
    path.symlink_to(path.with_name("outside"))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def writable_by_all(path):
    path.chmod(0o606)


def folder_instead(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [link_outside, pipe, writable_by_all, folder_instead])
def test_files_that_may_be_of_somebody_else_are_not_read(folder, change):
    assert keeps()
    change(folder / NAME)
    with pytest.warns(UserWarning, match="the cached file cannot be used"):
        assert read_blob(NAME, 7) is None
    if change is not folder_instead:
        # They are replaced, and nothing is written through them.
        write_blob(NAME, b"another")
        assert kept_bytes() == b"another"
        if change is link_outside:
            assert (folder / "masks" / "outside").read_bytes().endswith(b"payload")
