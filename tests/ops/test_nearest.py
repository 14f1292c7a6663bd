"""The nearest images: in order, told apart exactly, and few of them looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_order import in_exact_order
from mean_problems import ALPHA
from native_cpu import NO_CPU
from truth import values_of

import pyflocality as pf

BACKENDS = ["reference"] if NO_CPU else ["cpu", "reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def nearest(x, images, alpha=1.0, *, backend, **options):
    """What a backend answers, which ran."""
    with pf.trace_backends() as calls:
        found = pf.ops.nearest_images(x, images, alpha, backend=backend, **options)
    assert calls == [("nearest", backend)]
    return found


@each_backend
def test_nearest_images_in_order(backend, problem):
    x, images = problem(count=50)
    values = values_of(images).reshape(50, -1)
    noisy = x.double().numpy().reshape(3, -1)
    distance = ((noisy[:, None] - ALPHA.double().numpy()[:, None, None] * values) ** 2).sum(-1)
    for chunk_size in (None, 1, 7):
        for k in (1, 4, 50):
            found = nearest(x, images, ALPHA, k=k, chunk_size=chunk_size, backend=backend)
            order = np.argsort(distance, 1, kind="stable")[:, :k]
            np.testing.assert_array_equal(found.indices.numpy(), order)
            np.testing.assert_allclose(
                found.distances.numpy(), np.take_along_axis(distance, order, 1), rtol=1e-12
            )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_queries_of_every_dtype(backend, dtype, rng):
    images = torch.randint(0, 256, (200, 1, 3, 5), generator=rng, dtype=torch.uint8)
    x = torch.randn(5, 1, 3, 5, generator=rng, dtype=torch.float64).to(dtype)
    found = nearest(x, images, 0.25, k=6, backend=backend)
    values = images.double() / 127.5 - 1
    distances = (x.double()[:, None] - 0.25 * values).square().flatten(2).sum(2)
    expected, order = distances.sort(dim=1, stable=True)
    assert torch.equal(found.indices, order[:, :6])
    assert found.distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.distances.double(), expected[:, :6], rtol=1e-7, atol=0)


@each_backend
def test_nearest_prefers_the_earlier_of_equals(backend, problem):
    _, images = problem()
    twice = torch.cat([images, images])
    x = torch.from_numpy(values_of(images))
    for chunk_size in (None, 5):
        found = nearest(x, twice, k=2, chunk_size=chunk_size, backend=backend)
        np.testing.assert_array_equal(found.indices[:, 0].numpy(), np.arange(37))
        np.testing.assert_array_equal(found.indices[:, 1].numpy(), np.arange(37) + 37)
        # The values that were given: an image is at no distance from itself.
        assert not found.distances.any()


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
    for backend in BACKENDS if dtype == torch.uint8 else ["reference"]:
        for k in (1, 7, 60):
            for chunk_size in (None, 7):
                options = {"k": k, "chunk_size": chunk_size, "backend": backend}
                found = nearest(x, images, alpha, **options)
                assert found.indices.tolist() == [row[:k] for row in expected]
                gaps = x.double()[:, None] - alpha * values[found.indices]
                exact = gaps.square().flatten(2).sum(2).float()
                torch.testing.assert_close(found.distances, exact, rtol=2e-7, atol=1e-30)
    model = pf.NearestDenoiser(pf.TrainingSet(images))
    chosen = torch.tensor([row[0] for row in expected])
    assert torch.equal(model(x, 0.1, alpha), model.data.values()[chosen])


@each_backend
@pytest.mark.parametrize("middle", [127, 128, 2, 253])
def test_bytes_beside_one_another(backend, middle):
    """Bytes around the middle stand for small numbers, whose rounding was left out of the bound."""
    images = torch.tensor([middle, middle + 1, middle - 1], dtype=torch.uint8).reshape(3, 1, 1, 1)
    border = (middle + 0.5) / 127.5 - 1
    x = torch.tensor([border + gap for gap in (1e-9, -1e-9, 1e-12, 0.0)], dtype=torch.float64)
    x = x.reshape(4, 1, 1, 1)
    for noisy in (x, x.float()):
        expected = [in_exact_order(row, images, 1.0) for row in noisy]
        assert nearest(noisy, images, k=3, backend=backend).indices.tolist() == expected


@each_backend
def test_ties_of_all_images_are_ties(backend):
    images = 255 * torch.randint(0, 2, (3000, 1, 5, 5), dtype=torch.uint8)
    found = nearest(torch.zeros(1, 1, 5, 5), images, 0.3, k=5, backend=backend)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(found.distances, torch.full((1, 5), 25 * 0.09))


@each_backend
def test_copies_and_what_is_not_contiguous(backend, rng):
    whole = torch.randint(0, 256, (120, 3, 8, 6), generator=rng, dtype=torch.uint8)
    images = whole[::2, :, 1:, :5]
    data = pf.TrainingSet(images.contiguous()).augmented(flip=True, shifts=1)
    x = torch.randn(4, 3, 7, 5, generator=rng, dtype=torch.float64)
    options = {"k": 20, "augmentation": data.augmentation}
    copies = torch.cat([transform(images) for transform in data.augmentation.transforms])
    expected = pf.ops.nearest_images(x, copies, 0.7, k=20, backend="reference")
    for chunk_size in (None, 13):
        found = nearest(x, images, 0.7, backend=backend, chunk_size=chunk_size, **options)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.distances, expected.distances, rtol=1e-13, atol=0)


@pytest.mark.skipif(NO_CPU is not None, reason=str(NO_CPU))
def test_which_backend_serves_what(rng):
    """Bytes go through exact products of integers, whatever the noisy images are."""
    images = torch.randint(0, 256, (30, 1, 4, 4), generator=rng, dtype=torch.uint8)
    x = torch.randn(2, 1, 4, 4, generator=rng)
    slope = x.clone().requires_grad_()
    for noisy, stored, backend in (
        (x, images, "cpu"),
        (x.double(), images, "cpu"),
        (x, images / 127.5 - 1, "reference"),
        (slope, images, "reference"),
    ):
        with pf.trace_backends() as calls:
            found = pf.ops.nearest_images(noisy, stored, k=2)
        assert calls == [("nearest", backend)]
    found.distances.sum().backward()
    values = images.double() / 127.5 - 1
    expected = 2 * (x.double()[:, None] - values[found.indices]).sum(1)
    torch.testing.assert_close(slope.grad.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(pf.BackendUnavailableError, match="it reads uint8 images, these are torch"):
        pf.ops.nearest_images(x, images / 127.5 - 1, backend="cpu")


def test_more_neighbours_than_images_is_refused(problem):
    x, images = problem()
    with pytest.raises(ValueError, match=r"`k` must be at most the number of images 37, got 38"):
        pf.ops.nearest_images(x, images, k=38)
