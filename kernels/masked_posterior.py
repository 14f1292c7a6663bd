"""Masked posterior scan on an NVIDIA GPU: tensor-core products with the softmax in the epilogue.

Distances are expanded: sum w (z - u)^2 = A - 2 sum w z u + sum w u^2 with the noisy image z in
the units of the bytes u. The term A is the same for all images; the last one is the same for all
noisy images; the middle one is a product of matrices, whose image side is exact in float16.
`_mask_plan` says how neighbouring outputs share work, `_masked_products` holds the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pyflocality._budget import memory_budget_bytes
from pyflocality._checks import check_choice
from pyflocality._problem import PosteriorProblem
from pyflocality.kernels import _masked_products as kernels
from pyflocality.kernels._centred_images import COLUMN_MULTIPLE, CentredImages, centred_images
from pyflocality.kernels._launch import Launch, finite_power, generation, on_device_of
from pyflocality.kernels._mask_plan import OUTPUTS, Level, MaskPlan, mask_plan, unpacked
from pyflocality.kernels.state import empty_state, merge_parts
from pyflocality.reference.state import PosteriorState
from pyflocality.weights import QueryWeights

PRECISIONS = ("auto", "exact")
# Largest error of an answer in [-1, 1] that "auto" may cause by rounding the queries.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Config:
    """Shapes of the kernels for one GPU generation.

    Attributes:
        batch: Noisy images of a program; with 16 outputs each they are its rows.
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


def masked_posterior_state(
    problem: PosteriorProblem,
    weights: QueryWeights,
    *,
    precision: str = "auto",
    config: Config | None = None,
) -> PosteriorState:
    """Scan with a query per output value, as the reference of this name.

    Args:
        problem: float32 queries against uint8 images.
        weights: Masks, or real weights (each kept as two float16 halves, 22 bits).
        precision: "exact" splits every query in two float16 halves, which is as accurate as
            float32. "auto" takes one half where `rounding_error` stays below 1e-3, which is so
            at high noise, where masks are dense and the time goes. It decides for each noisy
            image alone, from its noise level.
        config: Shapes of the kernels; None takes those shipped for the device.
    """
    check_choice(precision, "precision", PRECISIONS)
    x = problem.x.detach()
    config = config or CONFIGS[generation(x.device)]
    plan = mask_plan(weights, tuple(problem.images.shape[1:]), config.block_d, x.device)
    images = centred_images(problem.images)
    exact = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if precision == "auto":
        exact = rounding_error(problem, images.variance, plan.strongest) > TOLERANCE
    state = _States(problem, weights.shape[0])
    for parts, chosen in ((1, ~exact), (2, exact)):
        rows = chosen.nonzero().flatten()
        if len(rows):
            scan = _Scan(problem, rows, images, plan, config, parts)
            state.put(rows, *scan.run())
    return state.finish(weights)


def rounding_error(problem: PosteriorProblem, variance: float, strongest: float) -> Tensor:
    r"""About how far rounding x to float16 can move an answer, float64 [B].

    Rounding x by :math:`\delta` moves the difference of two logits by
    :math:`\alpha \sum_d w_d \delta_d (v_i - v_j)_d / (\sigma^2 \tau)`, of the order
    :math:`\alpha \, \delta \, |w (v_i - v_j)| / (\sigma^2 \tau)`, and an answer by at most half of
    that where two images tie. With :math:`\delta = 2^{-12}` of the size of x and the images as
    far apart as two random ones this was 1.1 to 6 times the largest error seen on CIFAR-10, for
    windows from 5x5 to the whole image and noise levels from 0.01 to 1.
    """
    size = (problem.alpha.square() * variance + 0.5 / problem.scale).sqrt()
    apart = math.sqrt(2.0 * variance * strongest)
    error = 0.5 * problem.alpha * (2.0**-12 * size) * apart * 2.0 * problem.scale
    return torch.where(torch.isfinite(problem.scale), error, torch.inf)


