"""Addresses beyond 2^31 elements: sets of images are larger than that."""

from __future__ import annotations

import mmap

import pytest
import torch
from truth import random_images

from pyflocality.kernels.triton import (
    _global_products,
    _masked_products,
    _masked_softmax,
    masked_posterior,
)
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize
from pyflocality.weights import QueryWeights

# Row 16 lies at 2^31 elements, where a product of 32 bits wraps to before the first row.
STRIDE = 2**27
_ITEM = {torch.float16: 2, torch.float32: 4, torch.uint8: 1}
_MAP_NORESERVE = 0x4000

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(mmap, "MAP_ANONYMOUS"),
    reason="spreads few rows over address space that no memory stands behind",
)


def spread(matrix: torch.Tensor, stride: int = STRIDE) -> torch.Tensor:
    """The same rows, `stride` elements apart; the pages between them are never touched."""
    rows, columns = matrix.shape
    size = ((rows - 1) * stride + columns) * _ITEM[matrix.dtype]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=matrix.dtype)
    result = memory.as_strided((rows, columns), (stride, 1))
    result.copy_(matrix)
    return result


class Spreading:
    """Stands for a kernel and launches it on matrices whose rows are far apart.

    `matrices` are names of arguments, each with the name of its stride; the last one may be a
    result.
    """

    def __init__(self, kernel, matrices: dict[str, str]) -> None:
        self.kernel, self.matrices, self.launches = kernel, matrices, 0

    def __getitem__(self, grid):
        def launch(**arguments):
            far = {}
            for matrix, stride in self.matrices.items():
                columns = arguments[matrix].shape[-1]
                far[matrix] = spread(arguments[matrix].reshape(-1, columns))
                far[stride] = STRIDE
            self.kernel[grid](**(arguments | far))
            for matrix in self.matrices:
                arguments[matrix].copy_(far[matrix].reshape(arguments[matrix].shape))
            self.launches += 1

        return launch


# The matrices of every kernel: images; cores and sums; norms.
IMAGES = {"images_ptr": "stride_image"}
SCAN = IMAGES | {"cores_ptr": "stride_sum", "norms_ptr": "stride_norm"}


@pytest.mark.parametrize(
    "module, name, matrices",
    [
        (_masked_softmax, "masked_scan_kernel", SCAN),
        (_masked_products, "core_sums_kernel", IMAGES | {"sums_ptr": "stride_sum"}),
        (_masked_products, "squared_norms_kernel", IMAGES | {"norms_ptr": "stride_norm"}),
    ],
)
def test_masked_kernels(monkeypatch, rng, module, name, matrices):
    images = random_images(rng, 130, (1, 8, 8), torch.uint8)
    x = torch.randn(2, 1, 8, 8, generator=rng)
    masks = torch.rand(64, 64, generator=rng) < 0.6
    masks[:, [1, 2, 30]] = True
    problem, weights = posterior_problem(x, images, 0.4, 0.9), QueryWeights(masks)
    near = finalize(masked_posterior.scan(problem, weights))
    far = Spreading(getattr(module, name), matrices)
    monkeypatch.setattr(module, name, far)
    other = posterior_problem(x, images.clone(), 0.4, 0.9)
    assert torch.equal(finalize(masked_posterior.scan(other, weights)), near)
    assert far.launches > 0


def test_masked_kernel_with_tangents(monkeypatch, rng):
    images = random_images(rng, 130, (1, 8, 8), torch.uint8)
    x, tangents = torch.randn(2, 1, 8, 8, generator=rng), torch.randn(1, 2, 1, 8, 8, generator=rng)
    masks = torch.rand(64, 64, generator=rng) < 0.6
    masks[:, [1, 2, 30]] = True
    problem, weights = posterior_problem(x, images, 0.4, 0.9), QueryWeights(masks)
    near = masked_posterior.jvp(problem, tangents, weights)
    far = Spreading(_masked_softmax.masked_jvp_kernel, SCAN)
    monkeypatch.setattr(_masked_softmax, "masked_jvp_kernel", far)
    other = posterior_problem(x, images.clone(), 0.4, 0.9)
    again = masked_posterior.jvp(other, tangents, weights)
    assert torch.equal(again.weighted, near.weighted)
    assert far.launches > 0


def test_coefficient_sums_of_the_global_posterior(rng):
    stored = torch.randint(0, 256, (40, 128), generator=rng, dtype=torch.uint8)
    sums = spread(torch.zeros(16, 128))
    _global_products.coefficient_sums_kernel[(1, 1, 1)](
        spread(stored),
        torch.full((16, 40), 2.0),
        sums,
        40,
        STRIDE,
        40,
        QUERIES=16,
        BLOCK_N=32,
        BLOCK_D=128,
        NUM_STAGES=2,
    )
    assert torch.equal(sums, 2 * (stored.float() - 128).sum(0).expand(16, -1))


def test_weighted_sums_of_the_global_posterior(rng):
    """Images and sums lie a whole image apart: one block of long ones is enough."""
    stored = torch.randint(0, 256, (40, 128), generator=rng, dtype=torch.uint8)
    sums, total = spread(torch.zeros(16, 128)), torch.empty(1, 16)
    _global_products.weighted_sums_kernel[(1, 1, 1)](
        spread(stored),
        torch.zeros(16, 40),
        torch.zeros(16),
        torch.ones(16),
        total,
        sums,
        40,
        STRIDE,
        40,
        WEIGHT_UNIT=_global_products.WEIGHT_UNIT,
        QUERIES=16,
        BLOCK_N=32,
        BLOCK_D=128,
        NUM_STAGES=2,
    )
    # Distances of zero: every image weighs 1.
    assert torch.equal(sums, (stored.float() - 128).sum(0).expand(16, -1))
    assert torch.equal(total, torch.full((1, 16), 40.0))
