r"""Posterior mean over the patches of all images at all positions, on tensor cores.

The kernel counts in units in which stored bytes are exact in float16: :math:`K = 2u - 255`, so
that :math:`v = K / 255`, and, with :math:`X = 255 x / \alpha` and a power of two
:math:`g \ge \max |X|`, the distance of a query to a patch is

.. math::
    \lVert x - \alpha v \rVert^2 = (\alpha / 255)^2 \left( \lVert X \rVert^2 - 2 g s \right),
    \qquad s = \frac{X}{g} \cdot K - \frac{\lVert K \rVert^2}{2 g} .

Both terms of the score s are products of float16 numbers with float32 sums: the norm of a patch
is an integer of three 11-bit digits, each exact. The norm of the query is added last, in float64.
The products are those of an attention whose keys are all patches, which nobody ever writes down:
images are kept with channels innermost, so the run of a patch's values in one image row is
contiguous, and a tile of keys is an overlapping view. Queries are zero where a run of fixed
length reaches beyond the window.

A query is split into one or two float16 parts, and so are the weights of the values, see
`query_parts`. Weights below 2^-40 of the largest count as 0: even a billion patches of less
weight would move no answer by 1e-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
import triton
import triton.language as tl
from torch import Tensor

from pyflocality._budget import memory_budget_bytes
from pyflocality._problem import PosteriorProblem
from pyflocality.kernels._launch import (
    LARGEST_FACTOR,
    SMALLEST_FACTOR,
    Launch,
    generation,
    on_device_of,
)
from pyflocality.kernels._patches import (
    DIGIT_BITS,
    STEP,
    Geometry,
    Group,
    converted_images,
    query_groups,
    query_windows,
)
from pyflocality.kernels.state import empty_state, merge_parts
from pyflocality.reference.state import PosteriorState

# Programs wanted from one noisy image alone: two rounds of two on each of 132 multiprocessors.
# A constant, because the split of the images decides how sums are rounded.
_PROGRAMS_PER_IMAGE = 528
# Bounds of g: the digits' factors 2^22 / 2g to 1 / 2g must be float16.
_SMALLEST_UNIT, _LARGEST_UNIT = 2.0**6, 2.0**100
# Weights are that much larger in the kernel, for the range of float16.
_WEIGHT_SCALE = 2.0**15
# Expected error of a logit up to which one part of the query is enough, see `query_parts`.
_LOGIT_ERROR = 5e-3
# Shared memory of a Hopper multiprocessor that two programs, or one, can share out, less a
# reserve for scratch.
_SHARED_OF_TWO, _SHARED_OF_ONE = 100 * 1024, 200 * 1024


@dataclass(frozen=True)
class EquivariantConfig:
    """Tile sizes of the scan.

    Attributes:
        block_queries: Queries of a program.
        block_keys: Patches a step.
        resident: Whether the queries stay in shared memory; else they are read again at each
            step.
        launch: Layout of the compiled kernel.
    """

    block_queries: int
    block_keys: int
    resident: bool
    launch: Launch


def default_config(window: int, run: int, parts: int, arch: int) -> EquivariantConfig:
    """Tile sizes for a window, by what fits the shared memory of a multiprocessor.

    Two programs a multiprocessor come first: one weighs while the other multiplies.

    Args:
        window: Side of a patch.
        run: Length of a run.
        parts: float16 parts of a query.
        arch: 80 or 90, as `generation` tells.
    """
    # Deeper pipelines of the shortest runs spill on Ampere with some compilers.
    streamed = EquivariantConfig(128, 64, False, Launch(8, 3 if run > STEP else 2))
    if run > 64:
        streamed = EquivariantConfig(64, 32, False, Launch(4, 2))
    if arch < 90 or window > 7:
        return streamed
    row = 2 * window * run
    queries, keys = 128 * parts * row, 64 * row
    if queries + 2 * keys <= _SHARED_OF_TWO:
        return EquivariantConfig(128, 64, True, Launch(8, 2, 128))
    if queries + keys <= _SHARED_OF_TWO:
        return EquivariantConfig(128, 64, True, Launch(8, 1, 128))
    if queries + 2 * keys <= _SHARED_OF_ONE:
        return EquivariantConfig(128, 64, True, Launch(8, 2))
    return streamed


@triton.jit
def _query_tile(
    query_ptr, rows, first, WINDOW: tl.constexpr, RUN: tl.constexpr, TAKEN: tl.constexpr
):
    """Rows `first` to `first + TAKEN` of the queries' windows, [BLOCK_Q, TAKEN * RUN]."""
    inner = first * RUN + tl.arange(0, TAKEN * RUN)
    return tl.load(query_ptr + rows[:, None] * (WINDOW * RUN) + inner[None, :])


