"""Posterior over the patches of all images on the CPU: a query per pixel, as in the reference."""

from __future__ import annotations

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.passes import scan_windows
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
    kernel = native_module().equivariant_posterior
    return scan_windows(problem, kernel, window, instruction_set, circular=circular)
