"""The CUDA kernels and their launchers on the host, against independent float64 truth.

A simulator runs the very sources that NVRTC compiles (`tests/helpers/cuda_simulator.py`).
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from cuda_simulator import SimulatedKernel, need_compiler, simulated_cupy
from torch import Tensor
from truth import filtered_posterior_mean, random_images, softmax, values_of, window_weights

import pyflocality as pf
from pyflocality import ops
from pyflocality.backends import selection as _backends
from pyflocality.kernels import geometry, stored
from pyflocality.kernels.cuda import (
    _launch,
    _window_rows,
    _windows,
    patch_set,
    window_posterior,
)
from pyflocality.kernels.cuda._window_rows import window_posterior_rows
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize, finalize_jvp, log_sum_exp
from pyflocality.posterior.tangents import jacobian_factor
from pyflocality.reference import window_posterior as reference

pytestmark = need_compiler

# float32 rounding of a squared distance of some hundred terms, relative.
EPS = 1.2e-7


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    """CuPy's stand-in, and new memory full of NaN."""
    monkeypatch.setitem(sys.modules, "cupy", simulated_cupy())
    monkeypatch.setattr(_launch, "device_index", lambda device: 0)
    monkeypatch.setattr(_launch, "current_stream", lambda device: 0)
    monkeypatch.setattr(SimulatedKernel, "order", 0)
    _launch._kernel.cache_clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    _launch._kernel.cache_clear()


def noisy_problem(shape, count, batch, dtype, rng, **options):
    """Images, noisy images of some of them, and levels that differ within the batch."""
    images = random_images(rng, count, shape, dtype)
    sigma, alpha = torch.linspace(0.3, 0.9, batch), torch.linspace(0.95, 0.4, batch)
    chosen = torch.from_numpy(values_of(images[torch.randint(count, (batch,), generator=rng)]))
    noise = torch.randn(batch, *shape, generator=rng)
    x = alpha[:, None, None, None] * chosen + sigma[:, None, None, None] * noise
    return posterior_problem(x.float(), images, sigma, alpha, **options), sigma, alpha


def mean_of(problem, window: int) -> Tensor:
    state = window_posterior.scan(problem, window)
    return finalize(state).transpose(1, 2).reshape(problem.x.shape)


def plain_mean(x: Tensor, images: Tensor, window: int, sigma, alpha) -> Tensor:
    state = reference.scan(posterior_problem(x, images, sigma, alpha), window)
    return finalize(state).transpose(1, 2).reshape(x.shape)


def jvp_of(problem, directions: Tensor, window: int) -> tuple[Tensor, Tensor]:
    state = window_posterior.jvp(problem, directions, window)
    mean, jv = finalize_jvp(state, problem.x.shape[1], jacobian_factor(problem))
    mean, jv = mean.transpose(-1, -2), jv.transpose(-1, -2)
    return mean.reshape(problem.x.shape), jv.reshape(directions.shape)


def assert_within_budget(found: Tensor, exact: np.ndarray | Tensor, plain: Tensor, terms: int):
    """Twice the error of the float32 reference, and what rounding the distances may cost."""
    exact = torch.as_tensor(exact)
    budget = 2 * (plain.double() - exact).abs().max() + 4 * EPS * terms * max(1, exact.abs().max())
    assert torch.isfinite(found).all()
    assert (found.double() - exact).abs().max() <= budget


SCANS = [
    # Bytes in rows of fours, a window that a block of registers holds, several groups and splits.
    ((3, 6, 8), 77, 3, 3, torch.uint8),
    # Odd sizes; floats; sums of lines in shared memory; a window that covers everything.
    ((1, 9, 13), 45, 2, 25, torch.float32),
    # Two slices of channels.
    pytest.param((5, 5, 6), 33, 1, 5, torch.uint8, marks=pytest.mark.slow),
    # Several tiles in both directions, cut at the border.
    pytest.param((2, 67, 66), 11, 1, 5, torch.uint8, marks=pytest.mark.slow),
    # Regions in bands of rows.
    pytest.param((1, 150, 170), 3, 1, 299, torch.uint8, marks=pytest.mark.slow),
    pytest.param((3, 8, 8), 1, 2, 7, torch.float32, marks=pytest.mark.slow),
    pytest.param((1, 1, 9), 40, 2, 17, torch.uint8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "count", "batch", "window", "dtype"), SCANS)
