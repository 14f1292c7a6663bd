"""Ahead-of-time compiles of every shipped configuration of the masked posterior."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from triton import next_power_of_2
from triton_gates import compile_ahead

from pyflocality.kernels.triton import _masked_products as products
from pyflocality.kernels.triton import _masked_softmax, _merge
from pyflocality.kernels.triton._masked_levels import OUTPUTS
from pyflocality.kernels.triton._masked_plan import (
    CONFIGS,
    FEW_CONFIGS,
    JVP_CONFIGS,
    config_for,
)

HALF, SINGLE, INDEX = "*fp16", "*fp32", "*i32"
LISTS = {"inputs_ptr": INDEX, "starts_ptr": INDEX, "parents_ptr": INDEX}
SCAN = {
    "images_ptr": HALF,
    "queries_ptr": HALF,
    **LISTS,
    "cores_ptr": SINGLE,
    "norms_ptr": SINGLE,
    "outputs_ptr": INDEX,
    "values_ptr": SINGLE,
    "row_scale_ptr": SINGLE,
    "gain_ptr": SINGLE,
    "factor_ptr": SINGLE,
    "minimum_ptr": SINGLE,
    "total_ptr": SINGLE,
    "weighted_ptr": SINGLE,
    "blocks": "i32",
    "places_above": "i32",
    "column_blocks": "i32",
    "split_blocks": "i32",
    "stride_image": "i32",
    "stride_norm": "i32",
    "stride_sum": "i32",
    "stride_value": "i32",
    "dim": "i32",
}
SUMS = {
    "images_ptr": HALF,
    "queries_ptr": HALF,
    **LISTS,
    "above_ptr": SINGLE,
    "sums_ptr": SINGLE,
    "blocks": "i32",
    "places_above": "i32",
    "stride_image": "i32",
    "stride_sum": "i32",
}
NORMS = {
    "images_ptr": HALF,
    "mask_weights_ptr": HALF,
    **LISTS,
    "above_ptr": SINGLE,
    "row_scale_ptr": SINGLE,
    "norms_ptr": SINGLE,
    "count": "i32",
    "stride_image": "i32",
    "stride_above": "i32",
    "stride_norm": "i32",
}
PACK = {
    "noisy_ptr": SINGLE,
    "inputs_ptr": INDEX,
    "mask_weights_ptr": HALF,
    "queries_ptr": HALF,
    "dim": "i32",
    "blocks": "i32",
}
STRIDES = ("stride_image", "stride_norm", "stride_sum", "stride_above", "stride_value")


def constants(config, launch, **more):
    return {
        "OUTPUTS": OUTPUTS,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "NUM_STAGES": launch.num_stages,
        **more,
    }


def compiled(kernel, types, arch, launch, values):
    strides = [name for name in STRIDES if name in types]
    return compile_ahead(kernel, types, values, arch=arch, divisible=strides, **vars(launch))


def scan(arch, parts, parents, table=CONFIGS, values=0, has_image=True):
    config = table[arch]
    answers = {"VALUES": values, "HAS_IMAGE": has_image, "SLOTS": next_power_of_2(max(1, values))}
    more = {"BATCH": config.batch, "HALVES": parts, "HAS_PARENTS": parents, **answers}
    values = constants(config, config.scan, **more)
    return compiled(_masked_softmax.masked_scan_kernel, SCAN, arch, config.scan, values)


@pytest.mark.parametrize("parents", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("table", [CONFIGS, FEW_CONFIGS], ids=["many", "few"])
@pytest.mark.parametrize("arch", [80, 90])
def test_scan(arch, parts, parents, table):
    code = scan(arch, parts, parents, table)
    code.assert_fits(wgmma=True)
    assert code.has_async_copies
    # Products of two steps overlap: not every wait is for the last one.
    assert arch == 80 or max(code.waits) > 0, str(code)


@pytest.mark.parametrize(
    ("count", "values", "has_image"),
    [(8, 1, True), (8, 3, True), (8, 8, True), (4, 1, False), (4, 1, True), (4, 2, True)],
)
@pytest.mark.parametrize("arch", [80, 90])
def test_scan_of_value_images(arch, count, values, has_image):
    config = config_for(count, arch, values)
    assert config.batch == count
    code = scan(arch, 2, True, {arch: config}, values, has_image)
    code.assert_fits(wgmma=True)
    assert code.has_async_copies
    assert arch == 80 or max(code.waits) > 0, str(code)


@pytest.mark.parametrize("parents", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("arch", [80, 90])
def test_few_noisy_images_are_summed_in_the_order_of_many(arch, parts, parents):
    """A thread has the same work in both: what differs is how many threads there are."""
    few, many = (
        Counter(re.findall(r"\b(FFMA|FADD|FMUL|FMNMX|MUFU\.EX2|SHFL|HMMA|HGMMA[.\w]*)", code.sass))
        for code in (scan(arch, parts, parents, table) for table in (FEW_CONFIGS, CONFIGS))
    )
    assert few == many and few["SHFL"] > 0


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        *((80, config) for config in (CONFIGS[80], FEW_CONFIGS[80], JVP_CONFIGS[80])),
        *((90, config) for config in (CONFIGS[90], FEW_CONFIGS[90])),
    ],
)
def test_core_sums(arch, config, parts):
    values = constants(config, config.cores, BATCH=config.batch, HALVES=parts, HAS_PARENTS=True)
    code = compiled(products.core_sums_kernel, SUMS, arch, config.cores, values)
    code.assert_fits(wgmma=True)
    assert code.has_async_copies


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("arch", "config"), [(80, CONFIGS[80]), (80, JVP_CONFIGS[80]), (90, CONFIGS[90])]
)
def test_squared_norms(arch, config, parts):
    values = constants(config, config.norms, HALVES=parts, HAS_PARENTS=True)
    code = compiled(products.squared_norms_kernel, NORMS, arch, config.norms, values)
    code.assert_fits()
    # 16 rows are too few for a warpgroup.
    assert code.has_mma and not code.has_wgmma


@pytest.mark.parametrize("table", [CONFIGS, FEW_CONFIGS], ids=["many", "few"])
@pytest.mark.parametrize("arch", [80, 90])
def test_pack_queries(arch, table):
    config = table[arch]
    values = {
        "WEIGHT_HALVES": 2,
        "HALVES": 2,
        "OUTPUTS": OUTPUTS,
        "BATCH": config.batch,
        "BLOCK_D": config.block_d,
    }
    compile_ahead(
        products.pack_queries_kernel, PACK, values, arch=arch, num_warps=4, num_stages=3
    ).assert_fits()


@pytest.mark.parametrize("block_v", [1, 1024])
@pytest.mark.parametrize("arch", [80, 90])
def test_merge(arch, block_v):
    types = {name: SINGLE for name in _merge.merge_states_kernel.arg_names if name.endswith("_ptr")}
    types |= {"splits": "i32", "rows": "i32", "values": "i32"}
    values = {"BLOCK_R": _merge.BLOCK_ELEMENTS // block_v, "BLOCK_V": block_v}
    compile_ahead(
        _merge.merge_states_kernel, types, values, arch=arch, **vars(_merge.LAUNCH)
    ).assert_fits()
