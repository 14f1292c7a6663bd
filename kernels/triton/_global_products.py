"""Products behind the global posterior: Triton kernels over stored bytes, each with its launcher.

Distances come from integer tensor-core products. A noisy image in the units of the bytes is
rounded to 24-bit fixed point and written in three digits of 8 bits; products of digits with the
centred bytes u - 128 and their sums are integers, so a squared distance is exact but for that
rounding, whatever cancels in it. No noise level needs another arithmetic.

The second pass sums the images with their weights; splits of the set in which no image has any
weight are not read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyflocality.kernels.triton._cached import Cached, cached_with
from pyflocality.kernels.triton._launch import Launch
from pyflocality.posterior.state import PosteriorState

# Queries of a program: the rows of the smallest tensor-core product.
QUERIES = 16
DIGITS = 3
# Largest fixed-point number: its highest digit is at most 127.
LARGEST = 127 * 2**16
# Products of two 8-bit numbers that an int32 is sure to hold, with room to spare.
SEGMENT = 65536
# Bytes are counted from here, so that they fit 8 bits with a sign.
CENTRE = 128
# Weights are multiplied by this before they are split in float16 halves: what is then too small
# for half precision is below 2^-38 of the largest weight.
WEIGHT_UNIT = 16384.0
# Coefficients are multiplied by a power of two that brings the largest of a row near this power.
_EXPONENT = 14
# Programs of the second pass that keep a GPU busy.
PROGRAMS = 4096


@dataclass(frozen=True)
class Config:
    """Shapes of the kernels for one GPU generation.

    Attributes:
        distance_n: Images of a program of the first pass.
        distance_d: Values of a step of the first pass.
        distance: Layout of the first pass.
        odd_d, odd: The same where D is no multiple of 16: bytes then come one by one. The sums
            are integers, so the bits are the same.
        sum_n: Images of a step of the second pass.
        sum_d: Values of a program of the second pass.
        value_d: The same of value images, whose numbers take four times the registers.
        weighted: Layout of the second pass.
    """

    distance_n: int
    distance_d: int
    distance: Launch
    odd_d: int
    odd: Launch
    sum_n: int
    sum_d: int
    value_d: int
    weighted: Launch


CONFIGS = {
    80: Config(64, 128, Launch(4, 4), 64, Launch(8, 3), 32, 128, 64, Launch(4, 3)),
    90: Config(64, 128, Launch(4, 4), 64, Launch(8, 3), 32, 128, 64, Launch(4, 3)),
}


@triton.jit
def distances_kernel(
    images_ptr,  # uint8 [N, D]
    digits_ptr,  # int8 [G * QUERIES, 3, D], highest digit first
    norms_ptr,  # sums of (u - 128)^2, int64 [N]
    quantum_ptr,  # value of one unit of the lowest digit in bytes, float64 [G * QUERIES]
    common_ptr,  # squared norms of the fixed-point queries, float64 [G * QUERIES]
    distances_ptr,  # result in bytes^2, float32 [G * QUERIES, N]
    count,
    dim,
    QUERIES: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Squared distances of fixed-point queries to images.

    Grid: (ceil(N / BLOCK_N), G); each program handles QUERIES noisy images and BLOCK_N training
    images over all values.
    """
    image = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    query = tl.program_id(1).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    value = tl.arange(0, BLOCK_D)
    # Images past the last one repeat it and are not stored.
    line = images_ptr + tl.minimum(image, count - 1) * dim
    digits = digits_ptr + query * (3 * dim)
    product = tl.zeros((QUERIES, BLOCK_N), tl.int64)
    for segment in range(0, dim, SEGMENT):
        high = tl.zeros((QUERIES, BLOCK_N), tl.int32)
        middle = tl.zeros((QUERIES, BLOCK_N), tl.int32)
        low = tl.zeros((QUERIES, BLOCK_N), tl.int32)
        for start in tl.range(segment, min(segment + SEGMENT, dim), BLOCK_D, num_stages=NUM_STAGES):
            at = start + value
            inside = at < dim
            stored = tl.load(line[None, :] + at[:, None], mask=inside[:, None], other=0)
            # The highest bit turned over is u - 128 in two's complement.
            centred = (stored ^ 128).to(tl.int8, bitcast=True)
            place = digits[:, None] + at[None, :]
            mask = inside[None, :]
            high = tl.dot(tl.load(place, mask=mask, other=0), centred, high, out_dtype=tl.int32)
            middle = tl.dot(
                tl.load(place + dim, mask=mask, other=0), centred, middle, out_dtype=tl.int32
            )
            low = tl.dot(
                tl.load(place + 2 * dim, mask=mask, other=0), centred, low, out_dtype=tl.int32
            )
        product += (high.to(tl.int64) * 256 + middle) * 256 + low
    here = image < count
    norm = tl.load(norms_ptr + image, mask=here, other=0).to(tl.float64)
    quantum, common = tl.load(quantum_ptr + query), tl.load(common_ptr + query)
    distance = norm[None, :] + common[:, None] - 2.0 * quantum[:, None] * product.to(tl.float64)
    place = query[:, None] * count + image[None, :]
    tl.store(distances_ptr + place, distance.to(tl.float32), mask=here[None, :])


