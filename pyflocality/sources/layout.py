"""How the axes of an array of images are to be read.

| layout | shape |
|---|---|
| `"NCHW"` | number, channels, height, width |
| `"NHWC"` | number, height, width, channels |
| `"NHW"` | number, height, width: grey images |

A layout that is asked for is taken as it is. Without one, three axes are NHW and four are NCHW,
unless the numbers say something else: the last axis alone is of 1 or 3 (channels of a picture),
where it is NHWC; both it and the second axis are, or it is of 4 (RGBA) or of 2 (grey and alpha), or
the last is the odd one of three (bands of a square picture), or the three axes of one picture are
given for N pictures, where nobody can tell and the array is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pyflocality._support.caller import caller_level
from pyflocality._support.checks import check_choice, describe

LAYOUTS = ("NCHW", "NHWC", "NHW")
_AXES = "give layout='NCHW' or layout='NHWC'"
# Height and width from which on a last axis of four says colour and alpha and not width.
_PICTURE = 8


def check_layout(layout: object) -> str | None:
    """A layout or None.

    Raises:
        TypeError: It is no string.
        ValueError: It is none of the three.
    """
    if layout is None:
        return None
    if not isinstance(layout, str):
        listed = ", ".join(map(repr, LAYOUTS))
        raise TypeError(f"`layout` must be one of {listed}, got {describe(layout)}")
    return check_choice(layout, "layout", LAYOUTS)


def find_layout(shape: Sequence[int], layout: str | None) -> str:
    """The layout of images of a shape, or the one that was asked for.

    Raises:
        ValueError: The shape is not of the layout asked for, or can be read in several ways.
    """
    sizes = list(shape)
    if len(sizes) not in (3, 4):
        raise ValueError(
            "`images` must have shape [N, C, H, W] or [N, H, W] (or [N, H, W, C] with "
            f"layout='NHWC'), got {sizes}"
        )
    if layout is not None:
        if len(layout) != len(sizes):
            raise ValueError(
                f"`layout` is {layout!r}, of {len(layout)} axes, but `images` has shape {sizes}"
            )
        return layout
    if len(sizes) == 3:
        _refuse_one_picture(sizes)
        if sizes[0] == 3 and min(sizes[1:]) >= _PICTURE:
            warnings.warn(
                f"images of shape {sizes} are taken for 3 grey ones; if they are the channels of "
                "one image, pass images[None]; layout='NHW' says that they are not",
                stacklevel=caller_level(),
            )
        return "NHW"
    return _of_four(sizes)


def _refuse_one_picture(sizes: list[int]) -> None:
    rows, columns, last = sizes
    colours = last in (1, 3) and columns != last
    if colours or (last == 4 and min(rows, columns) >= _PICTURE):
        raise ValueError(
            f"`images` has shape {sizes}: {rows} grey images of {columns}x{last}, or one image of "
            f"{rows}x{columns} with {last} channels? For one image pass images[None] with "
            "layout='NHWC', for several give layout='NHW'"
        )


def _of_four(sizes: list[int]) -> str:
    _, second, third, last = sizes
    first = second in (1, 3)
    both = first and last in (1, 3) and third != last
    bands = not first and last not in (1, 3, 4) and min(second, third) >= _PICTURE
    if both or (bands and (last == 2 or second == third != last)):
        raise ValueError(
            f"`images` has shape {sizes}: {second} channels of {third}x{last}, or {last} channels "
            f"of {second}x{third}? {_AXES}"
        )
    if not first and last in (1, 3):
        return "NHWC"
    # Two rows make no picture; 4x4 pixels of some channels may be what is left of one.
    if second > 3 and last == 4 and (third != 4 or second == 4):
        raise ValueError(
            f"`images` has shape {sizes}: {second} channels of {third}x4, or {second}x{third} "
            f"pixels of red, green, blue and alpha? {_AXES}; images[..., :3] leaves alpha out"
        )
    return "NCHW"
