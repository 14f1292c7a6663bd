"""Pictures of images: grids, captioned rows and the way a sample came about, by Pillow.

Values in [-1, 1] become bytes round((v + 1) * 127.5), the inverse of the 8-bit convention of the
library, so a training image is drawn exactly. Values outside are clipped here, for display only.
Small images are enlarged by a whole factor, every value a square of equal pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.checks import (
    REAL_DTYPES,
    check_count,
    check_float_tensor,
    check_sequence,
    check_size,
    check_tensor,
    check_text,
    describe,
)
from pyflocality.storage.reader import values_to_bytes

if TYPE_CHECKING:
    from PIL import Image

# Height of a line of text in pixels, and what a picture shows where there is no image.
CAPTION_HEIGHT = 14
_PAPER = 255
_FRAME = (220, 0, 0)
# Images are enlarged by the largest factor that keeps their longer side within this.
_TILE = 64
# Longer sides are beyond what formats and viewers take.
_WIDEST = 2**16 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Values as bytes, round((v + 1) * 127.5) with v clipped to [-1, 1].

    Args:
        images: Finite floating-point values, any shape [...].

    Returns:
        uint8 [...], on the CPU.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: A value is NaN or infinite.
    """
    images = check_float_tensor(images, "images").detach().cpu().double()
    return values_to_bytes(images.clamp(-1.0, 1.0)).round().to(torch.uint8)


