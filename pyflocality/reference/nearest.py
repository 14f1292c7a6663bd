r"""The training images nearest to a query, in plain torch.

Products of matrices tell distances but for their rounding: with u the unit roundoff and D values
each differs by at most :math:`(D + 4) \, u \, (|x| + |\alpha v|)^2` from the truth. Differences,
squared and summed, are taken for those images alone that may be among the nearest by that bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._precision import plain_products
from pyflocality._problem import PosteriorProblem
from pyflocality.reference.global_posterior import squared_distances


def nearest_images(problem: PosteriorProblem, k: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances of the k nearest images, [B, k] each."""
    batch = len(problem.x)
    x = problem.x.reshape(batch, problem.images[0].numel())
    alpha = problem.alpha.to(x.dtype)
    chunk = problem.images_at_a_time((3 * x.shape[1] + 4 * batch) * x.element_size())
    distances = x.new_empty(batch, 0)
    indices = torch.empty(batch, 0, dtype=torch.int64, device=x.device)
    start = 0
    for images in problem.chunks(chunk):
        values = images.flatten(1)
        here = _candidates(x.detach(), values, alpha, k, distances.detach())
        if here is None:
            found = squared_distances(x, values, alpha)
            here = torch.arange(len(values), device=x.device).expand(batch, -1)
        else:
            rows = zip(x, here, alpha, strict=True)
            found = torch.cat(
                [squared_distances(xb[None], values[h], ab[None]) for xb, h, ab in rows]
            )
        # A stable sort keeps the earlier image first among equals, whatever the chunk size.
        distances, order = torch.cat([distances, found], 1).sort(stable=True, dim=1)
        indices = torch.cat([indices, here + start], 1).gather(1, order)[:, :k]
        distances, start = distances[:, :k], start + len(values)
    return indices, distances


def _candidates(x: Tensor, values: Tensor, alpha: Tensor, k: int, best: Tensor) -> Tensor | None:
    """Images that may be among the k nearest, in their order; None where all must be looked at.

    Args:
        x: Queries [B, D].
        values: Training values [n, D].
        alpha: Signal coefficients [B].
        k: Number of neighbours.
        best: Squared distances of the nearest images so far, ascending, [B, at most k].

    Returns:
        Indices [B, m], ascending, with all that may be needed; m is that of the query with most.
    """
    if len(x) == 0 or len(values) <= k or not plain_products():
        return None
    norms = values.square().sum(1)
    rough = torch.addmm(norms * alpha[:, None].square(), x * alpha[:, None], values.T, alpha=-2)
    own = x.square().sum(1)
    rough += own[:, None]
    # Once for the roughness of this distance and once for that of the one that decides.
    reach = own.sqrt() + alpha * norms.max().sqrt()
    slack = (x.shape[1] + 4) * torch.finfo(x.dtype).eps * reach.square()
    limit = rough.kthvalue(k, dim=1).values + 2 * slack
    if best.shape[1] == k:
        limit = torch.minimum(limit, best[:, -1] + slack)
    most = int((rough <= limit[:, None]).sum(1).max())
    if 4 * most > len(values):
        return None
    return rough.topk(max(1, most), largest=False).indices.sort(dim=1).values