@triton.jit
def added_products(weight, stored, sums):
    """Sums [QUERIES, BLOCK_D] and weights [QUERIES, BLOCK_N] times a block of images.

    Of bytes u they are those of u - 128, exact in float16, with two halves of every weight. Value
    images are float32 numbers: three products of their halves in TF32 keep 22 bits as well.
    """
    if stored.dtype == tl.uint8:
        centred = (stored.to(tl.float32) - 128.0).to(tl.float16)
        upper = weight.to(tl.float16)
        sums = tl.dot(upper, centred, sums)
        sums = tl.dot((weight - upper.to(tl.float32)).to(tl.float16), centred, sums)
    else:
        sums = tl.dot(weight, stored, sums, input_precision="tf32x3")
    return sums


@triton.jit
def weighted_sums_kernel(
    images_ptr,  # uint8 [N, D], or value images, float32
    distances_ptr,  # float32 [G * QUERIES, N]
    minimum_ptr,  # smallest distance of each query, float32 [G * QUERIES]
    factor_ptr,  # float32 [G * QUERIES]
    total_ptr,  # results, float32 [splits, G * QUERIES]
    weighted_ptr,  # sums of weight * (u - 128) or value, float32 [splits, G * QUERIES, D]
    count,
    dim,
    split_images,
    WEIGHT_UNIT: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Weights of the images of one split, and their weighted sum at some values.

    Grid: (ceil(D / BLOCK_D), G, splits); each program handles BLOCK_D values of QUERIES noisy
    images over `split_images` training images.
    """
    value = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    query = tl.program_id(1).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(2) * split_images
    last = min(first + split_images, count)
    minimum, factor = tl.load(minimum_ptr + query), tl.load(factor_ptr + query)
    line = distances_ptr + query * count
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(first, last, BLOCK_N):
        image = start + tl.arange(0, BLOCK_N)
        distance = tl.load(
            line[:, None] + image[None, :], mask=(image < last)[None, :], other=float("inf")
        )
        weight = tl.exp2((minimum[:, None] - distance) * factor[:, None])
        total += tl.sum(weight, axis=1)
    sums = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    inside = value < dim
    # Images without weight are not read: at low noise that is nearly all of them.
    needed = tl.where(tl.max(total, axis=0) > 0.0, last, first)
    for start in tl.range(first, needed, BLOCK_N, num_stages=NUM_STAGES):
        image = start + tl.arange(0, BLOCK_N)
        here = image < last
        distance = tl.load(line[:, None] + image[None, :], mask=here[None, :], other=float("inf"))
        weight = tl.exp2((minimum[:, None] - distance) * factor[:, None]) * WEIGHT_UNIT
        stored = tl.load(
            images_ptr + image.to(tl.int64)[:, None] * dim + value[None, :],
            mask=here[:, None] & inside[None, :],
            other=0,
        )
        sums = added_products(weight, stored, sums)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * QUERIES + query
    if tl.program_id(0) == 0:
        tl.store(total_ptr + row, total)
    place = row[:, None] * dim + value[None, :]
    tl.store(weighted_ptr + place, sums * (1.0 / WEIGHT_UNIT), mask=inside[None, :])


@triton.jit
def coefficient_sums_kernel(
    images_ptr,  # uint8 [N, D], or value images, float32
    coefficients_ptr,  # float32 [G * QUERIES, N], at most 2^15
    sums_ptr,  # result, sums of coefficient * (u - 128) or value, float32 [splits, G * QUERIES, D]
    count,
    dim,
    split_images,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Weighted sums of the images of one split at some values.

    Grid: (ceil(D / BLOCK_D), G, splits); each program handles BLOCK_D values of QUERIES rows of
    coefficients over `split_images` training images.
    """
    value = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(1).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(2) * split_images
    last = min(first + split_images, count)
    line = coefficients_ptr + row * count
    largest = tl.zeros((QUERIES,), tl.float32)
    for start in range(first, last, BLOCK_N):
        image = start + tl.arange(0, BLOCK_N)
        coefficient = tl.load(
            line[:, None] + image[None, :], mask=(image < last)[None, :], other=0.0
        )
        largest = tl.maximum(largest, tl.max(tl.abs(coefficient), axis=1))
    sums = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    inside = value < dim
    # Images without weight are not read: at low noise that is nearly all of them.
    needed = tl.where(tl.max(largest, axis=0) > 0.0, last, first)
    for start in tl.range(first, needed, BLOCK_N, num_stages=NUM_STAGES):
        image = start + tl.arange(0, BLOCK_N)
        here = image < last
        coefficient = tl.load(line[:, None] + image[None, :], mask=here[None, :], other=0.0)
        stored = tl.load(
            images_ptr + image.to(tl.int64)[:, None] * dim + value[None, :],
            mask=here[:, None] & inside[None, :],
            other=0,
        )
        sums = added_products(coefficient, stored, sums)
    line = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * QUERIES + row
    place = line[:, None] * dim + value[None, :]
    tl.store(sums_ptr + place, sums, mask=inside[None, :])


_norms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def squared_norms(images: Tensor) -> Tensor:
    """Sums of (u - 128)^2 over every image, int64 [N]; cached while the images are unchanged."""
    return cached_with(_norms, images, _squared_norms).here()[0]


def _squared_norms(images: Tensor) -> Cached:
    step = max(1, 2**24 // images[0].numel())
    centred = (block.flatten(1).to(torch.int32) - CENTRE for block in images.split(step))
    return Cached(torch.cat([block.square().sum(1, dtype=torch.int64) for block in centred]))


def filled(rows: Tensor, value: float = 0.0) -> Tensor:
    """Rows [R, ...] filled up to whole groups of queries, one at least."""
    missing = max(1, triton.cdiv(len(rows), QUERIES)) * QUERIES - len(rows)
    padding = (0, 0) * (rows.ndim - 1) + (0, missing)
    return F.pad(rows, padding, value=value).contiguous()


def fixed_point(noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds queries [B, D] (float64) to 24 bits of their largest value.

    Returns:
        Digits in base 256, highest first, int8 [B, 3, D]; the value of one unit, float64 [B];
        the squared norms of the rounded queries, float64 [B].
    """
    quantum = noisy.abs().amax(1) / LARGEST
    quantum = torch.where(quantum > 0, quantum, 1.0)
    whole = (noisy / quantum[:, None]).round()
    common = (quantum * torch.linalg.vector_norm(whole, dim=1)).square()
    rest, lower = whole.to(torch.int32), []
    for _ in range(DIGITS - 1):
        digit = ((rest + 128) & 255) - 128
        lower.append(digit)
        rest = (rest - digit) >> 8
    digits = torch.stack([rest, *reversed(lower)], dim=1)
    return digits.to(torch.int8), quantum, common


def splits_of(count: int, dim: int, config: Config) -> tuple[int, int]:
    """Number of splits and images of a split; of the set alone, so that the bits are too."""
    wanted = max(1, PROGRAMS // triton.cdiv(dim, config.sum_d))
    split = triton.cdiv(triton.cdiv(count, wanted), config.sum_n) * config.sum_n
    split = max(split, 8 * config.sum_n)
    return triton.cdiv(count, split), split


def distances_of(
    images: Tensor, norms: Tensor, queries: tuple[Tensor, Tensor, Tensor], config: Config
) -> Tensor:
    """Squared distances of queries, a multiple of QUERIES of them, to bytes [n, D]: [R, n].

    Norms are those of the bytes, int64 [n]; queries are what `fixed_point` answers.
    """
    (count, dim), (digits, quantum, common) = images.shape, queries
    # The kernel knows no strides: of a view it would read other images.
    assert all(tensor.is_contiguous() for tensor in (images, norms, *queries))
    distances = torch.empty(len(digits), count, device=images.device)
    block_d, launch = config.distance_d, config.distance
    if dim % 16 != 0:
        block_d, launch = config.odd_d, config.odd
    distances_kernel[(triton.cdiv(count, config.distance_n), len(digits) // QUERIES)](
        images_ptr=images,
        digits_ptr=digits,
        norms_ptr=norms,
        quantum_ptr=quantum,
        common_ptr=common,
        distances_ptr=distances,
        count=count,
        dim=dim,
        QUERIES=QUERIES,
        SEGMENT=SEGMENT,
        BLOCK_N=config.distance_n,
        BLOCK_D=block_d,
        NUM_STAGES=launch.num_stages,
        **launch.options(),
    )
    return distances


def weighted_sums(
    images: Tensor, distances: Tensor, factor: Tensor, split: int, config: Config
) -> PosteriorState:
    """States of the splits of some images: [S, R], [S, R] and, of u - 128 or values, [S, R, D].

    Args:
        images: Bytes [n, D], or value images, float32.
        distances: What `distances_of` answers, [R, n].
        factor: Factors of the distances in the power of two, [R].
        split: Images of a split.
        config: Shapes of the kernels.
    """
    (count, dim), rows = images.shape, len(factor)
    # A minimum is exact in any order.
    minimum = distances.amin(1)
    splits = triton.cdiv(count, split)
    assert all(tensor.is_contiguous() for tensor in (images, minimum, factor))
    total = torch.empty(splits, rows, device=images.device)
    weighted = torch.empty(splits, rows, dim, device=images.device)
    constants = _sum_constants(config, images)
    weighted_sums_kernel[(triton.cdiv(dim, constants["BLOCK_D"]), rows // QUERIES, splits)](
        images_ptr=images,
        distances_ptr=distances,
        minimum_ptr=minimum,
        factor_ptr=factor,
        total_ptr=total,
        weighted_ptr=weighted,
        count=count,
        dim=dim,
        split_images=split,
        WEIGHT_UNIT=WEIGHT_UNIT,
        **constants,
    )
    return PosteriorState(minimum.expand(splits, rows).contiguous(), total, weighted)


def coefficient_sums(images: Tensor, coefficients: Tensor, config: Config) -> Tensor:
    """Sums of coefficients [R, n] times u - 128, or values, of some images, float64 [R, D]."""
    count, dim = images.shape
    exponent = _EXPONENT - torch.frexp(coefficients.abs().amax(1)).exponent
    unit = torch.ldexp(torch.ones_like(coefficients[:, 0]), exponent.clamp(max=120))
    scaled = filled(coefficients * unit[:, None])
    # The kernel knows no strides: of a view it would read other images.
    assert images.is_contiguous() and scaled.is_contiguous()
    splits, split = splits_of(count, dim, config)
    partials = torch.empty(splits, len(scaled), dim, device=images.device)
    constants = _sum_constants(config, images)
    grid = (triton.cdiv(dim, constants["BLOCK_D"]), len(scaled) // QUERIES, splits)
    coefficient_sums_kernel[grid](
        images_ptr=images,
        coefficients_ptr=scaled,
        sums_ptr=partials,
        count=count,
        dim=dim,
        split_images=split,
        **constants,
    )
    # One split after the other, in a fixed order.
    whole = partials[0].double()
    for partial in partials[1:]:
        whole += partial
    return whole[: len(coefficients)] / unit.double()[:, None]


def _sum_constants(config: Config, images: Tensor) -> dict[str, int]:
    return {
        "QUERIES": QUERIES,
        "BLOCK_N": config.sum_n,
        "BLOCK_D": config.sum_d if images.dtype == torch.uint8 else config.value_d,
        "NUM_STAGES": config.weighted.num_stages,
        **config.weighted.options(),
    }
