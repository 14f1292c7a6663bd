r"""The state of a posterior scan: init, update, merge, finalize.

A scan visits the training images :math:`v_i` in any order and grouping. With :math:`e_i` the
weighted squared distance of a query to image :math:`i` and :math:`\kappa = 1 / (2 \sigma^2 \tau)`
the posterior weights are :math:`p_i \propto \exp(-\kappa e_i)`. The state keeps, per batch
element and query, the smallest distance seen :math:`m`, :math:`s = \sum_i \exp(-\kappa (e_i - m))`
and :math:`y = \sum_i \exp(-\kappa (e_i - m)) v_i`.

The scan counts in distances, not in logits: the difference :math:`e_i - m` is taken before the
factor :math:`\kappa`, so the rounding of large logits at small noise cancels, and the limit
:math:`\sigma = 0` (:math:`\kappa` the largest float) is the mean of the nearest images without
any special case. Merging is associative: it joins chunks, threads, devices and machines.

With :math:`w` the weights of the inputs in :math:`e_i`, the posterior means
:math:`\mathbb E[v]` change along a tangent :math:`u` of the noisy image by

.. math::
    J u = \frac{\alpha}{\sigma^2 \tau} \operatorname{Cov}(v, c), \qquad
    c_i = \sum_d w[d] \, u[d] \, v_i[d],

so a scan with K tangents keeps the V + K sums of :math:`v` and :math:`c_k` and, in their place
behind these, the K V sums of :math:`(v - \mathbb E[v]) (c_k - \mathbb E[c_k])` about the means of
the images seen so far. Kept as sums of products they would cancel: the factor grows without bound
as the noise falls, and where one image holds the posterior what rounding left of the difference
would be a Jacobian that is 0. `merge_tangents` joins such states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.transforms import is_differentiated


class PosteriorState(NamedTuple):
    """Partial sums of a scan.

    Attributes:
        minimum: Smallest distance m, [B, Q]; infinity before the first image.
        total: Sum s of the unnormalised weights, [B, Q].
        weighted: Sums y of the weighted values, [B, Q, V] for V values a query answers.
    """

    minimum: Tensor
    total: Tensor
    weighted: Tensor


def finite_factor(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of the distances in a dtype, where it overflows its largest number.

    Where it underflows it is the smallest, so that infinite distances still weigh nothing.
    """
    return scale.double().clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype)


def init(batch: int, queries: int, values: int, like: Tensor) -> PosteriorState:
    """The state before the first image, in the dtype and on the device of `like`."""
    return PosteriorState(
        like.new_full((batch, queries), torch.inf),
        like.new_zeros(batch, queries),
        like.new_zeros(batch, queries, values),
    )


def _exponential(gap: Tensor, scale: Tensor) -> Tensor:
    """exp(-gap * scale), 0 at infinite gaps."""
    if not is_differentiated(scale):
        return torch.exp(-gap * scale)
    # The derivative with respect to the scale would be 0 times infinity.
    infinite = torch.isinf(gap)
    return torch.exp(-gap.masked_fill(infinite, 0.0) * scale).masked_fill(infinite, 0.0)


def _decay(minimum: Tensor, new_minimum: Tensor, scale: Tensor) -> Tensor:
    # A state without images has an infinite minimum: its sums are 0 and must stay 0, where the
    # difference or its product with a scale of 0 may be NaN.
    decay = _exponential(minimum - new_minimum, scale[:, None])
    return torch.where(torch.isinf(minimum), 0.0, decay)


def _weights(distance: Tensor, minimum: Tensor, scale: Tensor) -> Tensor:
    # Infinite distances stand for images that a query is not compared with: without any other
    # so far, the difference to the minimum would be NaN.
    base = torch.where(torch.isinf(minimum), 0.0, minimum).to(distance.dtype)
    return _exponential(distance - base[:, None], scale[:, None, None])


