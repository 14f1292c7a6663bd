"""Where "auto" takes the reference for want of the native extension, or an old one, it is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native_cpu import needs_cpu

import pyflocality as pf
from pyflocality._support import caller
from pyflocality.backends import native_build, selection
from pyflocality.backends.report import configuration, format_configuration

DATA = pf.TrainingSet(torch.arange(32).reshape(2, 1, 4, 4).to(torch.uint8))
X = torch.zeros(1, 1, 4, 4)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(caller, "_told", set())
    selection._tell_if_outdated.cache_clear()
    yield
    selection._tell_if_outdated.cache_clear()


@pytest.fixture
def no_extension(monkeypatch):
    """A process in which the extension cannot be imported."""

    def fail():
        raise ImportError("no _C here")

    monkeypatch.setattr(selection, "native_module", fail)


def told(action) -> list[str]:
    """The warnings of an action."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


def test_a_missing_extension_is_told_once_with_its_cure(no_extension):
    def work():
        with pf.trace_backends() as ran:
            for model in (pf.OptimalDenoiser(DATA), pf.LocalDenoiser(DATA, 3)):
                model(X, 0.5)
                model.jvp(X, X[None], 0.5)
        assert {backend for _, backend in ran} == {"reference"}

    (message,) = told(work)
    assert "about 50 times slower" in message and "no _C here" in message
    assert "C++17 compiler" in message
    assert told(work) == []


def test_the_warning_is_of_the_line_that_called(no_extension):
    with pytest.warns(UserWarning, match="50 times") as caught:
        pf.ops.global_posterior_mean(X, DATA.images, 0.5)
    assert [warning.filename for warning in caught] == [__file__]


def test_what_was_asked_for_by_name_is_no_surprise(no_extension, monkeypatch):
    def work():
        pf.OptimalDenoiser(DATA, backend="reference")(X, 0.5)
        with pf.use_backend("reference"):
            pf.OptimalDenoiser(DATA)(X, 0.5)
        monkeypatch.setenv("PYFLOCALITY_BACKEND", "reference")
        pf.OptimalDenoiser(DATA)(X, 0.5)

    assert told(work) == []


def test_what_no_native_kernel_serves_is_no_loss(no_extension):
    def work():
        pf.OptimalDenoiser(DATA)(X.double(), 0.5)
        pf.Moments.from_data(torch.rand(3, 1, 4, 4))

    assert told(work) == []


@needs_cpu
def test_nothing_is_told_where_all_is_well():
    def work():
        with pf.trace_backends() as ran:
            pf.OptimalDenoiser(DATA)(X, 0.5)
        assert ran == [("global_posterior", "cpu")]

    if native_build.outdated_reason() is None:
        assert told(work) == []
    # At import nothing is looked at: no extension would be missing there.
    code = "import warnings; warnings.simplefilter('error'); import pyflocality"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A source tree whose extension was built a while after its last change."""
    (tmp_path / "setup.py").touch()
    for name in ("pyflocality/_C.so", "csrc/cpu/kernel.cpp", "csrc/include/pyflocality/a.h"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1000, 1000))
    library = tmp_path / "pyflocality" / "_C.so"
    os.utime(library, (2000, 2000))
    backends = tmp_path / "pyflocality" / "backends"
    backends.mkdir()
    monkeypatch.setattr(native_build, "__file__", str(backends / "native_build.py"))
    module = SimpleNamespace(__file__=str(library))
    monkeypatch.setattr(native_build, "native_module", lambda: module)
    return tmp_path


@needs_cpu
@pytest.mark.parametrize("changed", ["csrc/cpu/kernel.cpp", "csrc/include/pyflocality/a.h"])
def test_an_extension_older_than_its_sources_is_told_once(checkout, changed):
    assert native_build.outdated_reason() is None
    assert configuration()["outdated"] is None
    os.utime(checkout / changed, (3000, 3000))

    def work():
        with pf.trace_backends() as ran:
            for _ in range(2):
                pf.OptimalDenoiser(DATA)(X, 0.5)
        assert {backend for _, backend in ran} == {"cpu"}

    (message,) = told(work)
    assert f"{Path(changed)} was changed after it was built" in message
    assert "pip install --editable ." in message
    assert f"PROBLEM: {message}" in format_configuration(configuration())


def test_an_installed_package_has_no_sources_to_be_older_than(checkout):
    os.utime(checkout / "csrc/cpu/kernel.cpp", (3000, 3000))
    (checkout / "setup.py").unlink()
    assert native_build.outdated_reason() is None
    shutil.rmtree(checkout / "csrc")
    (checkout / "setup.py").touch()
    assert native_build.outdated_reason() is None
