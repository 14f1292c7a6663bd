"""Ahead-of-time compiles of every shipped configuration of the global posterior."""

from __future__ import annotations

import pytest
from triton_gates import compile_ahead

from pyflocality.kernels.triton import _global_products as kernels
from pyflocality.kernels.triton._global_products import CONFIGS

SINGLE, DOUBLE = "*fp32", "*fp64"
DISTANCES = {
    "images_ptr": "*u8",
    "digits_ptr": "*i8",
    "norms_ptr": "*i64",
    "quantum_ptr": DOUBLE,
    "common_ptr": DOUBLE,
    "distances_ptr": SINGLE,
    "count": "i32",
    "dim": "i32",
}
SUMS = {
    "images_ptr": "*u8",
    "distances_ptr": SINGLE,
    "minimum_ptr": SINGLE,
    "factor_ptr": SINGLE,
    "total_ptr": SINGLE,
    "weighted_ptr": SINGLE,
    "count": "i32",
    "dim": "i32",
    "split_images": "i32",
}


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("arch", [80, 90])
def test_distances(arch, aligned):
    config = CONFIGS[arch]
    block_d, launch = config.odd_d, config.odd
    if aligned:
        block_d, launch = config.distance_d, config.distance
    values = {
        "QUERIES": kernels.QUERIES,
        "SEGMENT": kernels.SEGMENT,
        "BLOCK_N": config.distance_n,
        "BLOCK_D": block_d,
        "NUM_STAGES": launch.num_stages,
    }
    code = compile_ahead(
        kernels.distances_kernel,
        DISTANCES,
        values,
        arch=arch,
        divisible=["dim"] if aligned else [],
        **vars(launch),
    )
    code.assert_fits()
    assert code.has_imma, str(code)
    assert code.has_async_copies or not aligned, str(code)


@pytest.mark.parametrize("stored", ["*u8", "*fp32"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("arch", [80, 90])
def test_weighted_sums(arch, aligned, stored):
    config = CONFIGS[arch]
    values = {
        "WEIGHT_UNIT": kernels.WEIGHT_UNIT,
        "QUERIES": kernels.QUERIES,
        "BLOCK_N": config.sum_n,
        "BLOCK_D": config.sum_d if stored == "*u8" else config.value_d,
        "NUM_STAGES": config.weighted.num_stages,
    }
    code = compile_ahead(
        kernels.weighted_sums_kernel,
        SUMS | {"images_ptr": stored},
        values,
        arch=arch,
        divisible=["dim"] if aligned else [],
        **vars(config.weighted),
    )
    code.assert_fits()
    assert code.has_mma, str(code)