def update(
    state: PosteriorState,
    distance: Tensor,
    scale: Tensor,
    weigh: Callable[[Tensor], Tensor],
) -> PosteriorState:
    """Take in a chunk of n images.

    Args:
        state: The state so far.
        distance: Weighted squared distances of the chunk, [B, n, Q]; infinite where a query is
            not compared with an image.
        scale: Factor of the distances in the exponent, [B].
        weigh: Maps unnormalised weights [B, n, Q] to the weighted sums of values [B, Q, V].
    """
    minimum = torch.minimum(state.minimum, distance.amin(1))
    weights = _weights(distance, minimum, scale)
    decay = _decay(state.minimum, minimum, scale)
    return PosteriorState(
        minimum,
        state.total * decay + weights.sum(1, dtype=state.total.dtype),
        state.weighted * decay[..., None] + weigh(weights),
    )


def no_values(weights: Tensor) -> Tensor:
    """What `update` is told of a scan that asks for the minimum and total alone."""
    return weights.new_zeros(weights.shape[0], weights.shape[2], 0)


def merge(first: PosteriorState, second: PosteriorState, scale: Tensor) -> PosteriorState:
    """The state after both sets of images."""
    minimum = torch.minimum(first.minimum, second.minimum)
    one, two = (rescaled(state, minimum, scale) for state in (first, second))
    return PosteriorState(minimum, one.total + two.total, one.weighted + two.weighted)


def rescaled(state: PosteriorState, minimum: Tensor, scale: Tensor) -> PosteriorState:
    """A state with its sums counted from a smaller minimum, [B, Q]."""
    decay = _decay(state.minimum, minimum, scale)
    return PosteriorState(minimum, state.total * decay, state.weighted * decay[..., None])


def finalize(state: PosteriorState) -> Tensor:
    """The posterior means [B, Q, V]."""
    return state.weighted / state.total[..., None]


def posterior_weights(distance: Tensor, state: PosteriorState, scale: Tensor) -> Tensor:
    """The posterior weights of a chunk's images, [B, n, Q], where `state` has seen all images.

    Args:
        distance: Weighted squared distances of the chunk, as in `update`, [B, n, Q].
        state: The state after the scan of all images.
        scale: Factor of the distances in the exponent, [B].
    """
    minimum, total = (part.to(distance.dtype)[:, None] for part in state[:2])
    return _exponential(distance - minimum, scale[:, None, None]) / total


def log_sum_exp(state: PosteriorState, scale: Tensor) -> Tensor:
    """Log of the sum of exp(-scale * distance), [B, Q]: the log-density up to a constant."""
    return state.total.log() - state.minimum * scale[:, None]


def tangent_values(values: int, tangents: int) -> int:
    """Number of weighted sums of a query with `values` values and `tangents` tangents."""
    return values + tangents * (1 + values)


def init_tangents(
    batch: int, queries: int, values: int, tangents: int, like: Tensor
) -> PosteriorState:
    """The state with tangents before the first image, float64 on the device of `like`."""
    return init(batch, queries, tangent_values(values, tangents), like.double())


def update_tangents(
    state: PosteriorState,
    distance: Tensor,
    scale: Tensor,
    values: int,
    terms: Callable[[int], tuple[Iterable[Tensor], Tensor]],
) -> PosteriorState:
    """Take in a chunk of n images with tangents.

    Args:
        state: The state so far, float64.
        distance: Weighted squared distances of the chunk, as in `update`, [B, n, Q].
        scale: Factor of the distances in the exponent, [B].
        values: Number V of values that a query answers.
        terms: Maps a batch element to its inner products and values, as `tangent_sums` takes them.
    """
    minimum = torch.minimum(state.minimum, distance.amin(1))
    weights = _weights(distance, minimum, scale)
    nearest = distance.detach().argmin(1)
    rows = [tangent_sums(weights[b], *terms(b), nearest[b]) for b in range(len(weights))]
    weighted = torch.stack(rows) if rows else state.weighted
    chunk = PosteriorState(minimum, weights.sum(1, dtype=torch.float64), weighted)
    return merge_tangents(state, chunk, scale.double(), values)


