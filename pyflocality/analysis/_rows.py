"""One row of a Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.checks import LevelLike, check_batch, check_levels
from pyflocality.backends.selection import OPERATIONS, requested_backend
from pyflocality.denoisers.base import Denoiser, PosteriorDenoiser
from pyflocality.denoisers.levels import join_rows, split_levels
from pyflocality.denoisers.pca_locality import PCALocalityDenoiser
from pyflocality.denoisers.queries import QueryDenoiser
from pyflocality.ops import global_posterior_jvp
from pyflocality.posterior.sharded import ranks_of


def jacobian_row(
    denoiser: Denoiser,
    x: Tensor,
    pixel: tuple[int, int, int],
    sigma: LevelLike,
    alpha: float | Tensor,
) -> Tensor:
    """Derivatives of one output value with respect to the inputs, [B, C, H, W].

    An output whose posterior compares a set of inputs with weights 1 is one value of the optimal
    denoiser of these inputs alone, whose Jacobian is symmetric: its row is its product with one
    tangent, in a pass over these inputs of every image. All others take a vjp.
    """
    x = check_batch(x, denoiser.image_shape, denoiser.device, "x")
    levels = check_levels(sigma, alpha, len(x), positive=True)
    if len(x) > 0 and isinstance(denoiser, QueryDenoiser) and _has_rows_of_its_own(denoiser):
        split = split_levels(levels, len(x))
        every = (denoiser.neighbourhood(pixel, level.sigma, level.alpha) for level in split)
        near = [inputs for inputs in every if inputs is not None]
        if len(near) == len(split) and all(_is_worth(denoiser, inputs, pixel) for inputs in near):
            rows = [
                _row_of_inputs(denoiser, x[level.rows], inputs, pixel, level.sigma, level.alpha)
                for level, inputs in zip(split, near, strict=True)
            ]
            return join_rows(rows, [level.rows for level in split])
    cotangent = torch.zeros_like(x)
    channel, row, column = pixel
    cotangent[:, channel, row, column] = 1.0
    return denoiser.vjp(x, cotangent[None], levels.sigma, levels.alpha)[0]


def _has_rows_of_its_own(denoiser: QueryDenoiser) -> bool:
    # A backend that was named, and lacks this operation, may well have the vjp.
    if requested_backend(denoiser.backend) not in ("auto", *OPERATIONS["global_posterior_jvp"]):
        return False
    # The inputs are taken from the images as they are stored, all of them.
    if denoiser.data.augmentation is not None or ranks_of(denoiser.data.images) is not None:
        return False
    return not isinstance(denoiser, PCALocalityDenoiser) or denoiser.aggregation == "exact"


def _is_worth(denoiser: QueryDenoiser, inputs: Tensor, pixel: tuple[int, int, int]) -> bool:
    """Whether the output is one of its inputs, and they fit the memory budget for all images."""
    if not inputs[pixel]:
        return False
    copied = int(inputs.sum()) * len(denoiser.data) * denoiser.data.images.element_size()
    return bool(inputs.all()) or copied <= memory_budget_bytes(denoiser.memory_budget)


def _row_of_inputs(
    denoiser: PosteriorDenoiser,
    x: Tensor,
    inputs: Tensor,
    pixel: tuple[int, int, int],
    sigma: float,
    alpha: float,
) -> Tensor:
    """The row of an output that compares some inputs, bool [C, H, W], and is one of them."""
    chosen = inputs.flatten().nonzero()[:, 0].to(x.device)
    place = torch.zeros_like(inputs)
    place[pixel] = True
    tangent = place.flatten().to(x.device)[chosen].to(x.dtype)

    def at_inputs(images: Tensor) -> Tensor:
        # All inputs are taken as they lie, without a copy.
        if len(chosen) == inputs.numel():
            return images.reshape(len(images), 1, 1, -1)
        return images.flatten(1).index_select(1, chosen)[:, None, None]

    near = at_inputs(x)
    products = global_posterior_jvp(
        near,
        tangent.expand_as(near)[None],
        at_inputs(denoiser.data.images),
        sigma,
        alpha,
        temperature=denoiser.temperature,
        backend=denoiser.backend,
        dtype=denoiser.dtype,
        memory_budget=denoiser.memory_budget,
    )[1][0]
    row = torch.zeros_like(x).flatten(1)
    row[:, chosen] = products.flatten(1)
    return row.reshape(x.shape)
