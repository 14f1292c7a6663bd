r"""Masked posterior scan with tangents on an NVIDIA GPU, in one pass over the images.

A tangent u needs the products :math:`c_i = \sum_d w[d] \, u[d] \, v_i[d]`, which are those of the
distances with u in the place of the noisy image. So tangents are further queries: a program's 8
queries are one noisy image with up to 7 tangents, or two with up to 3, or four with one, and only
the epilogue knows: it takes the weights from the first query of each noisy image, and sums c and
c v with them for the others.

Values and c are counted from x / alpha, cut to the range of images: where noise is small all but
the digits of their differences would cancel from a covariance. Queries are kept in two float16
halves at every noise level: a derivative is a difference that no noise makes forgiving.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyflocality.kernels.stored import StoredProblem
from pyflocality.kernels.triton._centred_images import CentredImages, centred_images
from pyflocality.kernels.triton._launch import generation
from pyflocality.kernels.triton._mask_plan import MaskPlan, mask_plan
from pyflocality.kernels.triton._masked_products import _gathered_products
from pyflocality.kernels.triton._masked_scan import (
    CONFIGS,
    Config,
    MaskedScan,
    centred_noisy,
    sums_over_weights,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import (
    PosteriorState,
    about_means,
    init,
    tangent_values,
    uncentred,
)
from pyflocality.posterior.tangents import centre_of
from pyflocality.storage.reader import BYTES_PER_UNIT, values_to_bytes
from pyflocality.weights import QueryWeights

# Halves that queries are kept in.
PARTS = 2
# Queries that a noisy image with its tangents takes up, by how many are left; 8 with more. Four
# tangents are cheaper as three and one.
SLOTS, LARGEST_SLOTS = (2, 2, 4, 4, 4), 8
# The epilogue takes more registers than without tangents, too many for some compilers on Ampere.
JVP_CONFIGS = CONFIGS | {80: replace(CONFIGS[80], block_n=64, split_blocks=16)}


@triton.jit
def masked_posterior_jvp_kernel(
    images_ptr,  # float16 [D, columns]
    queries_ptr,  # float16 [G, blocks, PARTS, ROWS, BLOCK_D]
    inputs_ptr,
    starts_ptr,
    parents_ptr,
    cores_ptr,  # sums of the level above, float32 [G, places above, IMAGES, SLOTS, columns]
    norms_ptr,  # float32 [tiles * 16, columns]
    outputs_ptr,  # output at each place, int32 [tiles * 16]
    row_scale_ptr,  # float32 [tiles * 16]
    gain_ptr,  # factor of the products in a distance, float32 [G * IMAGES]
    factor_ptr,  # factor of a distance in the power of two, float32 [G * IMAGES]
    centre_ptr,  # what values are counted from, float32 [G, tiles * 16, IMAGES]
    offset_ptr,  # what products are counted from, float32 [G, tiles * 16, IMAGES, SLOTS]
    minimum_ptr,  # results, float32 [splits, G, tiles * 16, IMAGES]
    sums_ptr,  # [splits, G, tiles * 16, IMAGES, 2, SLOTS]: without and with the value
    blocks,
    places_above,
    column_blocks,
    split_blocks,
    stride_image,
    stride_norm,
    stride_sum,
    HAS_PARENTS: tl.constexpr,
    PARTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    IMAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Posterior scan with tangents of one split of the images, for a tile of outputs.

    Rows are output, noisy image, slot: the first slot holds the noisy image, the others its
    tangents. For the sums the first slot counts 1, the others their products.

    Grid: (tiles, G, splits); each program handles 16 outputs of IMAGES noisy images with
    SLOTS - 1 tangents each over `split_blocks` blocks of BLOCK_N training images.
    """
    BATCH: tl.constexpr = IMAGES * SLOTS
    ROWS: tl.constexpr = OUTPUTS * BATCH
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tile.to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]
    image = group * IMAGES + tl.arange(0, IMAGES)  # [IMAGES]
    slot = tl.arange(0, SLOTS)
    gain = tl.load(row_scale_ptr + place)[:, None] * tl.load(gain_ptr + image)[None, :]
    factor = tl.load(factor_ptr + image)[None, :]  # [1, IMAGES]
    norm_line = norms_ptr + place * stride_norm
    value_line = images_ptr + tl.load(outputs_ptr + place).to(tl.int64) * stride_image
    query = tl.arange(0, BATCH)
    core_line = cores_ptr + tl.zeros((BATCH,), tl.int64)
    if HAS_PARENTS:
        parent = group * places_above + tl.load(parents_ptr + tile)
        core_line += (parent * BATCH + query) * stride_sum
    line = (group * tl.num_programs(0) * OUTPUTS + place)[:, None] * IMAGES
    line += tl.arange(0, IMAGES)[None, :]  # [OUTPUTS, IMAGES]
    centre = tl.load(centre_ptr + line)
    offset = tl.load(offset_ptr + line[:, :, None] * SLOTS + slot[None, None, :])
    noisy = (slot == 0)[None, None, :, None]
    first, last = tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)
    minimum = tl.full((OUTPUTS, IMAGES), float("inf"), tl.float32)
    plain = tl.zeros((OUTPUTS, IMAGES, SLOTS), tl.float32)
    weighted = tl.zeros((OUTPUTS, IMAGES, SLOTS), tl.float32)
    start = tl.program_id(2) * split_blocks
    for column_block in range(start, min(start + split_blocks, column_blocks)):
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        product = _gathered_products(
            images_ptr,
            queries_ptr + group * blocks * (PARTS * ROWS * BLOCK_D),
            inputs_ptr,
            first,
            last,
            column,
            stride_image,
            PARTS,
            ROWS,
            BLOCK_N,
            BLOCK_D,
            NUM_STAGES,
        )
        if HAS_PARENTS:
            product = tl.reshape(product, (OUTPUTS, BATCH, BLOCK_N))
            product += tl.load(core_line[:, None] + column[None, :])[None, :, :]
        product = tl.reshape(product, (OUTPUTS, IMAGES, SLOTS, BLOCK_N))
        own = tl.sum(tl.where(noisy, product, 0.0), axis=2)  # [OUTPUTS, IMAGES, BLOCK_N]
        norm = tl.load(norm_line[:, None] + column[None, :])
        distance = norm[:, None, :] - gain[:, :, None] * own
        smaller = tl.minimum(minimum, tl.min(distance, axis=2))
        weight = tl.exp2((smaller[:, :, None] - distance) * factor[:, :, None])
        decay = tl.exp2((smaller - minimum) * factor)[:, :, None]
        value = tl.load(value_line[:, None] + column[None, :]).to(tl.float32)
        value = value[:, None, :] - centre[:, :, None]
        inner = tl.where(noisy, 1.0, product - offset[:, :, :, None]) * weight[:, :, None, :]
        plain = plain * decay + tl.sum(inner, axis=3)
        weighted = weighted * decay + tl.sum(inner * value[:, :, None, :], axis=3)
        minimum = smaller
    split_line = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * tl.num_programs(0)
    state = split_line * (OUTPUTS * IMAGES) + line
    tl.store(minimum_ptr + state, minimum)
    sums = sums_ptr + state[:, :, None] * (2 * SLOTS) + slot[None, None, :]
    tl.store(sums, plain)
    tl.store(sums + SLOTS, weighted)