def test_window_posterior(shape, count, batch, window, dtype, rng):
    problem, sigma, alpha = noisy_problem(shape, count, batch, dtype, rng)
    found = mean_of(problem, window)
    if max(shape) < 20:
        weights, answers = window_weights(shape, window)
        exact = filtered_posterior_mean(
            problem.x, problem.images, weights, answers, sigma.numpy(), alpha.numpy()
        )
    else:
        exact = plain_mean(problem.x.double(), problem.images, window, sigma, alpha)
    plain = plain_mean(problem.x, problem.images, window, sigma, alpha)
    assert_within_budget(found, exact, plain, shape[0] * min(window, shape[1], shape[2]) ** 2)


def test_bands_are_planned_where_the_slow_test_means_them():
    plan = geometry.plan_window(geometry.WindowShape(1, 150, 170, 299, True, False))
    assert plan.band_rows < plan.region_height and plan.tiles > 1


def test_state_is_that_of_the_reference(rng):
    problem, sigma, alpha = noisy_problem((3, 6, 8), 77, 3, torch.uint8, rng)
    found = window_posterior.scan(problem, 3)
    exact_problem = posterior_problem(problem.x.double(), problem.images, sigma, alpha)
    exact = reference.scan(exact_problem, 3)
    assert {part.dtype for part in found} == {torch.float32}
    torch.testing.assert_close(found.minimum.double(), exact.minimum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        log_sum_exp(found, problem.scale), log_sum_exp(exact, problem.scale), rtol=1e-5, atol=1e-4
    )


def test_no_result_depends_on_the_order_of_threads(rng, monkeypatch):
    """A missing barrier would show: what a thread reads would be written before or after."""
    problem, _, _ = noisy_problem((3, 6, 8), 77, 2, torch.uint8, rng)
    directions = torch.randn(2, *problem.x.shape, generator=rng)
    results = []
    for order in (0, 1, 2):
        monkeypatch.setattr(SimulatedKernel, "order", order)
        results.append(
            (
                mean_of(problem, 3),
                jvp_of(problem, directions, 3)[1],
                patch_set.scan(problem, 4),
                window_posterior_rows(problem, [(1, 2, 3)], 3),
            )
        )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.slow
def test_no_result_of_a_tile_depends_on_the_order_of_threads(rng, monkeypatch):
    """Several tiles and groups of images: threads overwrite what others have read."""
    problem, _, _ = noisy_problem((1, 67, 70), 11, 1, torch.uint8, rng)
    results = []
    for order in (0, 1, 2):
        monkeypatch.setattr(SimulatedKernel, "order", order)
        results.append(mean_of(problem, 5))
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_an_image_has_the_same_bits_in_every_batch(rng):
    problem, sigma, alpha = noisy_problem((3, 6, 8), 77, 3, torch.uint8, rng)
    together = mean_of(problem, 3)
    for b in range(3):
        alone = posterior_problem(problem.x[b : b + 1], problem.images, sigma[b], alpha[b])
        assert torch.equal(mean_of(alone, 3)[0], together[b])
    narrow = posterior_problem(problem.x, problem.images, sigma, alpha, memory_budget=1)
    assert torch.equal(mean_of(narrow, 3), together)


def test_chunks_and_strides(rng):
    problem, sigma, alpha = noisy_problem((3, 6, 8), 77, 2, torch.uint8, rng)
    whole = mean_of(problem, 3)
    parts = posterior_problem(problem.x, problem.images, sigma, alpha, chunk_size=30)
    torch.testing.assert_close(mean_of(parts, 3), whole, rtol=0, atol=1e-6)
    strided = problem.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    again = posterior_problem(problem.x, strided, sigma, alpha)
    assert torch.equal(mean_of(again, 3), whole)


