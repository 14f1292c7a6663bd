"""The training images nearest to a query, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._problem import PosteriorProblem
from pyflocality.reference.global_posterior import squared_distances


def nearest_images(problem: PosteriorProblem, k: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances of the k nearest images, [B, k] each."""
    batch = len(problem.x)
    x = problem.x.reshape(batch, problem.images[0].numel())
    chunk = problem.images_at_a_time(3 * x.shape[1] * x.element_size())
    distances = x.new_empty(batch, 0)
    indices = torch.empty(batch, 0, dtype=torch.int64, device=x.device)
    start = 0
    for images in problem.chunks(chunk):
        stop = start + len(images)
        found = squared_distances(x, images.flatten(1), problem.alpha.to(x.dtype))
        here = torch.arange(start, stop, device=x.device).expand(batch, -1)
        # A stable sort keeps the earlier image first among equals, whatever the chunk size.
        distances, order = torch.cat([distances, found], 1).sort(stable=True, dim=1)
        indices = torch.cat([indices, here], 1).gather(1, order)[:, :k]
        distances, start = distances[:, :k], stop
    return indices, distances
