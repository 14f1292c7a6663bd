"""Copies of the images that are made when they are read: results are those of the enlarged set."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from torch import Tensor
from truth import random_images

import pyflocality as pf
from pyflocality import cli
from pyflocality.ops import (
    global_posterior_jvp,
    masked_posterior_jvp,
    nearest_images,
    window_posterior_jvp,
)

SHAPE = (3, 6, 5)
VALUES = 90
AUGMENTATIONS = [{"flip": True}, {"shifts": 1}, {"flip": True, "shifts": 1}]


def augmentation(**options):
    """The copies of a set, as operations take them."""
    large = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    return pf.TrainingSet(large).augmented(**options).augmentation


def enlarged(images: Tensor, *, flip: bool = False, shifts: int = 0) -> Tensor:
    """All copies in memory, the images themselves first, in the library's order."""
    array = images.numpy()
    padded = np.pad(array, ((0, 0), (0, 0), (shifts, shifts), (shifts, shifts)), mode="edge")
    mirrored = padded[..., ::-1]
    height, width = array.shape[2:]
    moves = sorted(range(-shifts, shifts + 1), key=lambda move: (abs(move), -move))
    copies = [
        side[:, :, shifts - down :, shifts - right :][:, :, :height, :width]
        for side in ((padded, mirrored) if flip else (padded,))
        for down in moves
        for right in moves
    ]
    return torch.from_numpy(np.concatenate(copies))


@pytest.fixture
def images(rng) -> Tensor:
    return random_images(rng, 50, SHAPE, torch.uint8)


