"""The tests of the kernels on the GPU under test, and the same under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from .. import ROOT
from ..command import Record

# The package of the benchmarks finds the kernels where nothing is installed.
_PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "--no-header",
    "-p",
    __package__.rpartition(".")[0],
)
# Tests of code compiled ahead of time say nothing about a GPU: in names of tests and of files.
_CHOSEN = ("-k", "not compiled and not compiles")
# A failure must not hide the rest, but a broken context fails all that follows.
_MOST_FAILURES = "--maxfail=20"
# Few of the CUDA kernels' tests, one for each kernel: a sanitizer is slow.
_SANITIZED = ("tests/kernels/cuda/test_cuda_gpu.py", "-k", "same_bits or jvp or vjp or patch_set")
_TAIL = 15


def run_tests(left: Callable[[], float]) -> Record:
    """The kernels' tests and all marked `gpu`, on the device, while there are seconds left."""
    command = [*_PYTEST, _MOST_FAILURES, *_CHOSEN]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    # The few of the CUDA kernels first.
    chosen = {"marked": ["-m", "gpu", "tests"], "kernels": ["-m", "", "tests/kernels/triton"]}
    return _all_of({name: [*command, *words] for name, words in chosen.items()}, left)


def run_sanitizers(left: Callable[[], float]) -> Record:
    """Some tests of the CUDA kernels under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"unavailable": "compute-sanitizer is not on the PATH"}
    tests = [*_PYTEST, *_SANITIZED]
    commands = {
        # Without an exit code of its own it ends with that of pytest, whatever it finds.
        check: [tool, "--tool", check, "--error-exitcode", "9", *tests]
        for check in ("memcheck", "racecheck")
    }
    # Torch's allocator hides accesses past the end of a tensor.
    return _all_of(commands, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _all_of(
    commands: Mapping[str, Sequence[str]], left: Callable[[], float], **variables: str
) -> Record:
    runs = {name: _run(command, left(), variables) for name, command in commands.items()}
    return runs | {"exit_code": int(any(run["exit_code"] for run in runs.values()))}


def _run(command: Sequence[str], seconds: float, variables: dict[str, str]) -> Record:
    """Exit code of a command, 1 if it takes too long, and the last lines of what it prints."""
    start, end = time.perf_counter(), []
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(5.0, seconds))
        except subprocess.TimeoutExpired:
            code, end = 1, ["out of time"]
        finally:
            if process.returncode is None:
                # With its workers, which may hang in a kernel.
                os.killpg(process.pid, signal.SIGKILL)
        printed.seek(0)
        tail = printed.read().decode(errors="replace").splitlines()[-_TAIL:] + end
    return {"exit_code": code, "tail": tail, "seconds": time.perf_counter() - start}
