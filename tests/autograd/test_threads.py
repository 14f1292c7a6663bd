"""Several threads at once: torch's forward mode, kept values, and settings of one thread alone."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from every_denoiser import MAKERS
from torch import Tensor, nn
from torch.autograd import forward_ad

import pyflocality as pf
from pyflocality import synthetic

SHAPE = (1, 4, 4)
THREADS = 8
CALLS = 240


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads that take turns often, with one thread in each operation."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


class Network(nn.Module):
    """A small network with attention, which fused kernels compute outside of derivatives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(y)))
        rows = y.flatten(2).transpose(1, 2)[:, None]
        seen = nn.functional.scaled_dot_product_attention(rows, rows, rows)
        return self.last(seen[:, 0].transpose(1, 2).reshape(y.shape)) / (1 + sigma.mean())


def data() -> pf.TrainingSet:
    generator = torch.Generator().manual_seed(0)
    return pf.TrainingSet(torch.randint(256, (12, *SHAPE), dtype=torch.uint8, generator=generator))


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float32)
    return x, torch.randn(3, 2, *SHAPE, generator=generator, dtype=torch.float32)


def by_sigma(denoiser: pf.Denoiser) -> Callable[[int], Tensor]:
    def call(seed: int) -> Tensor:
        sigma = torch.tensor([0.7, 0.9], requires_grad=True)
        denoiser(drawn(seed)[0], sigma, 0.8).square().sum().backward()
        return sigma.grad

    return call


def along(denoiser: pf.Denoiser, tangents: int = 3) -> Callable[[int], Tensor]:
    def call(seed: int) -> Tensor:
        x, u = drawn(seed)
        return torch.cat([part.flatten() for part in denoiser.jvp(x, u[:tangents], 0.7, 0.8)])

    return call


def second(denoiser: pf.Denoiser) -> Callable[[int], Tensor]:
    """A derivative of a derivative, which takes forward mode inside of forward mode."""

    def call(seed: int) -> Tensor:
        x, u = drawn(seed)
        x.requires_grad_()
        denoiser.jvp(x, u[:1], 0.7, 0.8)[1].square().sum().backward()
        return x.grad

    return call


def tangents_of_disks(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    places, grey = torch.rand(3, 3, generator=generator).double(), torch.ones(3).double()
    parameters = synthetic.DiskParameters(*(1 + places), grey, -grey)
    return synthetic.disk_tangents(parameters, 4)


def calls() -> list[Callable[[int], Tensor]]:
    network = pf.NetworkDenoiser(Network().eval(), takes="sigma", image_shape=SHAPE)
    wavelets = pf.WaveletShrinkageDenoiser(SHAPE, 2, rule="soft")
    local, optimal = pf.LocalDenoiser(data(), 3), pf.OptimalDenoiser(data())
    return [
        along(network),
        lambda seed: network(drawn(seed)[0], 0.7, 0.8).detach(),
        along(wavelets, 1),
        by_sigma(optimal),
        by_sigma(local),
        by_sigma(pf.PCALocalityDenoiser(data(), 0.1)),
        second(local),
        tangents_of_disks,
    ]


def answers(functions: list[Callable[[int], Tensor]], count: int, threads: int) -> list[Tensor]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda k: functions[k % len(functions)](k), range(count)))


@pytest.mark.slow
def test_forward_mode_of_many_threads_is_that_of_one():
    functions = calls()
    serial = [functions[k % len(functions)](k) for k in range(CALLS)]
    for found, expected in zip(answers(functions, CALLS, THREADS), serial, strict=True):
        assert torch.equal(found, expected)


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["dual_level", "torch.func.jvp"])
def test_threads_of_a_caller_who_is_inside_forward_mode(way):
    functions = calls()
    serial = [functions[k % len(functions)](k) for k in range(32)]
    if way == "dual_level":
        with forward_ad.dual_level():
            here = [functions[k % len(functions)](k) for k in range(32)]
            found = answers(functions, 32, THREADS)
    else:

        def waiting(x: Tensor) -> Tensor:
            found.extend(answers(functions, 32, THREADS))
            return x.sin()

        found, one = [], torch.ones(2)
        value, slope = torch.func.jvp(waiting, (one,), (one,))
        assert torch.equal(slope, one.cos())
        here = [functions[k % len(functions)](k) for k in range(32)]
    assert_all_close(found, serial)
    assert_all_close(here, serial)
    assert forward_ad._current_level == -1


def test_another_thread_goes_in_and_out_of_forward_mode():
    functions, done, entered = calls(), threading.Event(), []
    serial = [functions[k % len(functions)](k) for k in range(64)]
    x, u = torch.randn(50), torch.randn(50)

    def user() -> None:
        while not done.is_set():
            try:
                with forward_ad.dual_level():
                    slope = forward_ad.unpack_dual(forward_ad.make_dual(x, u).sin()).tangent
                    entered.append(torch.equal(slope, x.cos() * u))
            except RuntimeError as error:
                # Torch has one level, and a derivative of the library is at it.
                assert "Nested forward mode" in str(error)
            done.wait(1e-3)

    thread = threading.Thread(target=user)
    thread.start()
    try:
        found = answers(functions, 64, THREADS)
    finally:
        done.set()
        thread.join()
    assert all(entered)
    assert_all_close(found, serial)
    assert forward_ad._current_level == -1


class Inside(nn.Module):
    """A network that enters forward mode by itself."""

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        return torch.func.jvp(torch.sin, (y,), (y,))[1] + 0 * sigma.sum()


