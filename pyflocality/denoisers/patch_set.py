"""Patch sets: posteriors over overlapping patches, blended into one image."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflocality._support.checks import check_float_tensor, check_real, check_tensor, describe
from pyflocality._support.precision import Precision
from pyflocality._support.transforms import outside_transforms
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import (
    Members,
    PosteriorDenoiser,
    join_batch,
    share_passes,
    split_levels,
)
from pyflocality.denoisers.window import Window, level_rule
from pyflocality.ops import (
    filtered_posterior_jvp,
    filtered_posterior_mean,
    filtered_posterior_vjp,
    patch_set_mean,
)
from pyflocality.ops.patch_set import check_patch
from pyflocality.weights import QueryWeights

Masks = Tensor | Callable[[float, float], Tensor] | Sequence[tuple[float, Tensor]]


class PatchSetDenoiser(PosteriorDenoiser):
    r"""Patch set posterior composite (PSPC): every patch has a posterior and answers itself.

    .. math::
        \hat x_0[d] = \frac{\sum_{q : d \in P_q} \sum_i p_{q,i} v_i[d]}{|\{q : d \in P_q\}|},
        \qquad
        p_q = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_{d \in P_q} (x[d] - \alpha v_i[d])^2 \right)

    Square patches: every k x k window that fits inside the image. Flexible patches: a set of
    pixels :math:`P_q` for every pixel q, in all channels (`masks_from_maps` makes them from
    sensitivity maps). A pixel that lies in no patch gets the plain mean of the training images;
    the published code answers NaN there. A patch that covers the image is the optimal denoiser.

    Args:
        data: The training set.
        window: Side k of square patches, even or odd, at most min(H, W); or a function
            (alpha, sigma) -> k; or a table of pairs (sigma / alpha, k), of which the nearest in
            log(sigma / alpha) counts.
        masks: Flexible patches instead: bool [H, W, H, W], `masks[y, x]` the set of pixel
            (y, x); or a function or a table of them, as for `window`.
        temperature: Divides the logits.
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype.
        memory_budget: Working memory, bytes or a string such as "2GB".
        precision: "exact"; or "auto", which permits errors of about 1e-3 in [-1, 1], see
            `pyflocality.ops.PosteriorOptions`.

    Raises:
        TypeError: `window` or `masks` has none of its forms.
        ValueError: Both or neither are given, or one is out of range or of the wrong shape.

    References:
        Niedoba, Zwartsenberg, Murphy and Wood, Towards a mechanistic explanation of diffusion
        model generalization, 2025.
    """

    def __init__(
        self,
        data: TrainingSet,
        window: Window | None = None,
        *,
        masks: Masks | None = None,
        temperature: float = 1.0,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
        precision: Precision = "exact",
    ) -> None:
        super().__init__(
            data,
            temperature,
            backend=backend,
            dtype=dtype,
            memory_budget=memory_budget,
            precision=precision,
        )
        if (window is None) == (masks is None):
            raise ValueError("give either `window` or `masks`, and not both")
        self.window, self.masks = window, masks
        self._rule()

    def _rule(self) -> Callable[[float, float], int | Tensor]:
        """The window or the masks of a noise level, as a function (alpha, sigma)."""
        _, height, width = self.image_shape
        if self.window is not None:
            check = functools.partial(check_patch, height=height, width=width)
            return level_rule(
                self.window, "window", check, lambda given: isinstance(given, numbers.Real)
            )
        check = functools.partial(_check_masks, image_shape=self.image_shape)
        return level_rule(self.masks, "masks", check, lambda given: isinstance(given, Tensor))

    def _weights(self, patches: int | Tensor) -> QueryWeights:
        """The patches of a window or of masks as weights [Q, D]."""
        with outside_transforms():
            if isinstance(patches, Tensor):
                return _flexible_patches(patches, self.image_shape[0])
            return _square_patches(self.image_shape, patches)

    def _patches(self, sigma: Tensor, alpha: Tensor) -> tuple[list[Members], list[int | Tensor]]:
        """Groups of a batch, and the window or the masks of each."""
        levels = split_levels(sigma, alpha)
        with outside_transforms():
            patches_at = self._rule()
            patches = [patches_at(level.alpha, level.sigma) for level in levels]
        return share_passes(levels, patches)

    def _split(self, sigma: Tensor, alpha: Tensor) -> tuple[list[Members], list[QueryWeights]]:
        """Groups of a batch, and the patches of each as weights."""
        groups, patches = self._patches(sigma, alpha)
        return groups, list(map(self._weights, patches))

    def _denoise(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        images, options = self.data.images, self._posterior_options
        groups, of_groups = self._patches(sigma, alpha)
        parts = []
        for m, patches in zip(groups, of_groups, strict=True):
            if isinstance(patches, Tensor):
                weights = self._weights(patches)
                run = functools.partial(filtered_posterior_mean, x[m], images, weights, weights)
            else:
                run = functools.partial(patch_set_mean, x[m], images, patches)
            parts.append(run(sigma[m], alpha[m], **options))
        return join_batch(parts, groups)

    def _jvp(
        self, x: Tensor, tangents: Tensor, sigma: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        images, options = self.data.images, self._posterior_options
        groups, patches = self._split(sigma, alpha)
        parts = [
            filtered_posterior_jvp(
                x[m], tangents[:, m], images, w, w, sigma[m], alpha[m], **options
            )
            for m, w in zip(groups, patches, strict=True)
        ]
        means, derivatives = zip(*parts, strict=True)
        return join_batch(means, groups), join_batch(derivatives, groups, 1)

    def _vjp(self, x: Tensor, cotangents: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        images, options = self.data.images, self._posterior_options
        groups, patches = self._split(sigma, alpha)
        parts = [
            filtered_posterior_vjp(
                x[m], cotangents[:, m], images, w, w, sigma[m], alpha[m], **options
            )
            for m, w in zip(groups, patches, strict=True)
        ]
        return join_batch(parts, groups, 1)


def masks_from_maps(maps: Tensor, share: float) -> Tensor:
    """The smallest set of pixels that holds a given share of each sensitivity map.

    Args:
        maps: How much pixel (y, x) of the output listens to each pixel of the input, not
            negative, [H, W, H, W].
        share: Share of each map's sum that its set must reach, in (0, 1].

    Returns:
        Sets of pixels for `PatchSetDenoiser`, bool [H, W, H, W]. Pixels enter in the order of
        their values, the first of equals first, until the share is reached.

    Raises:
        TypeError: `maps` is not a floating-point tensor, or `share` not a number.
        ValueError: `maps` has the wrong shape or holds NaN or negative values, or `share` is
            out of range.
    """
    check_float_tensor(maps, "maps")
    share = check_real(share, "share", low=0.0, high=1.0, above=True)
    if maps.ndim != 4 or maps.shape[:2] != maps.shape[2:]:
        raise ValueError(f"`maps` must have shape [H, W, H, W], got {describe(maps)}")
    if not (maps >= 0).all():
        raise ValueError("`maps` holds negative values")
    flat = maps.double().flatten(2)
    sorted_values, order = flat.sort(dim=-1, descending=True, stable=True)
    before = sorted_values.cumsum(-1) - sorted_values
    kept = before < share * flat.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(maps.shape)


def _check_masks(masks: object, image_shape: tuple[int, int, int]) -> Tensor:
    if check_tensor(masks, "masks").dtype != torch.bool:
        raise TypeError(f"`masks` must be a bool tensor [H, W, H, W], got {describe(masks)}")
    _, height, width = image_shape
    if tuple(masks.shape) != (height, width, height, width):
        expected = [height, width, height, width]
        raise ValueError(f"`masks` must have shape {expected}, got {describe(masks)}")
    return masks


@functools.lru_cache(maxsize=8)
def _square_patches(image_shape: tuple[int, int, int], window: int) -> QueryWeights:
    channels, height, width = image_shape

    def covers(length: int) -> Tensor:
        start = torch.arange(length - window + 1)[:, None]
        place = torch.arange(length)
        return (place >= start) & (place < start + window)

    rows, columns = covers(height), covers(width)
    patches = rows[:, None, :, None] & columns[None, :, None, :]
    pixels = patches.reshape(-1, 1, height * width).expand(-1, channels, -1)
    return QueryWeights(pixels.flatten(1))


def _flexible_patches(masks: Tensor, channels: int) -> QueryWeights:
    height, width = masks.shape[:2]
    pixels = masks.reshape(height * width, 1, -1).expand(-1, channels, -1)
    return QueryWeights(pixels.flatten(1))
