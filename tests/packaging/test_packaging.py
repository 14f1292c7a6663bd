"""Wheel, sdist and the installation without a compiler, each outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from pyflocality.backends import machine_reason

ROOT = Path(__file__).resolve().parents[2]
NATIVE_MISSING = machine_reason("cpu")

# Most of it builds the extension, unless what is built is given: `--built FOLDER`.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "setup.py").is_file(), reason="the tests run outside a checkout"
    ),
]
needs_native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))

# Compilers that fail, whatever is asked of them.
BROKEN = {"CC": "false", "CXX": "false"}


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed; its output."""
    done = attempt(*command, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout
    return done.stdout


def attempt(
    *command: object, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("PYFLOCALITY_") and key != "PYTHONPATH"
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


# Stands for the kernels where a test is about what becomes of a build.
EMPTY_EXTENSION = """#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, module) { module.doc() = "Nothing."; }
"""


def copy_checkout(target: Path) -> Path:
    """The sources alone, without anything built in place."""
    shutil.copytree(
        ROOT,
        target,
        ignore=shutil.ignore_patterns(
            ".*_cache", ".git", ".venv", "venv", "out", "build", "dist", "__pycache__",
            "*.egg-info", "*.so", "*.pyd", "_native_build_failure.txt",
        ),
    )  # fmt: skip
    return target


def install(wheel: Path, target: Path) -> Path:
    """Unpack a wheel into a folder of its own, without its dependencies."""
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--target", target, wheel,
        cwd=target.parent,
    )  # fmt: skip
    return target


def python(installed: Path, code: str) -> str:
    """Run code against an installed package, from a folder that holds nothing.

    Without the site module (-S) an editable installation of the checkout does not exist.
    """
    elsewhere = installed.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    libraries = [path for path in sys.path if path.endswith("-packages")]
    path = os.pathsep.join([str(installed), *libraries])
    return run(sys.executable, "-S", "-c", code, cwd=elsewhere, env={"PYTHONPATH": path})


@pytest.fixture(scope="module")
def built(request, tmp_path_factory) -> Path:
    """Folder with the sdist and the wheel that was built from the unpacked sdist."""
    given = request.config.getoption("--built")
    if given is not None:
        return request.config.invocation_params.dir / given
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build(tmp_path_factory.mktemp("built"))
    # Whichever worker comes first builds for all of them.
    folder = tmp_path_factory.getbasetemp().parent / "built"
    failed = folder / "failed"
    try:
        folder.mkdir()
    except FileExistsError:
        while not (folder / "ready").exists():
            assert not failed.exists(), "another worker could not build"
            time.sleep(1)
        return folder / "dist"
    try:
        build(folder)
    except BaseException:
        failed.touch()
        raise
    (folder / "ready").touch()
    return folder / "dist"


def build(folder: Path) -> Path:
    checkout = copy_checkout(folder / "checkout")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=checkout)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    (wheel,) = built.glob("*.whl")
    return install(wheel, tmp_path_factory.mktemp("installed") / "site")


@needs_native
def test_wheel_brings_extension_kernels_and_sources(installed):
    output = python(
        installed,
        "from importlib import metadata, resources\n"
        "import pyflocality, pyflocality._C, pyflocality.kernels.triton\n"
        "from pyflocality.backends.native_build import FAILURE_FILE\n"
        "print(pyflocality.__file__)\n"
        "print(pyflocality._C.__file__)\n"
        "print(pyflocality.kernels.triton.__file__)\n"
        "print(resources.files('pyflocality.csrc').joinpath('include/pyflocality/pixel.h'))\n"
        "assert resources.files('pyflocality').joinpath('py.typed').is_file()\n"
        "assert not FAILURE_FILE.exists()\n"
        "assert metadata.version('pyflocality') == pyflocality.__version__\n",
    )
    paths = [Path(line) for line in output.split()]
    assert len(paths) == 4
    for path in paths:
        assert path.is_file()
        assert installed in path.parents


@needs_native
def test_installed_extension_computes(installed):
    output = python(
        installed,
        "import torch\n"
        "from pyflocality.backends import trace_backends\n"
        "from pyflocality.moments import Moments\n"
        "images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)\n"
        "with trace_backends() as calls:\n"
        "    print(Moments.from_data(images).covariance.item())\n"
        "print(calls)\n",
    )
    assert output.split("\n")[:2] == ["2.0", "[('covariance', 'cpu')]"]


