"""Jacobian-vector products of the posterior means: reference in float64, native kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from posterior_calls import (
    ALPHA,
    BACKENDS,
    EPS,
    OPS,
    SHAPE,
    SIGMA,
    jvp,
    masks,
    mean,
    problem,
)
from truth import filtered_posterior_mean, values_of, window_weights

import pyflocality as pf
from pyflocality.backends import BackendUnavailableError
from pyflocality.ops import (
    masked_posterior_jvp,
    masked_posterior_mean,
    window_posterior_jvp,
)


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
