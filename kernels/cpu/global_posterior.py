"""Posterior over whole images on the CPU: a query per batch element, as in the reference."""

from __future__ import annotations

from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.passes import scan_tangents, scan_values
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState


def scan(problem: PosteriorProblem, *, instruction_set: str | None = None) -> PosteriorState:
    """The state of all images."""
    values = problem.images[0].numel()
    return scan_values(problem, native_module().global_posterior, 24 * values, instruction_set)


def jvp(
    problem: PosteriorProblem, tangents: Tensor, *, instruction_set: str | None = None
) -> PosteriorState:
    """The state of all images with tangents [K, B, C, H, W]."""
    kernel = native_module().global_posterior_jvp
    centre = StoredProblem(problem).centre.flatten(1)
    return scan_tangents(problem, tangents, kernel, centre, 1, 4, instruction_set)
