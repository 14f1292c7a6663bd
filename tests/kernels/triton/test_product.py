"""The interpreter's product, on which every test of bits here rests."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(left_ptr, right_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    row, inner, column = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(left_ptr + row[:, None] * K + inner[None, :])
    right = tl.load(right_ptr + inner[:, None] * N + column[None, :])
    sums = tl.dot(left, right, tl.full((M, N), 0.5, tl.float32))
    tl.store(out_ptr + row[:, None] * N + column[None, :], sums)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    (m, k), n = left.shape, right.shape[1]
    out = torch.empty(m, n)
    product_kernel[(1,)](left.contiguous(), right.contiguous(), out, M=m, K=k, N=n)
    return out


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_value_depends_on_its_row_and_column_alone(rng, dtype):
    """A BLAS answers other bits at another place of the matrix, and on another processor."""
    left = torch.randn(64, 32, generator=rng).to(dtype)
    right = torch.randn(32, 128, generator=rng).to(dtype)
    expected = torch.zeros(64, 128)
    for k in range(32):
        expected += left[:, k, None].float() * right[k].float()
    expected += 0.5
    assert torch.equal(product(left, right), expected)
    for row in (0, 5, 63):
        assert torch.equal(product(left[row : row + 1], right)[0], expected[row])
    for first, columns in ((0, 1), (3, 2), (120, 8), (64, 64)):
        chosen = slice(first, first + columns)
        assert torch.equal(product(left, right[:, chosen]), expected[:, chosen])
