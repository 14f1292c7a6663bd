"""The search of nearest images looks exactly at few of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_cpu import NO_CPU

import pyflocality as pf
from pyflocality.reference import shortlists


@pytest.fixture
def looked_at(monkeypatch):
    """Numbers of images whose distances are computed without rounding."""
    numbers = []
    keys = shortlists.ExactQuery.keys

    def counted(self, stored):
        numbers.append(len(stored))
        return keys(self, stored)

    monkeypatch.setattr(shortlists.ExactQuery, "keys", counted)
    return numbers


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("alpha", [1.0, 0.01])
@pytest.mark.parametrize("spread", [0.0, 1e-2, 1.0])
def test_nearest_images_are_looked_at_where_their_order_is_open(
    rng, monkeypatch, looked_at, spread, alpha, dtype
):
    """Bits of the search through all images, but for the time it takes."""
    middle = torch.rand(1, 3, 8, 8, generator=rng) - 0.5
    images = middle + spread * (torch.rand(500, 3, 8, 8, generator=rng) - 0.5)
    if dtype == torch.uint8:
        images = ((images + 1) * 127.5).round().to(dtype)
    images[300:320] = images[:20]
    values = images / 127.5 - 1 if dtype == torch.uint8 else images
    noise = torch.randn(6, 3, 8, 8, generator=rng)
    x = alpha * values[:6] + noise * torch.logspace(-6, 2, 6)[:, None, None, None]
    backends = ["cpu", "reference"] if dtype == torch.uint8 and NO_CPU is None else ["reference"]
    found = [
        pf.ops.nearest_images(x, images, alpha, k=3, chunk_size=size, backend=backend)
        for backend in backends
        for size in (None, 90)
    ]
    if spread == 1.0:
        # Pairs of equal images, where they are among the nearest or next to them.
        assert 0 < sum(looked_at) <= 6 * 4 * len(found)
    everything = [(np.arange(500), np.zeros(500), np.ones(500))] * 6
    monkeypatch.setattr("pyflocality.reference.nearest._candidates", lambda *_: everything)
    looked_at.clear()
    expected = pf.ops.nearest_images(x, images, alpha, k=3, backend="reference")
    assert sum(looked_at) == 6 * 500
    for one in found:
        assert torch.equal(one.indices, expected.indices)
        torch.testing.assert_close(one.distances, expected.distances, rtol=2e-7, atol=0)


def test_images_apart_need_no_second_look(rng, looked_at):
    images = torch.randint(0, 256, (2000, 1, 8, 8), generator=rng, dtype=torch.uint8)
    x = torch.randn(4, 1, 8, 8, generator=rng)
    for k in (1, 100, 2000):
        pf.ops.nearest_images(x, images, 0.5, k=k)
    assert sum(looked_at) == 0
