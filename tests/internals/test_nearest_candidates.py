"""The search of nearest images looks at few of them."""

from __future__ import annotations

import pytest
import torch

import pyflocality as pf
from pyflocality.reference import nearest


@pytest.mark.parametrize("alpha", [1.0, 0.01])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0])
def test_nearest_images_are_looked_at_where_they_may_be_the_nearest(
    rng, monkeypatch, spread, alpha
):
    """Bits of the search through all images, but for the time it takes."""
    middle = torch.rand(1, 3, 8, 8, generator=rng) - 0.5
    images = middle + spread * (torch.rand(500, 3, 8, 8, generator=rng) - 0.5)
    images[300:320] = images[:20]
    x = (
        alpha * images[:6]
        + torch.randn(6, 3, 8, 8, generator=rng) * torch.logspace(-6, 2, 6)[:, None, None, None]
    )
    looked_at = []
    keys = nearest.ExactQuery.keys

    def counted(self, stored):
        looked_at.append(len(stored))
        return keys(self, stored)

    monkeypatch.setattr(nearest.ExactQuery, "keys", counted)
    found = {c: pf.ops.nearest_images(x, images, alpha, k=3, chunk_size=c) for c in (None, 90)}
    if spread == 1.0:
        assert sum(looked_at) < 400
    everything = [torch.arange(500)] * 6
    monkeypatch.setattr(nearest, "_candidates", lambda *_: everything)
    looked_at.clear()
    expected = pf.ops.nearest_images(x, images, alpha, k=3)
    assert sum(looked_at) == 6 * 500
    for one in found.values():
        assert torch.equal(one.indices, expected.indices)
        assert torch.equal(one.distances, expected.distances)
