"""Fixtures of the room's tests."""

from __future__ import annotations

import pytest
from source_files import (
    GREY,
    encoded,
    write_tree,
)

from pyflocality.sources import cache


@pytest.fixture
def cached_zip(tmp_path, monkeypatch):
    """A zip that is large enough to be cached, and where."""
    monkeypatch.setattr(cache, "MIN_IMAGES", 5)
    files = {f"{index % 2}/{index}.png": encoded(GREY[index]) for index in range(6)}
    return write_tree(tmp_path / "set", files, "zip"), tmp_path / "cache"
