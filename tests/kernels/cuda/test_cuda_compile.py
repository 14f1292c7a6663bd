"""Compilation of the CUDA kernels without a GPU: by nvcc, and by NVRTC as users' machines do it.

Each variant must compile for compute capability 8.0 and 9.0 to machine code that spills no
register, and to PTX for what comes after. Registers and spills are recorded as properties of the
tests (`pytest --junit-xml`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from pyflocality.kernels.cuda._launch import compile_options, kernel_source
from pyflocality.kernels.geometry import WindowShape, plan_vjp, plan_window

ARCHITECTURES = ("sm_80", "sm_90")
FUTURE = "compute_100"
USED = re.compile(
    r"entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
ROWS = dict(zip(("CHANNELS", "HEIGHT", "WIDTH", "WINDOW"), (3, 32, 32, 7), strict=True))


def window_case(channels, height, width, window, stored_bytes=True, tangents=0):
    vector = width % 4 == 0
    shape = WindowShape(channels, height, width, window, stored_bytes, vector, tangents)
    plan = plan_window(shape)
    return "window_posterior", plan.macros, plan.threads * plan.min_blocks


def vjp_case(channels, height, width, window, stored_bytes, cotangent):
    plan = plan_vjp(WindowShape(channels, height, width, window, stored_bytes, width % 4 == 0))
    macros = plan.macros | {"PYFLOCALITY_COTANGENT": cotangent}
    return "window_vjp", macros, plan.threads * plan.min_blocks


# Name -> source, constants, threads that must fit on a multiprocessor.
CASES = {
    "cifar k=3": window_case(3, 32, 32, 3),
    "cifar k=7": window_case(3, 32, 32, 7),
    "cifar k=15": window_case(3, 32, 32, 15),
    "cifar k=31": window_case(3, 32, 32, 31),
    "mnist k=7": window_case(1, 28, 28, 7),
    "cifar k=17": window_case(3, 32, 32, 17),
    "bytes 64x64 k=31": window_case(3, 64, 64, 31),
    "floats 128x128 k=7": window_case(3, 128, 128, 7, stored_bytes=False),
    "floats 128x128 k=17": window_case(3, 128, 128, 17, stored_bytes=False),
    "bytes 96x96 k=9": window_case(3, 96, 96, 9),
    "floats 28x28 patch set k=17": vjp_case(3, 28, 28, 17, False, 0),
    "floats 64x64 k=17": window_case(3, 64, 64, 17, stored_bytes=False),
    "bytes 64x64 k=15": window_case(3, 64, 64, 15),
    "odd sizes": window_case(5, 31, 33, 3),
    "256x256 k=511": window_case(3, 256, 256, 511),
    "floats 256x256 k=51": window_case(3, 256, 256, 51, stored_bytes=False),
    "cifar, one tangent": window_case(3, 32, 32, 7, tangents=1),
    "cifar, two tangents": window_case(3, 32, 32, 7, tangents=2),
    "floats, four channels, two tangents": window_case(4, 48, 44, 9, False, tangents=2),
    "cifar patch set": vjp_case(3, 32, 32, 7, True, 0),
    "cifar cotangent": vjp_case(3, 32, 32, 7, True, 1),
    "floats 64x64 cotangent k=17": vjp_case(3, 64, 64, 17, False, 1),
    "odd sizes patch set": vjp_case(5, 31, 33, 4, True, 0),
    "merge": ("merge", {}, 256),
    "rows": (
        "window_rows",
        {f"PYFLOCALITY_{name}": value for name, value in ROWS.items()} | {"PYFLOCALITY_BYTES": 1},
        256,
    ),
}
# nvcc takes seconds where NVRTC takes a half: the variants that differ most.
BY_NVCC = ("cifar k=7", "floats 64x64 k=17", "cifar, two tangents", "cifar cotangent", "merge")


def assert_no_spills(report: str, threads: int, record) -> None:
    found = USED.findall(report)
    assert found, report
    for kernel, architecture, stack, stores, loads, registers in found:
        record(f"{kernel} {architecture} registers", int(registers))
        record(f"{kernel} {architecture} spill bytes", int(stores) + int(loads))
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), (kernel, architecture)
        # So many blocks as were planned fit on a multiprocessor, registers given out by eights.
        assert -(-int(registers) // 8) * 8 * threads <= 65536, (kernel, architecture, registers)


def missing(message: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("case", CASES)
def test_nvrtc(case, record_property):
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        missing(f"NVRTC is not installed (nvidia-cuda-nvrtc, cuda-bindings): {error}")
    name, macros, threads = CASES[case]
    for architecture in (*ARCHITECTURES, FUTURE):
        log, size = compile_by_nvrtc(nvrtc, name, macros, architecture)
        if architecture == FUTURE:
            assert size > 1000
        else:
            assert_no_spills(log, threads, record_property)


def compile_by_nvrtc(nvrtc, name, macros, architecture):
    """The compiler's log, and the size of the PTX."""
    # The two in the middle are CuPy's own.
    options = [*compile_options(macros), "-ftz=true", "--device-as-default-execution-space"]
    options.append(f"--gpu-architecture={architecture}")
    if architecture != FUTURE:
        options.append("--ptxas-options=-v")
    code, program = nvrtc.nvrtcCreateProgram(
        kernel_source(name).encode(), f"{name}.cu".encode(), 0, [], []
    )
    assert code == nvrtc.nvrtcResult.NVRTC_SUCCESS
    (code,) = nvrtc.nvrtcCompileProgram(
        program, len(options), [option.encode() for option in options]
    )
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert code == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    nvrtc.nvrtcDestroyProgram(program)
    return log.decode(), size


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("case", BY_NVCC)
def test_nvcc(case, tmp_path, record_property):
    name, macros, threads = CASES[case]
    source = tmp_path / f"{name}.cu"
    source.write_text(kernel_source(name))
    targets = [
        f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES
    ]
    targets.append(f"-gencode=arch={FUTURE},code={FUTURE}")
    done = subprocess.run(
        ["nvcc", "-fatbin", *targets, "-Xptxas", "-v", *compile_options(macros), str(source)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_no_spills(done.stderr, threads, record_property)


def test_launcher_and_kernel_count_shared_memory_alike():
    """The kernel's own count is asserted against the launcher's when it is compiled."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        missing(f"NVRTC is not installed (nvidia-cuda-nvrtc, cuda-bindings): {error}")
    name, macros, _ = CASES["cifar k=7"]
    wrong = macros | {"PYFLOCALITY_SHARED_BYTES": macros["PYFLOCALITY_SHARED_BYTES"] - 4}
    with pytest.raises(AssertionError, match="the launcher counts as the kernel does"):
        compile_by_nvrtc(nvrtc, name, wrong, "compute_80")
