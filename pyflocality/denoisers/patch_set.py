"""Patch sets: posteriors over overlapping patches, blended into one image."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyflocality._support.checks import check_float_tensor, check_real, check_tensor, describe
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Asked, DenoiserOptions, PosteriorDenoiser
from pyflocality.denoisers.window import Window, level_rule
from pyflocality.ops.filtered_posterior import FILTERED_POSTERIOR
from pyflocality.ops.operation import Kind
from pyflocality.ops.patch_set import PATCH_SET, check_patch
from pyflocality.weights import QueryWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What masks ask of images of a shape, with a copy of the masks: their owner may write to them.
_flexible: MutableMapping[Tensor, tuple[tuple[int, int, int], Tensor, Asked]] = (
    WeakTensorKeyDictionary()
)

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
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.

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
        **options: Unpack[DenoiserOptions],
    ) -> None:
        super().__init__(data, temperature, **options)
        if (window is None) == (masks is None):
            raise ValueError("give either `window` or `masks`, and not both")
        self.window, self.masks = window, masks
        self._rule()

    def _rule(self) -> Callable[[float, float], int | Tensor]:
        """The window or the masks of a noise level, as a function (alpha, sigma)."""
        _, height, width = self.image_shape
        if self.window is not None:
            check = functools.partial(check_patch, height=height, width=width)
            return level_rule(self.window, "window", check, numbers.Real)
        check_masks = functools.partial(_check_masks, image_shape=self.image_shape)
        return level_rule(self.masks, "masks", check_masks, Tensor)

    def _questions(self, kind: Kind) -> Callable[[float, float], Asked]:
        patches_at = self._rule()
        # Masks make one object of weights, however many levels they are for.
        flexible = functools.cache(functools.partial(_flexible_patches, self.image_shape))

        def question(alpha: float, sigma: float) -> Asked:
            patches = patches_at(alpha, sigma)
            if isinstance(patches, Tensor):
                return flexible(patches)
            if kind == "scan":
                return Asked(PATCH_SET, (patches,))
            return _square_patches(self.image_shape, patches)

        return question


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
    checked = check_tensor(masks, "masks")
    if checked.dtype != torch.bool:
        raise TypeError(f"`masks` must be a bool tensor [H, W, H, W], got {describe(masks)}")
    _, height, width = image_shape
    if tuple(checked.shape) != (height, width, height, width):
        expected = [height, width, height, width]
        raise ValueError(f"`masks` must have shape {expected}, got {describe(masks)}")
    return checked


@functools.lru_cache(maxsize=8)
def _square_patches(image_shape: tuple[int, int, int], window: int) -> Asked:
    _, height, width = image_shape

    def covers(length: int) -> Tensor:
        start = torch.arange(length - window + 1)[:, None]
        place = torch.arange(length)
        return (place >= start) & (place < start + window)

    rows, columns = covers(height), covers(width)
    patches = rows[:, None, :, None] & columns[None, :, None, :]
    return _answering_themselves(image_shape, patches)


def _flexible_patches(image_shape: tuple[int, int, int], masks: Tensor) -> Asked:
    """Masks answer themselves: made once for as long as they stay as they are."""
    cached = _flexible.get(masks)
    if cached is None or cached[0] != image_shape or not torch.equal(cached[1], masks):
        cached = image_shape, masks.clone(), _answering_themselves(image_shape, masks)
        _flexible[masks] = cached
    return cached[2]


def _answering_themselves(image_shape: tuple[int, int, int], patches: Tensor) -> Asked:
    """A posterior for each patch [.., H, W], in all channels, that answers the patch."""
    channels, height, width = image_shape
    pixels = patches.reshape(-1, 1, height * width).expand(-1, channels, -1)
    weights = QueryWeights(pixels.flatten(1))
    return Asked(FILTERED_POSTERIOR, FILTERED_POSTERIOR.check(image_shape, weights, weights))