def test_images_at_odd_addresses(rng):
    """Rows of whole fours that start between words are read byte by byte."""
    problem, sigma, alpha = noisy_problem((3, 6, 8), 77, 2, torch.uint8, rng)
    memory = torch.zeros(problem.images.numel() + 1, dtype=torch.uint8)
    memory[1:] = problem.images.flatten()
    shifted = memory[1:].reshape(problem.images.shape)
    again = posterior_problem(problem.x, shifted, sigma, alpha)
    torch.testing.assert_close(mean_of(again, 3), mean_of(problem, 3), rtol=0, atol=1e-6)


def test_directions_at_odd_addresses_are_moved(rng, monkeypatch):
    """Values are read in fours, which must not start between them."""
    problem, _, _ = noisy_problem((3, 6, 8), 77, 1, torch.uint8, rng)
    memory = torch.randn(problem.x.numel() + 1, generator=rng)
    directions = memory[1:].view(1, *problem.x.shape)
    assert directions.data_ptr() % 16 == 4
    addresses = []

    def note(launched, *arguments):
        addresses.extend(
            argument.data_ptr()
            for argument in arguments
            if isinstance(argument, Tensor) and argument.numel() == directions.numel()
        )
        _launch.run(launched, *arguments)

    monkeypatch.setattr(_windows, "run", note)
    mean, found = jvp_of(problem, directions, 3)
    products = window_posterior.vjp(problem, directions, 3)
    assert addresses and all(address % 16 == 0 for address in addresses)
    mean_too, found_too = jvp_of(problem, directions.clone(), 3)
    assert torch.equal(mean, mean_too) and torch.equal(found, found_too)
    assert torch.equal(products, window_posterior.vjp(problem, directions.clone(), 3))


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-3, 80.0, 1e6])
def test_noise_at_its_extremes(sigma, rng):
    images = random_images(rng, 60, (3, 6, 8), torch.uint8)
    twins = torch.cat([images[:1], images[:1], images[1:]])
    x = torch.from_numpy(values_of(images[:1])).float()
    found = mean_of(posterior_problem(x, twins, sigma, 1.0), 3)
    exact = plain_mean(x.double(), twins, 3, sigma, 1.0)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("tangents", "window"), [(2, 3), pytest.param(3, 17, marks=pytest.mark.slow)]
)
def test_jvp(tangents, window, rng):
    shape = (3, 6, 8) if window == 3 else (4, 9, 7)
    dtype = torch.uint8 if window == 3 else torch.float32
    problem, sigma, alpha = noisy_problem(shape, 77, 2, dtype, rng)
    directions = torch.randn(tangents, *problem.x.shape, generator=rng)
    mean, found = jvp_of(problem, directions, window)

    def derivative(x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        function = lambda z: plain_mean(z, problem.images, window, sigma, alpha)  # noqa: E731
        return torch.func.jvp(function, (x,), (direction.to(x.dtype),))

    for k in range(tangents):
        exact_mean, exact = derivative(problem.x.double(), directions[k])
        plain_value, plain = derivative(problem.x, directions[k])
        assert_within_budget(mean, exact_mean, plain_value, 200)
        assert_within_budget(found[k], exact, plain, 200)


def test_no_tangents(rng):
    problem, _, _ = noisy_problem((3, 6, 8), 77, 2, torch.uint8, rng)
    mean, found = jvp_of(problem, torch.empty(0, *problem.x.shape), 3)
    assert found.shape == (0, *problem.x.shape)
    torch.testing.assert_close(mean, mean_of(problem, 3).double(), rtol=0, atol=1e-5)


def test_no_noisy_images(rng, monkeypatch):
    """Empty results of the right shapes, without a launch."""
    images = random_images(rng, 5, (3, 6, 8), torch.uint8)
    x, none = torch.empty(0, 3, 6, 8), torch.empty(0)
    problem = posterior_problem(x, images, none, none)
    monkeypatch.setattr(SimulatedKernel, "__call__", None)
    state = window_posterior.scan(problem, 3)
    assert [part.shape for part in state] == [(0, 48), (0, 48), (0, 48, 3)]
    assert patch_set.scan(problem, 3).shape == x.shape
    assert window_posterior_rows(problem, [(0, 0, 0), (2, 3, 4)], 3).shape == (0, 2, 3, 6, 8)
    for tangents in (0, 1, 3):
        directions = torch.empty(tangents, *x.shape)
        mean, found = jvp_of(problem, directions, 3)
        assert mean.shape == x.shape and found.shape == directions.shape
        assert window_posterior.vjp(problem, directions, 3).shape == directions.shape


def test_vjp_and_rows(rng):
    problem, sigma, alpha = noisy_problem((3, 6, 8), 77, 2, torch.uint8, rng)

    def derivative(x: Tensor, cotangent: Tensor) -> Tensor:
        _, pull = torch.func.vjp(lambda z: plain_mean(z, problem.images, 3, sigma, alpha), x)
        return pull(cotangent.to(x.dtype))[0]

    cotangent = torch.randn(problem.x.shape, generator=rng)
    exact = derivative(problem.x.double(), cotangent)
    plain = derivative(problem.x, cotangent)
    found = window_posterior.vjp(problem, torch.stack([cotangent, -2 * cotangent]), 3)
    assert_within_budget(found[0], exact, plain, 27)
    assert torch.equal(found[1], -2 * found[0])
    assert window_posterior.vjp(problem, found[:0], 3).shape == (0, *problem.x.shape)

    outputs = [(0, 0, 0), (2, 3, 4), (1, 5, 7)]
    rows = window_posterior_rows(problem, outputs, 3)
    for r, (channel, row, column) in enumerate(outputs):
        one = torch.zeros_like(problem.x)
        one[:, channel, row, column] = 1
        exact = derivative(problem.x.double(), one)
        assert_within_budget(rows[:, r], exact, derivative(problem.x, one), 27)
        assert (rows[:, r, :, : max(0, row - 1)] == 0).all()
    with pytest.raises(
        ValueError, match=r"`outputs` must be .* within \(3, 6, 8\), got \(3, 0, 0\)"
    ):
        window_posterior_rows(problem, [(3, 0, 0)], 3)


def patch_set_truth(problem, window, sigma, alpha) -> np.ndarray:
    values, x = values_of(problem.images), problem.x.double().numpy()
    total, count = np.zeros(x.shape), np.zeros(x.shape)
    height, width = x.shape[2:]
    for top in range(height - window + 1):
        for left in range(width - window + 1):
            place = (slice(None), slice(top, top + window), slice(left, left + window))
            for b in range(len(x)):
                patches = values[(slice(None), *place)].reshape(len(values), -1)
                gap = x[(b, *place)].reshape(-1) - float(alpha[b]) * patches
                weights = softmax(-(gap**2).sum(1) / (2 * float(sigma[b]) ** 2))
                total[(b, *place)] += (weights @ patches).reshape(x[(b, *place)].shape)
                count[(b, *place)] += 1
    return total / count


@pytest.mark.parametrize(
    ("shape", "window", "dtype"),
    [
        ((3, 6, 8), 3, torch.uint8),
        ((1, 7, 9), 4, torch.float32),
        pytest.param((3, 6, 8), 1, torch.uint8, marks=pytest.mark.slow),
        pytest.param((5, 6, 7), 6, torch.uint8, marks=pytest.mark.slow),
        pytest.param((1, 18, 19), 18, torch.uint8, marks=pytest.mark.slow),
    ],
)
def test_patch_set(shape, window, dtype, rng):
    problem, sigma, alpha = noisy_problem(shape, 45, 2, dtype, rng)
    found = patch_set.scan(problem, window)
    exact = patch_set_truth(problem, window, sigma, alpha)
    np.testing.assert_allclose(found.double().numpy(), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.0])
