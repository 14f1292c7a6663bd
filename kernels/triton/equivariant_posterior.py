r"""Posterior mean over the patches of all images at all positions, on tensor cores.

The kernel counts in units in which stored bytes are exact in float16: :math:`K = 2u - 255`, so
that :math:`v = K / 255`, and, with :math:`X = 255 x / \alpha` and a power of two
:math:`g \ge \max |X|`, the distance of a query to a patch is

.. math::
    \lVert x - \alpha v \rVert^2 = (\alpha / 255)^2 \left( \lVert X \rVert^2 - 2 g s \right),
    \qquad s = \frac{X}{g} \cdot K - \frac{\lVert K \rVert^2}{2 g} .

Both terms of the logit s are products of float16 numbers with float32 sums: the norm of a patch
is an integer of three 11-bit digits, each exact. The norm of the query is added last, in float64.
The products are those of an attention whose keys are all patches, which nobody ever writes down:
images are kept with channels innermost, so the run of a patch's values in one image row is
contiguous, and a tile of keys is an overlapping view. Queries are zero where a run of fixed
length reaches beyond the window.

A query is split into two float16 halves, or one where precision="auto" permits it, and so are the
weights of the values, see `query_halves`. Weights below 2^-40 of the largest count as 0: even a
billion patches of less weight would move no answer by 1e-3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
import triton
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.kernels.stored import LARGEST_FACTOR, power_factor
from pyflocality.kernels.triton._launch import generation, on_device_of
from pyflocality.kernels.triton._merge import empty_state, merge_partials
from pyflocality.kernels.triton._patch_logits import EquivariantConfig, default_config, scan_kernel
from pyflocality.kernels.triton._patches import (
    DIGIT_BITS,
    STEP,
    Geometry,
    Group,
    converted_images,
    query_groups,
    query_windows,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState

# Programs wanted from one noisy image alone: two rounds of two on each of 132 multiprocessors.
# A constant, because the split of the images decides how sums are rounded.
_PROGRAMS_PER_IMAGE = 528
# Bounds of g: the digits' factors 2^22 / 2g to 1 / 2g must be float16.
_SMALLEST_UNIT, _LARGEST_UNIT = 2.0**6, 2.0**100
# Weights are that much larger in the kernel, for the range of float16.
_WEIGHT_SCALE = 2.0**15
# Expected error of a logit up to which one half of the query is enough, see `query_halves`.
_LOGIT_ERROR = 5e-3


def scan(
    problem: PosteriorProblem,
    window: int,
    circular: bool,
    *,
    halves: int | None = None,
    config: EquivariantConfig | None = None,
) -> PosteriorState:
    """Scan of all patches with a query per pixel, as the reference.

    Args:
        problem: The problem; images must be uint8.
        window: Side of a patch.
        circular: Whether x goes on periodically; else windows are cut at the border.
        halves: float16 halves of queries and weights, 1 or 2; None follows `query_halves` where the
            problem's precision is "auto", else takes 2, which is as accurate as float32.
        config: Tile sizes; None takes `default_config`.
    """
    shape = problem.image_shape
    geometry = Geometry(shape, window, 0 if circular else window // 2)
    if halves is None and problem.precision == "auto":
        chosen = query_halves(problem, window)
    else:
        chosen = [halves or 2] * len(problem.x)
    result = PosteriorState(
        *(
            torch.empty(len(chosen), shape[1] * shape[2], *more, device=problem.x.device)
            for more in ((), (), (shape[0],))
        )
    )
    # Runs and windows in float64, copies of both, and their halves.
    per_image = shape[1] * shape[2] * window * geometry.run * 40
    at_a_time = max(1, memory_budget_bytes(problem.memory_budget) // 4 // per_image)
    for count in sorted(set(chosen)):
        rows = torch.tensor([b for b, one in enumerate(chosen) if one == count])
        for some in rows.to(problem.x.device).split(at_a_time):
            state = _scan(problem, some, geometry, circular, count, config)
            for whole, sums in zip(result, state, strict=True):
                whole[some] = sums
    return result


def query_halves(problem: PosteriorProblem, window: int) -> list[int]:
    r"""How many float16 halves the query of each noisy image needs.

    Rounding x to one half moves it by about 2^-12 |x| a value, independently, and the logit of a
    patch v by about :math:`2^{-12} \alpha / (\sigma^2 \tau) \sqrt{k^2 C / 3}\, |x|` with
    :math:`|v| \le 1` and :math:`|x|^2 \approx \alpha^2 + \sigma^2`. The answer is exactly that
    for a query moved so little, so answers move far less than logits: on CIFAR-10 with windows
    of 7 the largest of 900 errors was 3e-4 wherever this estimate is below 5e-3 (sigma above 0.55
    in the DDPM schedule), which is where one half is taken, and 2e-3 at sigma 0.08. Two halves are
    as good as float32.
    """
    values = problem.images.shape[1] * window**2
    scale = problem.scale
    size = (problem.alpha.square() + 0.5 / scale).sqrt()
    error = 2.0**-12 * 2.0 * problem.alpha * scale * (values / 3) ** 0.5 * size
    return [1 if one <= _LOGIT_ERROR else 2 for one in error.tolist()]


def _scan(
    problem: PosteriorProblem,
    rows: Tensor,
    geometry: Geometry,
    circular: bool,
    halves: int,
    config: EquivariantConfig | None,
) -> PosteriorState:
    """State [b, H W] of some of the noisy images."""
    device, channels = problem.x.device, geometry.shape[0]
    config = config or default_config(geometry.window, geometry.run, halves, generation(device))
    alpha, x = problem.alpha[rows], problem.x.detach()[rows].double()
    largest = (255.0 / alpha) * x.flatten(1).abs().amax(1)
    unit = torch.exp2(largest.clamp(_SMALLEST_UNIT, _LARGEST_UNIT).log2().ceil())
    # A logit counts distances in this unit.
    distance_unit = 2.0 * unit * (alpha / 255.0).square()
    factor = power_factor(problem.scale[rows] * distance_unit)
    windows = query_windows(x, geometry, circular)
    runs = F.pad(
        windows * (255.0 / alpha / unit)[:, None, None, None],
        (0, geometry.run - windows.shape[-1]),
    )
    groups = list(query_groups(geometry, circular, device))
    scans = [_GroupScan(group, runs, unit, factor, geometry, halves, config) for group in groups]
    for keys, norms, count in converted_images(problem, geometry):
        for scan in scans:
            scan.take(keys, norms, count)

    pixels = geometry.shape[1] * geometry.shape[2]
    minimum = torch.empty(len(x), pixels, dtype=torch.float64, device=device)
    total = torch.empty(len(x), pixels, device=device)
    weighted = torch.empty(len(x), pixels, channels, device=device)
    for group, scan in zip(groups, scans, strict=True):
        state = scan.state_of(len(x))
        minimum[:, group.queries] = state.minimum.double()
        total[:, group.queries] = state.total
        weighted[:, group.queries] = state.weighted[..., :channels]
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
        halves: int,
        config: EquivariantConfig,
    ) -> None:
        self._group, self._geometry, self._halves, self._config = group, geometry, halves, config
        classes, per_image = group.queries.shape
        self._rows = triton.cdiv(len(runs) * per_image, config.block_queries) * config.block_queries
        # [classes, b, Q, window, run] -> [classes, halves, rows, window, run]
        wanted = runs[:, group.queries].transpose(0, 1).flatten(1, 2)
        self._queries = wanted.new_zeros(
            (classes, halves, self._rows, *wanted.shape[2:]), dtype=torch.float16
        )
        for half in range(halves):
            rounded = wanted.half()
            self._queries[:, half, : wanted.shape[1]] = rounded
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
                query_ptr=self._queries,
                norm_query_ptr=self._norm_queries,
                factor_ptr=self._factor,
                keys_ptr=keys,
                norm_ptr=norms,
                origin_ptr=group.origins,
                best_ptr=best,
                sums_ptr=sums,
                num_rows=self._rows,
                num_keys=num_keys,
                keys_per_image=group.rows * group.columns,
                keys_per_row=group.columns,
                image_stride=math.prod(geometry.padded),
                row_stride=geometry.padded[1],
                norm_image_stride=math.prod(geometry.patches),
                norm_row_stride=geometry.patches[1],
                steps=steps,
                WINDOW=window,
                RUN=geometry.run,
                CHANNELS=channels,
                ANSWERS=answers,
                HALVES=self._halves,
                RESIDENT=config.resident,
                BLOCK_Q=config.block_queries,
                BLOCK_KEYS=config.block_keys,
                **config.launch.options(),
            )
        partials = PosteriorState(
            -best, sums[..., channels].contiguous(), sums[..., :channels].contiguous()
        )
        self._state = merge_partials(self._state, partials, self._factor.repeat(classes))

    def state_of(self, batch: int) -> PosteriorState:
        """The running state [b, classes, Q] and [b, classes, Q, channels], in units of logits."""
        classes, per_image = self._group.queries.shape
        return PosteriorState(
            *(
                tensor.reshape(classes, self._rows, *tensor.shape[1:])[:, : batch * per_image]
                .reshape(classes, batch, per_image, *tensor.shape[1:])
                .transpose(0, 1)
                for tensor in self._state
            )
        )
