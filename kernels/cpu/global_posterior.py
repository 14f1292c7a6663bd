"""Posterior over whole images on the CPU: a query per batch element, as in the reference."""

from __future__ import annotations

from torch import Tensor

from pyflocality.kernels.cpu.passes import native_kernel, scan_tangents, scan_values
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState


def scan(problem: PosteriorProblem, *, instruction_set: str | None = None) -> PosteriorState:
    """The state of all images."""
    kernel = native_kernel("global_posterior", instruction_set)
    return scan_values(problem, kernel, 24 * problem.answered * problem.images[0].numel())


def jvp(
    problem: PosteriorProblem, tangents: Tensor, *, instruction_set: str | None = None
) -> PosteriorState:
    """The state of all images with tangents [K, B, C, H, W]."""
    kernel = native_kernel("global_posterior_jvp", instruction_set)
    return scan_tangents(problem, tangents, kernel, StoredProblem(problem).centre.flatten(1), 1, 4)