def masked_posterior_jvp_state(
    problem: PosteriorProblem,
    tangents: Tensor,
    weights: QueryWeights,
    *,
    config: Config | None = None,
) -> PosteriorState:
    """Scan with a query per output value and K tangents, as the reference of this name.

    Args:
        problem: float32 queries against uint8 images.
        tangents: Directions, [K, B, C, H, W].
        weights: Masks, or real weights (each kept as two float16 halves, 22 bits).
        config: Shapes of the kernels; None takes those shipped for the device.
    """
    device = problem.x.device
    if len(problem.x) == 0:
        return init(0, weights.shape[0], tangent_values(1, len(tangents)), problem.x.double())
    config = config or JVP_CONFIGS[generation(device)]
    plan = mask_plan(weights, tuple(problem.images.shape[1:]), config.block_d, device)
    images = centred_images(problem.images)
    directions = tangents.detach().double().flatten(2).transpose(0, 1)
    means = total = None
    inner, cross = [], []
    for first, last, slots in tangent_groups(len(tangents)):
        some = directions.new_zeros(len(directions), slots - 1, directions.shape[2])
        some[:, : last - first] = directions[:, first:last]
        scan = TangentScan(problem, some, weights, images, plan, config)
        found = scan.sums_of(last - first)
        if means is None:
            minimum, total, means = found[:3]
        # Each group has a total of its own, rounded in its own way.
        share = (total / found[1])[..., None]
        inner.append(found[3] * share)
        cross.append(found[4] * share)
    minimum = StoredProblem(problem).distances(minimum)
    minimum += sums_over_weights(plan, centred_noisy(problem, images.centre).square())
    state = PosteriorState(minimum, total, torch.cat([means, *inner, *cross], -1))
    return uncentred(about_means(state, 1), centre_of(problem).flatten(1)[..., None])