class _States:
    """Collects the states of groups of noisy images, in the units of the formulas."""

    def __init__(self, problem: PosteriorProblem, queries: int) -> None:
        self.problem = problem
        shape = (len(problem.x), queries)
        options = {"dtype": torch.float64, "device": problem.x.device}
        self.minimum, self.total = torch.empty(shape, **options), torch.empty(shape, **options)
        self.weighted = torch.empty(shape, **options)

    def put(self, rows: Tensor, minimum: Tensor, total: Tensor, weighted: Tensor) -> None:
        unit = (self.problem.alpha[rows] / 127.5).square()[:, None]
        self.minimum[rows] = minimum.double() * unit
        self.total[rows] = total.double()
        self.weighted[rows] = weighted.double()

    def finish(self, weights: QueryWeights) -> PosteriorState:
        """Adds what the scan leaves out: the centre of the images and the common term."""
        problem, centre = self.problem, centred_images(self.problem.images).centre.double()
        weighted = (self.weighted + self.total * centre) / 127.5 - self.total
        noisy = _centred_noisy(problem, centre).square()
        dense = None if weights.is_mask else weights.dense(torch.float32, noisy.device)
        step = max(1, 2**24 // weights.shape[1])
        for start in range(0, weights.shape[0], step):
            rows = slice(start, start + step)
            part = unpacked(weights, noisy.device, rows) if dense is None else dense[rows]
            self.minimum[:, rows] += noisy @ part.double().T
        return PosteriorState(self.minimum, self.total, weighted[..., None])


def _centred_noisy(problem: PosteriorProblem, centre: Tensor) -> Tensor:
    """Noisy images minus alpha times the centre of the images, float64 [B, D]."""
    noisy = problem.x.detach().double().flatten(1)
    return noisy - problem.alpha[:, None] * (centre.double() / 127.5 - 1.0)


class _Scan:
    """One scan of all images for some noisy images at one precision."""

    def __init__(
        self,
        problem: PosteriorProblem,
        rows: Tensor,
        images: CentredImages,
        plan: MaskPlan,
        config: Config,
        parts: int,
    ) -> None:
        self.images, self.plan, self.config, self.parts = images, plan, config, parts
        self.rows, self.groups = len(rows), triton.cdiv(len(rows), config.batch)
        self.chunk_size = problem.chunk_size
        self.budget = memory_budget_bytes(problem.memory_budget)
        noisy = _centred_noisy(problem, images.centre)[rows]
        alpha, scale = problem.alpha[rows], problem.scale[rows]
        # A power of two that brings the largest value near 2^14: half precision then resolves
        # 2^-38 of it, and weights up to 2 and sums stay in range.
        exponent = 14 - torch.frexp(noisy.abs().amax(1)).exponent
        unit = torch.ldexp(torch.ones_like(alpha), exponent)
        self.noisy = self._grouped(noisy * unit[:, None], 0.0)
        self.gain = self._grouped(255.0 / (alpha * unit), 0.0)
        factor = scale * (alpha / 127.5).square()
        self.factor = self._grouped(finite_power(factor), 1.0)

    def _grouped(self, values: Tensor, fill: float) -> Tensor:
        """float32, with rows added to whole groups."""
        grouped = values.new_full((self.groups * self.config.batch, *values.shape[1:]), fill)
        grouped[: len(values)] = values
        return grouped.float()

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest distance without its common term, weights and weighted K: [rows, Q] each."""
        config, plan = self.config, self.plan
        places = plan.levels[0].tiles * OUTPUTS
        copy = 2 * self.images.dim * self.images.columns
        kept = self.images.keep(self.budget // 2)
        left = self.budget - copy * kept
        norms = self._kept_norms(left * 7 // 8)
        if norms is not None:
            left -= 4 * places * self.images.columns
        # Groups together: their queries are formed once per slice of the images.
        per_group = sum(level.blocks for level in plan.levels) * self.parts * self._rows_bytes
        together = max(1, min(self.groups, left // 2 // max(per_group, 1)))
        width = self._slice_width(left // 2, together, kept, norms is not None)
        states = [
            empty_state(min(together, self.groups - g) * places * config.batch, 1, self.gain.device)
            for g in range(0, self.groups, together)
        ]
        with on_device_of(self.noisy):
            for first in range(0, self.images.columns, width):
                last = min(first + width, self.images.columns)
                columns = self._columns(first, last)
                here = norms[:, first:last] if norms is not None else self._norms(columns, first)
                for number, group in enumerate(range(0, self.groups, together)):
                    part = slice(group * config.batch, (group + together) * config.batch)
                    states[number] = self._scan(columns, here, part, states[number])
        return self._answers(states, places)

    @property
    def _rows_bytes(self) -> int:
        """Bytes of one half of one block of a group's queries."""
        return 2 * OUTPUTS * self.config.batch * self.config.block_d

    def _slice_width(self, bytes_left: int, groups: int, kept: bool, have_norms: bool) -> int:
        """Columns of the images that are worked on at a time."""
        above = sum(level.tiles * OUTPUTS for level in self.plan.levels[1:])
        places = self.plan.levels[0].tiles * OUTPUTS
        split = self.config.block_n * self.config.split_blocks
        per_column = 4 * above * (groups * self.config.batch + 1)
        per_column += 12 * groups * places * self.config.batch // split
        per_column += 0 if kept else 2 * self.images.dim
        per_column += 0 if have_norms else 4 * places
        # Whole splits, so that the bits do not depend on the memory there is.
        width = bytes_left // max(per_column, 1) // split * split
        if self.chunk_size is not None:
            width = self.chunk_size // COLUMN_MULTIPLE * COLUMN_MULTIPLE
            return max(width, COLUMN_MULTIPLE)
        return max(width, split)

    def _columns(self, first: int, last: int) -> Tensor:
        if self.images.whole is not None:
            return self.images.whole[:, first:last]
        columns = torch.empty(
            self.images.dim, last - first, dtype=torch.float16, device=self.noisy.device
        )
        self.images.fill(columns, first)
        return columns

    def _kept_norms(self, budget: int) -> Tensor | None:
        """Squared norms of all images over all masks, kept for the next call with these masks."""
        places = self.plan.levels[0].tiles * OUTPUTS
        if self.images.whole is None or 4 * places * self.images.columns > budget:
            self.images.norms.pop("masked", None)
            return None
        owner, norms = self.images.norms.get("masked", (None, None))
        if owner is not self.plan:
            self.images.norms.pop("masked", None)
            norms = torch.empty(places, self.images.columns, device=self.noisy.device)
            width = self._slice_width(budget // 4, 1, True, True)
            with on_device_of(self.noisy):
                for first in range(0, self.images.columns, width):
                    columns = self.images.whole[:, first : first + width]
                    norms[:, first : first + width] = self._norms(columns, first)
            self.images.norms["masked"] = (self.plan, norms)
        return norms

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

    def _queries(self, level: Level, part: slice) -> Tensor:
        """Weighted noisy values of the lists of a level, for some groups."""
        noisy, config = self.noisy[part], self.config
        groups, rows = len(noisy) // config.batch, OUTPUTS * config.batch
        shape = (groups, level.blocks, self.parts, rows, config.block_d)
        queries = torch.empty(shape, dtype=torch.float16, device=noisy.device)
        kernels.pack_queries_kernel[(level.blocks, groups)](
            noisy,
            level.inputs,
            level.members,
            queries,
            noisy.shape[1],
            level.blocks,
            MEMBER_PARTS=level.parts,
            PARTS=self.parts,
            OUTPUTS=OUTPUTS,
            BATCH=config.batch,
            BLOCK_D=config.block_d,
            num_warps=4,
        )
        return queries

    def _core_sums(self, columns: Tensor, part: slice) -> Tensor | None:
        """Sums that the tiles of the first level share, [groups, places, batch, columns]."""
        config, above = self.config, None
        for level in reversed(self.plan.levels[1:]):
            queries = self._queries(level, part)
            groups, width = len(queries), columns.shape[1]
            sums = torch.empty(
                groups, level.tiles * OUTPUTS, config.batch, width, device=columns.device
            )
            kernels.core_sums_kernel[(level.tiles, groups, width // config.block_n)](
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
            )
            above = sums
        return above

    def _constants(self, level: Level, launch: Launch) -> dict[str, object]:
        return {
            "HAS_PARENTS": level.has_parents,
            "PARTS": self.parts,
            "OUTPUTS": OUTPUTS,
            "BATCH": self.config.batch,
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
        cores, queries = self._core_sums(columns, part), self._queries(level, part)
        gain, factor, groups = self.gain[part], self.factor[part], len(queries)
        blocks = columns.shape[1] // config.block_n
        splits = triton.cdiv(blocks, config.split_blocks)
        shape = (splits, groups * level.tiles * OUTPUTS * config.batch)
        minimum, total, weighted = (torch.empty(shape, device=gain.device) for _ in range(3))
        kernels.masked_posterior_kernel[(level.tiles, groups, splits)](
            columns,
            queries,
            level.inputs,
            level.starts,
            level.parents,
            gain if cores is None else cores,
            norms,
            self.plan.outputs,
            level.row_scale,
            gain,
            factor,
            minimum,
            total,
            weighted,
            level.blocks,
            0 if cores is None else cores.shape[1],
            blocks,
            config.split_blocks,
            columns.stride(0),
            norms.stride(0),
            columns.shape[1],
            **self._constants(level, config.scan),
        )
        per_row = factor.view(groups, 1, config.batch).expand(-1, level.tiles * OUTPUTS, -1)
        parts = PosteriorState(minimum, total, weighted[..., None])
        return merge_parts(state, parts, per_row.reshape(-1))

    def _answers(self, states: list[PosteriorState], places: int) -> tuple[Tensor, ...]:
        """The states by noisy image and output, [rows, Q] each."""
        at = self.plan.levels[0].places
        answers = []
        for sums in zip(*states, strict=True):
            merged = torch.cat([part.reshape(-1, places, self.config.batch) for part in sums])
            merged = merged[:, at].transpose(1, 2).reshape(-1, len(at))
            answers.append(merged[: self.rows])
        return tuple(answers)