def test_wheel_brings_the_benchmarks(installed):
    output = python(
        installed,
        "from importlib import import_module\n"
        "from pyflocality import cli\n"
        "for name in ('', '.cpu_suite', '.studies.disks', '.oracle', '.reproduce'):\n"
        "    print(import_module(f'pyflocality.benchmarks{name}').__file__)\n"
        "assert cli.main(['bench', '--list', '--filter', 'covariance/covariance']) == 0\n",
    )
    *paths, case = output.split()
    assert len(paths) == 5 and case == "covariance/covariance/cpu/N50000"
    for path in map(Path, paths):
        assert installed / "pyflocality" / "benchmarks" in path.parents


def test_wheel_brings_every_module_of_the_benchmarks_and_no_results(built):
    (wheel,) = built.glob("*.whl")
    prefix = "pyflocality/"
    names = {name.removeprefix(prefix) for name in zipfile.ZipFile(wheel).namelist()}
    found = {name for name in names if name.startswith("benchmarks/")}
    modules = (ROOT / "benchmarks").rglob("*.py")
    assert found == {path.relative_to(ROOT).as_posix() for path in modules}


def test_wheel_holds_no_tests_and_no_cpu_sources(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    # Options of the benchmarks, which are a package like the others.
    names.remove("pyflocality/benchmarks/conftest.py")
    tops = {name.split("/")[0] for name in names}
    assert tops == {"pyflocality", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if name.endswith(".cpp") or "test" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_a_build_needs(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "kernels/__init__.py",
        "csrc/include/pyflocality/pixel.h",
        "csrc/cpu/threads.h",
        "csrc/cpu/covariance.cpp",
        "pyflocality/moments/moments.py",
        "tests/conftest.py",
        "benchmarks/kernels/registry.py",
    ):
        assert path in names
    committed = {
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*.json")
    }
    assert committed and committed <= names


def test_without_a_compiler_the_install_works_and_says_why(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    command = (
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation",
        "--verbose", "--wheel-dir", tmp_path / "dist", checkout,
    )  # fmt: skip
    output = run(*command, cwd=tmp_path, env=BROKEN)
    assert "WARNING: the native extension of pyflocality was NOT built" in output
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    output = python(
        install(wheel, tmp_path / "site"),
        "import torch\n"
        "from pyflocality.backends import machine_reason, trace_backends\n"
        "from pyflocality.moments import Moments\n"
        "print(machine_reason('cpu'))\n"
        "images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)\n"
        "with trace_backends() as calls:\n"
        "    print(Moments.from_data(images).covariance.item())\n"
        "print(calls)\n",
    )
    *told, covariance, calls = output.strip().split("\n")
    reason = next(line for line in told if "C++17 compiler" in line)
    # The warning of the first call comes beside it.
    assert any("UserWarning" in line and "times slower" in line for line in told), told
    assert "could not be built" in reason
    assert "false" in reason and "C++17 compiler" in reason
    assert covariance == "2.0"
    assert calls == "[('covariance', 'reference')]"


def test_a_required_extension_that_fails_is_an_error(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    done = attempt(
        sys.executable, "setup.py", "build_ext", "--inplace",
        cwd=checkout,
        env=BROKEN | {"PYFLOCALITY_REQUIRE_NATIVE": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert not list((checkout / "pyflocality").glob("_C.*"))


@needs_native
def test_report_and_extension_beside_the_sources_replace_each_other(tmp_path):
    """As in an editable installation that is repeated after the compiler came or went."""
    checkout = copy_checkout(tmp_path / "checkout")
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):
        source.unlink()
    (checkout / "csrc" / "cpu" / "module.cpp").write_text(EMPTY_EXTENSION, encoding="utf-8")
    package = checkout / "pyflocality"
    command = (sys.executable, "setup.py", "build_ext", "--inplace", "--force")
    for env, built in ((BROKEN, False), ({}, True), (BROKEN, False)):
        run(*command, cwd=checkout, env=env)
        assert bool(list(package.glob("_C.*"))) is built
        assert (package / "_native_build_failure.txt").is_file() is not built


def test_kernels_refuse_a_second_name():
    done = attempt(sys.executable, "-c", "import kernels", cwd=ROOT)
    assert done.returncode != 0
    assert "pyflocality.kernels" in done.stdout
