"""The nearest images: in order, told apart exactly, and few of them looked at."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from mean_problems import ALPHA
from truth import values_of

import pyflocality as pf


def test_nearest_images_in_order(problem):
    x, images = problem(count=50)
    values = values_of(images).reshape(50, -1)
    noisy = x.double().numpy().reshape(3, -1)
    distance = ((noisy[:, None] - ALPHA.double().numpy()[:, None, None] * values) ** 2).sum(-1)
    for chunk_size in (None, 1, 7):
        found = pf.ops.nearest_images(x, images, ALPHA, k=4, chunk_size=chunk_size)
        order = np.argsort(distance, 1, kind="stable")[:, :4]
        np.testing.assert_array_equal(found.indices.numpy(), order)
        np.testing.assert_allclose(
            found.distances.numpy(), np.take_along_axis(distance, order, 1), rtol=1e-12
        )


def test_nearest_prefers_the_earlier_of_equals(problem):
    _, images = problem()
    twice = torch.cat([images, images])
    x = torch.from_numpy(values_of(images))
    for chunk_size in (None, 5):
        found = pf.ops.nearest_images(x, twice, k=2, chunk_size=chunk_size)
        np.testing.assert_array_equal(found.indices[:, 0].numpy(), np.arange(37))
        np.testing.assert_array_equal(found.indices[:, 1].numpy(), np.arange(37) + 37)


def in_exact_order(x, images, alpha):
    """Positions by |x - alpha v|^2 in fractions; the earlier first among equals."""
    noisy, factor = [Fraction(u) for u in x.flatten().tolist()], Fraction(alpha)

    def distance(image):
        row = image.flatten().tolist()
        if image.dtype == torch.uint8:
            row = [Fraction(2 * u - 255, 255) for u in row]
        return sum((p - factor * Fraction(v)) ** 2 for p, v in zip(noisy, row, strict=True))

    distances = [distance(image) for image in images]
    return sorted(range(len(images)), key=distances.__getitem__)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.0, 1e-4, 1e-9])
def test_nearest_images_are_told_apart_exactly(rng, dtype, alpha):
    """Single precision saw no difference between distances at alpha 1e-4 and took any image."""
    images = torch.randint(0, 256, (60, 2, 4, 5), generator=rng, dtype=torch.uint8)
    images[50:] = images[:10]
    if dtype != torch.uint8:
        images = images.to(dtype) / 127.5 - 1
    noise = torch.randn(4, 2, 4, 5, generator=rng) * torch.tensor([1e-8, 1e-3, 1.0, 90.0]).reshape(
        4, 1, 1, 1
    )
    values = images.double() / 127.5 - 1 if dtype == torch.uint8 else images.double()
    # The last one lies half way between two images: a tie, or all but one.
    between = (values[20] + values[30]) / 2
    x = torch.cat([(alpha * values[:4] + noise), alpha * between[None]]).float()
    expected = [in_exact_order(row, images, alpha) for row in x]
    for k in (1, 7, 60):
        for chunk_size in (None, 7):
            found = pf.ops.nearest_images(x, images, alpha, k=k, chunk_size=chunk_size)
            assert found.indices.tolist() == [row[:k] for row in expected]
            exact = (x.double()[:, None] - alpha * values[found.indices]).square().flatten(2).sum(2)
            torch.testing.assert_close(found.distances, exact.float(), rtol=2e-7, atol=1e-30)
    model = pf.NearestDenoiser(pf.TrainingSet(images))
    chosen = torch.tensor([row[0] for row in expected])
    assert torch.equal(model(x, 0.1, alpha), model.data.values()[chosen])


def test_ties_of_all_images_are_ties():
    images = 255 * torch.randint(0, 2, (3000, 1, 5, 5), dtype=torch.uint8)
    found = pf.ops.nearest_images(torch.zeros(1, 1, 5, 5), images, 0.3, k=5)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(found.distances, torch.full((1, 5), 25 * 0.09))


def test_more_neighbours_than_images_is_refused(problem):
    x, images = problem()
    with pytest.raises(ValueError, match=r"`k` must be at most the number of images 37, got 38"):
        pf.ops.nearest_images(x, images, k=38)