@pytest.mark.parametrize(("shape", "window"), [((1, 70, 72), 33), ((4, 64, 64), 9)])
def test_a_pass_over_whole_images_finds_what_a_scan_of_tiles_found(shape, window, sigma, rng):
    """To the last bit: far from all images, at little noise, each bit of a distance counts."""
    sizes = geometry.WindowShape(*shape, window, stored_bytes=True, vector=True)
    assert geometry.plan_window(sizes).tiles > 1 and geometry.plan_vjp(sizes).tiles == 1
    images = random_images(rng, 5, shape, torch.uint8)
    x = torch.from_numpy(values_of(images[:1])).float() + 0.5 * torch.randn(
        1, *shape, generator=rng
    )
    found = patch_set.scan(posterior_problem(x, images, sigma, 1.0), window)
    exact = ops.patch_set_mean(x.double(), images, window, sigma, backend="reference")
    plain = ops.patch_set_mean(x, images, window, sigma, backend="reference")
    assert_within_budget(found, exact, plain, 1)


def test_patch_sets_need_windows_that_fit(rng):
    problem, _, _ = noisy_problem((3, 6, 8), 5, 1, torch.uint8, rng)
    with pytest.raises(ValueError, match="`window` must be at most 6 to fit inside a 6x8 image"):
        patch_set.scan(problem, 7)


