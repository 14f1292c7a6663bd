"""What a cold masked scan takes and does once, counted without running its kernels."""

from __future__ import annotations

import weakref

import pytest
import torch
from test_masked_kernel import PRODUCTS, SCAN, SMALL, band_masks, problem_on
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth import random_images

from pyflocality.kernels.triton import _masked_products, _masked_softmax, _merge
from pyflocality.kernels.triton._centred_images import centred_images
from pyflocality.kernels.triton.masked_posterior import scan
from pyflocality.weights import QueryWeights

SHAPE = (3, 16, 16)
MEGABYTE = 10**6


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = {tensor.untyped_storage()._cdata for tensor in given}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage._cdata in given or storage._cdata in self._seen:
                continue
            self._seen[storage._cdata] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, size)
        return out

    def _forget(self, storage, size):
        del self._seen[storage]
        self.live -= size


class Idle:
    """Stands for a kernel and counts its launches, which do nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.grids.append(grid)


@pytest.fixture
def idle(monkeypatch):
    """The kernels by name, none of which runs."""
    idle = {}
    places = [(_masked_products, name) for name in PRODUCTS]
    for module, name in (*places, (_masked_softmax, SCAN), (_merge, "merge_states_kernel")):
        idle[name] = Idle()
        monkeypatch.setattr(module, name, idle[name])
    return idle


def windows(reach):
    """Masks of the inputs of all channels in windows around every output."""
    channels, height, width = SHAPE
    rows, columns = (
        torch.arange(height).repeat_interleave(width),
        torch.arange(width).repeat(height),
    )
    near = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) <= reach
    return QueryWeights(near.repeat(channels, channels))


def cold_call(device, rng, budget, batch=8, count=8000, values=0):
    """Peak bytes of a call for a new set and new masks, and the set."""
    images = random_images(rng, count, SHAPE, torch.uint8).to(device)
    x = torch.randn(batch, *SHAPE, generator=rng)
    further = {}
    if values:
        shape = (count, values, *SHAPE)
        further = {"values": torch.randn(shape, generator=rng).to(device), "with_image": True}
    problem = problem_on(device, x, images, 0.4, 0.9, memory_budget=budget, **further)
    weights = windows(2)
    with PeakMemory() as memory:
        scan(problem, weights, config=SMALL)
    return memory.peak, centred_images(images)


# A copy takes 12.6 MB, the norms 25 MB, the queries of a group 5 MB.
@pytest.mark.parametrize(
    ("megabytes", "copy", "norms"),
    [(20, False, False), (32, True, False), (46, True, True), (52, True, True)],
)
@pytest.mark.parametrize("batch", [8, 40])
def test_a_cold_call_stays_within_the_budget(device, rng, idle, megabytes, copy, norms, batch):
    """Packed queries, the plan and a copy of the norms came on top of the budget."""
    budget = megabytes * MEGABYTE
    peak, cached = cold_call(device, rng, budget, batch)
    assert (cached.cached_whole is not None, "masked" in cached.norms) == (copy, norms)
    assert 0.4 * budget < peak <= budget
    # Several slices, so that their width is what the budget leaves.
    assert len(idle[SCAN].grids) > 1


@pytest.mark.parametrize("megabytes", [32, 52])
@pytest.mark.parametrize("values", [1, 3])
def test_value_images_are_copied_within_the_budget(device, rng, idle, megabytes, values):
    """They are the larger part of a slice: 3 to 9 kB of an image, 1.5 kB of its copy."""
    budget = megabytes * MEGABYTE
    peak, _ = cold_call(device, rng, budget, values=values)
    assert 0.4 * budget < peak <= budget
    assert len(idle[SCAN].grids) > 1


def test_queries_are_packed_once_for_all_slices(device, rng, idle):
    cold_call(device, rng, 46 * MEGABYTE)
    assert len(idle[SCAN].grids) > 1
    # One for each level of the plan.
    assert len(idle["pack_queries_kernel"].grids) == 2
    assert len(idle["core_sums_kernel"].grids) == len(idle[SCAN].grids)


def test_masks_are_sent_to_the_device_once(device, rng, monkeypatch):
    """Every call sent the bits of the masks again."""
    images = random_images(rng, 30, (1, 4, 5), torch.uint8)
    problem = problem_on(device, images[:2].float() / 127.5 - 1, images, 0.4)
    weights = QueryWeights(band_masks((1, 4, 5)).dense(torch.bool))
    first = scan(problem, weights)
    monkeypatch.delattr(weights, "bits")
    again = scan(problem, weights)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
