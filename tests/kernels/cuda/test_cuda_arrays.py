"""The CUDA kernels called with arrays of other libraries, in the simulator."""

from __future__ import annotations

import sys

import pytest
import torch
from cuda_simulator import need_compiler, simulated_cupy
from torch import Tensor
from truth import random_images

from pyflocality import ops
from pyflocality.backends import selection as _backends
from pyflocality.backends.selection import BackendUnavailableError
from pyflocality.cuda import arrays
from pyflocality.kernels.cuda import _launch

SHAPE, SIGMA, ALPHA, TEMPERATURE = (2, 4, 6), 0.4, 0.9, 1.5


class Producer:
    """An array of some library that offers its memory through DLPack and nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


class CupyArray(Producer):
    """The same in the name of CuPy."""

    __module__ = "cupy._core.core"


@pytest.fixture
def gpu(monkeypatch):
    """CuPy's stand-in, and a backend that serves CPU tensors."""
    module = simulated_cupy()
    module.from_dlpack = lambda producer: CupyArray(torch.from_dlpack(producer))
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(_launch, "device_index", lambda device: 0)
    monkeypatch.setattr(_launch, "current_stream", lambda device: 0)
    monkeypatch.setattr(_backends, "machine_reason", lambda backend: None)
    monkeypatch.setattr(_backends, "_device_reason", lambda backend, device: None)
    _launch._kernel.cache_clear()
    yield
    _launch._kernel.cache_clear()


@pytest.fixture
def given(rng):
    """Noisy images, training images, and directions."""
    images = random_images(rng, 40, SHAPE, torch.uint8)
    clean = images[:2].float() / 127.5 - 1
    x = ALPHA * clean + SIGMA * torch.randn(clean.shape, generator=rng)
    return x, images, torch.randn(2, *x.shape, generator=rng)


LEVEL = (3, SIGMA, ALPHA)
CALLS = {
    "window_posterior_mean": lambda f, x, images, g, **o: f(x, images, *LEVEL, **o),
    "window_posterior_jvp": lambda f, x, images, g, **o: f(x, g, images, *LEVEL, **o),
    "window_posterior_vjp": lambda f, x, images, g, **o: f(x, g, images, *LEVEL, **o),
    "patch_set_mean": lambda f, x, images, g, **o: f(x, images, *LEVEL, **o),
}


def parts_of(result: object) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@need_compiler
@pytest.mark.parametrize("name", CALLS)
def test_functions_answer_in_the_kind_of_x_without_a_copy(name, gpu, given, monkeypatch):
    x, images, directions = given
    exact = CALLS[name](
        getattr(ops, name),
        x.double(),
        images,
        directions.double(),
        temperature=TEMPERATURE,
        backend="reference",
    )
    read = set()

    def run(launched, *arguments):
        read.update(one.data_ptr() for one in arguments if isinstance(one, Tensor))
        _launch.run(launched, *arguments)

    monkeypatch.setattr("pyflocality.kernels.cuda._windows.run", run)
    for kind, answered in ((CupyArray, CupyArray), (Producer, Tensor), (Tensor, Tensor)):
        read.clear()
        wrapped = [tensor if kind is Tensor else kind(tensor) for tensor in given]
        found = CALLS[name](getattr(arrays, name), *wrapped, temperature=TEMPERATURE)
        assert images.data_ptr() in read
        for one, true in zip(parts_of(found), parts_of(exact), strict=True):
            assert type(one) is answered
            values = one if answered is Tensor else one.tensor
            assert values.dtype == torch.float32
            torch.testing.assert_close(values.double(), true, rtol=1e-4, atol=1e-5)


@need_compiler
def test_rows_are_those_of_the_transposed_derivative(gpu, given):
    x, images, _ = given
    outputs = [(0, 0, 0), (1, 2, 5)]
    found = arrays.window_posterior_rows(
        CupyArray(x), CupyArray(images), outputs, *LEVEL, temperature=TEMPERATURE
    )
    assert type(found) is CupyArray and found.tensor.shape == (2, 2, *SHAPE)
    for r, (channel, row, column) in enumerate(outputs):
        one = torch.zeros_like(x)[None].double()
        one[:, :, channel, row, column] = 1
        exact = ops.window_posterior_vjp(
            x.double(), one, images, *LEVEL, temperature=TEMPERATURE, backend="reference"
        )
        torch.testing.assert_close(found.tensor[:, r].double(), exact[0], rtol=1e-4, atol=1e-5)
    half = arrays.window_posterior_rows(x.half(), images, outputs, *LEVEL)
    assert half.dtype == torch.float16


def test_wrong_arguments_are_named(gpu, given):
    x, images, directions = given
    rows = [(0, 0, 0)]
    with pytest.raises(TypeError, match="`tangents` must be .* with `__dlpack__`, got a list"):
        arrays.window_posterior_jvp(x, [1.0], images, *LEVEL)
    with pytest.raises(TypeError, match="`cotangents` must be .* got a list"):
        arrays.window_posterior_vjp(x, [1.0], images, *LEVEL)
    with pytest.raises(ValueError, match="`window` must be odd"):
        arrays.window_posterior_rows(x, images, rows, 4, SIGMA)
    with pytest.raises(ValueError, match="`sigma` must"):
        arrays.window_posterior_rows(x, images, rows, 3, 0.0)
    with pytest.raises(BackendUnavailableError, match="window_posterior_rows: it computes in f"):
        arrays.window_posterior_rows(x.double(), images, rows, *LEVEL)
    with pytest.raises(ValueError, match="`outputs` must be"):
        arrays.window_posterior_rows(x, images, [(5, 0, 0)], *LEVEL)
    with pytest.raises(ValueError, match="`outputs` must be .*0.5"):
        arrays.window_posterior_rows(x, images, [(0.5, 0, 0)], *LEVEL)
    with pytest.raises(ValueError, match="`images` must not have negative strides"):
        arrays.window_posterior_mean(x, images.numpy()[::-1], *LEVEL)
    with pytest.raises(TypeError, match="`x` cannot be passed through DLPack"):
        arrays.window_posterior_mean(x.numpy().astype(">f4"), images, *LEVEL)
    with pytest.raises(ValueError, match="`outputs` must be at least one .* got none"):
        arrays.window_posterior_rows(x, images, [], *LEVEL)


def test_without_a_gpu_the_backend_says_why(given, monkeypatch):
    x, images, directions = given
    monkeypatch.setattr(_backends, "machine_reason", lambda backend: "no GPU")
    for name, call in CALLS.items():
        with pytest.raises(BackendUnavailableError, match="no GPU"):
            call(getattr(arrays, name), x, images, directions)
    with pytest.raises(BackendUnavailableError, match="window_posterior_rows: no GPU"):
        arrays.window_posterior_rows(x, images, [(0, 0, 0)], *LEVEL)
