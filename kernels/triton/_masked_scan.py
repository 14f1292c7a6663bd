"""How a masked posterior scan is cut up: groups of queries, slices and splits of the images.

With tangents or without, the rows of a tile are 16 outputs times a group of queries: noisy images,
each followed by its tangents. The slices of the images follow the memory budget, the splits
follow nothing that a call can change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.kernels.devices import LARGEST_GRID
from pyflocality.kernels.stored import StoredProblem
from pyflocality.kernels.triton import _masked_products as kernels
from pyflocality.kernels.triton._centred_images import (
    COLUMN_MULTIPLE,
    CONVERSION_BYTES,
    CentredImages,
)
from pyflocality.kernels.triton._kept import Kept
from pyflocality.kernels.triton._launch import Launch, on_device_of
from pyflocality.kernels.triton._mask_plan import OUTPUTS, Level, MaskPlan, unpacked
from pyflocality.kernels.triton.state import empty_state, merge_parts
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.storage.reader import bytes_to_values

# Elements of weights in float64 at a time.
_ELEMENTS_AT_A_TIME = 2**22


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


def config_for(count: int, arch: int) -> Config:
    """Shapes for a number of noisy images: no rows without one where fewer rows hold them all."""
    few = FEW_CONFIGS[arch]
    return few if count <= few.batch else CONFIGS[arch]


def centred_noisy(problem: PosteriorProblem, centre: Tensor) -> Tensor:
    """Noisy images minus alpha times the centre of the images, float64 [B, D]."""
    noisy = problem.x.detach().double().flatten(1)
    return noisy - problem.alpha[:, None] * bytes_to_values(centre.double())


def sums_over_weights(plan: MaskPlan, values: Tensor) -> Tensor:
    """Weighted sums of every row of values [R, D] for each query: float64 [R, Q]."""
    values, step = values.double(), max(1, _ELEMENTS_AT_A_TIME // values.shape[1])
    sums = []
    for rows in plan.weights.split(step):
        if rows.dtype == torch.uint8:
            rows = unpacked(rows, values.shape[1])
        sums.append(values @ rows.double().T)
    return torch.cat(sums, 1)


class MaskedScan:
    """One scan of all images for some noisy images at one precision.

    Args:
        problem: The problem.
        rows: Which of its noisy images, int64 [n].
        images: The images, centred.
        plan: The products that the weights need.
        config: Shapes of the kernels.
        parts: float16 halves that queries are kept in.
        tangents: Further queries of each noisy image, float64 [n, T, D]; 1 + T divides the
            queries of a program. None is none.
    """

    # Weighted sums of an output of a noisy image.
    sums = 1

    def __init__(
        self,
        problem: PosteriorProblem,
        rows: Tensor,
        images: CentredImages,
        plan: MaskPlan,
        config: Config,
        parts: int,
        tangents: Tensor | None = None,
    ) -> None:
        self.images, self.plan, self.config, self.parts = images, plan, config, parts
        self.chunk_size = problem.chunk_size
        self.budget = memory_budget_bytes(problem.memory_budget)
        queries = centred_noisy(problem, images.centre)[rows][:, None]
        if tangents is not None:
            queries = torch.cat([queries, tangents], 1)
        self.count, self.slots = queries.shape[:2]
        # Noisy images of a group, and groups.
        self.members = config.batch // self.slots
        self.groups = triton.cdiv(self.count, self.members)
        # A power of two that brings the largest value near 2^14: half precision then resolves
        # 2^-38 of it, and weights up to 2 and sums stay in range.
        exponent = 14 - torch.frexp(queries.abs().amax(2)).exponent
        self.unit = torch.ldexp(torch.ones_like(queries[..., 0]), exponent)
        self.queries = self.grouped(queries * self.unit[..., None], 0.0)
        self.gain = self.grouped(255.0 / (problem.alpha[rows] * self.unit[:, 0]), 0.0)
        self.factor = self.grouped(StoredProblem(problem).factor[rows], 1.0)

    def grouped(self, values: Tensor, fill: float) -> Tensor:
        """What belongs to noisy images [n, ...] by group, filled up: float32 [G, members, ...]."""
        grouped = values.new_full((self.groups * self.members, *values.shape[1:]), fill)
        grouped[: len(values)] = values
        return grouped.float().unflatten(0, (self.groups, self.members))

    @property
    def places(self) -> int:
        """Places of the level of the outputs."""
        return self.plan.levels[0].tiles * OUTPUTS

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """The scan, in units of the centred bytes.

        Returns:
            Smallest distances without their common term and weights, float32 [n, Q]; weighted
            sums, [n, Q, sums].
        """
        kept = self.images.keep(self.budget // 2)
        # Running states, what a merge makes of them, and the answers in float64.
        states = 16 * (2 + self.sums) * self.groups * self.members * self.places
        left = self.budget - self.plan.nbytes - self.queries.nbytes - states
        if kept:
            left -= 2 * self.images.dim * self.images.columns
        else:
            left -= min(CONVERSION_BYTES, left // 2)
        norms = self._kept_norms(left)
        if norms is not None:
            left -= norms.nbytes
        # Groups together: their queries are formed once, or once per slice of the images.
        per_group = self._packed_bytes(self.parts)
        together = max(1, min(self.groups, left // 2 // per_group, LARGEST_GRID))
        width = self._slice_width(left - together * per_group, together, kept, norms is not None)
        parts = [slice(g, min(g + together, self.groups)) for g in range(0, self.groups, together)]
        # Where all that the groups share is kept, one after the other goes through the images.
        turns = [parts] if norms is None else [[part] for part in parts]
        with on_device_of(self.queries):
            return self._answers(
                [state for turn in turns for state in self._states(turn, width, norms)]
            )

    def _states(self, parts: list[slice], width: int, norms: Tensor | None) -> list[PosteriorState]:
        """States of some groups, after one walk through the images in slices of a width."""
        sizes = [(part.stop - part.start) * self.places * self.members for part in parts]
        states = [empty_state(size, self.sums, self.gain.device) for size in sizes]
        packed = self._packed(parts[0]) if len(parts) == 1 else None
        for first in range(0, self.images.columns, width):
            self._take_slice(
                slice(first, min(first + width, self.images.columns)), parts, states, packed, norms
            )
        return states

    def _take_slice(
        self,
        chosen: slice,
        parts: list[slice],
        states: list[PosteriorState],
        packed: list[Tensor] | None,
        norms: Tensor | None,
    ) -> None:
        """Take a slice of the images into the states; what is made for it ends with the call."""
        columns = self._columns(chosen.start, chosen.stop)
        here = self._norms(columns, chosen.start) if norms is None else norms[:, chosen]
        for index, part in enumerate(parts):
            # Without a name here, the queries of one part are gone before those of the next.
            states[index] = self._scan(
                columns, here, packed or self._packed(part), part, states[index]
            )

    def _packed_bytes(self, parts: int) -> int:
        """Bytes of a group's packed queries, in one or two halves."""
        blocks = sum(level.blocks for level in self.plan.levels)
        return 2 * blocks * parts * OUTPUTS * self.config.batch * self.config.block_d

    def _slice_width(self, bytes_left: int, groups: int, kept: bool, have_norms: bool) -> int:
        """Columns of the images that are worked on at a time."""
        split = self.config.block_n * self.config.split_blocks
        # Whole splits, so that the bits do not depend on the memory there is.
        largest = LARGEST_GRID * self.config.block_n // split * split
        if self.chunk_size is not None:
            width = self.chunk_size // COLUMN_MULTIPLE * COLUMN_MULTIPLE
            return min(max(width, COLUMN_MULTIPLE), largest)
        width = bytes_left // self._column_bytes(groups, kept, have_norms) // split * split
        return min(max(width, split), largest)

    def _column_bytes(self, groups: int, kept: bool, have_norms: bool) -> int:
        """Bytes for every column of a slice, rounded up."""
        above = sum(level.tiles * OUTPUTS for level in self.plan.levels[1:])
        state = 4 * (2 + self.sums) * groups * self.places * self.members
        size = triton.cdiv(state, self.config.block_n * self.config.split_blocks)
        size += 4 * above * groups * self.config.batch
        size += 0 if kept else 2 * self.images.dim
        return size + (0 if have_norms else 4 * (self.places + above))

    def _columns(self, first: int, last: int) -> Tensor:
        whole = self.images.whole
        if whole is not None:
            return whole[:, first:last]
        columns = torch.empty(
            self.images.dim, last - first, dtype=torch.float16, device=self.queries.device
        )
        self.images.fill(columns, first)
        return columns

    def _kept_norms(self, budget: int) -> Tensor | None:
        """Squared norms of all images over all masks, kept for the next call with these masks.

        None where they do not fit the budget beside one group's queries and a slice.
        """
        whole, per_split = self.images.whole, self.config.block_n * self.config.split_blocks
        room = budget - 4 * self.places * self.images.columns
        # The same for both precisions, so that one does not throw away what the other needs.
        least = self._packed_bytes(2) + per_split * self._column_bytes(1, True, True)
        if whole is None or room < least:
            self.images.norms.pop("masked", None)
            return None
        owner, kept = self.images.norms.get("masked", (None, None))
        if owner is not self.plan:
            self.images.norms.pop("masked", None)
            norms = torch.empty(self.places, self.images.columns, device=self.queries.device)
            width = self._slice_width(room, 1, True, True)
            with on_device_of(self.queries):
                for first in range(0, self.images.columns, width):
                    columns = whole[:, first : first + width]
                    self._norms(columns, first, norms[:, first : first + width])
            kept = Kept(norms)
            self.images.norms["masked"] = (self.plan, kept)
        return kept.here()[0]

    def _norms(self, columns: Tensor, first: int, target: Tensor | None = None) -> Tensor:
        """Squared norms of some images over all masks, infinite where no image is."""
        count, config, above = len(self.images.images) - first, self.config, None
        for level in reversed(self.plan.levels):
            outputs = level is self.plan.levels[0]
            norms = target
            if target is None or not outputs:
                norms = torch.empty(level.tiles * OUTPUTS, columns.shape[1], device=columns.device)
            kernels.squared_norms_kernel[(level.tiles, columns.shape[1] // config.block_n)](
                columns,
                level.members,
                level.inputs,
                level.starts,
                level.parents,
                norms if above is None else above,
                level.row_scale,
                norms,
                count if outputs else columns.shape[1],
                columns.stride(0),
                norms.stride(0) if above is None else above.stride(0),
                norms.stride(0),
                HAS_PARENTS=level.has_parents,
                PARTS=level.parts,
                OUTPUTS=OUTPUTS,
                BLOCK_N=config.block_n,
                BLOCK_D=config.block_d,
                NUM_STAGES=config.norms.num_stages,
                **config.norms.options(),
            )
            above = norms
        return above

    def _packed(self, part: slice) -> list[Tensor]:
        """Weighted values of the queries of some groups at the lists of every level."""
        values, config, packed = self.queries[part], self.config, []
        for level in self.plan.levels:
            shape = (
                *(len(values), level.blocks, self.parts),
                *(OUTPUTS * config.batch, config.block_d),
            )
            packed.append(torch.empty(shape, dtype=torch.float16, device=values.device))
            kernels.pack_queries_kernel[(level.blocks, len(values))](
                values,
                level.inputs,
                level.members,
                packed[-1],
                values.shape[-1],
                level.blocks,
                MEMBER_PARTS=level.parts,
                PARTS=self.parts,
                OUTPUTS=OUTPUTS,
                BATCH=config.batch,
                BLOCK_D=config.block_d,
                num_warps=4,
            )
        return packed

    def _core_sums(self, columns: Tensor, packed: list[Tensor]) -> Tensor | None:
        """Sums that the tiles of the first level share, [groups, places, batch, columns]."""
        config, above, width = self.config, None, columns.shape[1]
        for level, queries in reversed(list(zip(self.plan.levels, packed, strict=True))[1:]):
            sums = torch.empty(
                len(queries), level.tiles * OUTPUTS, config.batch, width, device=columns.device
            )
            kernels.core_sums_kernel[(level.tiles, len(queries), width // config.block_n)](
                columns,
                queries,
                level.inputs,
                level.starts,
                level.parents,
                sums if above is None else above,
                sums,
                level.blocks,
                0 if above is None else above.shape[1],
                columns.stride(0),
                width,
                **self._constants(level, config.cores),
                BATCH=config.batch,
            )
            above = sums
        return above

    def _constants(self, level: Level, launch: Launch) -> dict[str, object]:
        return {
            "HAS_PARENTS": level.has_parents,
            "PARTS": self.parts,
            "OUTPUTS": OUTPUTS,
            "BLOCK_N": self.config.block_n,
            "BLOCK_D": self.config.block_d,
            "NUM_STAGES": launch.num_stages,
            **launch.options(),
        }

    def _scan(
        self,
        columns: Tensor,
        norms: Tensor,
        packed: list[Tensor],
        part: slice,
        state: PosteriorState,
    ) -> PosteriorState:
        """Take some columns of the images into the state of some groups."""
        config, level = self.config, self.plan.levels[0]
        cores = self._core_sums(columns, packed)
        blocks = columns.shape[1] // config.block_n
        grid = (level.tiles, len(packed[0]), triton.cdiv(blocks, config.split_blocks))
        inputs = (
            *(columns, packed[0], level.inputs, level.starts, level.parents),
            *(self.gain if cores is None else cores, norms, self.plan.outputs, level.row_scale),
            *(self.gain[part], self.factor[part]),
        )
        sizes = (
            *(level.blocks, 0 if cores is None else cores.shape[1], blocks, config.split_blocks),
            *(columns.stride(0), norms.stride(0), columns.shape[1]),
        )
        found = self.launch(grid, inputs, sizes, self._constants(level, config.scan), part)
        per_row = self.factor[part][:, None].expand(-1, self.places, -1)
        return merge_parts(state, found, per_row.reshape(-1).contiguous())

    def launch(
        self,
        grid: tuple[int, int, int],
        inputs: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        constants: dict[str, object],
        part: slice,
    ) -> PosteriorState:
        """Run the scan's kernel for some groups: the states of all splits."""
        shape = (grid[2], grid[1] * self.places * self.members)
        minimum, total, weighted = (torch.empty(shape, device=self.gain.device) for _ in range(3))
        kernels.masked_posterior_kernel[grid](
            *inputs, minimum, total, weighted, *sizes, **constants, BATCH=self.config.batch
        )
        return PosteriorState(minimum, total, weighted[..., None])

    def _answers(self, states: list[PosteriorState]) -> tuple[Tensor, ...]:
        """The states by noisy image and output, [n, Q] and [n, Q, sums]."""
        at = self.plan.levels[0].places
        answers = []
        for sums in zip(*states, strict=True):
            merged = torch.cat(
                [part.reshape(-1, self.places, self.members, *part.shape[1:]) for part in sums]
            )
            answers.append(merged[:, at].transpose(1, 2).flatten(0, 1)[: self.count])
        return tuple(answers)
