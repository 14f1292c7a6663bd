"""How long products and decompositions of matrices take on this machine, from short measurements.

Each is measured once in a process, at a size that takes a fraction of a second.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

# Sides of the matrices that are measured; half of what is asked for lies between the latter two.
_PRODUCT, _SMALLEST, _LARGEST = 1024, 768, 1536
_RUNS = 3


def product_seconds(flops: float, dtype: torch.dtype = torch.float64) -> float:
    """Time of products of large matrices on the CPU.

    Args:
        flops: Additions and multiplications, a count of each.
        dtype: Of the matrices.
    """
    return flops * _product(dtype) / (2 * _PRODUCT**3)


def solver_seconds(side: int) -> float:
    """Time of all eigenvalues and eigenvectors of a symmetric matrix, float64, on the CPU.

    It grows as the cube of the side, from that of a matrix of half the side or less.
    """
    measured = min(side, max(_SMALLEST, min(side // 2, _LARGEST)))
    return _solver(measured) * (side / measured) ** 3


def shortest(function: Callable[[], object], runs: int = _RUNS) -> float:
    """Seconds of the shortest of some runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def _product(dtype: torch.dtype) -> float:
    left = torch.full((_PRODUCT, _PRODUCT), 0.5, dtype=dtype)
    out = torch.empty_like(left)
    return shortest(lambda: torch.mm(left, left, out=out))


@functools.cache
def _solver(side: int) -> float:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(side, side, dtype=torch.float64, generator=generator)
    matrix = random @ random.T
    # What is measured takes most of the time that measuring may.
    return shortest(lambda: torch.linalg.eigh(matrix), 1 if side > _SMALLEST else _RUNS)
