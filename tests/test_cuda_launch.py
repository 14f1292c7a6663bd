"""Launch layer and predicates of the CUDA backend, without CuPy or a GPU."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from cuda_simulator import CompileException, need_compiler, simulated_cupy

from pyflocality._backends import Call, machine_reason
from pyflocality._gpu_limits import uint8_limits
from pyflocality._gpu_limits_equivariant import patch_limits
from pyflocality.cuda import launch
from pyflocality.cuda.arrays import as_tensor
from pyflocality.cuda.launch import CudaKernelError, Launch, run
from pyflocality.cuda.limits import patch_set_limits, window_posterior_limits
from pyflocality.cuda.sources import compile_options, kernel_source
from pyflocality.cuda.stored import grid_parts

CPU = torch.device("cpu")


@pytest.fixture
def cupy(monkeypatch):
    module = simulated_cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(launch, "device_index", lambda device: 0)
    monkeypatch.setattr(launch, "current_stream", lambda device: 7)
    launch._kernel.cache_clear()
    yield module
    launch._kernel.cache_clear()


def test_nothing_imports_cupy():
    modules = "launch, limits, geometry, sources, stored, arrays, window_posterior, "
    modules += "window_adjoint, window_rows"
    code = "import sys; sys.modules['cupy'] = None\n"
    code += f"from pyflocality.cuda import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["window_posterior", "window_adjoint", "window_rows", "merge"])
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
        run(Launch("merge", "merge_sums", (1, 1, 1), 256), CPU, ())
    assert error.value.kernel == "merge_sums"


def test_a_launch_that_fails_names_the_kernel_and_the_cause(cupy, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    monkeypatch.setattr(cupy.RawModule, "get_function", lambda self, name: refuse)
    message = "'merge_sums' could not be launched: RuntimeError: CUDA_ERROR_LAUNCH_OUT_OF"
    with pytest.raises(CudaKernelError, match=message):
        run(Launch("merge", "merge_sums", (1, 1, 1), 256), CPU, ())


def test_launches_pass_pointers_on_the_current_stream(cupy, monkeypatch):
    seen = {}

    class Stream:
        def __init__(self, handle, device):
            seen["stream"] = (handle, device)

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
    cupy.cuda.ExternalStream = Stream
    monkeypatch.setattr(cupy.RawModule, "get_function", lambda self, name: kernel)
    values = torch.zeros(3)
    run(Launch("merge", "merge_sums", (5, 2, 3), 96, 60_000), CPU, (values, 2**40))
    assert seen["stream"] == (7, 0) and seen["entered"] is False
    assert (seen["grid"], seen["block"], seen["shared"]) == ((5, 2, 3), (96,), 60_000)
    assert seen["allowed"] == 60_000
    assert seen["args"] == (np.uintp(values.data_ptr()), np.int64(2**40))
    assert [argument.nbytes for argument in seen["args"]] == [8, 8]
    with pytest.raises(ValueError, match="contiguous memory, got strides"):
        run(Launch("merge", "merge_sums", (1, 1, 1), 256), CPU, (torch.zeros(3, 4).T,))


@need_compiler
@pytest.mark.parametrize("splits", [1, 8, 13])
def test_sums_of_splits(cupy, splits, rng):
    from pyflocality.cuda.window_posterior import merge_sums

    partial = torch.randn(splits, 3, 15, generator=rng)
    # Single values, added in double precision: exact up to its rounding.
    torch.testing.assert_close(merge_sums(partial), partial.double().sum(0), rtol=0, atol=1e-13)


def test_limits():
    def call(shape, dtype=torch.uint8, **options):
        return Call(CPU, facts={"images_dtype": dtype, "image_shape": shape}, **options)

    assert window_posterior_limits(call((3, 32, 32))) is None
    assert window_posterior_limits(call((1, 256, 256))) is None
    assert "up to 256x256 pixels, got 300x20" in window_posterior_limits(call((3, 300, 20)))
    assert "reads uint8 or float32" in window_posterior_limits(call((3, 8, 8), torch.float64))
    facts = {"images_dtype": torch.uint8, "image_shape": (3, 8, 8)}
    assert "computes in float32" in window_posterior_limits(Call(CPU, torch.float64, facts=facts))
    assert "no derivative" in window_posterior_limits(call((3, 8, 8), requires_grad=True))
    assert patch_set_limits(call((3, 64, 64))) is None
    assert "does not fit into the shared memory" in patch_set_limits(call((3, 256, 256)))


@pytest.mark.parametrize("batch", [0, 1, 65535, 65536, 200_000])
def test_parts_of_a_batch_fit_a_grid(batch):
    for at_a_time in (1000, 65535, 10**9):
        parts = grid_parts(batch, at_a_time)
        assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
        assert all(part.stop - part.start <= min(at_a_time, 65535) for part in parts)


def test_old_gpus_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    facts = {"images_dtype": torch.uint8, "image_shape": (3, 32, 32)}
    reason = window_posterior_limits(Call(torch.device("cuda", 0), facts=facts))
    assert reason == "it needs a GPU of compute capability 8.0 or above, cuda:0 has 7.5"
    # The Triton kernels say the same.
    facts["window"] = 3
    for limits in (uint8_limits, patch_limits):
        assert limits(Call(torch.device("cuda", 0), facts=facts)) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for limits in (window_posterior_limits, uint8_limits, patch_limits):
        assert limits(Call(torch.device("cuda", 0), facts=facts)) is None


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
