"""Jacobian-vector products of the posterior means: reference in float64, native kernels."""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest
import torch
from native_cpu import ISAS, needs_cpu
from torch import Tensor
from truth import filtered_posterior_mean, random_images, values_of, window_weights

import pyflocality as pf
from pyflocality.backends.selection import OPERATIONS, BackendUnavailableError
from pyflocality.kernels.cpu import jvp as native
from pyflocality.ops import (
    global_posterior_jvp,
    global_posterior_mean,
    masked_posterior_jvp,
    masked_posterior_mean,
    window_posterior_jvp,
    window_posterior_mean,
)
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize_jvp, merge_tangents
from pyflocality.posterior.tangents import jacobian_factor
from pyflocality.weights import QueryWeights

OPS = ("global", "window", "masked")
MEANS = {
    "global": global_posterior_mean,
    "window": window_posterior_mean,
    "masked": masked_posterior_mean,
}
JVPS = {
    "global": global_posterior_jvp,
    "window": window_posterior_jvp,
    "masked": masked_posterior_jvp,
}
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
SHAPE = (3, 6, 5)
SIGMA = torch.tensor([0.05, 0.4, 1.2], dtype=torch.float64)
ALPHA = torch.tensor([1.0, 0.8, 0.9], dtype=torch.float64)
# float32 rounding of a sum of some hundred terms, relative.
EPS = 1.2e-7