def tangent_sums(
    weights: Tensor, inner: Iterable[Tensor], values: Tensor, nearest: Tensor
) -> Tensor:
    """The weighted sums of one batch element over a chunk, with tangents, float64.

    Args:
        weights: The weights, [n, Q].
        inner: The products c of every tangent, [n, Q].
        values: Values that the queries answer, [n, V, Q], or [n, V, 1] for all of them.
        nearest: The image of the largest weight of every query, [Q]: what the terms are counted
            from, so that it and its equals add nothing to the covariance.

    Returns:
        Sums of v, of c_k and of (v - E[v]) (c_k - E[c_k]), [Q, V + K + K V].
    """
    total = weights.sum(0, dtype=torch.float64)[:, None]
    safe = torch.where(total > 0, total, 1.0)
    place = nearest[None, None].expand(1, values.shape[1], -1)
    origin = values.expand(-1, -1, len(nearest)).gather(0, place)
    gaps = values - origin
    moved = _summed(weights[:, None] * gaps)
    means, products, cross = moved + total * origin[0].T.double(), [], []
    for c in inner:
        start = c.gather(0, nearest[None])
        factor = weights * (c - start)
        shift = _summed(factor[:, None])
        products.append(shift + total * start.T.double())
        cross.append(_summed(factor[:, None] * gaps) - shift * moved / safe)
    return torch.cat([means, *products, *cross], dim=-1)


def _summed(terms: Tensor) -> Tensor:
    """Terms [n, V, Q] over the images, in float64: [Q, V]."""
    return terms.sum(0, dtype=torch.float64).T


def merge_tangents(
    first: PosteriorState, second: PosteriorState, scale: Tensor, values: int
) -> PosteriorState:
    """The state with tangents after both sets of images; `values` as in `update_tangents`."""
    minimum = torch.minimum(first.minimum, second.minimum)
    one, two = (rescaled(state, minimum, scale) for state in (first, second))
    total = one.total + two.total
    share = one.total * two.total / torch.where(total > 0, total, 1.0)
    (v, c), (other_v, other_c) = (_means(state, values) for state in (first, second))
    apart = (c - other_c)[..., None] * (v - other_v)[..., None, :]
    between = share[..., None] * apart.flatten(-2)
    still = torch.zeros_like(one.weighted[..., : values + c.shape[-1]])
    weighted = one.weighted + two.weighted + torch.cat([still, between], -1)
    return PosteriorState(minimum, total, weighted)


def _means(state: PosteriorState, values: int) -> tuple[Tensor, Tensor]:
    total = torch.where(state.total > 0, state.total, 1.0)[..., None]
    means, inner, _ = _split(state.weighted, values)
    return means / total, inner / total


def about_means(state: PosteriorState, values: int) -> PosteriorState:
    """A state with tangents whose last sums are those of c_k v, as others keep it: float64."""
    minimum, total, weighted = (part.double() for part in state)
    means, inner, cross = _split(weighted, values)
    cross = cross - inner[..., None] * means[..., None, :] / total[..., None, None]
    return PosteriorState(minimum, total, torch.cat([means, inner, cross.flatten(-2)], dim=-1))


def uncentred(state: PosteriorState, centre: Tensor) -> PosteriorState:
    """A state with tangents, in float64, whose values were counted from a centre.

    What c is counted from is left as it is: it matters to no result.

    Args:
        state: State of values v - centre, with K tangents.
        centre: [B, Q, V].
    """
    minimum, total, weighted = (part.double() for part in state)
    centre = centre.double()
    means, rest = weighted.tensor_split([centre.shape[-1]], dim=-1)
    means = means + total[..., None] * centre
    return PosteriorState(minimum, total, torch.cat([means, rest], dim=-1))


def finalize_jvp(state: PosteriorState, values: int, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior means and their derivatives along the tangents.

    Args:
        state: State of a scan with K tangents.
        values: Number V of values that a query answers.
        factor: Factor alpha / (sigma^2 temperature) of the covariances, [B].

    Returns:
        Means [B, Q, V] and derivatives [K, B, Q, V].
    """
    means, _, covariance = _split(finalize(state), values)
    return means, (covariance * factor[:, None, None, None]).movedim(-2, 0)


def _split(sums: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Parts [..., V], [..., K] and [..., K, V] of sums with tangents."""
    tangents = (sums.shape[-1] - values) // (1 + values)
    means, inner, cross = sums.split([values, tangents, tangents * values], dim=-1)
    return means, inner, cross.unflatten(-1, (tangents, values))
