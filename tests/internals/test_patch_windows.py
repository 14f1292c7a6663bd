"""How many windows of a patch set lie over a pixel."""

from __future__ import annotations

import torch

from pyflocality.reference.patch_set import windows_over


def test_windows_over_a_pixel_are_counted():
    count = windows_over((4, 5), 2, torch.zeros(1))
    assert count.tolist() == [[1, 2, 2, 2, 1], [2, 4, 4, 4, 2], [2, 4, 4, 4, 2], [1, 2, 2, 2, 1]]
