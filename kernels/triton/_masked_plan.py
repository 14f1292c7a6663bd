"""How a masked posterior scan is cut up: groups of queries, slices of the images, what is cached.

With tangents or without, the rows of a tile are 16 outputs times a group of queries: noisy images,
each followed by its tangents. The slices of the images follow the memory budget, the splits
follow nothing that a call can change. All of it is counted in plain numbers, before any tensor is
made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pyflocality.kernels.devices import LARGEST_GRID
from pyflocality.kernels.triton._centred_images import COLUMN_MULTIPLE, CONVERSION_BYTES
from pyflocality.kernels.triton._launch import Launch
from pyflocality.kernels.triton._masked_levels import OUTPUTS


@dataclass(frozen=True)
class Config:
    """Shapes of the kernels for one GPU generation.

    Attributes:
        batch: Queries of a program; with 16 outputs each they are its rows.
        block_n: Training images of a block.
        block_d: Inputs of a step of the products.
        split_blocks: Blocks of images a program scans. The bits of a result depend on it, and on
            nothing that a call can change.
        scan: Layout of the scan.
        cores: Layout of the sums over cores.
        norms: Layout of the squared norms.
    """

    batch: int
    block_n: int
    block_d: int
    split_blocks: int
    scan: Launch
    cores: Launch
    norms: Launch

    @property
    def split(self) -> int:
        """Images that a program scans."""
        return self.block_n * self.split_blocks


# Lists of inputs are read ahead too, which takes up two stages of the pipelines.
CONFIGS = {
    80: Config(8, 128, 32, 8, Launch(8, 5), Launch(8, 5), Launch(4, 4)),
    90: Config(8, 128, 64, 8, Launch(8, 5), Launch(8, 5), Launch(4, 4)),
}
# For few noisy images: the rows of one warpgroup, which half of the warps share. Each thread then
# has as many rows as above and the same images of them, so that every sum keeps its order.
FEW_CONFIGS = {
    arch: replace(config, batch=4, scan=Launch(4, 5), cores=Launch(4, 5))
    for arch, config in CONFIGS.items()
}
# The epilogue with tangents takes more registers, too many for some compilers on Ampere.
JVP_CONFIGS = CONFIGS | {80: replace(CONFIGS[80], block_n=64, split_blocks=16)}


# Value images that the shapes for few noisy images have registers for.
_FEW_VALUES = 2


def config_for(count: int, arch: int, values: int = 0) -> Config:
    """Shapes for a number of noisy images: no rows without one where fewer rows hold them all.

    With more value images, of which `values` tells how many there are, registers would not do.
    """
    few = FEW_CONFIGS[arch]
    return few if count <= few.batch and values <= _FEW_VALUES else CONFIGS[arch]


@dataclass(frozen=True)
class ScanSizes:
    """What the memory of a scan depends on.

    Attributes:
        config: Shapes of the kernels.
        groups: Groups of queries.
        group_images: Noisy images of a group.
        halves: float16 halves that queries are kept in.
        sums: Weighted sums of an output of a noisy image.
        places: Places of the level of the outputs.
        places_above: Places of all levels above it.
        blocks: Blocks of the lists of all levels.
        dim: Values of an image.
        columns: Columns of the copy of the images.
        held_bytes: What is there throughout: the levels, and the queries.
        value_bytes: Bytes of the value images of an image; 0 without any.
        chunk_size: Training images at a time; None leaves it to the budget.
    """

    config: Config
    groups: int
    group_images: int
    halves: int
    sums: int
    places: int
    places_above: int
    blocks: int
    dim: int
    columns: int
    held_bytes: int
    value_bytes: int = 0
    chunk_size: int | None = None

    @property
    def copy_bytes(self) -> int:
        """Bytes of the whole copy of the images."""
        return 2 * self.dim * self.columns

    @property
    def norm_bytes(self) -> int:
        """Bytes of the squared norms of all images over all masks."""
        return 4 * self.places * self.columns

    @property
    def state_bytes(self) -> int:
        """Running states, what a merge makes of them, and the answers in float64."""
        return 16 * (2 + self.sums) * self.groups * self.group_images * self.places

    def packed_bytes(self, halves: int) -> int:
        """Bytes of a group's packed queries, in one or two halves."""
        return 2 * self.blocks * halves * OUTPUTS * self.config.batch * self.config.block_d

    def column_bytes(self, groups: int, *, copied: bool, has_norms: bool) -> int:
        """Bytes for every column of a slice, rounded up.

        Args:
            groups: Groups that go through the images together.
            copied: Whether the whole copy of the images is there.
            has_norms: Whether the norms of all images are.
        """
        state = 4 * (2 + self.sums) * groups * self.places * self.group_images
        size = math.ceil(state / self.config.split)
        size += 4 * self.places_above * groups * self.config.batch
        size += self.value_bytes + (0 if copied else 2 * self.dim)
        return size + (0 if has_norms else 4 * (self.places + self.places_above))

    def slice_width(self, room: int, groups: int, *, copied: bool, has_norms: bool) -> int:
        """Columns of the images that are worked on at a time in `room` bytes."""
        split = self.config.split
        # Whole splits, so that the bits do not depend on the memory there is.
        largest = LARGEST_GRID * self.config.block_n // split * split
        if self.chunk_size is not None:
            width = self.chunk_size // COLUMN_MULTIPLE * COLUMN_MULTIPLE
            return min(max(width, COLUMN_MULTIPLE), largest)
        width = room // self.column_bytes(groups, copied=copied, has_norms=has_norms)
        return min(max(width // split * split, split), largest)


@dataclass(frozen=True)
class ScanPlan:
    """What a scan does in which order.

    Attributes:
        copied: Whether the whole copy of the images is made, if it is not there, and cached.
        norm_width: Images at a time of which norms are made, to be cached; None where they do not
            fit beside the rest and every slice makes its own.
        turns: Slices of the groups that go through the images together, and then the next ones.
        width: Columns of a slice of the images.
    """

    copied: bool
    norm_width: int | None
    turns: tuple[tuple[slice, ...], ...]
    width: int


def plan_scan(sizes: ScanSizes, budget: int, *, has_copy: bool) -> ScanPlan:
    """Cut a scan up so that it fits a budget in bytes, if anything does.

    An earlier call may have cached the whole copy of the images.
    """
    copied = has_copy or sizes.copy_bytes <= budget // 2
    room = budget - sizes.held_bytes - sizes.state_bytes
    room -= sizes.copy_bytes if copied else min(CONVERSION_BYTES, room // 2)
    beside, norm_width = room - sizes.norm_bytes, None
    # The same for both precisions, so that one does not throw away what the other needs.
    slice_bytes = sizes.config.split * sizes.column_bytes(1, copied=True, has_norms=True)
    if copied and beside >= sizes.packed_bytes(2) + slice_bytes:
        room, norm_width = beside, sizes.slice_width(beside, 1, copied=True, has_norms=True)
    # Groups together: their queries are formed once, or once per slice of the images.
    per_group = sizes.packed_bytes(sizes.halves)
    together = max(1, min(sizes.groups, room // 2 // per_group, LARGEST_GRID))
    starts = range(0, sizes.groups, together)
    slices = tuple(slice(first, min(first + together, sizes.groups)) for first in starts)
    # Where all that the groups share is cached, one after the other goes through the images.
    turns = (slices,) if norm_width is None else tuple((some,) for some in slices)
    room -= together * per_group
    width = sizes.slice_width(room, together, copied=copied, has_norms=norm_width is not None)
    return ScanPlan(copied, norm_width, turns, width)
