"""Ahead-of-time compiles of every shipped configuration of the masked posterior with tangents."""

from __future__ import annotations

import pytest
from test_masked_compiles import SCAN, compiled, constants

from pyflocality.kernels.triton._masked_plan import JVP_CONFIGS
from pyflocality.kernels.triton._masked_softmax import masked_jvp_kernel
from pyflocality.kernels.triton.masked_posterior import LARGEST_SLOTS, SLOTS

# In the order of the kernel's arguments.
LEFT_OUT = ("total_ptr", "weighted_ptr", "values_ptr", "stride_value", "dim")
TYPES = {name: kind for name, kind in SCAN.items() if name not in LEFT_OUT}
TYPES |= dict.fromkeys(["centre_ptr", "offset_ptr", "sums_ptr"], "*fp32")


@pytest.mark.parametrize(
    ("slots", "parents"),
    [*((slots, True) for slots in sorted({*SLOTS, LARGEST_SLOTS})), (LARGEST_SLOTS, False)],
)
@pytest.mark.parametrize("arch", [80, 90])
def test_scan(arch, slots, parents):
    config = JVP_CONFIGS[arch]
    values = constants(
        config,
        config.scan,
        IMAGES=config.batch // slots,
        SLOTS=slots,
        HALVES=2,
        HAS_PARENTS=parents,
    )
    code = compiled(masked_jvp_kernel, TYPES, arch, config.scan, values)
    code.assert_fits(wgmma=True)
    assert code.has_async_copies
    # Products of two steps overlap: not every wait is for the last one.
    assert arch == 80 or max(code.waits) > 0, str(code)
