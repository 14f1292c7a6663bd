"""Native equivariant posteriors against the float64 reference: every instruction set and size."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS
from patch_problems import ALPHA, SIGMA, boundaries, problem

from pyflocality.kernels.cpu import equivariant_posterior as native
from pyflocality.ops import equivariant_posterior_mean
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize


@pytest.mark.parametrize("isa", ISAS)
@boundaries
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 7), (2, 7, 4)])
@pytest.mark.parametrize("count", [1, 130])
def test_every_instruction_set_and_size(isa, boundary, shape, count, rng):
    x, images = problem(rng, shape, count)
    given = posterior_problem(x.float(), images, SIGMA, ALPHA)
    state = native.scan(given, 3, boundary == "circular", instruction_set=isa)
    found = finalize(state).transpose(1, 2).reshape(x.shape)
    exact = equivariant_posterior_mean(
        x, images, 3, SIGMA, ALPHA, boundary=boundary, backend="reference"
    )
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-5)
