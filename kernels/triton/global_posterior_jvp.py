r"""Global posterior scan with tangents on an NVIDIA GPU: two passes over the stored bytes.

The products :math:`c_i = \sum_d u[d] \, v_i[d]` of the tangents are made as the distances are, of
integers: c counts from x / alpha, cut to the range of images, before anything is rounded. With
all distances at hand, the second pass sums the images by the weights :math:`p_i` and by
:math:`p_i (c_i - \mathrm E[c])`, whose sum over the images is zero: no digits cancel from a
covariance, however little noise there is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyflocality.kernels.stored import StoredProblem
from pyflocality.kernels.triton._launch import Launch, generation, on_device_of
from pyflocality.kernels.triton.global_posterior import (
    CENTRE,
    CONFIGS,
    QUERIES,
    Config,
    distances_of,
    fixed_point,
    splits_of,
    squared_norms,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import (
    PosteriorState,
    finite_factor,
    init,
    merge_tangents,
    tangent_values,
)
from pyflocality.posterior.tangents import centre_of
from pyflocality.storage.reader import BYTES_PER_UNIT, values_to_bytes

# Coefficients are multiplied by a power of two that brings the largest of a row near 2^14, before
# they are split in float16 halves: what is then too small is below 2^-38 of it.
_EXPONENT = 14
# Layout of the second pass.
LAUNCH = Launch(4, 3)


@triton.jit
def coefficient_sums_kernel(
    images_ptr,  # uint8 [N, D]
    coefficients_ptr,  # float32 [G * QUERIES, N], at most 2^15
    sums_ptr,  # result, sums of coefficient * (u - 128), float32 [splits, G * QUERIES, D]
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
        found = tl.load(line[:, None] + image[None, :], mask=(image < last)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(found), axis=1))
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
        centred = (stored.to(tl.float32) - 128.0).to(tl.float16)
        upper = coefficient.to(tl.float16)
        sums = tl.dot(upper, centred, sums)
        sums = tl.dot((coefficient - upper.to(tl.float32)).to(tl.float16), centred, sums)
    line = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * QUERIES + row
    place = line[:, None] * dim + value[None, :]
    tl.store(sums_ptr + place, sums, mask=inside[None, :])


def global_posterior_jvp_state(
    problem: PosteriorProblem, tangents: Tensor, *, config: Config | None = None
) -> PosteriorState:
    """Scan with one query per batch element and K tangents, as the reference of this name.

    Args:
        problem: float32 queries against uint8 images.
        tangents: Directions, [K, B, C, H, W].
        config: Shapes of the kernels; None takes those shipped for the device.
    """
    config = config or CONFIGS[generation(problem.x.device)]
    directions = tangents.detach().double().flatten(2).transpose(0, 1)
    count, dim = len(problem.images), directions.shape[2]
    if len(directions) == 0:
        return init(0, 1, tangent_values(dim, len(tangents)), problem.x.double())
    # Distances, products and coefficients, one more of them in double precision, and the sums of
    # every split, for one noisy image.
    splits, _ = splits_of(count, dim, config)
    per_image = (1 + len(tangents)) * (40 * count + 4 * (splits + 4) * dim)
    together = max(1, StoredProblem(problem).budget // per_image)
    parts = [
        _scan(StoredProblem(problem).part(rows), directions[rows], config)
        for rows in torch.arange(len(problem.x), device=problem.x.device).split(together)
    ]
    return PosteriorState(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _scan(stored: StoredProblem, directions: Tensor, config: Config) -> PosteriorState:
    """State of some noisy images: [b, 1], [b, 1] and [b, 1, D + K + K D], float64."""
    problem = stored.problem
    noisy = stored.exact.flatten(1) - CENTRE
    centre = values_to_bytes(centre_of(problem).double().flatten(1)) - CENTRE
    factor64 = finite_factor(problem.scale, torch.float64)
    queries = fixed_point(_filled(noisy))
    # A squared distance is norm + common - 2 quantum product: c - c of the centre is that, too.
    digits, quantum, _ = fixed_point(_filled(directions.flatten(0, 1)))
    offsets = _filled((directions * centre[:, None]).sum(2).flatten()[:, None])[:, 0]
    inner_queries = (digits, -0.5 * quantum, -offsets)
    norms, state, first = squared_norms(problem.images), None, 0
    with on_device_of(noisy):
        for images in stored.rows():
            own_norms = norms[first : first + len(images)]
            first += len(images)
            distance = distances_of(images, own_norms, queries, config)
            none = norms.new_zeros(len(images))
            inner = distances_of(images, none, inner_queries, config)
            inner = inner[: directions.shape[:2].numel()].reshape(
                *directions.shape[:2], len(images)
            )
            found = _sums(stored, images, distance[: len(noisy)], inner, config)
            found = PosteriorState(stored.distances(found.minimum), *found[1:])
            state = (
                found if state is None else merge_tangents(state, found, factor64, images.shape[1])
            )
    return state


def _sums(
    stored: StoredProblem, images: Tensor, distance: Tensor, inner: Tensor, config: Config
) -> PosteriorState:
    """State of some images in bytes [n, D], from distances [b, n] and products [b, K, n]."""
    # One noisy image at a time, so that the bits do not depend on the batch.
    rows = [_coefficients(*row) for row in zip(distance, inner, stored.factor, strict=True)]
    minimum, total, mean, coefficients = (torch.stack(part) for part in zip(*rows, strict=True))
    sums = _weighted_images(images, coefficients.flatten(0, 1), config)
    sums = sums.unflatten(0, coefficients.shape[:2])
    values = stored.values(sums[:, 0] + CENTRE * total[:, None], total)
    # The coefficients add up to 0 but for their rounding: this counts the values from their mean.
    left = coefficients[:, 1:].sum(2, dtype=torch.float64)[..., None]
    cross = (sums[:, 1:] - left * (sums[:, 0] / total[:, None])[:, None]) / BYTES_PER_UNIT**2
    inner = mean * total[:, None] / BYTES_PER_UNIT
    weighted = torch.cat([values, inner, cross.flatten(1)], 1)
    return PosteriorState(minimum.double()[:, None], total[:, None], weighted[:, None])


def _coefficients(distance: Tensor, inner: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """What a noisy image multiplies the training images by.

    Args:
        distance: Distances [n].
        inner: Products c [K, n].
        factor: Factor of a distance in the power of two.

    Returns:
        Smallest distance; sum of the weights and means of c [K], float64; the weights and, for
        every tangent, the weights times c less its mean, float32 [1 + K, n].
    """
    minimum = distance.amin()
    weight = torch.exp2((minimum - distance) * factor)
    total = weight.sum(dtype=torch.float64)
    mean = (weight * inner.double()).sum(1) / total
    spread = (weight * (inner - mean[:, None])).float()
    return minimum, total, mean, torch.cat([weight[None], spread])


def _weighted_images(images: Tensor, coefficients: Tensor, config: Config) -> Tensor:
    """Sums of coefficients [R, n] times u - 128 over some images, float64 [R, D]."""
    count, dim = images.shape
    exponent = _EXPONENT - torch.frexp(coefficients.abs().amax(1)).exponent
    unit = torch.ldexp(torch.ones_like(coefficients[:, 0]), exponent.clamp(max=120))
    scaled = _filled(coefficients * unit[:, None])
    # The kernel knows no strides: of a view it would read other images.
    assert images.is_contiguous() and scaled.is_contiguous()
    splits, split = splits_of(count, dim, config)
    sums = torch.empty(splits, len(scaled), dim, device=images.device)
    coefficient_sums_kernel[(triton.cdiv(dim, config.sum_d), len(scaled) // QUERIES, splits)](
        images,
        scaled,
        sums,
        count,
        dim,
        split,
        QUERIES=QUERIES,
        BLOCK_N=config.sum_n,
        BLOCK_D=config.sum_d,
        NUM_STAGES=LAUNCH.num_stages,
        **LAUNCH.options(),
    )
    # One split after the other, in a fixed order.
    whole = sums[0].double()
    for part in sums[1:]:
        whole += part
    return whole[: len(coefficients)] / unit.double()[:, None]


def _filled(rows: Tensor) -> Tensor:
    """Rows [R, ...] filled up with zeros to whole groups of queries, one at least."""
    missing = max(1, triton.cdiv(len(rows), QUERIES)) * QUERIES - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).contiguous()
