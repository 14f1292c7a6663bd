"""The training images nearest to a query, on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.passes import Kernel, native_kernel
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.reference.shortlists import Shortlist, of_all_ranks, positions_of, ranked

# Bytes of a value of a noisy image while it is put into stored units, and as integers.
_BYTES_PER_VALUE = 40
# Bytes of a candidate, of which all images may be some.
_BYTES_PER_CANDIDATE = 80
# Bytes of images whose distances are measured at a time.
_MEASURED_BYTES = 2**20


def scan(
    problem: PosteriorProblem,
    k: int,
    distances: bool = True,
    among: Tensor | None = None,
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Indices and squared distances of the k nearest images, as the reference has them."""
    stored, values = StoredProblem(problem), problem.images[0].numel()
    kernel = native_kernel("nearest_candidates", instruction_set, k=k)
    indices = torch.empty(len(problem.x), k, dtype=torch.int64)
    gaps = problem.x.new_empty(indices.shape if distances else 0)
    # A quarter of the budget each for noisy images and candidates, another for copies of images.
    for rows, part in stored.parts(4 * _BYTES_PER_VALUE * values):
        shortlists = _shortlists(part, kernel, k, among)
        indices[rows] = ranked(part.problem, shortlists, k, distances)
        if distances:
            gaps[rows] = _distances(part.problem, indices[rows])
    return of_all_ranks(problem, indices, gaps) if distances else (indices, None)


def _shortlists(
    stored: StoredProblem, kernel: Kernel, k: int, among: Tensor | None
) -> list[Shortlist]:
    """The images that may be among the nearest, for each noisy image."""
    noisy = np.ascontiguousarray(stored.exact.flatten(1).numpy())
    shortlists = [Shortlist(k) for _ in noisy]
    size = max(1, stored.budget // (4 * _BYTES_PER_CANDIDATE * max(1, len(noisy))))
    start = 0
    for block in stored.rows(among):
        for images in block.split(size):
            limits = np.array([shortlist.limit for shortlist in shortlists])
            candidates = kernel(images.numpy(), noisy, limits)
            for shortlist, (rows, *bounds) in zip(shortlists, candidates, strict=True):
                shortlist.take_in(positions_of(rows, start, among), *bounds)
            start += len(images)
    return shortlists


def _distances(problem: PosteriorProblem, indices: Tensor) -> Tensor:
    """Squared distances of images at positions [B, k], float64."""
    noisy = problem.x.flatten(1).double().numpy()
    alpha = problem.alpha.contiguous().numpy()
    owners = torch.arange(len(noisy)).repeat_interleave(indices.shape[1])
    threads, measure = torch.get_num_threads(), native_module().pair_distances
    found, size = [], max(1, _MEASURED_BYTES // noisy.shape[1])
    for places, some in zip(indices.flatten().split(size), owners.split(size), strict=True):
        images = problem.reader.at(places).flatten(1)
        found.append(measure(images.numpy(), noisy, alpha, some.numpy(), threads=threads))
    return torch.from_numpy(np.concatenate(found)).reshape(indices.shape)
