"""Exact covariance on tensor cores: every path against integer arithmetic, and its code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_gates import compile_ahead

from pyflocality.kernels.triton import covariance as kernels
from pyflocality.kernels.triton.covariance import CovarianceConfig
from pyflocality.kernels.triton.covariance import scan as accumulate_covariance

SMALL = CovarianceConfig(32, 32, 32, num_warps=4, num_stages=2)
WIDE = CovarianceConfig(32, 64, 32, num_warps=4, num_stages=2)
TALL = CovarianceConfig(64, 32, 32, num_warps=4, num_stages=2)


def random_images(n: int, values: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * n + values)
    return torch.randint(0, 256, (n, values), dtype=torch.uint8, generator=generator)


def assert_exact(images: torch.Tensor, device: torch.device, config: CovarianceConfig) -> None:
    """The sums are added to what is there, and nothing below the diagonal changes."""
    values = images.shape[1]
    gram = torch.arange(values**2, device=device).reshape(values, values)
    total = torch.arange(values, device=device)
    accumulate_covariance(images.to(device), gram, total, config=config)
    centred = images.numpy().astype(np.int64) - 128
    before = np.arange(values**2).reshape(values, values)
    expected = before + np.triu(np.einsum("ia,ib->ab", centred, centred))
    np.testing.assert_array_equal(gram.cpu().numpy(), expected)
    np.testing.assert_array_equal(total.cpu().numpy(), np.arange(values) + centred.sum(0))


@pytest.mark.parametrize("config", [SMALL, WIDE, TALL], ids=["square", "wide", "tall"])
@pytest.mark.parametrize(
    ("n", "values"), [(1, 1), (2, 31), (33, 7), (127, 65), (70, 130), (257, 129)]
)
def test_odd_sizes(n, values, config, device):
    assert_exact(random_images(n, values), device, config)


def test_shipped_configuration(device):
    """More than one tile each way, and more than one block of images, of the shipped sizes."""
    config = CovarianceConfig()
    images = random_images(2 * config.block_images + 3, config.block_rows + 5)
    assert len(kernels.upper_tiles(images.shape[1], config)) == 3
    assert_exact(images, device, config)


def test_splits_are_merged(device, monkeypatch):
    splits = []

    def recorded(*arguments):
        splits.append(splits_of(*arguments))
        return splits[-1]

    splits_of = kernels.splits_of
    monkeypatch.setattr(kernels, "_PARTIAL_COST", 0)
    monkeypatch.setattr(kernels, "splits_of", recorded)
    assert_exact(random_images(8 * 32 + 1, 40), device, SMALL)
    assert splits == [9]


def test_passes_and_groups_of_tiles(device, monkeypatch):
    """Working memory for 70 images of a pass and for two tiles of sums."""
    monkeypatch.setattr(kernels, "_PASS_BYTES", 70 * 100)
    monkeypatch.setattr(kernels, "_PARTIAL_BYTES", 2 * SMALL.tile_bytes)
    assert_exact(random_images(200, 100), device, SMALL)


@pytest.mark.parametrize("byte", [0, 255])
def test_extreme_sums_beyond_32_bits(byte, device):
    """The largest products over more images than one 32-bit sum holds."""
    n = 140_001
    config = CovarianceConfig(32, 32, 1024, num_warps=4, num_stages=2)
    images = torch.full((n, 3), byte, dtype=torch.uint8, device=device)
    gram = torch.zeros(3, 3, dtype=torch.int64, device=device)
    total = torch.zeros(3, dtype=torch.int64, device=device)
    accumulate_covariance(images, gram, total, config=config)
    assert torch.equal(gram.cpu(), torch.full((3, 3), n * (byte - 128) ** 2).triu())
    assert torch.equal(total.cpu(), torch.full((3,), n * (byte - 128)))


def test_one_pass_fits_32_bits():
    assert kernels.IMAGES_PER_PASS * 128 * 128 < 2**31


def test_no_images_and_strided_images(device):
    images = random_images(90, 60)
    for view in (images[:0], images[::3], images[:, ::2], images.T):
        assert_exact(view, device, SMALL)


@pytest.mark.parametrize("values", [1, 128, 129, 784, 3072])
@pytest.mark.parametrize("config", [CovarianceConfig(), SMALL, WIDE, TALL])
def test_tiles_cover_the_upper_triangle_once(values, config):
    tiles = kernels.upper_tiles(values, config)
    assert len(set(tiles)) == len(tiles)
    first = np.arange(values)
    rows, columns = first // config.block_rows, first // config.block_columns
    needed = {(int(r), int(c)) for i, r in enumerate(rows) for c in columns[i::1]}
    assert set(tiles) == needed


@pytest.mark.parametrize("tiles", [1, 3, 28, 300, 4656])
@pytest.mark.parametrize("steps", [1, 2, 7, 391, 512])
def test_no_split_is_empty(tiles, steps):
    splits = kernels.splits_of(tiles, steps, CovarianceConfig())
    assert 1 <= splits <= steps
    assert (splits - 1) * -(-steps // splits) < steps


def test_offsets_beyond_32_bits(device):
    """Rows that begin beyond 2^31 bytes: 32-bit offsets would read and write elsewhere."""
    block, stride = 32, 2**27
    # Pages that nobody touches take no memory on the CPU.
    centred = torch.from_numpy(np.zeros(block * stride, dtype=np.int8)).to(device)
    corner = torch.randint(-128, 128, (block, block), dtype=torch.int8)
    centred.view(block, stride)[:, -block:] = corner.to(device)
    sums = torch.empty(1, 1, block, block, dtype=torch.int32, device=device)
    last = centred[stride - block :]
    kernels.product_kernel[(1, 1)](
        last,
        torch.zeros(1, 2, dtype=torch.int32, device=device),
        sums,
        stride,
        1,
        BLOCK_ROWS=block,
        BLOCK_COLUMNS=block,
        BLOCK_IMAGES=block,
        num_warps=4,
        num_stages=2,
    )
    expected = corner.to(torch.int64) @ corner.to(torch.int64).T
    assert torch.equal(sums.cpu()[0, 0].to(torch.int64), expected)


PRODUCT = {
    "centred_ptr": "*i8",
    "tiles_ptr": "*i32",
    "partial_ptr": "*i32",
    "padded_images": "i32",
    "steps": "i32",
}
CENTRE = {
    "images_ptr": "*u8",
    "centred_ptr": "*i8",
    "partial_ptr": "*i32",
    **dict.fromkeys(["num_images", "num_values", "padded_values", "padded_images", "steps"], "i32"),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_product_uses_integer_tensor_cores(arch):
    config = CovarianceConfig()
    blocks = {
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_IMAGES": config.block_images,
    }
    code = compile_ahead(
        kernels.product_kernel,
        PRODUCT,
        blocks,
        arch=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=["padded_images"],
    )
    code.assert_fits(wgmma=True)
    assert code.has_imma, str(code)
    assert code.has_async_copies, str(code)
    # Two programs on a multiprocessor of Hopper.
    assert arch == 80 or (code.registers <= 128 and code.shared_bytes <= 113 * 1024), str(code)


@pytest.mark.parametrize("arch", [80, 90])
def test_transposition_moves_16_bytes_at_a_time(arch):
    config = CovarianceConfig()
    code = compile_ahead(
        kernels.centre_kernel,
        CENTRE,
        {"BLOCK_IMAGES": config.block_images, "BLOCK_VALUES": config.block_rows},
        arch=arch,
        num_warps=config.num_warps,
        num_stages=3,
        divisible=["num_values", "padded_values", "padded_images"],
    )
    code.assert_fits()
    assert "LDG.E.128" in code.sass and "STG.E.128" in code.sass