def test_operations_by_name(rng, monkeypatch):
    """Were there a GPU: the public operations on the backend, and a model of them."""
    monkeypatch.setattr(_backends, "machine_reason", lambda backend: None)
    monkeypatch.setattr(_backends, "_device_reason", lambda backend, device: None)
    problem, sigma, alpha = noisy_problem((3, 6, 8), 45, 2, torch.uint8, rng)
    x, given = problem.x, (problem.images, 3, sigma, alpha)
    directions = torch.randn(2, *x.shape, generator=rng)
    calls = {
        "window_posterior": lambda z, u: ops.window_posterior_mean(z, *given),
        "window_posterior_jvp": lambda z, u: ops.window_posterior_jvp(z, u, *given)[1],
        "window_posterior_vjp": lambda z, u: ops.window_posterior_vjp(z, u, *given),
        "patch_set": lambda z, u: ops.patch_set_mean(z, *given),
    }
    for op, call in calls.items():
        with pf.use_backend("cuda"), pf.trace_backends() as ran:
            found = call(x, directions)
        assert ran == [(op, "cuda")]
        with pf.use_backend("reference"):
            exact, plain = call(x.double(), directions.double()), call(x, directions)
        assert_within_budget(found, exact, plain, 27)
    model = pf.LocalDenoiser(pf.TrainingSet(problem.images), window=3, backend="cuda")
    again = model(x, sigma, alpha)
    assert torch.equal(again, ops.window_posterior_mean(x, *given, backend="cuda"))
    with pf.trace_backends() as ran:
        field = pf.analysis.sensitivity(model, x, sigma, alpha, pixel=(1, 2, 3))
    assert ran == [("window_posterior_vjp", "cuda")]
    one = torch.zeros_like(x)
    one[:, 1, 2, 3] = 1
    assert torch.equal(field, model.vjp(x, one[None], sigma, alpha)[0].abs())


@pytest.mark.parametrize("strided", [False, True])
def test_rows_of_many_noisy_images_fit_the_budget(strided, rng, monkeypatch):
    """The distances of all noisy images to all images were held at once, whatever the budget."""
    problem, sigma, alpha = noisy_problem((1, 6, 8), 40, 3, torch.uint8, rng)
    whole = window_posterior_rows(problem, [(0, 2, 3)], 3)
    batches = []
    monkeypatch.setattr(
        _window_rows,
        "run",
        lambda launched, *arguments: (
            batches.append(launched.grid[1]),
            _launch.run(launched, *arguments),
        ),
    )
    images = problem.images
    if strided:
        images = images.repeat_interleave(2, 3)[..., ::2]
        monkeypatch.setattr(stored, "_BLOCK_BYTES", 15 * 48)
    # One noisy image's distances, weights and sums, and half of another's.
    some = posterior_problem(problem.x, images, sigma, alpha, memory_budget=22_000)
    found = window_posterior_rows(some, [(0, 2, 3)], 3)
    assert set(batches) == {1} and len(batches) == 3 * 2 * (3 if strided else 1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
