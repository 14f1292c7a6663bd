"""Posterior means of all windows inside the image over one another, on the CPU."""

from __future__ import annotations

from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.passes import BYTES_PER_SUM, apply_weights, image_shape, scan_images
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.reference.patch_set import windows_over


def scan(problem: PosteriorProblem, window: int, *, instruction_set: str | None = None) -> Tensor:
    """The means, [B, C, H, W]."""
    stored = StoredProblem(problem)
    shape = image_shape(problem)
    per_image = problem.x.shape[2:].numel() * BYTES_PER_SUM
    kernel = native_module().patch_set_scan
    state = scan_images(
        stored, kernel, per_image, instruction_set, image_shape=shape, window=window
    )
    state = problem.merged(state, stored.scale)
    kernel = native_module().patch_set
    sums = apply_weights(stored, kernel, state, instruction_set, image_shape=shape, window=window)[
        :, 0
    ]
    means = sums.reshape(problem.x.shape) / windows_over(problem.x.shape[2:], window, sums)
    return means * stored.step + stored.shift
