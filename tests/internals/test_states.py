"""States of scans: parts of a set are merged to the state of the whole."""

from __future__ import annotations

import pytest
import torch
from posterior_calls import ALPHA, BACKENDS, OPS, SHAPE, SIGMA, extra, problem

from pyflocality.backends.selection import OPERATIONS
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.state import finalize_jvp, merge_tangents
from pyflocality.posterior.tangents import jacobian_factor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_states_over_parts_of_the_set_merge(op, backend, rng):
    x, directions, images = problem(rng)
    run = OPERATIONS[f"{op}_posterior_jvp"][backend].load()
    values = {"global": 90, "window": 3, "masked": 1}[op]
    parts = [
        posterior_problem(x.float(), part, SIGMA, ALPHA)
        for part in (images[:11], images[11:], images)
    ]
    first, second, whole = (run(part, directions.float(), *extra(op, SHAPE)) for part in parts)
    factor = jacobian_factor(parts[0])
    merged = finalize_jvp(merge_tangents(first, second, parts[0].scale, values), values, factor)
    for one, other in zip(merged, finalize_jvp(whole, values, factor), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
