"""Posterior means of all windows inside the image over one another, on the CPU."""

from __future__ import annotations

from torch import Tensor

from pyflocality.kernels.cpu.passes import (
    BYTES_PER_SUM,
    apply_weights,
    scan_images,
    window_kernel,
)
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.reference.patch_set import windows_over


def scan(problem: PosteriorProblem, window: int, *, instruction_set: str | None = None) -> Tensor:
    """The means, [B, C, H, W], or [B, A, C, H, W] with values."""
    stored = StoredProblem(problem)
    shape = problem.images.shape[1:]
    kernel = window_kernel("patch_set_scan", instruction_set, problem, window)
    size = shape[1] * shape[2] * BYTES_PER_SUM
    state = scan_images(stored.without_values, kernel, size)
    state = problem.merged(state, stored.scale)
    kernel = window_kernel("patch_set", instruction_set, problem, window)
    sums = apply_weights(stored, kernel, state).unflatten(2, shape)
    means = stored.means(sums / windows_over(shape[1:], window, sums))
    return means.reshape(len(problem.x), *problem.answer_shape)
