"""Times that are foreseen from short measurements."""

from __future__ import annotations

import pytest
import torch

from pyflocality._support import rates
from pyflocality._support.rates import product_seconds, shortest, solver_seconds


def test_products_take_their_operations(monkeypatch):
    """A machine that takes a second for the product that is measured, half of it in float32."""
    monkeypatch.setattr(rates, "_product", lambda dtype: {torch.float32: 0.5}.get(dtype, 1.0))
    assert product_seconds(2 * 1024**3) == 1.0
    assert product_seconds(6 * 1024**3, torch.float32) == 1.5


@pytest.mark.parametrize(
    ("side", "measured"), [(1, 1), (768, 768), (1000, 768), (2000, 1000), (12288, 1536)]
)
def test_a_solver_grows_as_the_cube_from_half_the_side_or_less(monkeypatch, side, measured):
    monkeypatch.setattr(rates, "_solver", lambda side: 1e-9 * side**3 + (side != measured))
    assert solver_seconds(side) == pytest.approx(1e-9 * side**3)


def test_measured_once():
    rates._product.cache_clear()
    rates._solver.cache_clear()
    assert product_seconds(1e9) == product_seconds(1e9) > 0
    assert solver_seconds(64) == solver_seconds(64) > 0
    assert rates._product.cache_info().misses == rates._solver.cache_info().misses == 1


def test_the_shortest_run_counts(monkeypatch):
    now = iter([0.0, 3.0, 3.0, 4.5, 5.0, 9.0])
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(now))
    assert shortest(lambda: None) == 1.5
