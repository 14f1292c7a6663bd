"""8-bit images as the tensor cores take them: transposed, centred, in float16, without rounding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyflocality.kernels.triton._kept import Kept, version_of
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
        version: Version of `images` that this was made from; None where they have none.
        kept_centre: The centre, float16 [D].
        variance: Mean over the D values of the mean of K^2, in the units of [-1, 1].
        kept_whole: The whole copy where it fits the memory budget, else None.
        norms: What launchers keep beside the copy: by owner, a key and norms of the images.
    """

    images: Tensor
    version: int | None
    kept_centre: Kept
    variance: float
    kept_whole: Kept | None = None
    norms: dict[object, tuple[object, Kept]] = field(default_factory=dict)

    @property
    def centre(self) -> Tensor:
        """The centre, float16 [D], for use on the current stream."""
        return self.kept_centre.here()[0]

    @property
    def whole(self) -> Tensor | None:
        """The whole copy [D, columns] where it is kept, for use on the current stream."""
        return None if self.kept_whole is None else self.kept_whole.here()[0]

    @property
    def dim(self) -> int:
        """Values of an image, D."""
        return self.images[0].numel()

    @property
    def columns(self) -> int:
        """Columns of the copy: N rounded up; those past the last image are zero."""
        return -(-len(self.images) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def fill(self, target: Tensor, first: int) -> None:
        """Write the columns from image `first` on into `target` [D, columns]."""
        step, centre = max(COLUMN_MULTIPLE, _ELEMENTS_AT_A_TIME // self.dim), self.centre
        for start in range(0, target.shape[1], step):
            part = target[:, start : start + step]
            stored = self.images[first + start : first + start + part.shape[1]]
            values = stored.reshape(len(stored), self.dim).half() - centre
            part[:, : len(stored)].copy_(values.T)
            part[:, len(stored) :].zero_()

    def keep(self, budget: int) -> bool:
        """Keep the whole copy if it fits `budget` bytes; says whether it is kept."""
        if self.kept_whole is None and 2 * self.dim * self.columns <= budget:
            whole = torch.empty(
                self.dim, self.columns, dtype=torch.float16, device=self.images.device
            )
            self.fill(whole, 0)
            self.kept_whole = Kept(whole)
        return self.kept_whole is not None


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def centred_images(images: Tensor) -> CentredImages:
    """The centred form of a set of images, made anew after the images were changed in place."""
    version, found = version_of(images), _copies.get(images)
    # The copy must not keep the tensor alive that the dictionary watches.
    view = images.detach()
    if version is None:
        return CentredImages(view, version, *_centre(view))
    if found is None or found.version != version or found.images.shape != images.shape:
        found = CentredImages(view, version, *_centre(view))
        _copies[images] = found
    return found


def _centre(images: Tensor) -> tuple[Kept, float]:
    count, dim = len(images), images[0].numel()
    step = max(1, _ELEMENTS_AT_A_TIME // dim)
    # Sums of bytes and of their squares over few images are exact in float32; the totals are
    # exact in float64.
    step = min(step, 256)
    total = torch.zeros(dim, dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(total)
    for part in images.split(step):
        values = part.reshape(len(part), dim).float()
        total += values.sum(0)
        squares += values.square().sum(0)
    centre = (total / count).round()
    spread = (squares - 2 * centre * total) / count + centre.square()
    return Kept(centre.half()), float(spread.mean()) / BYTES_PER_UNIT**2