def noisy(images: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # Near an image, a mirrored one and shifted ones.
    near = torch.stack(
        [
            images[3],
            images[4].flip(-1),
            torch.cat([images[5][..., :1], images[5][..., :-1]], -1),
            images[6].flip(-1).roll(1, -2),
        ]
    )
    return (0.8 * (near / 127.5 - 1) + 0.3 * noise).to(dtype)


def near_masks() -> Tensor:
    rows, columns = torch.arange(6), torch.arange(5)
    above = (rows[:, None] - rows).abs() <= 1
    beside = (columns[:, None] - columns).abs() <= 1
    return above[:, None, :, None] & beside[None, :, None, :]


def soft(queries: int) -> Tensor:
    return torch.rand(queries, VALUES, generator=torch.Generator().manual_seed(queries))


MAKERS = {
    "optimal": lambda data, **o: pf.OptimalDenoiser(data, **o),
    "nearest": lambda data, **o: pf.NearestDenoiser(data, **o),
    "wiener": lambda data: pf.WienerDenoiser(data),
    "pca": lambda data, **o: pf.PCALocalityDenoiser(data, 0.1, **o),
    "pca_signed": lambda data, **o: pf.PCALocalityDenoiser(data, 0, **o),
    "pca_soft": lambda data, **o: pf.PCALocalityDenoiser(data, 0.1, softness=0.5, **o),
    "pca_batch_mean": lambda data, **o: pf.PCALocalityDenoiser(
        data, 0.1, aggregation="batch_mean", batch_size=32, **o
    ),
    "gaussian_mixture": lambda data, **o: pf.GaussianMixtureDenoiser(data, 0.3, **o),
    "local": lambda data, **o: pf.LocalDenoiser(data, 3, **o),
    "equivariant": lambda data, **o: pf.EquivariantDenoiser(data, 3, **o),
    "equivariant_broken": lambda data, **o: pf.EquivariantDenoiser(data, 3, "broken", **o),
    "patch_set": lambda data, **o: pf.PatchSetDenoiser(data, 3, **o),
    "patch_set_even": lambda data, **o: pf.PatchSetDenoiser(data, 4, **o),
    "patch_set_masks": lambda data, **o: pf.PatchSetDenoiser(data, masks=near_masks(), **o),
    "filtered": lambda data, **o: pf.FilteredPosteriorDenoiser(data, soft(5), soft(5) + 0.1, **o),
    "filtered_own": lambda data, **o: pf.FilteredPosteriorDenoiser(data, soft(VALUES), **o),
}
SCANNING = [name for name in MAKERS if name != "wiener"]


@pytest.mark.parametrize("options", AUGMENTATIONS[::2], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_denoiser_answers_as_on_the_enlarged_set(name, options, images):
    data = pf.TrainingSet(images)
    whole = MAKERS[name](pf.TrainingSet(enlarged(images, **options)))
    part = MAKERS[name](data.augmented(**options))
    plain = MAKERS[name](data)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        x = noisy(images, dtype)
        exact = whole(x, 0.3, 0.8)
        torch.testing.assert_close(part(x, 0.3, 0.8), exact, rtol=0, atol=tolerance)
        # The copies matter here.
        assert (plain(x, 0.3, 0.8) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("name", SCANNING)
@pytest.mark.parametrize("budget", [1, "100KB"])
def test_the_memory_budget_does_not_matter(name, budget, images):
    data = pf.TrainingSet(images).augmented(flip=True)
    x = noisy(images)
    whole = MAKERS[name](data)(x, 0.3, 0.8)
    blocks = MAKERS[name](data, memory_budget=budget)(x, 0.3, 0.8)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-10)


def derivatives(op: str, x: Tensor, tangents: Tensor, images: Tensor, **options: object) -> Tensor:
    if op == "global":
        return global_posterior_jvp(x, tangents, images, 0.4, 0.8, **options)[1]
    if op == "window":
        return window_posterior_jvp(x, tangents, images, 3, 0.4, 0.8, **options)[1]
    masks = soft(VALUES) < 0.4
    return masked_posterior_jvp(x, tangents, images, masks, 0.4, 0.8, **options)[1]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("op", ["global", "window", "masked"])
def test_derivatives_are_those_of_the_enlarged_set(op, backend, images, rng):
    x = noisy(images)
    tangents = torch.randn(2, *x.shape, generator=rng, dtype=torch.float64)
    options = {"flip": True, "shifts": 1}
    exact = derivatives(op, x, tangents, enlarged(images, **options), backend="reference")
    found = derivatives(
        op,
        x.float(),
        tangents.float(),
        images,
        backend=backend,
        augmentation=augmentation(**options),
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@needs_cpu
@pytest.mark.parametrize("name", ["optimal", "pca", "local", "equivariant", "equivariant_broken"])
@pytest.mark.parametrize("level", [(0.0, 1.0), (0.05, 1.0), (5.0, 0.2)])
def test_native_scans_answer_as_on_the_enlarged_set(name, level, images):
    options = {"flip": True, "shifts": 1}
    exact = MAKERS[name](pf.TrainingSet(enlarged(images, **options)))(noisy(images), *level)
    denoiser = MAKERS[name](pf.TrainingSet(images).augmented(**options), backend="cpu")
    for budget in (None, 1):
        denoiser.memory_budget = budget
        found = denoiser(noisy(images, torch.float32), *level)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", AUGMENTATIONS, ids=str)
def test_moments_are_those_of_the_enlarged_set_to_the_bit(options, images):
    whole = pf.Moments.from_data(enlarged(images, **options))
    found = pf.Moments.from_data(pf.TrainingSet(images).augmented(**options))
    assert found.count == whole.count
    assert torch.equal(found.mean, whole.mean)
    assert torch.equal(found.covariance, whole.covariance)
    # What masks in the cache folder are found by.
    assert found.content_key() == whole.content_key()
    assert found.content_key() != pf.Moments.from_data(images).content_key()


def test_neighbours_are_counted_copy_by_copy(images):
    options = {"flip": True, "shifts": 1}
    x = noisy(images)
    exact = nearest_images(x, enlarged(images, **options), 0.8, k=100)
    found = nearest_images(x, images, 0.8, k=100, augmentation=augmentation(**options))
    assert torch.equal(found.indices, exact.indices)
    torch.testing.assert_close(found.distances, exact.distances)
    assert (found.indices >= len(images)).any()
    with pytest.raises(ValueError, match="`k` must be at most the number of images 100"):
        nearest_images(x, images, k=101, augmentation=augmentation(flip=True))


def test_float_images_are_copied_alike(rng):
    images = random_images(rng, 40, SHAPE, torch.float32)
    options = {"flip": True, "shifts": 2}
    x = 0.8 * images[:2].double().flip(-1)
    whole = pf.LocalDenoiser(pf.TrainingSet(enlarged(images, **options)), 3)
    found = pf.LocalDenoiser(pf.TrainingSet(images).augmented(**options), 3)
    torch.testing.assert_close(found(x, 0.3, 0.8), whole(x, 0.3, 0.8), rtol=0, atol=1e-6)


def test_a_set_keeps_its_augmentation(images):
    labels = torch.arange(len(images)) % 3
    data = pf.TrainingSet(images, labels).augmented(flip=True, shifts=1)
    for twin in (
        data.subset(range(3, 9)),
        data.subset([5, 2]),
        data.with_label(1),
        data.to("cpu"),
        data.to("cpu"),
        copy.copy(data),
        copy.deepcopy(data),
        pickle.loads(pickle.dumps(data)),
    ):
        assert twin.augmentation == augmentation(flip=True, shifts=1) and twin.copies == 18
    assert len(data) == len(images) and data.images.data_ptr() == images.data_ptr()
    assert repr(data) == (
        "TrainingSet('array': 50 images 3x6x5, uint8, 3 labels, 18 copies each, flipped and "
        "shifted by up to 1, cpu)"
    )
    assert torch.equal(data.values(), pf.TrainingSet(images).values())
    assert data.augmented().copies == 1 and data.augmented().augmentation is None


def test_keys_tell_augmentations_apart(images):
    data = pf.TrainingSet(images)
    variants = [data, *(data.augmented(**options) for options in AUGMENTATIONS)]
    keys = [variant.content_key() for variant in variants]
    assert len(set(keys)) == 4 and all(len(key) == 64 for key in keys)
    assert data.augmented(flip=True).content_key() == keys[1]
    assert data.augmented(flip=True).augmented().content_key() == keys[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flip": 1}, TypeError, "`flip` must be True or False, got 1"),
        ({"shifts": 1.5}, TypeError, "`shifts` must be a whole number"),
        ({"shifts": -1}, ValueError, "`shifts` must be at least 0, got -1"),
        ({"shifts": 5}, ValueError, "`shifts` must be less than 5 for images of 6x5"),
    ],
)
def test_wrong_augmentations_are_refused(options, error, message, images):
    with pytest.raises(error, match=message):
        pf.TrainingSet(images).augmented(**options)


def test_operations_refuse_what_is_no_augmentation(images):
    with pytest.raises(TypeError, match="`augmentation` must be that of a TrainingSet"):
        nearest_images(noisy(images), images, augmentation="flip")
    with pytest.raises(ValueError, match="`shifts` must be less than 5"):
        nearest_images(noisy(images), images, augmentation=augmentation(shifts=5))


def test_generate_takes_the_mirrored_images(tmp_path, images):
    folder = tmp_path / "set.npy"
    np.save(folder, images[:8].numpy())
    records = []
    for extra in ([], ["--flip"]):
        out = tmp_path / f"out{len(extra)}"
        command = ["generate", str(folder), "--out", str(out), "--n", "2", "--steps", "2"]
        assert cli.main([*command, "--denoiser", "optimal", "--no-progress", *extra]) == 0
        records.append(json.loads((out / "run.json").read_text()))
    assert [record["data"]["flip"] for record in records] == [False, True]
    assert records[0]["data"]["content_key"] != records[1]["data"]["content_key"]
    assert records[0]["nearest"]["mirrored"] == [False, False]
    samples = np.load(tmp_path / "out1" / "samples.npy")
    nearest = records[1]["nearest"]
    # Two steps of the optimal denoiser end at an image of the enlarged set.
    for sample, index, mirrored in zip(samples, nearest["index"], nearest["mirrored"], strict=True):
        found = images[index].flip(-1) if mirrored else images[index]
        np.testing.assert_allclose(sample, found.numpy() / 127.5 - 1, atol=0.05)