@functools.lru_cache
def masks(shape: tuple[int, int, int]) -> QueryWeights:
    """Masks that differ a little between neighbours, with an empty, a full and a dense one."""
    generator = torch.Generator().manual_seed(3)
    channels, height, width = shape
    rows, columns = np.divmod(np.arange(height * width), width)
    near = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns) <= 2
    chosen = torch.from_numpy(np.tile(near, (channels, channels)))
    chosen ^= torch.rand(chosen.shape, generator=generator) < 0.05
    chosen[0] = False
    chosen[len(chosen) // 2] = True
    chosen[-1] = torch.rand(chosen.shape[1], generator=generator) < 0.9
    return QueryWeights(chosen)


def extra(op: str, shape: tuple[int, ...]) -> tuple[object, ...]:
    return {"global": (), "window": (3,), "masked": (masks(tuple(shape)),)}[op]


def mean(op: str, x: Tensor, images: Tensor, *levels: object, **options: object) -> Tensor:
    return MEANS[op](x, images, *extra(op, images.shape[1:]), *levels, **options)


def jvp(
    op: str, x: Tensor, tangents: Tensor, images: Tensor, *levels: object, **options: object
) -> tuple[Tensor, Tensor]:
    return JVPS[op](x, tangents, images, *extra(op, images.shape[1:]), *levels, **options)


def problem(
    generator: torch.Generator,
    count: int = 41,
    batch: int = 3,
    tangents: int = 3,
    *,
    shape: tuple[int, int, int] = SHAPE,
    stored: torch.dtype = torch.uint8,
    sigma: Tensor | float = SIGMA,
    alpha: Tensor | float = ALPHA,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images near training images, tangents and images, float64."""
    images = random_images(generator, count, shape, stored)
    clean = values_of(images[torch.randint(count, (batch,), generator=generator)])
    level = [torch.as_tensor(value, dtype=torch.float64).expand(batch) for value in (sigma, alpha)]
    sigma, alpha = (value[:, None, None, None] for value in level)
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    directions = torch.randn(tangents, batch, *shape, generator=generator, dtype=torch.float64)
    # Values that float32 holds, so that both precisions see the same problem.
    x = (alpha * torch.from_numpy(clean) + sigma * noise).float().double()
    return x, directions.float().double(), images


def largest(values: Tensor) -> float:
    """Largest absolute value, 0 if there are none."""
    return float(values.abs().max()) if values.numel() > 0 else 0.0


def assert_within_budget(
    found: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    plain: tuple[Tensor, Tensor],
    tangents: Tensor,
    sigma: float,
    alpha: float,
) -> None:
    """Twice the error of the float32 reference, and what float32 sums may cost.

    A logit, about half the number of values where an image fits, has a relative error of EPS,
    which moves an answer by that much of itself. Values and inner products are counted from near
    the image that fits, so their products are of order min(sigma / alpha, 1)^2 |u|; their
    rounding is multiplied by alpha / sigma^2.
    """
    logit = exact[0][0].numel() * (1 + 1 / max(sigma / alpha, 0.1))
    product = alpha / sigma**2 * min(sigma / alpha, 1) ** 2
    size = largest(tangents.flatten(2).norm(dim=-1))
    rounding = (4 * logit, 4 * logit * largest(exact[1]) + 8 * product * size)
    for one, true, near, allowed in zip(found, exact, plain, rounding, strict=True):
        assert one.shape == true.shape
        assert largest(one - true) <= 2 * largest(near - true) + EPS * allowed


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("tangents", [1, 3])
def test_reference_is_the_derivative_of_the_mean(op, stored, tangents, rng):
    x, directions, images = problem(rng, tangents=tangents, stored=stored)
    found_mean, found = jvp(op, x, directions, images, SIGMA, ALPHA, temperature=1.3)
    for k in range(tangents):
        expected_mean, expected = torch.func.jvp(
            lambda z: mean(op, z, images, SIGMA, ALPHA, temperature=1.3), (x,), (directions[k],)
        )
        torch.testing.assert_close(found_mean, expected_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[k], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_reference_equals_finite_differences(op, rng):
    x, directions, images = problem(rng, tangents=2)
    _, found = jvp(op, x, directions, images, SIGMA, ALPHA)
    if op == "global":
        weights, answers = np.ones((1, 90)), [np.arange(90)]
    elif op == "window":
        weights, answers = window_weights(SHAPE, 3)
    else:
        weights = masks(SHAPE).dense(torch.float64).numpy()
        answers = [np.array([m]) for m in range(90)]
    assert found.abs().max() > 0.1
    for k in range(2):
        ends = [
            filtered_posterior_mean(
                x + step * directions[k], images, weights, answers, SIGMA.numpy(), ALPHA.numpy()
            )
            for step in (1e-5, -1e-5)
        ]
        # The third derivative grows as sigma^-6, times step^2 = 1e-10; rounding 1e-16 / step.
        np.testing.assert_allclose(found[k].numpy(), (ends[0] - ends[1]) / 2e-5, rtol=0, atol=1e-4)


def test_soft_weights(rng):
    x, directions, images = problem(rng)
    weights = torch.rand(90, 90, generator=rng, dtype=torch.float64)
    _, found = masked_posterior_jvp(x, directions, images, weights, SIGMA, ALPHA)
    for k in range(3):
        _, expected = torch.func.jvp(
            lambda z: masked_posterior_mean(z, images, weights, SIGMA, ALPHA),
            (x,),
            (directions[k],),
        )
        torch.testing.assert_close(found[k], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_reference_is_differentiable(op, rng):
    x, directions, images = problem(
        rng, count=7, batch=1, tangents=2, shape=(2, 2, 3), sigma=0.7, alpha=0.9
    )
    torch.autograd.gradcheck(
        lambda z, u: jvp(op, z, u, images, 0.7, 0.9, chunk_size=3),
        (x.requires_grad_(), directions.requires_grad_()),
        eps=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_unit_tangents_give_the_jacobian(op, backend, rng):
    shape = (2, 3, 4)
    x, _, images = problem(rng, count=60, batch=1, shape=shape, sigma=0.3, alpha=0.9)
    units = torch.eye(24).reshape(24, 1, *shape)
    _, found = jvp(op, x.float(), units, images, 0.3, 0.9, backend=backend)
    exact = torch.func.jacrev(lambda z: mean(op, z, images, 0.3, 0.9))(x).reshape(24, 24)
    jacobian = found.reshape(24, 24).T.double()
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(jacobian, exact, rtol=0, atol=2e-5)
    if op == "global":
        torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=2e-5)


@functools.lru_cache
def reference_case(
    op: str,
    stored: torch.dtype,
    shape: tuple[int, int, int],
    count: int,
    tangents: int,
    sigma: float,
    alpha: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A problem and its answers by the reference, in float64 and in float32."""
    generator = torch.Generator().manual_seed(count + tangents)
    given = problem(
        generator, count, 3, tangents, shape=shape, stored=stored, sigma=sigma, alpha=alpha
    )
    x, directions, images = given
    exact = jvp(op, x, directions, images, sigma, alpha, backend="reference")
    narrow = x.float(), directions.float(), images
    return given, exact, jvp(op, *narrow, sigma, alpha, backend="reference")


@needs_cpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 6, 6), (2, 1, 9)])
@pytest.mark.parametrize(
    ("count", "tangents"), [(1, 1), (2, 9), (47, 0), (49, 3), (301, 8), (1600, 1)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_size(isa, op, stored, shape, count, tangents):
    sigma, alpha = 0.4, 0.9
    given, exact, plain = reference_case(op, stored, shape, count, tangents, sigma, alpha)
    x, directions, images = given
    given = posterior_problem(x.float(), images, sigma, alpha)
    scan = getattr(native, f"{op}_posterior_jvp_state")
    state = scan(given, directions.float(), *extra(op, shape), instruction_set=isa)
    values = {"global": x[0].numel(), "window": shape[0], "masked": 1}[op]
    found = finalize_jvp(state, values, jacobian_factor(given))
    if op == "window":
        found = tuple(part.transpose(-1, -2) for part in found)
    found = found[0].reshape(x.shape), found[1].reshape(directions.shape)
    assert_within_budget(found, exact, plain, directions, sigma, alpha)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.3, 2.0, 80.0, 1e3])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_every_noise_level(op, sigma, alpha):
    given, exact, plain = reference_case(op, torch.uint8, SHAPE, 200, 3, sigma, alpha)
    x, directions, images = given
    found = jvp(op, x.float(), directions.float(), images, sigma, alpha, backend="cpu")
    assert_within_budget(found, exact, plain, directions, sigma, alpha)


