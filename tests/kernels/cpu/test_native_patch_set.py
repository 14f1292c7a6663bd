"""Native patch sets against the float64 reference: every instruction set and size."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS
from native_cpu import needs_cpu
from truth import noisy_batch, random_images

from pyflocality.kernels.cpu import patch_set as native
from pyflocality.ops.patch_set import patch_set_mean
from pyflocality.posterior.problem import posterior_problem


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("shape", "window"),
    [((1, 7, 5), 5), ((3, 6, 6), 3), ((2, 4, 9), 4), ((1, 1, 1), 1), ((4, 3, 8), 2)],
)
@pytest.mark.parametrize("count", [1, 47, 49, 2000])
def test_every_instruction_set_and_size(isa, dtype, shape, window, count, rng):
    images = random_images(rng, count, shape, dtype)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    exact = patch_set_mean(x, images, window, 0.4, 0.9, backend="reference")
    problem = posterior_problem(x.float(), images, 0.4, 0.9)
    found = native.scan(problem, window, instruction_set=isa)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
