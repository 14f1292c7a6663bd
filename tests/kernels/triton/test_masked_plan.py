"""The plan of a masked scan: from a memory budget to groups, slices and what is cached."""

from __future__ import annotations

import dataclasses

import pytest

from pyflocality.kernels.triton._centred_images import CONVERSION_BYTES
from pyflocality.kernels.triton._masked_plan import (
    CONFIGS,
    FEW_CONFIGS,
    JVP_CONFIGS,
    ScanSizes,
    config_for,
    plan_scan,
)

# CIFAR-10 with a mask for every value: 40 noisy images in five groups.
SIZES = ScanSizes(
    config=CONFIGS[90],
    groups=5,
    group_images=8,
    halves=2,
    sums=1,
    places=3072,
    places_above=224,
    blocks=900,
    dim=3072,
    columns=50048,
    held_bytes=2**21,
)


def peak(sizes, plan):
    """Bytes that a scan holds at a time, but for what is made while images are converted."""
    together = max(some.stop - some.start for turn in plan.turns for some in turn)
    has_norms = plan.norm_width is not None
    column = sizes.column_bytes(together, copied=plan.copied, has_norms=has_norms)
    shared = plan.copied * sizes.copy_bytes + has_norms * sizes.norm_bytes
    held = sizes.held_bytes + sizes.state_bytes + shared
    return held + together * sizes.packed_bytes(sizes.halves) + plan.width * column


@pytest.mark.parametrize("megabytes", [160, 320, 640, 1500, 2500, 10_000])
@pytest.mark.parametrize("sums", [1, 8])
@pytest.mark.parametrize("groups", [1, 5, 60])
def test_a_plan_fits_its_budget_and_takes_every_group_once(megabytes, sums, groups):
    budget = megabytes * 10**6
    sizes = dataclasses.replace(SIZES, sums=sums, groups=groups)
    plan = plan_scan(sizes, budget, has_copy=False)
    taken = [group for turn in plan.turns for some in turn for group in range(groups)[some]]
    assert taken == list(range(groups))
    least = sizes.held_bytes + sizes.state_bytes + CONVERSION_BYTES + sizes.packed_bytes(2)
    least += sizes.config.split * sizes.column_bytes(1, copied=False, has_norms=False)
    assert peak(sizes, plan) <= max(budget, 2 * least)
    assert plan.width % sizes.config.split == 0 and plan.width > 0


def test_what_is_cached_follows_the_budget():
    # A copy takes 307 MB, at most half of a budget, and the norms 615 MB.
    plans = [plan_scan(SIZES, n * 10**6, has_copy=False) for n in (600, 640, 950, 1400)]
    assert [plan.copied for plan in plans] == [False, True, True, True]
    assert [plan.norm_width is not None for plan in plans] == [False, False, False, True]
    # What an earlier call cached is used whatever this one could have afforded.
    assert plan_scan(SIZES, 600 * 10**6, has_copy=True).copied


def test_groups_go_together_unless_all_that_they_share_is_cached():
    tight = plan_scan(SIZES, 640 * 10**6, has_copy=False)
    roomy = plan_scan(SIZES, 10**10, has_copy=False)
    assert len(tight.turns) == 1 and len(roomy.turns) == 1
    narrow = plan_scan(dataclasses.replace(SIZES, groups=400), 5 * 10**9, has_copy=False)
    assert narrow.norm_width is not None and len(narrow.turns) > 1
    assert all(len(turn) == 1 for turn in narrow.turns)


def test_both_precisions_cache_the_same():
    for megabytes in range(200, 2000, 50):
        one, two = (
            plan_scan(dataclasses.replace(SIZES, halves=halves), megabytes * 10**6, has_copy=False)
            for halves in (1, 2)
        )
        assert one.copied == two.copied and one.norm_width == two.norm_width


@pytest.mark.parametrize("chunk_size", [None, 10**8])
def test_slices_fit_a_grid(chunk_size):
    """A grid has at most 65,535 programs along its second and third dimension."""
    sizes, config = dataclasses.replace(SIZES, chunk_size=chunk_size), SIZES.config
    width = sizes.slice_width(10**15, 1, copied=True, has_norms=True)
    assert width % config.split == 0
    assert 65535 * config.block_n - config.split < width <= 65535 * config.block_n


def test_a_chunk_size_counts_in_whole_blocks():
    for chunk_size, width in ((1, 128), (127, 128), (300, 256)):
        sizes = dataclasses.replace(SIZES, chunk_size=chunk_size)
        assert plan_scan(sizes, 10**9, has_copy=False).width == width


def test_table_has_every_generation():
    assert set(CONFIGS) == set(FEW_CONFIGS) == set(JVP_CONFIGS) == {80, 90}
    for arch in (80, 90):
        assert [config_for(count, arch).batch for count in (1, 4, 5, 100)] == [4, 4, 8, 8]
        assert [config_for(4, arch, values).batch for values in (1, 2, 3)] == [4, 4, 8]
