"""The native kernels under sanitizers: csrc/tests/sanitize.cpp built and run with each."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc"
DRIVER = CSRC / "tests" / "sanitize.cpp"
# All that does not need Python.
KERNELS = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if "bind" not in path.stem]
# Functions that are called once stay apart: as one, instrumented, they take four times as long.
COMMON = [
    *("-std=c++17", "-O1", "-fno-inline-functions-called-once", "-pthread"),
    *(f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}"),
]
SANITIZERS = {
    "address_undefined": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-g1", "-fsanitize=thread"],
}
TIMEOUT = 900


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command without sanitizer options of the user's."""
    environment = {key: value for key, value in os.environ.items() if "SAN_OPTIONS" not in key}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False
    )


def output(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def execute(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an instrumented program.

    ThreadSanitizer gives up where the system randomises addresses more than it knows of; then
    the program runs again without that.
    """
    done = run([program, *arguments])
    setarch = shutil.which("setarch")
    if "unexpected memory mapping" in done.stderr and setarch is not None:
        done = run([setarch, "-R", program, *arguments])
    return done


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler whose sanitizers work here; there must be one in CI."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    found = next(filter(None, map(shutil.which, names)), None)
    reason = "there is no C++ compiler" if found is None else None
    folder = tmp_path_factory.mktemp("probe")
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    for name, flags in SANITIZERS.items() if found is not None else ():
        built = run([found, *COMMON, *flags, source, "-o", program])
        done = execute(program) if built.returncode == 0 else built
        if done.returncode != 0:
            reason = f"{found} cannot build and run with the {name} sanitizer: {output(done)}"
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module", params=list(SANITIZERS))
def driver(
    request: pytest.FixtureRequest, compiler: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The driver and all kernels, built with a sanitizer."""
    folder, flags = tmp_path_factory.mktemp(request.param), [*COMMON, *SANITIZERS[request.param]]

    def build(source: Path) -> subprocess.CompletedProcess[str]:
        return run([compiler, *flags, "-c", source, "-o", folder / f"{source.stem}.o"])

    # The slowest files first; two at a time are what the memory of a small machine is good for.
    sources = sorted([*KERNELS, DRIVER], key=lambda path: "masked" not in path.stem)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for source, done in zip(sources, pool.map(build, sources), strict=True):
            assert done.returncode == 0, f"{source.name}: {output(done)}"
    program = folder / "sanitize"
    linked = run([compiler, *flags, *sorted(folder.glob("*.o")), "-o", program])
    assert linked.returncode == 0, output(linked)
    return program


def test_the_driver_runs_every_kernel():
    text = DRIVER.read_text(encoding="utf-8")
    missing = [path.stem for path in KERNELS if f'#include "{path.stem}.h"' not in text]
    assert KERNELS
    assert not missing, f"csrc/tests/sanitize.cpp does not run {missing}"


@pytest.mark.slow
def test_kernels_under_sanitizers(driver):
    what = "threads" if driver.parent.name.startswith("thread") else "all"
    done = execute(driver, what)
    assert done.returncode == 0, output(done)
    assert "comparisons hold" in done.stdout