@triton.jit
def _key_tile(
    keys_ptr,
    places,
    first,
    row_stride,
    CHANNELS: tl.constexpr,
    RUN: tl.constexpr,
    TAKEN: tl.constexpr,
):
    """Rows `first` to `first + TAKEN` of the patches at `places`, [TAKEN * RUN, BLOCK_KEYS]."""
    inner = tl.arange(0, TAKEN * RUN)
    offsets = (first + inner // RUN) * row_stride * CHANNELS + inner % RUN
    return tl.load(keys_ptr + places[None, :] + offsets[:, None])


@triton.jit
def scan_kernel(
    query_ptr,  # float16 [classes, PARTS, rows, WINDOW, RUN]
    norm_query_ptr,  # float16 [rows, 16]: what a norm's digits count, negative
    factor_ptr,  # float32 [rows]: of a score in the power of two
    keys_ptr,  # float16 [N, padded height, padded width, CHANNELS], and zeros behind
    norm_ptr,  # float16 [N, patch rows, patch columns, 4]: digits, and zeros behind
    origin_ptr,  # int32 [classes, 2]: row and column of a class's first patch
    best_ptr,  # results, float32 [splits, classes, rows]: largest score
    sums_ptr,  # float32 [splits, classes, rows, ANSWERS]: weighted channels, then weights
    num_rows,  # a multiple of BLOCK_Q
    num_keys,
    keys_per_image,
    keys_per_row,
    image_stride,  # in pixels
    row_stride,
    norm_image_stride,  # in patches
    norm_row_stride,
    steps,
    WINDOW: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    ANSWERS: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Online softmax of a tile of queries over some of the patches.

    Grid: (query tiles, splits, classes); each program handles BLOCK_Q queries and `steps` blocks
    of patches of their class.
    """
    # 64-bit before any product: images and queries may exceed 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    split = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    factor = tl.load(factor_ptr + rows)
    first_row = tl.load(origin_ptr + 2 * group)
    first_column = tl.load(origin_ptr + 2 * group + 1)
    query_stride = tl.cast(num_rows, tl.int64) * (WINDOW * RUN)
    high_ptr = query_ptr + group * PARTS * query_stride
    low_ptr = high_ptr + query_stride
    digit = tl.arange(0, 16)
    norm_query = tl.load(norm_query_ptr + rows[:, None] * 16 + digit[None, :])
    # Queries that stay: the window's rows as a sum of powers of two, a product for each.
    if RESIDENT:
        if WINDOW & 1:
            high_1 = _query_tile(high_ptr, rows, 0, WINDOW, RUN, 1)
            if PARTS == 2:
                low_1 = _query_tile(low_ptr, rows, 0, WINDOW, RUN, 1)
        if WINDOW & 2:
            high_2 = _query_tile(high_ptr, rows, WINDOW & 1, WINDOW, RUN, 2)
            if PARTS == 2:
                low_2 = _query_tile(low_ptr, rows, WINDOW & 1, WINDOW, RUN, 2)
        if WINDOW & 4:
            high_4 = _query_tile(high_ptr, rows, WINDOW & 3, WINDOW, RUN, 4)
            if PARTS == 2:
                low_4 = _query_tile(low_ptr, rows, WINDOW & 3, WINDOW, RUN, 4)

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_Q, ANSWERS], tl.float32)
    answer = tl.arange(0, ANSWERS)
    for step in range(0, steps):
        first = (split * steps + step) * BLOCK_KEYS
        key = first + tl.arange(0, BLOCK_KEYS)  # [BLOCK_KEYS]
        valid = key < num_keys
        key = tl.where(valid, key, 0)
        image = (key // keys_per_image).to(tl.int64)
        place = key % keys_per_image
        row = first_row + place // keys_per_row
        column = first_column + place % keys_per_row
        # In multiples of CHANNELS, which the compiler sees: it copies that much at a time.
        places = (image * image_stride + row * row_stride + column) * CHANNELS
        norm_places = (image * norm_image_stride + row * norm_row_stride + column) * 4
        # A score is minus the distance, but for the query's own norm: [BLOCK_Q, BLOCK_KEYS].
        digits = tl.load(norm_ptr + norm_places[None, :] + digit[:, None])
        score = tl.dot(norm_query, digits)
        if RESIDENT:
            if WINDOW & 4:
                keys = _key_tile(keys_ptr, places, WINDOW & 3, row_stride, CHANNELS, RUN, 4)
                score = tl.dot(high_4, keys, score)
                if PARTS == 2:
                    score = tl.dot(low_4, keys, score)
            if WINDOW & 2:
                keys = _key_tile(keys_ptr, places, WINDOW & 1, row_stride, CHANNELS, RUN, 2)
                score = tl.dot(high_2, keys, score)
                if PARTS == 2:
                    score = tl.dot(low_2, keys, score)
            if WINDOW & 1:
                keys = _key_tile(keys_ptr, places, 0, row_stride, CHANNELS, RUN, 1)
                score = tl.dot(high_1, keys, score)
                if PARTS == 2:
                    score = tl.dot(low_1, keys, score)
        else:
            for down in range(0, WINDOW):
                keys = _key_tile(keys_ptr, places, down, row_stride, CHANNELS, RUN, 1)
                high = _query_tile(high_ptr, rows, down, WINDOW, RUN, 1)
                score = tl.dot(high, keys, score)
                if PARTS == 2:
                    low = _query_tile(low_ptr, rows, down, WINDOW, RUN, 1)
                    score = tl.dot(low, keys, score)
        # Only the last block has patches that are not there.
        if first + BLOCK_KEYS > num_keys:
            score = tl.where(valid[None, :], score, float("-inf"))
        largest = tl.max(score, 1)
        # Weights are float16, 2^15 for the best: below 2^-40 of it they are exactly 0. A block
        # that holds nothing more for any query adds nothing and need not be weighed.
        matters = (largest - best) * factor > -41.0
        if tl.max(matters.to(tl.int32), 0) > 0:
            new_best = tl.maximum(best, largest)
            # Scores are subtracted before the factor, which may be as large as 2^120.
            weight = tl.exp2((score - new_best[:, None]) * factor[:, None] + 15.0)
            sums = sums * tl.exp2((best - new_best) * factor)[:, None]
            # [BLOCK_KEYS, ANSWERS]: channels of the centre pixel, then a 1 that sums the weights.
            centre_ptr = keys_ptr + (WINDOW // 2) * (row_stride + 1) * CHANNELS
            values = tl.load(
                centre_ptr + places[:, None] + answer[None, :],
                mask=(answer < CHANNELS)[None, :],
                other=0.0,
            )
            values = tl.where(answer[None, :] == CHANNELS, 1.0, values).to(tl.float16)
            high_weight = weight.to(tl.float16)
            sums = tl.dot(high_weight, values, sums)
            if PARTS == 2:
                low_weight = (weight - high_weight.to(tl.float32)).to(tl.float16)
                sums = tl.dot(low_weight, values, sums)
            best = new_best

    out = (split * tl.num_programs(2) + group) * num_rows + rows
    tl.store(best_ptr + out, best)
    tl.store(sums_ptr + out[:, None] * ANSWERS + answer[None, :], sums)


def equivariant_posterior_state(
    problem: PosteriorProblem,
    window: int,
    circular: bool,
    *,
    parts: int | None = None,
    config: EquivariantConfig | None = None,
) -> PosteriorState:
    """Scan of all patches with a query per pixel, as the reference of this name.

    Args:
        problem: The problem; images must be uint8.
        window: Side of a patch.
        circular: Whether x goes on periodically; else windows are cut at the border.
        parts: float16 parts of queries and weights, 1 or 2; None follows `query_parts`.
        config: Tile sizes; None takes `default_config`.
    """
    shape = tuple(problem.images.shape[1:])
    geometry = Geometry(shape, window, 0 if circular else window // 2)
    chosen = [parts] * len(problem.x) if parts else query_parts(problem, window)
    result = PosteriorState(
        *(
            torch.empty(len(chosen), shape[1] * shape[2], *more, device=problem.x.device)
            for more in ((), (), (shape[0],))
        )
    )
    # Runs and windows in float64, copies of both, and their parts.
    per_image = shape[1] * shape[2] * window * geometry.run * 40
    at_a_time = max(1, memory_budget_bytes(problem.memory_budget) // 4 // per_image)
    for count in sorted(set(chosen)):
        members = torch.tensor([b for b, one in enumerate(chosen) if one == count])
        for some in members.to(problem.x.device).split(at_a_time):
            state = _scan(problem, some, geometry, circular, count, config)
            for whole, part in zip(result, state, strict=True):
                whole[some] = part
    return result


def query_parts(problem: PosteriorProblem, window: int) -> list[int]:
    r"""How many float16 parts the query of each noisy image needs.

    Rounding x to one part moves it by about 2^-12 |x| a value, independently, and the logit of a
    patch v by about :math:`2^{-12} \alpha / (\sigma^2 \tau) \sqrt{k^2 C / 3}\, |x|` with
    :math:`|v| \le 1` and :math:`|x|^2 \approx \alpha^2 + \sigma^2`. The answer is exactly that
    for a query moved so little, so answers move far less than logits: on CIFAR-10 with windows
    of 7 the largest of 900 errors was 3e-4 wherever this estimate is below 5e-3 (sigma above 0.55
    in the DDPM schedule), which is where one part is taken, and 2e-3 at sigma 0.08. Two parts are
    as good as float32.
    """
    values = problem.images.shape[1] * window**2
    scale = problem.scale
    size = (problem.alpha.square() + 0.5 / scale).sqrt()
    error = 2.0**-12 * 2.0 * problem.alpha * scale * (values / 3) ** 0.5 * size
    return [1 if one <= _LOGIT_ERROR else 2 for one in error.tolist()]


def _scan(
    problem: PosteriorProblem,
    members: Tensor,
    geometry: Geometry,
    circular: bool,
    parts: int,
    config: EquivariantConfig | None,
) -> PosteriorState:
    """State [b, H W] of some of the noisy images."""
    device, channels = problem.x.device, geometry.shape[0]
    config = config or default_config(geometry.window, geometry.run, parts, generation(device))
    alpha, x = problem.alpha[members], problem.x.detach()[members].double()
    largest = (255.0 / alpha) * x.flatten(1).abs().amax(1)
    unit = torch.exp2(largest.clamp(_SMALLEST_UNIT, _LARGEST_UNIT).log2().ceil())
    # A score counts distances in this unit.
    distance_unit = 2.0 * unit * (alpha / 255.0).square()
    factor = problem.scale[members] * distance_unit * math.log2(math.e)
    factor = factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR).float()
    windows = query_windows(x, geometry, circular)
    runs = F.pad(
        windows * (255.0 / alpha / unit)[:, None, None, None],
        (0, geometry.run - windows.shape[-1]),
    )
    groups = list(query_groups(geometry, circular, device))
    scans = [_GroupScan(group, runs, unit, factor, geometry, parts, config) for group in groups]
    for keys, norms, count in converted_images(problem, geometry):
        for scan in scans:
            scan.take(keys, norms, count)

    pixels = geometry.shape[1] * geometry.shape[2]
    minimum = torch.empty(len(x), pixels, dtype=torch.float64, device=device)
    total = torch.empty(len(x), pixels, device=device)
    weighted = torch.empty(len(x), pixels, channels, device=device)
    for group, scan in zip(groups, scans, strict=True):
        state = scan.state_of(len(x))
        for whole, part in zip((minimum, total, weighted), state, strict=True):
            whole[:, group.queries] = (
                part[..., :channels] if part.ndim == 4 else part.to(whole.dtype)
            )
    own = windows.square().sum((-2, -1))
    minimum = (own + minimum * distance_unit[:, None]).clamp_min_(0.0)
    return PosteriorState(
        minimum.float(), total / _WEIGHT_SCALE, weighted / (255.0 * _WEIGHT_SCALE)
    )


class _GroupScan:
    """The scan of one group of classes: its queries and its running state."""

    def __init__(
        self,
        group: Group,
        runs: Tensor,
        unit: Tensor,
        factor: Tensor,
        geometry: Geometry,
        parts: int,
        config: EquivariantConfig,
    ) -> None:
        self._group, self._geometry, self._parts, self._config = group, geometry, parts, config
        classes, per_image = group.queries.shape
        self._rows = triton.cdiv(len(runs) * per_image, config.block_queries) * config.block_queries
        # [classes, b, Q, window, run] -> [classes, parts, rows, window, run]
        wanted = runs[:, group.queries].transpose(0, 1).flatten(1, 2)
        self._queries = wanted.new_zeros(
            (classes, parts, self._rows, *wanted.shape[2:]), dtype=torch.float16
        )
        for part in range(parts):
            rounded = wanted.half()
            self._queries[:, part, : wanted.shape[1]] = rounded
            wanted = wanted - rounded
        self._factor = factor.new_full((self._rows,), LARGEST_FACTOR)
        self._factor[: wanted.shape[1]] = factor.repeat_interleave(per_image)
        self._norm_queries = self._queries.new_zeros(self._rows, STEP)
        digits = torch.tensor([-(2.0 ** (DIGIT_BITS * place)) for place in range(3)])
        digits = digits.to(unit) / (2.0 * unit[:, None])
        self._norm_queries[: wanted.shape[1], :3] = digits.half().repeat_interleave(per_image, 0)
        self._state = empty_state(classes * self._rows, geometry.channels, runs.device)

    def take(self, keys: Tensor, norms: Tensor, count: int) -> None:
        """Take in a chunk of images."""
        group, geometry, config = self._group, self._geometry, self._config
        classes, per_image = group.queries.shape
        channels, window = geometry.channels, geometry.window
        num_keys = count * group.rows * group.columns
        blocks = triton.cdiv(num_keys, config.block_keys)
        tiles = triton.cdiv(per_image, config.block_queries) * classes
        steps = triton.cdiv(blocks, max(1, _PROGRAMS_PER_IMAGE // tiles))
        splits = triton.cdiv(blocks, steps)
        answers = max(STEP, triton.next_power_of_2(channels + 1))
        best = self._factor.new_empty(splits, classes * self._rows)
        sums = self._factor.new_empty(splits, classes * self._rows, answers)
        with on_device_of(keys):
            scan_kernel[(self._rows // config.block_queries, splits, classes)](
                self._queries,
                self._norm_queries,
                self._factor,
                keys,
                norms,
                group.origins,
                best,
                sums,
                self._rows,
                num_keys,
                group.rows * group.columns,
                group.columns,
                math.prod(geometry.padded),
                geometry.padded[1],
                math.prod(geometry.patches),
                geometry.patches[1],
                steps,
                WINDOW=window,
                RUN=geometry.run,
                CHANNELS=channels,
                ANSWERS=answers,
                PARTS=self._parts,
                RESIDENT=config.resident,
                BLOCK_Q=config.block_queries,
                BLOCK_KEYS=config.block_keys,
                **config.launch.options(),
            )
        found = PosteriorState(
            -best, sums[..., channels].contiguous(), sums[..., :channels].contiguous()
        )
        self._state = merge_parts(self._state, found, self._factor.repeat(classes))

    def state_of(self, batch: int) -> PosteriorState:
        """The running state as [b, classes, Q] and [b, classes, Q, channels], in score units."""
        classes, per_image = self._group.queries.shape
        return PosteriorState(
            *(
                tensor.reshape(classes, self._rows, *tensor.shape[1:])[:, : batch * per_image]
                .reshape(classes, batch, per_image, *tensor.shape[1:])
                .transpose(0, 1)
                for tensor in self._state
            )
        )
