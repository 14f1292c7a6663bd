"""Launch geometry of the CUDA kernels, in plain Python: every pixel, image and split once."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from pyflocality.kernels.devices import SHARED_BYTES
from pyflocality.kernels.geometry import (
    WindowPlan,
    WindowShape,
    ceil_div,
    images_per_split,
    plan_vjp,
    plan_window,
)

SIDES = [(1, 1), (1, 9), (3, 5), (8, 8), (9, 6), (28, 28), (31, 33), (32, 32), (45, 200)]
SIDES += [(64, 64), (65, 64), (64, 65), (96, 96), (7, 256), (256, 3), (128, 128), (256, 256)]


def windows(height: int, width: int) -> list[int]:
    largest = 2 * max(height, width) - 1
    return sorted({k for k in (1, 3, 7, 15, 17, 31, 63, 101, 201, largest) if k <= largest})


def shapes():
    for (height, width), channels, tangents in itertools.product(SIDES, (1, 3, 5), (0, 1, 2)):
        for window in windows(height, width):
            yield WindowShape(channels, height, width, window, True, width % 4 == 0, tangents)


def tiles(plan: WindowPlan):
    """Corners of the tiles, as a block derives them from its index."""
    across = ceil_div(plan.shape.width, plan.tile_width)
    for index in range(plan.tiles):
        yield index % across * plan.tile_width, index // across * plan.tile_height


def test_every_pixel_has_one_thread():
    for plan in {dataclasses.replace(plan_window(shape)) for shape in shapes()}:
        height, width = plan.shape.height, plan.shape.width
        quads = ceil_div(plan.tile_width, 4)
        counts = np.zeros((height, width), dtype=int)
        # Threads whose quad lies in the tile, four pixels each, cut at the image's last column.
        threads = np.arange(plan.threads)
        rows, columns = threads // quads, threads % quads * 4
        for left, top in tiles(plan):
            active = (rows < plan.tile_height) & (left + columns < width) & (top + rows < height)
            for j in range(4):
                x, y = left + columns[active] + j, top + rows[active]
                np.add.at(counts, (y[x < width], x[x < width]), 1)
        assert (counts == 1).all(), plan


def test_regions_hold_every_window_of_their_tile():
    for shape in shapes():
        plan = plan_window(shape)
        before = shape.window // 2
        after = shape.window - 1 - before
        for left, top in tiles(plan):
            first, last = (
                max(0, left - before) // 4 * 4,
                min(shape.width, left + plan.tile_width + after),
            )
            assert first <= max(0, left - before)
            assert last - first <= plan.region_width, plan
            upper = max(0, top - before)
            lower = min(shape.height, top + plan.tile_height + after)
            assert lower - upper <= plan.region_height, plan
        assert plan.band_rows <= plan.region_height


def test_plans_fit_the_machine():
    for shape in shapes():
        plan = plan_window(shape)
        assert plan.shared_bytes <= SHARED_BYTES, plan
        assert plan.threads <= 1024 and plan.threads % 32 == 0
        assert plan.min_blocks * plan.threads <= 2048
        # Registers that the compiler may give a thread: enough for its sums.
        assert 65536 // (plan.min_blocks * plan.threads) >= (64 if shape.tangents == 0 else 128)


def test_the_usual_sizes_get_whole_images_and_several_at_a_time():
    cifar = plan_window(WindowShape(3, 32, 32, 7, True, True))
    assert (cifar.tiles, cifar.images, cifar.threads, cifar.min_blocks) == (1, 8, 256, 4)
    mnist = plan_window(WindowShape(1, 28, 28, 7, True, True))
    assert (mnist.tiles, mnist.images, mnist.threads) == (1, 8, 224)
    faces = plan_window(WindowShape(3, 64, 64, 17, True, True))
    assert (faces.tiles, faces.images, faces.threads) == (1, 4, 1024)


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 1000, 16383, 16385, 50000, 1281167])
def test_every_image_is_in_one_split(count):
    per_split = images_per_split(count)
    splits = ceil_div(count, per_split)
    assert splits <= 512
    ends = [(s * per_split, min(count, (s + 1) * per_split)) for s in range(splits)]
    assert ends[0][0] == 0 and ends[-1][1] == count
    assert all(first < last for first, last in ends)
    assert all(one[1] == two[0] for one, two in itertools.pairwise(ends))


def test_every_pixel_of_a_whole_image_pass_has_one_thread():
    for (height, width), window in itertools.product(SIDES, (1, 2, 7, 16)):
        shape = WindowShape(3, height, width, window, True, False)
        if window >= 2 * max(height, width):
            continue
        try:
            plan = plan_vjp(shape)
        except ValueError as error:
            assert height * width * 4 > SHARED_BYTES - 8192, (shape, error)
            continue
        across = ceil_div(width, 4)
        chunks = ceil_div(height * across, plan.threads)
        own = np.arange(chunks * plan.threads)
        own = own[own < height * across]
        counts = np.zeros((height, width), dtype=int)
        for j in range(4):
            y, x = own // across, own % across * 4 + j
            np.add.at(counts, (y[x < width], x[x < width]), 1)
        assert (counts == 1).all()
        assert plan.shared_bytes <= SHARED_BYTES


def test_larger_images_are_refused():
    with pytest.raises(ValueError, match="up to 256x256 pixels, got 257x3"):
        plan_window(WindowShape(3, 257, 3, 7, True, False))
    with pytest.raises(ValueError, match="200x200 image does not fit into the shared memory"):
        plan_vjp(WindowShape(3, 200, 200, 7, True, True))
