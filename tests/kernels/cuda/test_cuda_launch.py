"""Launch layer and predicates of the CUDA backend, without CuPy or a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_simulator import CompileException, need_compiler, simulated_cupy

from pyflocality import ops
from pyflocality.backends import selection as _backends
from pyflocality.backends.selection import OPERATIONS, BackendUnavailableError, machine_reason
from pyflocality.cuda.arrays import as_tensor
from pyflocality.kernels.cuda import _launch
from pyflocality.kernels.cuda._launch import (
    CudaKernelError,
    Launch,
    compile_options,
    kernel_source,
    run,
)
from pyflocality.kernels.limits import window_posterior_limits, window_vjp_limits
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import posterior_problem

CPU = torch.device("cpu")
GPU = {"triton", "cuda"}


@pytest.fixture
def cupy(monkeypatch):
    module = simulated_cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(_launch, "device_index", lambda device: 0)
    monkeypatch.setattr(_launch, "current_stream", lambda device: 7)
    _launch._kernel.cache_clear()
    yield module
    _launch._kernel.cache_clear()


def test_nothing_imports_cupy():
    modules = "_launch, _windows, window_posterior, patch_set, _window_rows"
    code = "import sys; sys.modules['cupy'] = None\n"
    code += "from pyflocality.kernels import geometry, limits, stored\n"
    code += f"from pyflocality.kernels.cuda import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["window_posterior", "window_vjp", "window_rows", "merge"])
def test_sources_stand_alone(name):
    text = kernel_source(name)
    assert '#include "' not in text and "#pragma once" not in text
    assert text.count("constexpr int kByteCentre") == 1
    assert 'extern "C" __global__' in text


def test_options_are_in_a_fixed_order():
    assert compile_options({"B": 2, "A": 1}) == ("-std=c++17", "-DA=1", "-DB=2")


def test_a_kernel_that_does_not_compile_names_itself_and_the_cause(cupy, monkeypatch):
    def refuse(self, name):
        raise CompileException("line 7: expected a ;")

    monkeypatch.setattr(cupy.RawModule, "get_function", refuse)
    message = "'merge_sums' could not be compiled: CompileException: line 7: expected a ;"
    with pytest.raises(CudaKernelError, match=message) as error:
        run(Launch("merge", "merge_sums", (1, 1, 1), 256), torch.zeros(1))
    assert error.value.kernel == "merge_sums"


def test_a_launch_that_fails_names_the_kernel_and_the_cause(cupy, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    monkeypatch.setattr(cupy.RawModule, "get_function", lambda self, name: refuse)
    message = "'merge_sums' could not be launched: RuntimeError: CUDA_ERROR_LAUNCH_OUT_OF"
    with pytest.raises(CudaKernelError, match=message):
        run(Launch("merge", "merge_sums", (1, 1, 1), 256), torch.zeros(1))


def test_a_cupy_that_finds_no_driver_is_the_cause(cupy, monkeypatch):
    def refuse(index):
        raise RuntimeError("cudaErrorInsufficientDriver")

    cupy.cuda.Device = refuse
    with pytest.raises(CudaKernelError, match="'merge_sums' could not be launched: .*Insufficient"):
        run(Launch("merge", "merge_sums", (1, 1, 1), 256), torch.zeros(1))


def test_the_cupy_of_the_cuda_of_torch_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for version, package in (("12.6", "cupy-cuda12x"), ("13.0", "'pyflocality.cuda.'")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert re.search(f"pip install {package}$", machine_reason("cuda"))


@pytest.mark.parametrize("by_protocol", [True, False])
def test_launches_pass_pointers_on_the_current_stream(by_protocol, cupy, monkeypatch):
    seen = {}

    class Stream:
        def __init__(self, handle, device):
            seen["stream"] = (handle, device)

        @classmethod
        def from_external(cls, stream):
            version, handle = stream.__cuda_stream__()
            return cls(handle, version)

        def __enter__(self):
            seen["entered"] = True

        def __exit__(self, *error):
            seen["entered"] = False

    class Kernel:
        max_dynamic_shared_size_bytes = 0

        def __call__(self, grid, block, args, *, shared_mem):
            assert seen["entered"]
            seen.update(grid=grid, block=block, args=args, shared=shared_mem)
            seen["allowed"] = self.max_dynamic_shared_size_bytes

    kernel = Kernel()
    # Before CuPy 14 a handle, since then the protocol.
    cupy.cuda.Stream = Stream if by_protocol else object
    cupy.cuda.ExternalStream = None if by_protocol else Stream
    monkeypatch.setattr(cupy.RawModule, "get_function", lambda self, name: kernel)
    values = torch.zeros(3)
    run(Launch("merge", "merge_sums", (5, 2, 3), 96, 60_000), values, 2**40)
    assert seen["stream"] == (7, 0) and seen["entered"] is False
    assert (seen["grid"], seen["block"], seen["shared"]) == ((5, 2, 3), (96,), 60_000)
    assert seen["allowed"] == 60_000
    assert seen["args"] == (np.uintp(values.data_ptr()), np.int64(2**40))
    assert [argument.nbytes for argument in seen["args"]] == [8, 8]
    with pytest.raises(ValueError, match="contiguous memory, got strides"):
        run(Launch("merge", "merge_sums", (1, 1, 1), 256), torch.zeros(3, 4).T)


@pytest.mark.filterwarnings("error")
def test_streams_of_the_cupy_that_is_installed():
    pytest.importorskip("cupy", reason="the package 'cupy' is not installed")
    for handle in (0, 0x1234):
        assert _launch._stream(handle, 0).ptr == handle


@need_compiler
@pytest.mark.parametrize("splits", [1, 8, 13])
def test_sums_of_splits(cupy, splits, rng):
    from pyflocality.kernels.cuda._windows import merge_sums

    partial = torch.randn(splits, 3, 15, generator=rng)
    # Single values, added in double precision: exact up to its rounding.
    torch.testing.assert_close(merge_sums(partial), partial.double().sum(0), rtol=0, atol=1e-13)


def test_limits():
    def call(shape, window=7, dtype=torch.uint8, **options):
        facts = {"images_dtype": dtype, "image_shape": shape, "window": window}
        return Call(CPU, facts=facts, **options)

    assert window_posterior_limits(call((3, 32, 32))) is None
    assert window_posterior_limits(call((1, 256, 256), 511)) is None
    assert "up to 256x256 pixels, got 300x20" in window_posterior_limits(call((3, 300, 20)))
    refused = window_posterior_limits(call((3, 8, 8), dtype=torch.float64))
    assert "reads uint8 or float32" in refused
    facts = {"images_dtype": torch.uint8, "image_shape": (3, 8, 8)}
    assert "computes in float32" in window_posterior_limits(Call(CPU, torch.float64, facts=facts))
    assert "no derivative" in window_posterior_limits(call((3, 8, 8), requires_grad=True))
    assert window_vjp_limits(call((3, 64, 64), 127)) is None
    assert "does not fit into the shared memory" in window_vjp_limits(call((3, 256, 256)))
    # The sums of a large window take up shared memory beside the image.
    assert window_vjp_limits(call((1, 80, 256))) is None
    refused = window_vjp_limits(call((1, 80, 256), 511))
    assert "80x256 image does not fit into the shared memory" in refused


def test_operations_tell_the_limits_their_window(monkeypatch):
    """Were there a GPU: images too large for the pass over whole windows are refused before it."""
    monkeypatch.setattr(_backends, "machine_reason", lambda backend: None)
    monkeypatch.setattr(_backends, "_device_reason", lambda backend, device: None)
    images, x = torch.zeros(1, 1, 80, 256, dtype=torch.uint8), torch.zeros(1, 1, 80, 256)
    with pytest.raises(BackendUnavailableError, match="80x256 image does not fit"):
        ops.window_posterior_vjp(x, x[None], images, 511, 0.5, backend="cuda")
    big, images = torch.zeros(1, 1, 2, 257), torch.zeros(1, 1, 2, 257, dtype=torch.uint8)
    calls = {
        "patch_set": lambda: ops.patch_set_mean(big, images, 2, 0.5, backend="cuda"),
        "mean": lambda: ops.window_posterior_mean(big, images, 3, 0.5, backend="cuda"),
        "jvp": lambda: ops.window_posterior_jvp(big, big[None], images, 3, 0.5, backend="cuda"),
        "sum": lambda: ops.posterior_log_sum_exp(big, images, 0.5, window=3, backend="cuda"),
    }
    for call in calls.values():
        with pytest.raises(BackendUnavailableError, match="up to 256x256 pixels, got 2x257"):
            call()


@pytest.mark.parametrize("batch", [0, 1, 65535, 65536, 200_000])
def test_parts_of_a_batch_fit_a_grid(batch):
    x, images = torch.zeros(batch, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    stored = StoredProblem(posterior_problem(x, images, 0.5, 1.0, memory_budget=2**30))
    for at_a_time in (1000, 65535, 10**9):
        parts = stored.parts(2**30 // at_a_time)
        assert [i for rows, _ in parts for i in range(batch)[rows]] == list(range(batch))
        assert all(len(part.problem.x) <= min(at_a_time, 65535) for _, part in parts)


def gpu_of(monkeypatch, capability, shared):
    """Have torch tell of a GPU of this capability and shared memory of a block, if it tells."""
    found = SimpleNamespace(major=capability[0], shared_memory_per_block_optin=shared)
    if shared is None:
        del found.shared_memory_per_block_optin
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    facts = {"images_dtype": torch.uint8, "image_shape": (3, 32, 32), "window": 3}
    call = Call(torch.device("cuda", 0), facts=facts)
    limits = [table[name].limits for table in OPERATIONS.values() for name in table.keys() & GPU]
    assert len(limits) == 10
    (reason,) = {predicate(call) for predicate in limits}
    return reason


def test_gpus_that_cannot_run_a_kernel_are_refused_with_the_reason(monkeypatch):
    """The reason is the same for the kernels of all operations."""
    reason = gpu_of(monkeypatch, (7, 5), 64 * 1024)
    assert reason == "it needs a GPU of compute capability 8.0 or above, cuda:0 has 7.5"
    reason = gpu_of(monkeypatch, (8, 0), 64 * 1024)
    assert reason == (
        "its blocks need up to 101376 bytes of shared memory, cuda:0 gives a block 65536"
    )


@pytest.mark.parametrize(
    ("capability", "kibibytes"),
    [((8, 0), 163), ((8, 6), 99), ((8, 9), 99), ((9, 0), 227), ((12, 0), 99), ((8, 6), None)],
)
def test_gpus_that_can_run_the_kernels(monkeypatch, capability, kibibytes):
    shared = None if kibibytes is None else kibibytes * 1024
    assert gpu_of(monkeypatch, capability, shared) is None


def test_arrays_of_other_libraries_are_not_copied():
    array = np.arange(6, dtype=np.float32)
    tensor = as_tensor(array, "x")
    tensor[0] = 9
    assert array[0] == 9
    assert as_tensor(tensor, "x") is tensor
    with pytest.raises(TypeError, match="`images` must be .* with `__dlpack__`, got a list"):
        as_tensor([1.0], "images")


@pytest.mark.skipif(machine_reason("cuda") is None, reason="the cuda backend can run here")
def test_the_backend_says_what_is_missing():
    reason = machine_reason("cuda")
    assert "pip install 'pyflocality[cuda]'" in reason or "no CUDA device" in reason
