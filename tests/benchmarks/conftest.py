"""Fixtures of the room's tests."""

from __future__ import annotations

import pytest
from tiny_sets import write_network, write_sets  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, sorted by class, and two networks."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_sets(folder)
    for seed, name in enumerate("ab"):
        write_network(folder / f"{name}.safetensors", seed)
    return folder
