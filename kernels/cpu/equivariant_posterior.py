"""Posterior over the patches of all images on the CPU: a query per pixel, as in the reference."""

from __future__ import annotations

import functools

from pyflocality.kernels.cpu.passes import scan_windows, window_kernel
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState


def scan(
    problem: PosteriorProblem,
    window: int,
    circular: bool,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """The state of all patches."""
    kernel = window_kernel("equivariant_posterior", instruction_set, problem, window)
    return scan_windows(problem, functools.partial(kernel, circular=circular))
