"""Entries that reach their cutoffs: decided by single precision or formed again, never guessed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from instruction_sets import ISAS
from native_cpu import needs_cpu

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.mask_tile import mark

pytestmark = needs_cpu
SLACK = 1e-3


def problem(rows: int, columns: int, terms: int):
    """Whole numbers, so that products are exact: factor, coefficients, places, entries.

    Rows of the factor lie apart.
    """
    generator = torch.Generator().manual_seed(rows * 100 + columns + terms)
    factor = torch.randint(-3, 4, (rows + columns, terms + 2), generator=generator).double()
    factor = factor[:, :terms]
    coefficients = torch.randint(0, 3, (terms,), generator=generator).double()
    places = torch.randperm(rows + columns, generator=generator)[:rows]
    entries = (factor[places] * coefficients) @ factor[rows:].T
    return factor, coefficients, places, entries


def marked(entries, cutoffs, factor, coefficients, places, **options):
    """The bits of entries whose values are off by nearly all that their slack allows."""
    rows, columns = entries.shape
    signs = torch.ones(entries.numel())
    signs[::2] = -1.0
    values = (entries + 0.99 * SLACK * signs.reshape(entries.shape)).float()
    root = torch.tensor(SLACK).sqrt()
    return mark(
        values,
        (root.expand(rows).contiguous(), root.expand(columns).contiguous()),
        cutoffs,
        (factor, coefficients),
        places,
        rows,
        **({"most_left_open": entries.numel()} | options),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 8, 5), (7, 17, 9), (20, 100, 64), (5, 33, 0)])
def test_entries_on_their_cutoffs_are_decided_exactly(sizes, isa):
    factor, coefficients, places, entries = problem(*sizes)
    # Whole numbers that many entries are equal to, and what lies a rounding error beside them.
    for beside in (0.0, 1e-12, -1e-12):
        cutoffs = torch.full((sizes[1],), 4.0, dtype=torch.float64) + beside
        found = marked(entries, cutoffs, factor, coefficients, places, instruction_set=isa)
        expected = entries.abs() >= cutoffs
        assert np.array_equal(found.bits, np.packbits(expected.numpy(), axis=1))
        assert found.near == int((entries.abs() == 4.0).sum())


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_left_open_is_counted(isa):
    factor, coefficients, places, entries = problem(20, 100, 64)
    cutoffs = torch.full((100,), 4.0, dtype=torch.float64)
    on = int((entries.abs() == 4.0).sum())
    arguments = entries, cutoffs, factor, coefficients, places
    assert on > 10
    assert marked(*arguments, most_left_open=on, instruction_set=isa) is not None
    assert marked(*arguments, most_left_open=on - 1, instruction_set=isa) is None


def test_decided_entries_are_not_formed_again():
    _, _, places, entries = problem(6, 40, 3)
    nothing = torch.full((46, 3), float("nan"), dtype=torch.float64)
    cutoffs = torch.full((40,), 4.5, dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    found = marked(entries, cutoffs, nothing, ones, places, most_left_open=0)
    assert np.array_equal(found.bits, np.packbits((entries.abs() >= 4.5).numpy(), axis=1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("values", np.zeros(3, np.float32), r"`values` must have shape \[n, m\]"),
        ("row_slack", np.zeros(3, np.float32), r"`row_slack` must have shape \[n\]"),
        ("column_slack", np.zeros(2, np.float32), r"`column_slack` must have shape \[m\]"),
        ("cutoffs", np.zeros(2), r"`cutoffs` must have shape \[m\]"),
        ("factor", np.zeros((9, 3)), r"`factor` must have shape \[D, K\]"),
        ("factor", np.zeros((9, 8))[:, ::2], "`factor` must have each row in one piece"),
        ("places", np.array([0, 9]), "`places` must hold rows of `factor`, got 9"),
        ("places", np.array([0, -1]), "`places` must hold rows of `factor`, got -1"),
        ("first_column", 7, "`first_column` must leave room"),
        ("isa", "sse9", "`isa` must be one of"),
    ],
)
def test_wrong_arguments(name, value, message):
    right = {
        "values": np.zeros((2, 3), np.float32),
        "row_slack": np.zeros(2, np.float32),
        "column_slack": np.zeros(3, np.float32),
        "cutoffs": np.ones(3),
        "factor": np.zeros((9, 4)),
        "coefficients": np.zeros(4),
        "places": np.array([0, 1]),
        "first_column": 6,
        "most_left_open": 6,
    }
    assert native_module().mark_tile(**right) is not None
    with pytest.raises(ValueError, match=message):
        native_module().mark_tile(**(right | {name: value}))