def test_a_network_that_is_inside_forward_mode_by_itself():
    denoiser = pf.NetworkDenoiser(Inside(), takes="sigma", image_shape=SHAPE)
    x, u = drawn(1)
    expected = u * (x.cos() - x * x.sin())
    # One at a time: torch.func.jvp in the network is not the library's.
    torch.testing.assert_close(denoiser.jvp(x, u, 0.7)[1], expected)
    torch.testing.assert_close(denoiser.vjp(x, u, 0.7), expected)
    assert forward_ad._current_level == -1
    torch.testing.assert_close(torch.func.jvp(torch.sin, (x,), (x,))[1], x * x.cos())


def test_calls_while_another_thread_compiles():
    functions, done = calls(), threading.Event()
    serial = [functions[k % len(functions)](k) for k in range(32)]
    optimal, x = pf.OptimalDenoiser(data()), drawn(1)[0]
    expected, compiled = optimal(x, 0.5), []

    def compile_again() -> None:
        while not done.is_set():
            torch.compiler.reset()
            compiled.append(torch.compile(optimal, backend="eager", fullgraph=True)(x, 0.5))

    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compile_again)
        try:
            found = answers(functions, 32, THREADS)
            with pytest.raises(ValueError, match="`x` holds NaN"):
                for _ in range(200):
                    optimal(x * torch.nan, 0.5)
        finally:
            done.set()
        compiling.result()
    torch.compiler.reset()
    assert all(torch.equal(one, expected) for one in compiled)
    for one, other in zip(found, serial, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in MAKERS if "batch_mean" not in name])
def test_one_denoiser_of_many_threads(name):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (30, 2, 4, 4), dtype=torch.uint8, generator=generator)
    alone, shared = (MAKERS[name](pf.TrainingSet(images)) for _ in range(2))
    x = torch.randn(2, 2, 4, 4, generator=generator)
    levels = [0.2 + 0.1 * (k % 12) for k in range(32)]
    serial = [alone(x, level) for level in levels]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda level: shared(x, level), levels))
    assert all(torch.equal(one, other) for one, other in zip(found, serial, strict=True))


def test_weights_that_are_dropped_while_other_threads_read_them():
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (30, 1, 4, 4), dtype=torch.uint8, generator=generator)
    # Room for the weights of two noise levels.
    denoiser = pf.PCALocalityDenoiser(pf.TrainingSet(images), 0.1, memory_budget=80)
    levels = [0.2 + 0.1 * (k % 5) for k in range(400)]
    serial = [denoiser.weights_at(level).bits for level in levels]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda level: denoiser.weights_at(level).bits, levels))
    assert all((one == other).all() for one, other in zip(found, serial, strict=True))
    assert len(denoiser._weights) <= 2


def test_what_is_kept_is_computed_once(monkeypatch):
    computed = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda matrix: computed.append(len(matrix)) or eigh(matrix)
    )
    moments = pf.Moments.from_data(data())
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda _: moments.eigh(), range(32)))
    assert computed == [16] and all(one is found[0] for one in found)
    for twin in (copy.deepcopy(moments), pickle.loads(pickle.dumps(moments))):
        assert torch.equal(twin.eigh().values, found[0].values)


@pytest.mark.slow
def test_analysis_from_many_threads():
    network = pf.NetworkDenoiser(Network().eval(), takes="sigma", image_shape=SHAPE)
    wavelets = pf.WaveletShrinkageDenoiser(SHAPE, 2, rule="soft")

    def look(seed: int) -> Tensor:
        denoiser = (network, wavelets, pf.LocalDenoiser(data(), 3))[seed % 3]
        x = drawn(seed)[0][:1]
        field = pf.analysis.sensitivity(denoiser, x, 0.7, 0.8, pixel=(0, 1, 2))
        found = pf.analysis.jacobian_spectrum(denoiser, x, 0.7, 0.8, k=2)
        return torch.cat([field.flatten(), found[0].flatten().to(field.dtype)])

    serial = [look(seed) for seed in range(24)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(look, range(24)))
    # The solver restarts at random where an eigenvalue is 0.
    for one, other in zip(found, serial, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_sets_that_threads_make_leave_the_filters_of_warnings_alone():
    images = np.zeros((4, *SHAPE), np.uint8)
    images.flags.writeable = False
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("always")
        sets = list(pool.map(lambda _: pf.TrainingSet(images), range(200)))
    assert [str(one.message) for one in told if "writable" in str(one.message)] == []
    assert warnings.filters == filters
    assert all(one.images.data_ptr() == images.ctypes.data for one in sets)


def test_settings_are_those_of_a_thread(monkeypatch):
    monkeypatch.delenv("PYFLOCALITY_BACKEND", raising=False)
    denoiser, x = pf.OptimalDenoiser(data()), drawn(1)[0]

    def ran() -> list[tuple[str, str]]:
        with pf.trace_backends() as calls:
            denoiser(x, 0.5)
        return calls

    with ThreadPoolExecutor(1) as pool:
        usual = pool.submit(ran).result()
        with pf.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
            assert ran() == [("global_posterior", "reference")]
            assert pool.submit(ran).result() == usual
        with pf.trace_backends() as calls:
            assert pool.submit(ran).result() == usual
        assert calls == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_process_changes_nothing(dtype):
    def found() -> list[Tensor]:
        x, u = drawn(1)
        denoisers = [maker(data()) for maker in MAKERS.values()]
        results = [part for one in denoisers for part in (one(x, 0.5), one.vjp(x, u, 0.5))]
        return [*results, along(pf.WaveletShrinkageDenoiser(SHAPE, 2, rule="soft"))(1)]

    expected = found()
    torch.set_default_dtype(dtype)
    try:
        changed = found()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(changed, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
