"""Fixtures of the room's tests."""

from __future__ import annotations

import numpy as np
import pytest
from packing_files import COUNT, png

from pyflocality import packing


@pytest.fixture
def pixels():
    """Colour images, uint8 [N, 3, 8, 6]."""
    return np.random.default_rng(5).integers(0, 256, (COUNT, 3, 8, 6), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pixels):
    """A folder with a subfolder for each of two classes."""
    root = tmp_path / "images"
    for index, image in enumerate(pixels):
        name = root / ("cat" if index < 9 else "dog") / f"{index:03d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(png(image))
    return root


@pytest.fixture
def few_a_block(monkeypatch):
    """Four images a block."""
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 4 * 3 * 8 * 6)
