"""Declarations: what is counted of an operation is what its reference does, and all have places."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from every_operation import Problem, variants
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from value_problems import OPS

from pyflocality.ops.costs import Size, Work
from pyflocality.ops.operation import OPERATIONS
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import PosteriorProblem, posterior_problem
from pyflocality.storage.reader import trace_blocks

SHAPE = (2, 4, 5)
VALUES, PIXELS = 40, 20
POSTERIORS = sorted(set(OPERATIONS) - {"nearest", "covariance"})
DERIVATIVES = [
    (op, kind) for op in POSTERIORS for kind in OPERATIONS[op].variants if kind != "scan"
]


class Counted(TorchDispatchMode):
    """Counts operations by the rule of `pyflocality.ops.costs`.

    Every exponential is counted where the smallest distance is taken off what it is of, and for
    that alone.
    """

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.flops, self._alpha = 0, alpha.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation of torch and count it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("add", "sub", "mul", "square", "pow", "div"):
            # Noisy images over alpha make a product with every image needless.
            tensors = [one for one in args if isinstance(one, Tensor)]
            scaled = any(one.untyped_storage().data_ptr() == self._alpha for one in tensors)
            self.flops += 0 if scaled else result.numel()
        elif name == "sum":
            self.flops += args[0].numel() - result.numel()
        elif name == "avg_pool2d":
            self.flops += 2 * result.numel()
        elif name in ("mm", "bmm"):
            # Products with masks are none.
            masks = bool(((args[1] == 0) | (args[1] == 1)).all())
            self.flops += args[0].shape[-1] * result.numel() * (1 if masks else 2)
        return result


def setting(images: int, batch: int, directions: int = 0, values: int = 0) -> Size:
    return Size(images, SHAPE, batch, directions, window=1, terms=VALUES**2, value_images=values)


def counted(op: str, kind: str, size: Size) -> int:
    """Operations of the reference in float64."""
    operation, generator = OPERATIONS[op], torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size.images, *SHAPE), generator=generator, dtype=torch.uint8)
    x = torch.randn(size.batch, *SHAPE, generator=generator, dtype=torch.float64)
    shape = (size.images, size.value_images, *SHAPE)
    values = torch.randn(shape, generator=generator) if size.value_images else None
    problem: PosteriorProblem = posterior_problem(x, images, 0.7, 0.9, values=values)
    query = operation.check(SHAPE, *operation.example(size, generator))
    along = problem.answer_shape if kind == "vjp" else SHAPE
    shape = (size.directions, size.batch, *along)
    directions = torch.randn(shape, generator=generator, dtype=x.dtype)
    mode = Counted(problem.alpha)
    with mode:
        operation.run(kind, problem, query, "reference", *([directions] if kind != "scan" else []))
    return mode.flops


def per_pair(op: str, kind: str, *directions: int, values: int = 0) -> tuple[int, int]:
    """What is counted, and what is declared, for another image and noisy image (and direction)."""
    found, declared = 0, 0
    corners = itertools.product((2, 5), (1, 3), *((k, k + 2) for k in directions))
    steps = (3, 2, *(2 for _ in directions))
    for corner in corners:
        size = setting(*corner, *([] if directions else [0]), values)
        lows = sum(value == low for value, low in zip(corner, (2, 1, *directions), strict=True))
        sign = -1 if lows % 2 else 1
        found += sign * counted(op, kind, size)
        declared += sign * OPERATIONS[op].work(kind, size).flops
    for step in steps:
        found, declared = found // step, declared // step
    return found, int(declared)


@pytest.mark.parametrize("op", POSTERIORS)
def test_a_scan_costs_what_its_reference_does(op):
    found, declared = per_pair(op, "scan")
    # Of a pair as a whole: factor, exponential and the sum of the weights.
    assert 0 <= found - declared <= 3, (found, declared)


# What derivatives count from, so that digits do not cancel, for a direction and a pair of images.
COUNTED_FROM = {
    ("global_posterior", "jvp"): 3,
    # And a sum over channels that begins with 0.
    ("window_posterior", "jvp"): 2 * PIXELS,
    ("equivariant_posterior", "jvp"): 2 * PIXELS * PIXELS,
    ("masked_posterior", "jvp"): VALUES,
    ("filtered_posterior", "jvp"): 3 * VALUES,
    ("window_posterior", "vjp"): 3 * VALUES,
    ("equivariant_posterior", "vjp"): 3 * VALUES * PIXELS,
    ("masked_posterior", "vjp"): 3 * VALUES,
    ("filtered_posterior", "vjp"): 3 * VALUES,
}


@pytest.mark.parametrize(("op", "kind"), DERIVATIVES)
def test_a_direction_costs_what_its_reference_does(op, kind):
    found, declared = per_pair(op, kind, 1)
    assert found - declared == COUNTED_FROM.get((op, kind), 0), (found, declared)


# What derivatives count from, for a pair of images, and what is once a pair.
COUNTED_FROM_A_PAIR = {
    ("global_posterior", "jvp"): 2 * VALUES + 3,
    ("window_posterior", "jvp"): 2 * VALUES + PIXELS,
    ("equivariant_posterior", "jvp"): (2 * VALUES + PIXELS) * PIXELS,
    ("masked_posterior", "jvp"): 3 * VALUES,
    ("filtered_posterior", "jvp"): VALUES,
}


@pytest.mark.parametrize(("op", "kind"), DERIVATIVES)
def test_a_derivative_costs_what_its_reference_does_before_directions(op, kind):
    found, declared = per_pair(op, kind)
    assert found - declared == COUNTED_FROM_A_PAIR.get((op, kind), 0), (found, declared)


# The same of a value image more.
COUNTED_FROM_A_VALUE = {
    ("filtered_posterior", "jvp"): VALUES,
    ("window_posterior", "vjp"): 2 * VALUES,
    ("masked_posterior", "vjp"): 2 * VALUES,
    ("filtered_posterior", "vjp"): 2 * VALUES,
}


@pytest.mark.parametrize(
    ("op", "kind"), [(op, kind) for op in OPS for kind in OPERATIONS[op].variants]
)
def test_a_value_image_costs_what_its_reference_takes(op, kind):
    directions = () if kind == "scan" else (1,)
    (found, declared), (less, told) = (per_pair(op, kind, *directions, values=n) for n in (3, 2))
    assert declared > told
    further = (found - less) - (declared - told)
    assert further == COUNTED_FROM_A_VALUE.get((op, kind), 0)


@pytest.mark.parametrize("kind", ["scan", "jvp", "vjp"])
def test_answers_and_value_images_are_read_and_written(kind):
    operation, plain = OPERATIONS["window_posterior"], setting(5, 3, 2)
    beside = replace(plain, value_images=2, with_image=True)
    assert (plain.answered, beside.answered) == (1, 3)
    assert replace(beside, with_image=False).answered == 2
    bytes_more = operation.work(kind, beside).bytes - operation.work(kind, plain).bytes
    # Values of two images, read twice where posteriors and derivatives are apart; two answers more
    # of each noisy image and tangent, or two cotangents.
    read = 5 * 2 * VALUES * 4 * operation.variants[kind].scans
    answers = {"scan": 1, "jvp": 3, "vjp": 2}[kind] * 3 * 2 * VALUES * 4
    assert bytes_more == read + answers


@pytest.mark.parametrize(
    ("op", "kind"), [(op, kind) for op, kind, backend in variants() if backend == "reference"]
)
def test_images_are_read_as_often_as_is_declared(op, kind):
    problem = Problem(op)
    with trace_blocks() as blocks:
        problem.answers(kind, "reference", torch.float32)
    read = sum(block.count for block in blocks)
    assert read == OPERATIONS[op].variants[kind].scans * len(problem.images)


def test_sums_and_neighbours_cost_what_they_take():
    size, values = setting(5, 3), VALUES
    covariance, nearest = (OPERATIONS[op].work("scan", size) for op in ("covariance", "nearest"))
    assert covariance == Work(5 * values * (values + 1), 5 * values + 16 * values * (values + 1), 1)
    assert nearest == Work(5 * 3 * 3 * values, 5 * values + 3 * (4 * values + 8), 1)


ANSWERED_ON_GPUS = {"global_posterior": {"scan", "jvp"}, "masked_posterior": {"scan"}}


@pytest.mark.parametrize("op", OPS)
def test_kernels_without_values_refuse_them_by_name(op):
    call, answering = Call(torch.device("cuda"), facts={"values": True}), set()
    for kind, variant in OPERATIONS[op].variants.items():
        for backend, served in variant.backends.items():
            if backend in ("triton", "cuda") and served.answers_values:
                answering.add(kind)
            elif backend in ("triton", "cuda"):
                assert "`values` are given" in (served.why_not(call) or ""), (kind, backend)
    assert answering == ANSWERED_ON_GPUS.get(op, set())
