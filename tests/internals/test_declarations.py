"""Declarations: what is counted of an operation is what its reference does, and all have places."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyflocality.ops.costs import Size
from pyflocality.ops.operation import OPERATIONS
from pyflocality.posterior.problem import PosteriorProblem, posterior_problem

SHAPE = (2, 4, 5)
VALUES, PIXELS = 40, 20
POSTERIORS = sorted(set(OPERATIONS) - {"nearest", "covariance"})


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


def setting(images: int, batch: int, directions: int = 0) -> Size:
    return Size(images, SHAPE, batch, directions, window=1, terms=VALUES**2)


def counted(op: str, kind: str, size: Size) -> int:
    """Operations of the reference in float64."""
    operation, generator = OPERATIONS[op], torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size.images, *SHAPE), generator=generator, dtype=torch.uint8)
    x = torch.randn(size.batch, *SHAPE, generator=generator, dtype=torch.float64)
    problem: PosteriorProblem = posterior_problem(x, images, 0.7, 0.9)
    query = operation.check(SHAPE, *operation.example(size, generator))
    directions = torch.randn(size.directions, *x.shape, generator=generator, dtype=x.dtype)
    mode = Counted(problem.alpha)
    with mode:
        operation.run(kind, problem, query, "reference", *([directions] if kind != "scan" else []))
    return mode.flops


def per_pair(op: str, kind: str, *directions: int) -> tuple[int, int]:
    """What is counted, and what is declared, for another image and noisy image (and direction)."""
    found, declared = 0, 0
    corners = itertools.product((2, 5), (1, 3), *((k, k + 2) for k in directions))
    steps = (3, 2, *(2 for _ in directions))
    for corner in corners:
        size = setting(*corner)
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


@pytest.mark.parametrize(
    ("op", "kind"),
    [(op, kind) for op in POSTERIORS for kind in OPERATIONS[op].variants if kind != "scan"],
)
def test_a_direction_costs_what_its_reference_does(op, kind):
    found, declared = per_pair(op, kind, 1)
    assert found - declared == COUNTED_FROM[op, kind], (found, declared)
