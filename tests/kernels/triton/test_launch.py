"""What the launchers of all Triton kernels share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pyflocality.kernels.triton._launch import generation


@pytest.mark.parametrize(
    ("major", "shared", "column"),
    [
        (8, 163 * 1024, 80),
        (8, 99 * 1024, 80),
        (9, 227 * 1024, 90),
        (10, 227 * 1024, 90),
        # A consumer GPU of a later generation.
        (12, 99 * 1024, 80),
        # torch does not tell.
        (8, None, 80),
        (9, None, 90),
        (12, None, 80),
    ],
)
def test_generation_follows_the_shared_memory(monkeypatch, major, shared, column):
    found = SimpleNamespace(major=major)
    if shared is not None:
        found.shared_memory_per_block_optin = shared
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert generation(torch.device("cuda", 0)) == column
