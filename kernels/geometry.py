"""Sizes of a launch of the window kernels.

A kernel is compiled for one plan: the macros of `WindowPlan.macros` are the constants of
`csrc/include/pyflocality/window_traits.h`, which asserts that both count shared memory alike.

Plans do not depend on the GPU or on the batch: a noisy image gets the same partial sums in the
same order in every batch and on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pyflocality.kernels.devices import SHARED_BYTES

# Of a multiprocessor, on GPUs made for data centres: what the blocks that run at once share.
_SHARED_OF_ALL = 160 * 1024
# Of the partial sums of the lines, where they do not fit into registers.
_SHARED_OF_TAILS = 16 * 1024
_UNROLLED_WINDOW = 15
_QUAD = 4
_IMAGES = (8, 4, 2, 1)
_TILE_SIDES = (64, 32, 16, 8)
_LARGEST_SIDE = 256
# Split of the training images: at least so many at a time, and at most so many splits.
_IMAGES_PER_SPLIT, _SPLITS = 32, 512
# Registers of a multiprocessor.
_REGISTERS = 65536
# Tangents that one pass takes: the sums of more do not fit into registers.
TANGENTS = 2


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """The next multiple at or above a number."""
    return ceil_div(number, multiple) * multiple


@dataclass(frozen=True)
class WindowShape:
    """What a window kernel is compiled for.

    Attributes:
        channels: Channels C of the images.
        height: Rows H.
        width: Columns W.
        window: Side of the window in pixels.
        stored_bytes: Whether the training images are uint8, else float32.
        vector: Whether four neighbouring values of an image can be read at once: rows of whole
            fours, in memory aligned to them.
        tangents: Tangents beside the distances, 0 to `TANGENTS`.
    """

    channels: int
    height: int
    width: int
    window: int
    stored_bytes: bool
    vector: bool
    tangents: int = 0


@dataclass(frozen=True)
class WindowPlan:
    """Sizes of a window kernel.

    Attributes:
        shape: What it is for.
        tile_height: Rows of pixels that a block answers.
        tile_width: Columns of pixels that a block answers.
        region_height: Rows that the windows of a tile reach, at most.
        region_width: Columns that they reach, from a whole quad on, at most.
        band_rows: Rows of the region in shared memory at a time.
        images: Images that a block takes at a time.
        threads: Threads of a block.
        line_threads: Threads of it that sum along lines.
    """

    shape: WindowShape
    tile_height: int
    tile_width: int
    region_height: int
    region_width: int
    band_rows: int
    images: int
    threads: int
    line_threads: int

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        shape = self.shape
        return ceil_div(shape.height, self.tile_height) * ceil_div(shape.width, self.tile_width)

    @property
    def slices(self) -> int:
        """Slices of the channels: a block answers four of them, three beside tangents."""
        return ceil_div(self.shape.channels, 3 if self.shape.tangents else 4)

    @property
    def state_rows(self) -> int:
        """Numbers that a block writes for a pixel: the minimum and the sums."""
        return 1 + (1 + self.shape.tangents) * (1 + self.shape.channels)

    @property
    def min_blocks(self) -> int:
        """Blocks that the registers of a multiprocessor must hold: as many as its memory can."""
        return max(1, min(_register_blocks(self), _SHARED_OF_ALL // self.shared_bytes))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        planes = self.images * (1 + self.shape.tangents)
        floats = planes * self.band_rows * (self.region_width | 1)
        if self.band_rows < self.region_height:
            floats += planes * self.region_height * (self.tile_width | 1)
        if self.shape.window > _UNROLLED_WINDOW:
            floats += _tail_entries(self.shape, self) * self.line_threads
        return 4 * floats

    @property
    def macros(self) -> dict[str, int]:
        """Constants of the compilation, by name."""
        shape = self.shape
        values = {
            "BYTES": shape.stored_bytes,
            "VECTOR": shape.vector,
            "CHANNELS": shape.channels,
            "HEIGHT": shape.height,
            "WIDTH": shape.width,
            "WINDOW": shape.window,
            "TANGENTS": shape.tangents,
            "THREADS": self.threads,
            "MIN_BLOCKS": self.min_blocks,
            "IMAGES": self.images,
            "TILE_HEIGHT": self.tile_height,
            "TILE_WIDTH": self.tile_width,
            "REGION_HEIGHT": self.region_height,
            "REGION_WIDTH": self.region_width,
            "BAND_ROWS": self.band_rows,
            "LINE_THREADS": self.line_threads,
            "SHARED_BYTES": self.shared_bytes,
        }
        return {f"PYFLOCALITY_{name}": int(value) for name, value in values.items()}


def _register_blocks(plan: WindowPlan) -> int:
    return max(1, _REGISTERS // (_registers_per_thread(plan.shape) * plan.threads))


def _registers_per_thread(shape: WindowShape) -> int:
    """What a thread needs to keep the sums of four pixels and the values it works on."""
    if shape.tangents > 0:
        return 128
    return 64 if shape.channels < 4 else 80


def _most_threads(shape: WindowShape) -> int:
    # Registers are given out to four warps at a time.
    return min(1024, _REGISTERS // _registers_per_thread(shape) // 128 * 128)


def _tail_entries(shape: WindowShape, plan: WindowPlan) -> int:
    return min(shape.window, max(plan.region_height, plan.region_width))


def _tiled(shape: WindowShape, side: int, threads: int) -> WindowPlan:
    """A plan with tiles of about side x side pixels, one image and band at a time."""
    height = ceil_div(shape.height, ceil_div(shape.height, side))
    width = ceil_div(shape.width, ceil_div(shape.width, side))
    if width < shape.width:
        width = round_up(width, _QUAD)
    # Rows of a band of more columns than a tile may have are cut to what the threads can answer.
    height = min(height, threads // ceil_div(width, _QUAD))
    quads = height * ceil_div(width, _QUAD)
    reach = shape.window - 1
    region_height, region_width = shape.height, shape.width
    if height < shape.height:
        region_height = min(shape.height, height + reach)
    if width < shape.width:
        region_width = min(shape.width, width + reach + _QUAD - 1)
    own = max(64, round_up(quads, 32))
    plan = WindowPlan(shape, height, width, region_height, region_width, region_height, 1, own, 1)
    return replace(plan, line_threads=_line_threads(plan))


def _line_threads(plan: WindowPlan) -> int:
    if plan.shape.window <= _UNROLLED_WINDOW:
        return plan.threads
    lines = _SHARED_OF_TAILS // (4 * _tail_entries(plan.shape, plan)) // 32 * 32
    return min(plan.threads, max(32, lines))


def _candidates(shape: WindowShape) -> Iterator[WindowPlan]:
    """Plans in order of preference: large tiles, whole regions, many rows at a time."""
    most = _most_threads(shape)
    quads = shape.height * ceil_div(shape.width, _QUAD)
    sides = _TILE_SIDES if quads > most else (_LARGEST_SIDE, *_TILE_SIDES)
    plans = [_tiled(shape, side, most) for side in sides]
    for plan in plans:
        for images in _IMAGES:
            whole = replace(plan, images=images)
            budget = min(SHARED_BYTES, _SHARED_OF_ALL // _register_blocks(plan))
            if whole.shared_bytes <= (budget if images > 1 else SHARED_BYTES):
                yield whole
        yield from _bands(plan, (64, 32, 16))
    for plan in plans:
        yield from _bands(plan, (8, 4, 2, 1))


def _bands(plan: WindowPlan, choices: tuple[int, ...]) -> Iterator[WindowPlan]:
    return (replace(plan, band_rows=rows) for rows in choices if rows < plan.region_height)


def _check_side(shape: WindowShape) -> None:
    if max(shape.height, shape.width) > _LARGEST_SIDE:
        raise ValueError(
            f"the window kernels serve images of up to {_LARGEST_SIDE}x{_LARGEST_SIDE} pixels, "
            f"got {shape.height}x{shape.width}"
        )


@functools.lru_cache(maxsize=256)
def plan_window(shape: WindowShape) -> WindowPlan:
    """The sizes of a scan.

    Raises:
        ValueError: An image is larger than the kernels are made for.
    """
    _check_side(shape)
    for plan in _candidates(shape):
        if plan.shared_bytes <= SHARED_BYTES:
            return plan
    raise ValueError(f"no plan fits into the shared memory of a block: {shape}")


@functools.lru_cache(maxsize=256)
def plan_vjp(shape: WindowShape) -> WindowPlan:
    """The sizes of a pass that applies weights to whole windows.

    Its blocks hold whole images, and each answers as many pixels as it has threads for.

    Raises:
        ValueError: An image does not fit into shared memory.
    """
    _check_side(shape)
    quads = shape.height * ceil_div(shape.width, _QUAD)
    most = _most_threads(shape)
    threads = min(most, max(64, round_up(quads, 32)))
    plan = WindowPlan(
        shape, shape.height, shape.width, shape.height, shape.width, shape.height, 1, threads, 1
    )
    plan = replace(plan, line_threads=_line_threads(plan))
    for images in _IMAGES:
        whole = replace(plan, images=images)
        budget = min(SHARED_BYTES, _SHARED_OF_ALL // _register_blocks(plan))
        if whole.shared_bytes <= (budget if images > 1 else SHARED_BYTES):
            return whole
    raise ValueError(
        f"a {shape.height}x{shape.width} image does not fit into the shared memory of a block"
    )


def images_per_split(count: int) -> int:
    """Training images of a split, of `count` in all: the same for every batch and GPU."""
    return max(_IMAGES_PER_SPLIT, round_up(ceil_div(count, _SPLITS), _IMAGES[0]))
