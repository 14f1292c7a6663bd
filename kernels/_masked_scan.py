"""How a masked posterior scan is cut up: groups of queries, slices and splits of the images.

With tangents or without, the rows of a tile are 16 outputs times a group of queries: noisy images,
each followed by its tangents. The slices of the images follow the memory budget, the splits
follow nothing that a call can change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pyflocality._budget import memory_budget_bytes
from pyflocality._gpu_limits import LARGEST_GRID
from pyflocality._problem import PosteriorProblem
from pyflocality.kernels import _masked_products as kernels
from pyflocality.kernels._centred_images import COLUMN_MULTIPLE, CentredImages
from pyflocality.kernels._kept import Kept
from pyflocality.kernels._launch import Launch, finite_power, on_device_of
from pyflocality.kernels._mask_plan import OUTPUTS, Level, MaskPlan, unpacked
from pyflocality.kernels.state import empty_state, merge_parts
from pyflocality.reference.state import PosteriorState
from pyflocality.weights import QueryWeights

# Elements of masks unpacked at a time.
_ELEMENTS_AT_A_TIME = 2**24


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


def centred_noisy(problem: PosteriorProblem, centre: Tensor) -> Tensor:
    """Noisy images minus alpha times the centre of the images, float64 [B, D]."""
    noisy = problem.x.detach().double().flatten(1)
    return noisy - problem.alpha[:, None] * (centre.double() / 127.5 - 1.0)


def sums_over_weights(weights: QueryWeights, values: Tensor) -> Tensor:
    """Weighted sums of every row of values [R, D] for each query: float64 [R, Q]."""
    dense = None if weights.is_mask else weights.dense(torch.float32, values.device)
    step = max(1, _ELEMENTS_AT_A_TIME // weights.shape[1])
    sums = []
    for start in range(0, weights.shape[0], step):
        rows = slice(start, start + step)
        part = unpacked(weights, values.device, rows) if dense is None else dense[rows]
        sums.append(values.double() @ part.double().T)
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
        alpha, scale = problem.alpha[rows], problem.scale[rows]
        # A power of two that brings the largest value near 2^14: half precision then resolves
        # 2^-38 of it, and weights up to 2 and sums stay in range.
        exponent = 14 - torch.frexp(queries.abs().amax(2)).exponent
        self.unit = torch.ldexp(torch.ones_like(queries[..., 0]), exponent)
        self.queries = self.grouped(queries * self.unit[..., None], 0.0)
        self.gain = self.grouped(255.0 / (alpha * self.unit[:, 0]), 0.0)
        factor = scale * (alpha / 127.5).square()
        self.factor = self.grouped(finite_power(factor), 1.0)

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
        copy = 2 * self.images.dim * self.images.columns
        kept = self.images.keep(self.budget // 2)
        left = self.budget - copy * kept
        norms = self._kept_norms(left * 7 // 8)
        if norms is not None:
            left -= 4 * self.places * self.images.columns
        # Groups together: their queries are formed once per slice of the images.
        per_group = sum(level.blocks for level in self.plan.levels) * self.parts * self._rows_bytes
        together = max(1, min(self.groups, left // 2 // max(per_group, 1), LARGEST_GRID))
        width = self._slice_width(left // 2, together, kept, norms is not None)
        parts = [slice(g, min(g + together, self.groups)) for g in range(0, self.groups, together)]
        rows = self.places * self.members
        states = [
            empty_state((part.stop - part.start) * rows, self.sums, self.gain.device)
            for part in parts
        ]
        with on_device_of(self.queries):
            for first in range(0, self.images.columns, width):
                last = min(first + width, self.images.columns)
                columns = self._columns(first, last)
                here = norms[:, first:last] if norms is not None else self._norms(columns, first)
                states = [
                    self._scan(columns, here, part, state)
                    for part, state in zip(parts, states, strict=True)
                ]
        return self._answers(states)

    @property
    def _rows_bytes(self) -> int:
        """Bytes of one half of one block of a group's queries."""
        return 2 * OUTPUTS * self.config.batch * self.config.block_d

    def _slice_width(self, bytes_left: int, groups: int, kept: bool, have_norms: bool) -> int:
        """Columns of the images that are worked on at a time."""
        above = sum(level.tiles * OUTPUTS for level in self.plan.levels[1:])
        split = self.config.block_n * self.config.split_blocks
        per_column = 4 * above * (groups * self.config.batch + 1)
        state = 4 * (2 + self.sums) * groups * self.places * self.members
        per_column += state // split
        per_column += 0 if kept else 2 * self.images.dim
        per_column += 0 if have_norms else 4 * self.places
        # Whole splits, so that the bits do not depend on the memory there is.
        largest = LARGEST_GRID * self.config.block_n // split * split
        if self.chunk_size is not None:
            width = self.chunk_size // COLUMN_MULTIPLE * COLUMN_MULTIPLE
            return min(max(width, COLUMN_MULTIPLE), largest)
        width = bytes_left // max(per_column, 1) // split * split
        return min(max(width, split), largest)

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
        """Squared norms of all images over all masks, kept for the next call with these masks."""
        whole = self.images.whole
        if whole is None or 4 * self.places * self.images.columns > budget:
            self.images.norms.pop("masked", None)
            return None
        owner, kept = self.images.norms.get("masked", (None, None))
        if owner is not self.plan:
            self.images.norms.pop("masked", None)
            norms = torch.empty(self.places, self.images.columns, device=self.queries.device)
            width = self._slice_width(budget // 4, 1, True, True)
            with on_device_of(self.queries):
                for first in range(0, self.images.columns, width):
                    columns = whole[:, first : first + width]
                    norms[:, first : first + width] = self._norms(columns, first)
            kept = Kept(norms)
            self.images.norms["masked"] = (self.plan, kept)
        return kept.here()[0]

    def _norms(self, columns: Tensor, first: int) -> Tensor:
        """Squared norms of some images over all masks, infinite where no image is."""
        count, config, above = len(self.images.images) - first, self.config, None
        for level in reversed(self.plan.levels):
            norms = torch.empty(level.tiles * OUTPUTS, columns.shape[1], device=columns.device)
            outputs = level is self.plan.levels[0]
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
                columns.shape[1],
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

    def _packed(self, level: Level, part: slice) -> Tensor:
        """Weighted values of the queries of some groups at the lists of a level."""
        values, config = self.queries[part], self.config
        shape = (
            *(len(values), level.blocks, self.parts),
            *(OUTPUTS * config.batch, config.block_d),
        )
        packed = torch.empty(shape, dtype=torch.float16, device=values.device)
        kernels.pack_queries_kernel[(level.blocks, len(values))](
            values,
            level.inputs,
            level.members,
            packed,
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

    def _core_sums(self, columns: Tensor, part: slice) -> Tensor | None:
        """Sums that the tiles of the first level share, [groups, places, batch, columns]."""
        config, above = self.config, None
        for level in reversed(self.plan.levels[1:]):
            packed = self._packed(level, part)
            groups, width = len(packed), columns.shape[1]
            sums = torch.empty(
                groups, level.tiles * OUTPUTS, config.batch, width, device=columns.device
            )
            kernels.core_sums_kernel[(level.tiles, groups, width // config.block_n)](
                columns,
                packed,
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
        self, columns: Tensor, norms: Tensor, part: slice, state: PosteriorState
    ) -> PosteriorState:
        """Take some columns of the images into the state of some groups."""
        config, level = self.config, self.plan.levels[0]
        cores, packed = self._core_sums(columns, part), self._packed(level, part)
        blocks = columns.shape[1] // config.block_n
        grid = (level.tiles, len(packed), triton.cdiv(blocks, config.split_blocks))
        inputs = (
            *(columns, packed, level.inputs, level.starts, level.parents),
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
