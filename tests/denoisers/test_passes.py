"""How often the images are read: a batch of several noise levels shares its passes."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from every_denoiser import near_masks, soft_weights

import pyflocality as pf
from pyflocality.backends import trace_blocks

COUNT, SHAPE = 1040, (2, 6, 6)
BUDGET = 2**14
# Little and much noise beside the images, and one level twice.
SIGMA, ALPHA = torch.tensor([0.3, 0.2, 0.3, 0.25, 2.0]), torch.tensor([0.9, 0.8, 0.9, 0.5, 1.0])

# Passes over the images on (reference, cpu); None where there is no such kernel.
CASES = {
    "optimal": (lambda data, **o: pf.OptimalDenoiser(data, **o), 1, 1),
    "local": (lambda data, **o: pf.LocalDenoiser(data, 3, **o), 1, 1),
    # A window of 3 for three of the four levels.
    "local, two windows": (lambda data, **o: pf.LocalDenoiser(data, pick(3, 5), **o), 2, 2),
    "equivariant": (lambda data, **o: pf.EquivariantDenoiser(data, 3, **o), 1, 1),
    # Posteriors, then their blend.
    "patch set": (lambda data, **o: pf.PatchSetDenoiser(data, 3, **o), 2, 2),
    "patch set, two windows": (lambda data, **o: pf.PatchSetDenoiser(data, pick(3, 4), **o), 4, 4),
    # And twice where the kernel counts noisy images of little and of much noise differently.
    "patch set, masks": (
        lambda data, **o: pf.PatchSetDenoiser(data, masks=near_masks(6, 6), **o),
        2,
        4,
    ),
    "filtered, own values": (lambda data, **o: filtered(data, soft_weights(72, 72), **o), 1, None),
    "filtered": (
        lambda data, **o: filtered(data, soft_weights(5, 72), responses=True, **o),
        2,
        None,
    ),
    "masks of one kind": (lambda data, **o: filtered(data, soft_weights(72, 72) > 0.5, **o), 1, 2),
    # Every level has masks of its own.
    "pca": (lambda data, **o: pf.PCALocalityDenoiser(data, 0.1, **o), 4, 4),
    "nearest": (lambda data, **o: pf.NearestDenoiser(data, **o), 1, None),
}


def pick(small, large):
    """One window for most levels, and another for one of them."""
    return lambda alpha, sigma: large if sigma == alpha / 2 else small


def filtered(data, weights, responses=False, **options):
    answers = weights.sqrt() if responses else None
    return pf.FilteredPosteriorDenoiser(data, weights, answers, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("passes") / "images.npy"
    np.save(found, np.random.default_rng(6).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8))
    return found


@pytest.mark.parametrize("where", ["streamed", "in memory"])
@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, "reference") for case in CASES] + [(case, "cpu") for case in CASES if CASES[case][2]],
)
def test_passes_of_a_batch(case, backend, where, path, rng):
    if backend == "cpu":
        pytest.importorskip("pyflocality._C")
    make, expected = CASES[case][0], CASES[case][1 + (backend == "cpu")]
    data = pf.TrainingSet.load(path)
    options = {"backend": backend}
    if where == "streamed":
        # Blocks of a few images, and room for one noisy image at a time.
        options["memory_budget"] = BUDGET
    else:
        data = pf.TrainingSet(data.images.clone())
    denoiser = make(data, **options)
    if case == "pca":
        # Reads the set by itself.
        denoiser.moments  # noqa: B018
    x = torch.randn(len(SIGMA), *SHAPE, generator=rng)
    with trace_blocks() as blocks:
        found = denoiser(x, SIGMA, ALPHA)
    assert {block.from_file for block in blocks} == {where == "streamed"}
    passes = collections.Counter()
    for block in blocks:
        passes.update(range(block.first, block.first + block.count))
    # The kernel for masks takes a look at the first images to count from their mean.
    assert {passes[i] for i in range(1024, COUNT)} == {expected}
    looks = {passes[i] - expected for i in range(1024)}
    assert len(looks) == 1 and (looks == {0} or backend == "cpu")
    # Passes are shared, answers are not.
    for b in range(len(x)):
        alone = denoiser(x[b : b + 1], SIGMA[b : b + 1], ALPHA[b : b + 1])
        torch.testing.assert_close(found[b : b + 1], alone, rtol=0, atol=5e-5)