@needs_cpu
@pytest.mark.parametrize("window", [1, 5, 7, 17])
@pytest.mark.parametrize("shape", [(3, 9, 6), (1, 4, 9)])
def test_every_window(window, shape, rng):
    x, directions, images = problem(rng, 100, 2, 2, shape=shape, sigma=0.5, alpha=1.0)
    found = window_posterior_jvp(x.float(), directions.float(), images, window, 0.5, backend="cpu")
    exact = window_posterior_jvp(x, directions, images, window, 0.5)
    for one, true in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_levels_of_each_image(op, backend, rng):
    x, directions, images = problem(rng)
    together = jvp(op, x.float(), directions.float(), images, SIGMA, ALPHA, backend=backend)
    for b in range(3):
        alone = jvp(
            op, x[b : b + 1], directions[:, b : b + 1], images, float(SIGMA[b]), float(ALPHA[b])
        )
        torch.testing.assert_close(together[0][b].double(), alone[0][0], rtol=0, atol=2e-5)
        torch.testing.assert_close(together[1][:, b].double(), alone[1][:, 0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_means_are_those_without_tangents(op, backend, rng):
    x, directions, images = problem(rng)
    found, _ = jvp(op, x.float(), directions.float(), images, SIGMA, ALPHA, backend=backend)
    plain = mean(op, x.float(), images, SIGMA, ALPHA, backend=backend)
    # Sums of at most 41 values counted from another origin.
    torch.testing.assert_close(found, plain, rtol=0, atol=4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_one_image_does_not_move(op, backend, rng):
    x, directions, images = problem(rng, count=1)
    found, derivative = jvp(
        op, x.float(), directions.float(), images, SIGMA, ALPHA, backend=backend
    )
    expected = torch.from_numpy(values_of(images)).expand_as(x)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    # Products of order |u| / alpha, rounded.
    assert derivative.abs().max() <= 40 * EPS * directions.flatten(2).norm(dim=-1).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_weights_does_not_move(backend, rng):
    x, directions, images = problem(rng)
    found, derivative = jvp(
        "masked", x.float(), directions.float(), images, SIGMA, ALPHA, backend=backend
    )
    plain = torch.from_numpy(values_of(images)).reshape(41, -1)[:, 0].mean().float().expand(3)
    torch.testing.assert_close(found.reshape(3, -1)[:, 0], plain, rtol=0, atol=1e-6)
    assert (derivative.reshape(3, 3, -1)[..., 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_no_tangents_and_no_images(op, backend, rng):
    x, directions, images = problem(rng, tangents=2)
    x, directions = x.float(), directions.float()
    found, derivative = jvp(op, x, directions[:0], images, SIGMA, ALPHA, backend=backend)
    plain = mean(op, x, images, SIGMA, ALPHA, backend=backend)
    torch.testing.assert_close(found, plain, rtol=0, atol=4e-6)
    assert derivative.shape == (0, 3, *SHAPE)
    found, derivative = jvp(op, x[:0], directions[:, :0], images, 0.5, backend=backend)
    assert found.shape == (0, *SHAPE)
    assert derivative.shape == (2, 0, *SHAPE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 7}, {"memory_budget": 1}])
def test_no_chunk_size_changes_the_result(op, backend, options, rng):
    x, directions, images = problem(rng, 150, sigma=0.5, alpha=0.8)
    x, directions = x.float(), directions.float()
    whole = jvp(op, x, directions, images, 0.5, 0.8, backend=backend)
    parts = jvp(op, x, directions, images, 0.5, 0.8, backend=backend, **options)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_thread_counts_give_the_same_bits(op, rng):
    x, directions, images = problem(rng, 3000, 2, 3, shape=(3, 5, 3), sigma=0.5, alpha=0.8)
    x, directions = x.float(), directions.float()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(jvp(op, x, directions, images, 0.5, 0.8, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_bits_depend_neither_on_the_batch_nor_on_other_tangents(op, rng):
    sigma = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)
    x, directions, images = problem(rng, 900, 7, 9, shape=(3, 5, 3), sigma=sigma, alpha=0.8)
    x, directions = x.float(), directions.float()
    found, derivative = jvp(op, x, directions, images, sigma, 0.8, backend="cpu")
    for b in (0, 3, 6):
        alone = jvp(
            op,
            x[b : b + 1],
            directions[:, b : b + 1],
            images,
            float(sigma[b]),
            0.8,
            backend="cpu",
        )
        assert torch.equal(alone[0][0], found[b])
        assert torch.equal(alone[1][:, 0], derivative[:, b])
    for chosen in (slice(8, 9), slice(2, 5), slice(1, 9)):
        some = jvp(op, x, directions[chosen], images, sigma, 0.8, backend="cpu")
        assert torch.equal(some[0], found)
        assert torch.equal(some[1], derivative[chosen])
    narrow = jvp(op, x, directions, images, sigma, 0.8, backend="cpu", memory_budget=1)
    assert torch.equal(narrow[0], found)
    assert torch.equal(narrow[1], derivative)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_states_over_parts_of_the_set_merge(op, backend, rng):
    x, directions, images = problem(rng)
    run = OPERATIONS[f"{op}_posterior_jvp"][backend].load()
    values = {"global": 90, "window": 3, "masked": 1}[op]
    parts = [
        posterior_problem(x.float(), part, SIGMA, ALPHA)
        for part in (images[:11], images[11:], images)
    ]
    first, second, whole = (run(part, directions.float(), *extra(op, SHAPE)) for part in parts)
    factor = jacobian_factor(parts[0])
    merged = finalize_jvp(merge_tangents(first, second, parts[0].scale, values), values, factor)
    for one, other in zip(merged, finalize_jvp(whole, values, factor), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", OPS)
def test_half_precision_computes_in_float32(op, rng):
    x, directions, images = problem(rng, sigma=0.5, alpha=1.0)
    x, directions = x.half(), directions.half()
    found = jvp(op, x, directions, images, 0.5)
    wide = jvp(op, x.float(), directions.float(), images, 0.5)
    for one, other in zip(found, wide, strict=True):
        assert one.dtype == torch.float16
        torch.testing.assert_close(one, other.half())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_inputs_that_are_not_contiguous(op, backend, rng):
    x, directions, images = problem(rng)
    x, directions = x.float(), directions.float()
    strided = [
        part.movedim(-3, -1).contiguous().movedim(-1, -3) for part in (x, directions, images)
    ]
    assert not any(part.is_contiguous() for part in strided)
    found = jvp(op, *strided, SIGMA, ALPHA, backend=backend)
    plain = jvp(op, x, directions, images, SIGMA, ALPHA, backend=backend)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_the_backend_that_ran(op, rng):
    x, directions, images = problem(rng, count=9)
    x, directions = x.float(), directions.float()
    with pf.trace_backends() as calls:
        jvp(op, x, directions, images, 0.5)
        jvp(op, x.double(), directions.double(), images, 0.5)
        jvp(op, x, directions.clone().requires_grad_(), images, 0.5)
        torch.func.jvp(lambda z: jvp(op, z, directions, images, 0.5), (x,), (directions[0],))
    name = f"{op}_posterior_jvp"
    assert calls == [(name, "cpu")] + [(name, "reference")] * 3
    with pytest.raises(BackendUnavailableError, match="computes in float32"):
        jvp(op, x.double(), directions.double(), images, 0.5, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="no derivative"):
        jvp(op, x.requires_grad_(), directions, images, 0.5, backend="cpu")
    soft = torch.rand(90, 90, generator=rng)
    with pytest.raises(BackendUnavailableError, match="serves masks"):
        masked_posterior_jvp(x.detach(), directions, images, soft, 0.5, backend="cpu")


WRONG = {
    "no tensor": ({"tangents": [0.0]}, TypeError, r"`tangents` must be a torch.Tensor"),
    "whole numbers": (
        {"tangents": torch.zeros(2, 3, *SHAPE, dtype=torch.int64)},
        TypeError,
        r"`tangents` must have a floating-point dtype",
    ),
    "other precision": (
        {"tangents": torch.zeros(2, 3, *SHAPE).double()},
        TypeError,
        r"`tangents` must be torch.float32 like `x`, got a torch.float64 tensor",
    ),
    "one tangent without K": (
        {"tangents": torch.zeros(3, *SHAPE)},
        ValueError,
        r"`tangents` must have shape \[K, 3, 3, 6, 5\], got .*\(3, 3, 6, 5\)",
    ),
    "other batch": (
        {"tangents": torch.zeros(2, 1, *SHAPE)},
        ValueError,
        r"`tangents` must have shape \[K, 3, 3, 6, 5\]",
    ),
    "other device": (
        {"tangents": torch.zeros(2, 3, *SHAPE, device="meta")},
        ValueError,
        r"`tangents` must be on cpu like `x`",
    ),
    "not a number": (
        {"tangents": torch.full((2, 3, *SHAPE), torch.nan)},
        ValueError,
        r"`tangents` holds NaN",
    ),
    "no noise": ({"sigma": 0.0}, ValueError, r"`sigma` must be positive for derivatives.*got 0\.0"),
    "no noise in one image": (
        {"sigma": torch.tensor([1.0, 0.0, 1.0])},
        ValueError,
        r"`sigma` must be positive for derivatives",
    ),
    "negative noise": ({"sigma": -1.0}, ValueError, r"`sigma` must be finite and not negative"),
    "wrong x": (
        {"x": torch.zeros(3, 1, 6, 5)},
        ValueError,
        r"`x` must have shape \[B, 3, 6, 5\]",
    ),
    "no alpha": ({"alpha": 0.0}, ValueError, r"`alpha` must be finite and positive"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case, op, backend):
    change, error, message = WRONG[case]
    given = {"x": torch.zeros(3, *SHAPE), "tangents": torch.zeros(2, 3, *SHAPE), "sigma": 0.5}
    given = {**given, "alpha": 1.0, **change}
    images = torch.zeros(5, *SHAPE, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        jvp(
            op,
            given["x"],
            given["tangents"],
            images,
            given["sigma"],
            given["alpha"],
            backend=backend,
        )


def test_wrong_window_and_weights():
    x, tangents = torch.zeros(3, *SHAPE), torch.zeros(2, 3, *SHAPE)
    images = torch.zeros(5, *SHAPE, dtype=torch.uint8)
    with pytest.raises(ValueError, match="`window` must be odd"):
        window_posterior_jvp(x, tangents, images, 4, 0.5)
    with pytest.raises(ValueError, match=r"`weights` must have shape \[90, 90\]"):
        masked_posterior_jvp(x, tangents, images, torch.ones(90, 80, dtype=torch.bool), 0.5)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_ctrl_c_ends_a_scan(op, rng, ctrl_c):
    images = random_images(rng, 500, (3, 8, 8), torch.uint8).repeat(60, 1, 1, 1)
    x = torch.rand(16, 3, 8, 8, generator=rng)
    tangents = torch.randn(16, 16, 3, 8, 8, generator=rng)
    ctrl_c(0.3)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            jvp(op, x, tangents, images, 1.0, backend="cpu")
    assert time.perf_counter() - started < 60