def default_scale(height: int, width: int) -> int:
    """The whole factor that brings an image of this size to at most 64 pixels, at least 1."""
    height, width = check_size(height, "height"), check_size(width, "width")
    return max(1, _TILE // max(height, width))


def image_grid(
    images: Tensor,
    columns: int | None = None,
    pad: int = 2,
    scale: int | None = None,
    *,
    marked: Tensor | None = None,
) -> Image.Image:
    """Images side by side, row by row.

    Image i has its upper left corner at x = pad + (i % columns) (scale W + pad),
    y = pad + (i // columns) (scale H + pad).

    Args:
        images: Values in [-1, 1], [n, C, H, W] with n >= 1. One channel is drawn grey, three are
            drawn in colour, and any other number as grey images side by side.
        columns: Images in a row; None draws up to eight.
        pad: Pixels between images and around them, at least 0.
        scale: Whole factor of enlargement; None takes `default_scale`.
        marked: Which images have a red frame in the space around them, bool [n]; None for none.

    Returns:
        A picture of mode "L" or "RGB"; "RGB" where there are frames.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape or range, or a value is NaN or infinite.
    """
    from PIL import Image

    columns = None if columns is None else check_count(columns, "columns")
    pad, scale = _check_layout(pad, scale)
    tiles = _tiles(images)
    scale = default_scale(*tiles.shape[1:3]) if scale is None else scale
    columns = min(len(tiles), 8) if columns is None else columns
    _check_canvas(tiles.shape, columns, pad, scale)
    framed = _check_marked(marked, len(tiles))
    if any(framed) and tiles.shape[3] == 1:
        tiles = tiles.repeat(3, axis=3)
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width, channels = tiles.shape[1:]
    rows = -(-len(tiles) // columns)
    canvas = np.full(
        (pad + rows * (height + pad), pad + columns * (width + pad), channels), _PAPER, np.uint8
    )
    for index, tile in enumerate(tiles):
        top = pad + index // columns * (height + pad)
        left = pad + index % columns * (width + pad)
        if framed[index]:
            canvas[top - pad : top + height + pad, left - pad : left + width + pad] = _FRAME
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def captioned_rows(
    rows: Sequence[tuple[str, Tensor]],
    pad: int = 2,
    scale: int | None = None,
    *,
    marked: Sequence[Tensor | None] | None = None,
) -> Image.Image:
    """Rows of images, each below a line of text.

    Row r starts at y = r (14 + 2 pad + scale H): 14 pixels of text, then its images as
    `image_grid` lays them out.

    Args:
        rows: Pairs of a caption and images in [-1, 1], [n, C, H, W], of one shape (C, H, W).
        pad: Pixels between images and around them, at least 0.
        scale: Whole factor of enlargement; None takes `default_scale`.
        marked: For each row which of its images have a red frame, as training images that they
            are, bool [n] or None; a line at the end says so. None for no frames.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no rows, or an argument has the wrong shape or range.
    """
    from PIL import Image, ImageDraw

    pad, scale = _check_layout(pad, scale)
    rows = _check_rows(rows)
    marks = [None] * len(rows) if marked is None else check_sequence(marked, "marked", "masks")
    if len(marks) != len(rows):
        raise ValueError(f"`marked` must have one for each of {len(rows)} rows, got {len(marks)}")
    grids = [
        image_grid(images, max(len(images), 1), pad, scale, marked=mark)
        for (_, images), mark in zip(rows, marks, strict=True)
    ]
    width = max(grid.width for grid in grids)
    is_marked = any(mark is not None and bool(mark.any()) for mark in marks)
    if is_marked:
        # Also the ends of captions tell how many are.
        width = max(width, *(_length(caption) for caption, _ in rows))
    height = sum(grid.height + CAPTION_HEIGHT for grid in grids)
    mode = "RGB" if any(grid.mode == "RGB" for grid in grids) else "L"
    sheet = Image.new(mode, (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (caption, _), grid in zip(rows, grids, strict=True):
        draw.text((max(pad, 1), top + 1), caption, fill="black")
        sheet.paste(grid, (0, top + CAPTION_HEIGHT))
        top += CAPTION_HEIGHT + grid.height
    return sheet if not is_marked else _explained(sheet)


def sample_sheet(
    samples: Tensor,
    nearest: Tensor | None = None,
    columns: int = 8,
    *,
    marked: Tensor | None = None,
) -> Image.Image:
    """Samples, each above the training image nearest to it.

    Args:
        samples: Images in [-1, 1], [n, C, H, W].
        nearest: For each sample a training image, [n, C, H, W], or None to draw samples alone.
        columns: Images in a row.
        marked: Which samples have a red frame, as training images that they are, bool [n]; a line
            below says so. None for none.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The shapes differ, or a value is NaN or infinite.
    """
    columns = check_count(columns, "columns")
    _check_images(samples, "samples")
    framed = _check_marked(marked, len(samples))
    if nearest is None:
        grid = image_grid(samples, min(columns, len(samples)), marked=marked)
        return _explained(grid) if any(framed) else grid
    _check_images(nearest, "nearest")
    if nearest.shape != samples.shape:
        raise ValueError(
            f"`nearest` must have the shape of `samples`, {list(samples.shape)}, got "
            f"{describe(nearest)}"
        )
    rows: list[tuple[str, Tensor]] = []
    marks: list[Tensor | None] = []
    for start in range(0, len(samples), columns):
        part = slice(start, start + columns)
        rows.append(("samples", samples[part]))
        rows.append(("nearest training images", nearest[part]))
        marks += [None if marked is None else marked[part], None]
    return captioned_rows(rows, marked=marks)


def _explained(sheet: Image.Image) -> Image.Image:
    """A sheet above a line that says what its frames mean, whose end it is wide enough for."""
    from PIL import Image, ImageDraw

    text = "framed: recited, within 1/255 of a training image"
    size = max(sheet.width, _length(text)), sheet.height + CAPTION_HEIGHT
    whole = Image.new("RGB", size, "white")
    whole.paste(sheet, (0, 0))
    ImageDraw.Draw(whole).text((2, sheet.height + 1), text, fill=_FRAME)
    return whole


def trajectory_strip(
    x_t: Tensor, x0: Tensor, timesteps: Tensor, samples: int = 3, columns: int = 10
) -> Image.Image:
    """The way from noise to image: for each sample a row of states above a row of answers.

    Args:
        x_t: States, [steps, n, C, H, W].
        x0: The denoiser's answers to them, [steps, n, C, H, W].
        timesteps: Times of the steps, [steps].
        samples: How many samples to draw, the first ones.
        columns: How many steps to draw at most; of more, some evenly spaced ones from the first
            to the last.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The shapes differ, or a value is NaN or infinite.
    """
    samples, columns = check_count(samples, "samples"), check_count(columns, "columns")
    check_float_tensor(x_t, "x_t")
    check_float_tensor(x0, "x0")
    if check_tensor(timesteps, "timesteps").dtype not in REAL_DTYPES or timesteps.ndim != 1:
        raise TypeError(f"`timesteps` must be real numbers [steps], got {describe(timesteps)}")
    if not torch.isfinite(timesteps).all():
        raise ValueError("`timesteps` holds NaN or infinite values")
    if x_t.ndim != 5 or x_t.numel() == 0 or x_t.shape != x0.shape or len(timesteps) != len(x_t):
        raise ValueError(
            "`x_t` and `x0` must have one shape [steps, n, C, H, W] and `timesteps` its length, "
            f"got {list(x_t.shape)}, {list(x0.shape)} and {list(timesteps.shape)}"
        )
    steps, number = x_t.shape[:2]
    shown = torch.linspace(0, steps - 1, min(steps, columns)).round().long()
    times = ", ".join(f"{time:g}" for time in timesteps[shown].tolist())
    rows = []
    for index in range(min(samples, number)):
        rows.append((f"sample {index}: noisy images x_t at t = {times}", x_t[shown, index]))
        rows.append(("denoised images x0", x0[shown, index]))
    return captioned_rows(rows)


def _check_layout(pad: object, scale: object) -> tuple[int, int | None]:
    """Space around images, and their enlargement where one is given."""
    pad = check_count(pad, "pad", minimum=0, maximum=_WIDEST)
    return pad, None if scale is None else check_count(scale, "scale", maximum=_WIDEST)


def _length(text: str) -> int:
    """Pixels that a line of text takes, with a little space around it."""
    from PIL import Image, ImageDraw

    return math.ceil(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text)) + 4


def _check_marked(marked: object, count: int) -> list[bool]:
    """Which of some images have a frame."""
    if marked is None:
        return [False] * count
    tensor = check_tensor(marked, "marked")
    if tensor.dtype != torch.bool or tensor.shape != (count,):
        raise ValueError(f"`marked` must be bool [{count}], got {describe(marked)}")
    return tensor.tolist()


def _check_canvas(tiles: Sequence[int], columns: int, pad: int, scale: int) -> None:
    """Refuse a picture [h, w] of images [n, H, W, c] that nothing could show."""
    count, height, width = tiles[:3]
    rows = -(-count // columns)
    sides = pad + rows * (height * scale + pad), pad + columns * (width * scale + pad)
    if max(sides) > _WIDEST:
        raise ValueError(
            f"`columns`, `scale` and `pad` must give a picture of at most {_WIDEST} pixels a "
            f"side, got {columns}, {scale} and {pad}: {sides[0]}x{sides[1]} pixels"
        )


def _check_rows(rows: object) -> Sequence[tuple[str, Tensor]]:
    """Pairs of a caption and images, at least one."""
    expected = "pairs of a caption and images"
    pairs = check_sequence(rows, "rows", expected)
    if len(pairs) == 0:
        raise ValueError("`rows` must hold at least one row, got none")
    for row in pairs:
        caption, images = check_sequence(row, "rows", expected, length=2)
        check_text(caption, "rows")
        _check_images(images, "rows")
    return pairs


def _check_images(images: object, name: str) -> None:
    images = check_float_tensor(images, name)
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"`{name}` must have shape [n, C, H, W], got {describe(images)}")


def _tiles(images: Tensor) -> np.ndarray:
    """Checked images as bytes: uint8 [n, H, W, 1] or [n, H, W, 3]."""
    values = to_bytes(images)
    if values.ndim != 4 or values.numel() == 0:
        raise ValueError(f"`images` must have shape [n, C, H, W], got {describe(images)}")
    if values.shape[1] not in (1, 3):
        values = values.permute(0, 2, 1, 3).flatten(2)[:, None]
    return values.permute(0, 2, 3, 1).numpy()
