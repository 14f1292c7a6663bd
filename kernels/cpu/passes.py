"""Passes of the native kernels over all training images.

Kernels work in stored units, as `pyflocality.kernels.stored` tells. A scan gives the state of every
query; where an operation needs the weights themselves, a second pass computes the distances again
and applies them: nothing is stored per image and query.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import (
    PosteriorState,
    merge,
    merge_tangents,
    tangent_values,
    uncentred,
)

# A sum takes up to 16 lanes of float32, and 3 numbers in double precision.
BYTES_PER_SUM = 64 + 24

Kernel = Callable[..., Any]
Join = Callable[[PosteriorState, PosteriorState, Tensor], PosteriorState]


def native_kernel(name: str, instruction_set: str | None, **options: object) -> Kernel:
    """A kernel of `pyflocality._C`: takes images and, for each noisy image, rows of arrays.

    Value images, where there are any, are further keywords.
    """
    kernel = getattr(native_module(), name)
    threads = torch.get_num_threads()
    return functools.partial(kernel, threads=threads, isa=instruction_set or "", **options)


def window_kernel(
    name: str, instruction_set: str | None, problem: PosteriorProblem, window: int
) -> Kernel:
    """A kernel with a query per pixel."""
    shape = tuple(problem.images.shape[1:])
    return native_kernel(name, instruction_set, image_shape=shape, window=window)


def scan_images(
    stored: StoredProblem,
    kernel: Kernel,
    bytes_per_image: int,
    rows: tuple[Tensor, ...] = (),
    join: Join = merge,
) -> PosteriorState:
    """Run a scan over all images, for as many noisy images at a time as the budget allows.

    Args:
        stored: The problem.
        kernel: The kernel.
        bytes_per_image: Working memory per noisy image and thread.
        rows: Further arguments of the kernel, a row for each noisy image.
        join: Joins the states of blocks of images.

    Returns:
        The state in stored units, but for its weights: they are the same in all units.
    """

    def answer(*arrays: object, **values: object) -> PosteriorState:
        return PosteriorState(*map(torch.from_numpy, kernel(*arrays, **values)))

    states = _over_images(stored, answer, bytes_per_image, rows, join)
    return PosteriorState(*map(torch.cat, zip(*states, strict=True)))


def apply_weights(
    stored: StoredProblem, kernel: Kernel, state: PosteriorState, rows: tuple[Tensor, ...] = ()
) -> Tensor:
    """Run a second pass: sums over the images of all ranks in stored units, float64 [B, K, D].

    Args:
        stored: The problem.
        kernel: The kernel.
        state: The state of all ranks after the scan, in stored units.
        rows: Nothing to apply the weights themselves to what is answered (K = A); else cotangents
            [B, K, A D], posterior means [B, A D] and what images are counted from, [B, D].
    """

    def answer(*arrays: object, **values: object) -> Tensor:
        return torch.from_numpy(kernel(*arrays, **values))

    count = rows[0].shape[1] if rows else stored.problem.answered
    sums = stored.noisy.shape[1:].numel() * max(1, count)
    rows = (state.minimum, state.total, *rows)
    totals = _over_images(stored, answer, sums * BYTES_PER_SUM, rows, lambda a, b, _: a + b)
    return stored.problem.summed(torch.cat(totals))


def _over_images(
    stored: StoredProblem,
    kernel: Kernel,
    bytes_per_image: int,
    rows: tuple[Tensor, ...],
    join: Callable[[Any, Any, Tensor], Any],
) -> list[Any]:
    """What a kernel answers for groups of noisy images: each block of images is read once."""
    at_a_time = max(1, stored.budget // (bytes_per_image * (torch.get_num_threads() + 1)))
    rows = (stored.noisy.flatten(1), stored.factor, *rows)
    arrays = []
    for row in rows:
        arrays.append(list(map(Tensor.numpy, row.contiguous().split(at_a_time))))
    results: list[Any] = []
    for images, values in stored.pairs():
        run = kernel
        if values is not None:
            given = {"values": values.numpy(), "with_image": stored.problem.with_image}
            run = functools.partial(kernel, **given)
        answers = list(map(run, itertools.repeat(images.numpy()), *arrays))
        scales = stored.scale.split(at_a_time) if results else ()
        results = list(map(join, results, answers, scales)) if results else answers
    return results


def scan_values(problem: PosteriorProblem, kernel: Kernel, bytes_per_image: int) -> PosteriorState:
    """Run a scan; the state in the units of the formulas."""
    stored = StoredProblem(problem)
    state = scan_images(stored, kernel, bytes_per_image)
    return PosteriorState(
        stored.distances(state.minimum), state.total, stored.values(state.weighted, state.total)
    )


def scan_windows(problem: PosteriorProblem, kernel: Kernel) -> PosteriorState:
    """Run a scan with a query per pixel; the state in the units of the formulas."""
    channels, height, width = problem.images.shape[1:]
    # Per query and thread: lanes of the sums, and a state in double precision.
    values = channels * problem.answered
    per_query = (values + 1) * 64 + 20 + 8 * values
    return scan_values(problem, kernel, height * width * per_query)


def scan_tangents(
    problem: PosteriorProblem,
    tangents: Tensor,
    kernel: Kernel,
    centre: Tensor,
    queries: int,
    bytes_per_sum: int,
    outputs: Tensor | None = None,
) -> PosteriorState:
    """Run a scan with tangents; the state in the units of the formulas.

    Args:
        problem: The problem.
        tangents: Directions [K, B, C, H, W].
        kernel: The kernel.
        centre: What values are counted from, in stored units, [B, D].
        queries: Queries per noisy image.
        bytes_per_sum: Memory of a thread per query and weighted sum.
        outputs: The value that each query answers, [Q]; None where they answer all together.
    """
    stored = StoredProblem(problem)
    directions = tangents.detach().flatten(2).transpose(0, 1)
    own = 1 if outputs is not None else centre.shape[1] // queries
    values = own * problem.answered
    sums = tangent_values(values, len(tangents))
    # And the states of a thread's piece and of the whole in double precision.
    per_image = queries * (1 + sums) * (bytes_per_sum + 16)
    join = functools.partial(merge_tangents, values=values)
    state = scan_images(stored, kernel, per_image, (centre, directions), join)
    # Values of images and c are in stored units, their products in the square of these.
    image = own if problem.answers_image else 0
    of_values = torch.ones(values, dtype=torch.float64)
    of_values[:image] = stored.step
    inner = torch.full((len(tangents),), stored.step, dtype=torch.float64)
    units = torch.cat([of_values, inner, (inner[:, None] * of_values).flatten()])
    state = PosteriorState(stored.distances(state.minimum), state.total, state.weighted * units)
    origin = state.minimum.new_zeros(len(centre), queries, values)
    if image > 0:
        answered = centre if outputs is None else centre[:, outputs]
        counted_from = answered.double() * stored.step + stored.shift
        # [B, D], where a query's values lie Q apart -> [B, Q, V]
        origin[..., :image] = counted_from.reshape(-1, own, queries).transpose(1, 2)
    return uncentred(state, origin)
