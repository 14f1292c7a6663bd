"""Fixtures of the room's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def step_inputs(rng):
    """State, answer (well outside [-1, 1] at places) and noise [4, 1, 3, 3]."""
    x, x0, noise = torch.randn(3, 4, 1, 3, 3, generator=rng, dtype=torch.float64)
    return x, 1.5 * x0, noise
