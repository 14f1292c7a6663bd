"""Value images in posteriors: the reference against the formulas, derivatives, and what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from value_problems import ALPHA, OPS, SHAPE, SIGMA, TEMPERATURE, ValueProblem, functions, queries

import pyflocality as pf
from pyflocality.backends import trace_blocks
from pyflocality.data import TrainingSet

BUDGET = 64 * 2**10
DERIVED = [(op, kind) for op in OPS for kind in ("jvp", "vjp") if kind in functions(op)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(("count", "values"), [(1, 1), (31, 2)])
def test_answers_are_the_formula(op, with_image, count, values, rng):
    problem = ValueProblem(rng, count, values)
    with pf.trace_backends() as ran:
        (found,) = problem.found(op, "mean", torch.float64, with_image=with_image)
    assert ran == [(op, "reference")]
    assert found.shape == (3, values + with_image, *SHAPE)
    exact = problem.truth(op, with_image)
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("op", "kind"), DERIVED)
@pytest.mark.parametrize("with_image", [False, True])
def test_derivatives_are_the_formula(op, kind, with_image, rng):
    problem = ValueProblem(rng)
    answered = 2 + with_image
    if kind == "jvp":
        mean, found = problem.found(
            op, "jvp", torch.float64, problem.tangents, with_image=with_image
        )
        exact = problem.truth(op, with_image, along=problem.tangents)
        assert found.shape == (2, 3, answered, *SHAPE)
        np.testing.assert_allclose(mean.numpy(), problem.truth(op, with_image), rtol=0, atol=1e-11)
    else:
        against = problem.cotangents(answered)
        (found,) = problem.found(op, "vjp", torch.float64, against, with_image=with_image)
        exact = problem.truth(op, with_image, against=against)
        assert found.shape == (2, 3, *SHAPE)
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_torch_differentiates_the_answers(op, rng):
    problem = ValueProblem(rng, count=7, values=1, batch=1)
    x, given = problem.x, queries(op).given

    def mean(z: torch.Tensor) -> torch.Tensor:
        options = {"values": problem.values, "temperature": TEMPERATURE}
        return functions(op)["mean"](z, problem.images, *given, SIGMA, ALPHA, **options)

    _, found = torch.func.jvp(mean, (x,), (problem.tangents[0],))
    exact = problem.truth(op, False, along=problem.tangents)[0]
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_images_as_values_are_the_plain_answers(op, rng):
    problem = ValueProblem(rng, stored=torch.float32)
    values = problem.images[:, None]
    for dtype in (torch.float32, torch.float64):
        options = {"backend": "reference", "values": values}
        (plain,) = problem.found(op, "mean", dtype, **(options | {"values": None}))
        (found,) = problem.found(op, "mean", dtype, **options)
        torch.testing.assert_close(found[:, 0], plain, rtol=0, atol=0)
        (both,) = problem.found(op, "mean", dtype, **options, with_image=True)
        torch.testing.assert_close(both, plain[:, None].expand_as(both), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("op", "kind"), [(op, "mean") for op in OPS] + DERIVED)
@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 7}, {"memory_budget": 1}])
def test_every_chunking_answers_the_same(op, kind, options, rng):
    problem = ValueProblem(rng)
    along = {
        "mean": (),
        "jvp": (problem.tangents,),
        "vjp": (problem.cotangents(3),),
    }[kind]
    whole, parts = (
        problem.found(op, kind, torch.float64, *along, with_image=True, **given)
        for given in ({}, options)
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_copies_have_values_of_their_own(op, chunk_size, rng):
    problem = ValueProblem(rng, count=17)
    augmentation = TrainingSet(problem.images).augmented(flip=True).augmentation
    one = ValueProblem(rng, count=34)
    one.images = torch.cat([problem.images, problem.images.flip(-1)])
    one.x = problem.x
    exact = one.truth(op, True)
    problem.values = one.values
    (found,) = problem.found(
        op,
        "mean",
        torch.float64,
        with_image=True,
        augmentation=augmentation,
        chunk_size=chunk_size,
    )
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-11)


@pytest.fixture
def mapped(rng, tmp_path):
    """A problem whose values lie in a file of 8 times the budget, and that file."""
    problem = ValueProblem(rng, count=1700)
    path = tmp_path / "values.npy"
    np.save(path, problem.values.flatten(1, 2).clamp(-1, 1).numpy())
    problem.values = TrainingSet.load(path, layout="NCHW").images.unflatten(1, (2, SHAPE[0]))
    assert problem.values.nbytes > 8 * BUDGET
    return problem, path


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("with_image", [False, True])
def test_values_are_read_from_their_file(op, with_image, mapped):
    problem, _ = mapped
    options = {"with_image": with_image, "memory_budget": BUDGET}
    held = problem.values.clone()
    (whole,) = problem.found(op, "mean", torch.float64, values=held, with_image=with_image)
    with trace_blocks() as blocks:
        (found,) = problem.found(op, "mean", torch.float64, **options)
    read = sum(block.count for block in blocks if block.from_file)
    # Scans that find the posteriors alone do not read values.
    assert read == len(problem.values)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("budget", [BUDGET, None])
def test_a_changed_file_of_values_is_noticed(mapped, budget):
    problem, path = mapped
    problem.found("window_posterior", "mean", torch.float64, memory_budget=budget)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{path}.*changed"):
        problem.found("window_posterior", "mean", torch.float64, memory_budget=budget)


WRONG = {
    "no tensor": (lambda v: v.numpy(), TypeError, "float32 tensor"),
    "another dtype": (torch.Tensor.double, TypeError, "float32 tensor"),
    "one image less": (lambda v: v[1:], ValueError, r"shape \[31, R, 2, 5, 4\]"),
    "no axis of values": (lambda v: v[:, 0], ValueError, r"shape \[31, R, 2, 5, 4\]"),
    "no value": (lambda v: v[:, :0], ValueError, r"shape \[31, R, 2, 5, 4\]"),
    "another size": (lambda v: v[..., 1:], ValueError, r"shape \[31, R, 2, 5, 4\]"),
    "not finite": (lambda v: v.where(v < v.max(), torch.inf), ValueError, "NaN or infinite"),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_are_refused_before_any_work(op, wrong, rng):
    problem = ValueProblem(rng)
    change, error, message = WRONG[wrong]
    with pf.trace_backends() as ran, pytest.raises(error, match=f"`values`.*{message}"):
        problem.found(op, "mean", torch.float32, values=change(problem.values))
    assert ran == []


def test_wrong_directions_and_flags_are_refused(rng):
    problem = ValueProblem(rng)
    op = "window_posterior"
    for answered, with_image in ((1, False), (2, True)):
        along = problem.cotangents(answered)
        with pytest.raises(ValueError, match=r"`cotangents` must have shape \[K, 3, "):
            problem.found(op, "vjp", torch.float64, along, with_image=with_image)
    with pytest.raises(ValueError, match=r"`cotangents` must have shape \[K, 3, 2, 5, 4\]"):
        problem.found(op, "vjp", torch.float64, problem.cotangents(2), values=None)
    with pytest.raises(ValueError, match="`with_image` must be False without `values`"):
        problem.found(op, "mean", torch.float64, values=None, with_image=True)
    with pytest.raises(TypeError, match="`with_image`"):
        problem.found(op, "mean", torch.float64, with_image=1)


def test_operations_without_values_refuse_them(rng):
    problem = ValueProblem(rng)
    x, images = problem.x, problem.images
    with pytest.raises(ValueError, match="`values` must be None for equivariant_posterior"):
        pf.ops.equivariant_posterior_mean(x, images, 3, SIGMA, values=problem.values)
    with pytest.raises(ValueError, match="`values` must be None for log-sum-exps"):
        pf.ops.posterior_log_sum_exp(x, images, SIGMA, values=problem.values)


@pytest.mark.parametrize("op", OPS)
def test_batches_may_be_empty(op, rng):
    problem = ValueProblem(rng)
    problem.x = problem.x[:0]
    (found,) = problem.found(op, "mean", torch.float32, with_image=True)
    assert found.shape == (0, 3, *SHAPE)
