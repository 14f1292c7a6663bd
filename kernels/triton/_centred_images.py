"""8-bit images as the tensor cores take them: transposed, centred, in float16, without rounding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyflocality.kernels.triton._cached import Cached, cached_with
from pyflocality.storage.reader import BYTES_PER_UNIT

# Columns are padded to whole blocks of the widest kernel.
COLUMN_MULTIPLE = 128
# Elements converted at a time, and the bytes that takes beside the result.
_ELEMENTS_AT_A_TIME = 2**22
CONVERSION_BYTES = 4 * _ELEMENTS_AT_A_TIME


@dataclass
class CentredImages:
    """A set of N images u as integers K = u - centre, [D, columns], float16.

    The centre is the rounded mean of every value: |K| <= 255 is exact in float16, and sums of
    products and squares are as small as a constant shift can make them.

    Attributes:
        images: Images as stored, uint8 [N, C, H, W].
        cached_centre: The centre, float16 [D].
        variance: Mean over the D values of the mean of K^2, in the units of [-1, 1].
        cached_whole: The whole copy where it has been cached, else None.
        norms: What launchers cache beside the copy: by owner, a key and norms of the images.
    """

    images: Tensor
    cached_centre: Cached
    variance: float
    cached_whole: Cached | None = None
    norms: dict[object, tuple[object, Cached]] = field(default_factory=dict)

    @property
    def centre(self) -> Tensor:
        """The centre, float16 [D], for use on the current stream."""
        return self.cached_centre.here()[0]

    @property
    def dim(self) -> int:
        """Values of an image, D."""
        return self.images[0].numel()

    @property
    def columns(self) -> int:
        """Columns of the copy: N rounded up; those past the last image are zero."""
        return -(-len(self.images) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def whole(self) -> Tensor:
        """The whole copy [D, columns], made once, for use on the current stream."""
        if self.cached_whole is None:
            self.cached_whole = Cached(self.columns_of(0, self.columns))
        return self.cached_whole.here()[0]

    def columns_of(self, first: int, last: int) -> Tensor:
        """The columns of some images, new memory, [D, last - first]."""
        shape = (self.dim, last - first)
        result = torch.empty(shape, dtype=torch.float16, device=self.images.device)
        step, centre = max(COLUMN_MULTIPLE, _ELEMENTS_AT_A_TIME // self.dim), self.centre
        for start in range(0, last - first, step):
            target = result[:, start : start + step]
            stored = self.images[first + start : first + start + target.shape[1]]
            values = stored.reshape(len(stored), self.dim).half() - centre
            target[:, : len(stored)].copy_(values.T)
            target[:, len(stored) :].zero_()
        return result


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def centred_images(images: Tensor) -> CentredImages:
    """The centred form of a set of images, made anew after the images were changed in place."""
    return cached_with(_copies, images, _centred)


def _centred(images: Tensor) -> CentredImages:
    count, dim = len(images), images[0].numel()
    step = max(1, _ELEMENTS_AT_A_TIME // dim)
    # Sums of bytes and of their squares over few images are exact in float32; the totals are
    # exact in float64.
    step = min(step, 256)
    total = torch.zeros(dim, dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(total)
    for block in images.split(step):
        values = block.reshape(len(block), dim).float()
        total += values.sum(0)
        squares += values.square().sum(0)
    centre = (total / count).round()
    spread = (squares - 2 * centre * total) / count + centre.square()
    variance = float(spread.mean()) / BYTES_PER_UNIT**2
    return CentredImages(images, Cached(centre.half()), variance)
