"""The tiling of masks: every sum over a mask is the sum of its lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyflocality.kernels.triton._masked_levels import (
    OUTPUTS,
    MaskLevels,
    levels_of,
    mask_levels,
    tiles_of_grid,
)
from pyflocality.weights import QueryWeights


def sums_by_levels(levels: MaskLevels, values: torch.Tensor, block_d: int) -> torch.Tensor:
    """Weighted sums of values [D] for every query, along their lists."""
    above = None
    for level in reversed(levels.levels):
        sums = torch.zeros(level.tiles * OUTPUTS, dtype=torch.float64)
        weights = level.mask_weights.double().sum(1)
        for tile in range(level.tiles):
            places = slice(tile * OUTPUTS, (tile + 1) * OUTPUTS)
            for block in range(int(level.starts[tile]), int(level.starts[tile + 1])):
                listed = level.inputs[block * block_d : (block + 1) * block_d].long()
                sums[places] += weights[block] @ values[listed]
            sums[places] *= level.row_scale[places]
            if level.has_parents:
                sums[places] += above[level.parents[tile]]
        above = sums
    return above[levels.levels[0].places]


def bands(shape, reach):
    channels, height, width = shape
    rows, columns = np.divmod(np.arange(height * width), width)
    near = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns) <= reach
    return torch.from_numpy(np.tile(near, (channels, channels)))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 7, 5), (3, 9, 10), (2, 1, 9), (40, 1, 1), (3, 16, 16)]
)
@pytest.mark.parametrize("reach", [0, 3, 12, 100])
def test_sums_over_masks(shape, reach, rng):
    masks = bands(shape, reach)
    masks ^= torch.rand(masks.shape, generator=rng) < 0.02
    masks[0] = False
    values = torch.randn(masks.shape[1], dtype=torch.float64, generator=rng)
    levels = levels_of(masks, shape, 32)
    torch.testing.assert_close(sums_by_levels(levels, values, 32), masks.double() @ values)


def test_sums_with_values(rng):
    weights = torch.randn(70, 70, generator=rng) * torch.logspace(-8, 8, 70)[:, None]
    weights[4], weights[:, 9] = 0.0, 0.0
    values = torch.randn(70, dtype=torch.float64, generator=rng)
    levels = levels_of(weights, (2, 7, 5), 16)
    found, exact = sums_by_levels(levels, values, 16), weights.double() @ values
    # Two halves keep 22 bits of the largest weight of a row.
    size = weights.double().abs().amax(1) * values.abs().sum()
    assert ((found - exact).abs() <= 2.0**-22 * size).all()


def test_outputs_are_where_the_places_say(rng):
    levels = levels_of(bands((3, 9, 10), 3), (3, 9, 10), 32)
    assert torch.equal(levels.outputs[levels.levels[0].places], torch.arange(270).int())


def test_alike_masks_share_their_core():
    masks = torch.zeros(256, 256, dtype=torch.bool)
    masks[:, :100] = True
    masks[torch.arange(256), torch.arange(256)] = True
    levels = levels_of(masks, (1, 16, 16), 16)
    # 16 tiles whose fringes are the outputs' own values, then one core for all of them.
    assert [level.tiles for level in levels.levels] == [16, 1]
    assert int(levels.levels[0].starts[-1]) <= 16
    assert levels.levels[1].blocks == 7


def test_masks_without_a_core_have_one_level():
    levels = levels_of(torch.eye(64, dtype=torch.bool), (1, 8, 8), 16)
    assert len(levels.levels) == 1 and levels.products == 64 * 16 and levels.strongest == 1


def test_long_lists_come_first(rng):
    masks = torch.rand(256, 256, generator=rng) < torch.rand(256, 1, generator=rng) ** 3
    lengths = levels_of(masks, (1, 16, 16), 16).levels[0].starts.diff()
    assert (lengths.diff() <= 0).all() and lengths[0] > lengths[-1]


@pytest.mark.parametrize("grid", [(3, 8, 8), (1, 1, 33), (1, 33, 1), (2, 5, 7), (20, 1, 1)])
def test_tiles_hold_every_output_once(grid):
    tiles, _ = tiles_of_grid(grid)
    numbers = tiles[tiles >= 0].sort().values
    assert torch.equal(numbers, torch.arange(grid[0] * grid[1] * grid[2]))


def test_levels_are_built_once(rng):
    weights = QueryWeights(torch.rand(35, 35, generator=rng) < 0.5)
    device = torch.device("cpu")
    levels = mask_levels(weights, (1, 7, 5), 16, device)
    assert mask_levels(weights, (1, 7, 5), 16, device) is levels
    assert mask_levels(weights, (1, 7, 5), 32, device) is not levels
