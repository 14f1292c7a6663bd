"""Passes of the native kernels over all training images.

Kernels work in stored units, as `pyflocality.kernels.stored` tells. A scan gives the state of every
query; where an operation needs the weights themselves, a second pass computes the distances again
and applies them: nothing is kept per image and query.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

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

Kernel = Callable[..., tuple[np.ndarray, ...]]
Join = Callable[[PosteriorState, PosteriorState, Tensor], PosteriorState]


def image_shape(problem: PosteriorProblem) -> tuple[int, int, int]:
    """Channels, height and width."""
    channels, height, width = problem.images.shape[1:]
    return channels, height, width


def scan_images(
    stored: StoredProblem,
    kernel: Kernel,
    bytes_per_image: int,
    instruction_set: str | None,
    rows: tuple[Tensor, ...] = (),
    join: Join = merge,
    **options: object,
) -> PosteriorState:
    """Run a scan over all images, for as many noisy images at a time as the budget allows.

    Args:
        stored: The problem.
        kernel: The kernel.
        bytes_per_image: Working memory per noisy image and thread.
        instruction_set: As the callers take it.
        rows: Further arguments of the kernel, a row for each noisy image.
        join: Joins the states of blocks of images.
        options: Further arguments of the kernel, the same for all.

    Returns:
        The state in stored units, but for its weights: they are the same in all units.
    """

    def joined(first: tuple, second: tuple, scale: Tensor) -> tuple:
        return join(PosteriorState(*first), PosteriorState(*second), scale)

    options["isa"] = instruction_set or ""
    return PosteriorState(*_over_images(stored, kernel, bytes_per_image, rows, joined, options))


def apply_weights(
    stored: StoredProblem,
    kernel: Callable[..., np.ndarray],
    state: PosteriorState,
    instruction_set: str | None,
    rows: tuple[Tensor, ...] = (),
    **options: object,
) -> Tensor:
    """Run a second pass: sums over the images of all ranks in stored units, float64 [B, K, D].

    Args:
        stored: The problem.
        kernel: The kernel.
        state: The state of all ranks after the scan, in stored units.
        instruction_set: As the callers take it.
        rows: Nothing to apply the weights themselves (K = 1); else cotangents [B, K, D], and
            posterior means and what values are counted from, a row for each noisy image.
        options: Further arguments of the kernel.
    """

    def kernel_of_one(*arrays: np.ndarray, **options: object) -> tuple[np.ndarray]:
        return (kernel(*arrays, **options),)

    def added(first: tuple, second: tuple, scale: Tensor) -> tuple:
        return (first[0] + second[0],)

    sums = stored.noisy.shape[1:].numel() * max(1, rows[0].shape[1] if rows else 1)
    rows = (state.minimum, state.total, *rows)
    options["isa"] = instruction_set or ""
    (total,) = _over_images(stored, kernel_of_one, sums * BYTES_PER_SUM, rows, added, options)
    return stored.problem.summed(total)


def _over_images(
    stored: StoredProblem,
    kernel: Kernel,
    bytes_per_image: int,
    rows: tuple[Tensor, ...],
    join: Callable[[tuple, tuple, Tensor], tuple],
    options: dict[str, object],
) -> tuple[Tensor, ...]:
    """What a kernel answers for all noisy images: each block of images is read once."""
    threads = torch.get_num_threads()
    at_a_time = max(1, stored.budget // (bytes_per_image * (threads + 1)))
    split = [
        row.contiguous().split(at_a_time) for row in (stored.noisy.flatten(1), stored.factor, *rows)
    ]
    groups = [tuple(map(Tensor.numpy, group)) for group in zip(*split, strict=True)]
    result: list[tuple] = []
    for images in stored.rows():
        block = images.numpy()
        answers = [
            tuple(map(torch.from_numpy, kernel(block, *arrays, threads=threads, **options)))
            for arrays in groups
        ]
        scales = stored.scale.split(at_a_time) if result else ()
        result = list(map(join, result, answers, scales)) if result else answers
    return tuple(map(torch.cat, zip(*result, strict=True)))


def scan_values(
    problem: PosteriorProblem,
    kernel: Kernel,
    bytes_per_image: int,
    instruction_set: str | None,
    **options: object,
) -> PosteriorState:
    """Run a scan; the state in the units of the formulas. Arguments as those of `scan_images`."""
    stored = StoredProblem(problem)
    state = scan_images(stored, kernel, bytes_per_image, instruction_set, (), merge, **options)
    return PosteriorState(
        stored.distances(state.minimum), state.total, stored.values(state.weighted, state.total)
    )


def scan_windows(
    problem: PosteriorProblem,
    kernel: Kernel,
    window: int,
    instruction_set: str | None,
    **options: object,
) -> PosteriorState:
    """Run a scan with a query per pixel; the state in the units of the formulas."""
    channels, height, width = image_shape(problem)
    # Per query and thread: lanes of the sums, and a state in double precision.
    per_query = (channels + 1) * 64 + 20 + 8 * channels
    options |= {"image_shape": (channels, height, width), "window": window}
    return scan_values(problem, kernel, height * width * per_query, instruction_set, **options)


def scan_tangents(
    problem: PosteriorProblem,
    tangents: Tensor,
    kernel: Kernel,
    centre: Tensor,
    queries: int,
    bytes_per_sum: int,
    instruction_set: str | None,
    **options: object,
) -> PosteriorState:
    """Run a scan with tangents; the state in the units of the formulas.

    Args:
        problem: The problem.
        tangents: Directions [K, B, C, H, W].
        kernel: The kernel.
        centre: What values are counted from, in stored units, [B, D].
        queries: Queries per noisy image, which answer all values together.
        bytes_per_sum: Memory of a thread per query and weighted sum.
        instruction_set: As the callers take it.
        options: Further arguments of the kernel.
    """
    stored = StoredProblem(problem)
    directions = tangents.detach().flatten(2).transpose(0, 1)
    values = centre.shape[1] // queries
    sums = tangent_values(values, len(tangents))
    state = scan_images(
        stored,
        kernel,
        # And the states of a thread's piece and of the whole in double precision.
        queries * (1 + sums) * (bytes_per_sum + 16),
        instruction_set,
        (centre, directions),
        functools.partial(merge_tangents, values=values),
        **options,
    )
    # Values and c are in stored units, their products in the square of these.
    units = torch.full((sums,), stored.step, dtype=torch.float64)
    units[values + len(tangents) :] *= stored.step
    state = PosteriorState(stored.distances(state.minimum), state.total, state.weighted * units)
    origin = centre.double() * stored.step + stored.shift
    # [B, D], where a query's values lie Q apart -> [B, Q, V]
    return uncentred(state, origin.reshape(-1, values, queries).transpose(1, 2))