def tangent_groups(count: int) -> list[tuple[int, int, int]]:
    """Which tangents are scanned together: first, last, and slots of a noisy image then.

    K tangents take at most 4/3 (1 + K) slots together; without any the noisy image takes two.
    """
    groups, first = [], 0
    while first < count or not groups:
        left = count - first
        slots = SLOTS[left] if left < len(SLOTS) else LARGEST_SLOTS
        last = min(count, first + slots - 1)
        groups.append((first, last, slots))
        first = last
    return groups


class TangentScan(MaskedScan):
    """The scan of all noisy images with a group of tangents.

    Args:
        problem: The problem.
        tangents: Directions, float64 [B, slots - 1, D].
        weights: The weights.
        images: The images, centred.
        plan: The products that the weights need.
        config: Shapes of the kernels.
    """

    def __init__(
        self,
        problem: PosteriorProblem,
        tangents: Tensor,
        weights: QueryWeights,
        images: CentredImages,
        plan: MaskPlan,
        config: Config,
    ) -> None:
        rows = torch.arange(len(problem.x), device=problem.x.device)
        super().__init__(problem, rows, images, plan, config, PARTS, tangents)
        self.sums = 2 * self.slots
        # In the units of the kernel: centred bytes, and products with scaled tangents.
        centre = values_to_bytes(centre_of(problem).double().flatten(1)) - images.centre.double()
        places, row_scale = plan.outputs.long(), plan.levels[0].row_scale
        self._centre = self.grouped(centre[:, places], 0.0).transpose(1, 2).contiguous()
        products = torch.cat([torch.zeros_like(tangents[:, :1]), tangents], 1) * centre[:, None]
        offsets = sums_over_weights(plan, products.flatten(0, 1)).unflatten(0, self.unit.shape)
        offsets = offsets[..., places] * self.unit[..., None] / row_scale
        self._offset = self.grouped(offsets, 0.0).permute(0, 3, 1, 2).contiguous()

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
        minimum = torch.empty(shape, device=self.gain.device)
        sums = torch.empty(*shape, self.sums, device=self.gain.device)
        masked_posterior_jvp_kernel[grid](
            *inputs,
            self._centre[part],
            self._offset[part],
            minimum,
            sums,
            *sizes,
            **constants,
            IMAGES=self.members,
            SLOTS=self.slots,
        )
        return PosteriorState(minimum, sums[..., 0].contiguous(), sums)

    def sums_of(self, tangents: int) -> tuple[Tensor, ...]:
        """The scan in units of values, for the first of the tangents, float64.

        Returns:
            Smallest distances in centred bytes and weights, [B, Q]; weighted sums of the values
            [B, Q, 1], of the products c and of c times the value, [B, Q, tangents].
        """
        minimum, total, sums = (part.double() for part in self.run())
        level = self.plan.levels[0]
        row_scale = level.row_scale.double()[level.places]
        unit = row_scale[:, None] / self.unit[:, None, 1 : 1 + tangents] / BYTES_PER_UNIT
        plain, weighted = sums.unflatten(-1, (2, self.slots)).unbind(-2)
        inner, cross = (
            part[..., 1 : 1 + tangents] * unit for part in (plain, weighted / BYTES_PER_UNIT)
        )
        return minimum, total, weighted[..., :1] / BYTES_PER_UNIT, inner, cross
