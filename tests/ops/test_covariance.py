"""Exact covariance sums: every backend against integer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from integer_sums import random_images, truth, zeros
from native_cpu import needs_cpu

import pyflocality as pf
from pyflocality.ops.covariance import accumulate_covariance

# Odd sizes around panels, words and tiles; one image; one value; several tiles of outputs.
SIZES = [(1, 1), (1, 7), (2, 33), (3, 8), (31, 65), (127, 31), (257, 129), (130, 600)]


@pytest.mark.parametrize(("n", "values"), SIZES)
def test_reference_is_exact(n, values):
    images = random_images(n, values)
    gram, total = zeros(values)
    accumulate_covariance(images, gram, total, backend="reference")
    expected_gram, expected_total = truth(images)
    np.testing.assert_array_equal(gram.numpy(), expected_gram)
    np.testing.assert_array_equal(total.numpy(), expected_total)


@pytest.mark.parametrize("byte", [0, 127, 128, 255])
@pytest.mark.parametrize("backend", ["reference"])
def test_extreme_sums_beyond_32_bits(backend, byte):
    """The largest products, over more images than a block and than int32 can sum."""
    n = 140_001
    images = torch.full((n, 3), byte, dtype=torch.uint8)
    gram, total = zeros(3)
    accumulate_covariance(images, gram, total, backend=backend)
    assert torch.equal(gram, torch.full((3, 3), n * (byte - 128) ** 2).triu())
    assert torch.equal(total, torch.full((3,), n * (byte - 128)))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_adds_to_what_is_there_and_leaves_the_lower_triangle(backend):
    images = random_images(40, 50)
    gram = torch.arange(2500).reshape(50, 50)
    total = torch.arange(50)
    with pf.trace_backends() as calls:
        accumulate_covariance(images, gram, total, backend=backend)
    assert calls == [("covariance", backend)]
    expected_gram, expected_total = truth(images)
    np.testing.assert_array_equal(gram.numpy(), np.arange(2500).reshape(50, 50) + expected_gram)
    np.testing.assert_array_equal(total.numpy(), np.arange(50) + expected_total)


@needs_cpu
def test_auto_takes_the_native_kernel_on_the_cpu():
    with pf.trace_backends() as calls:
        accumulate_covariance(random_images(4, 9), *zeros(9))
    assert calls == [("covariance", "cpu")]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_strided_images(backend):
    images = random_images(60, 80)
    for view in (images[::3], images[:, ::2], images[5:9, 3:50], images.T):
        gram, total = zeros(view.shape[1])
        accumulate_covariance(view, gram, total, backend=backend)
        np.testing.assert_array_equal(gram.numpy(), truth(view)[0])
        np.testing.assert_array_equal(total.numpy(), truth(view)[1])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_memory_mapped_images(backend, tmp_path):
    images = random_images(300, 40)
    np.save(tmp_path / "images.npy", images.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    gram, total = zeros(40)
    accumulate_covariance(mapped, gram, total, backend=backend)
    np.testing.assert_array_equal(gram.numpy(), truth(images)[0])


def test_no_images_add_nothing():
    gram, total = zeros(4)
    accumulate_covariance(torch.zeros(0, 4, dtype=torch.uint8), gram, total)
    assert not gram.any() and not total.any()


WRONG = {
    "images type": (dict(images=[[1, 2]]), TypeError, "`images`"),
    "images dtype": (dict(images=torch.zeros(2, 3)), TypeError, "`images`.*torch.float32"),
    "images shape": (dict(images=torch.zeros(3, dtype=torch.uint8)), ValueError, "`images`.*n, D"),
    "no values": (dict(images=torch.zeros(3, 0, dtype=torch.uint8)), ValueError, "`images`"),
    "gram dtype": (dict(gram=torch.zeros(3, 3)), TypeError, "`gram`"),
    "gram shape": (dict(gram=torch.zeros(3, 4, dtype=torch.int64)), ValueError, "`gram`"),
    "gram layout": (
        dict(gram=torch.zeros(3, 6, dtype=torch.int64)[:, ::2]),
        ValueError,
        "`gram` must be contiguous",
    ),
    "total shape": (dict(total=torch.zeros(4, dtype=torch.int64)), ValueError, "`total`"),
    "device": (
        dict(gram=torch.zeros(3, 3, dtype=torch.int64, device="meta")),
        ValueError,
        "`gram` must hold values",
    ),
    "backend": (dict(backend="fortran"), ValueError, "`backend`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    change, kind, message = WRONG[case]
    gram, total = zeros(3)
    arguments = dict(images=random_images(2, 3), gram=gram, total=total) | change
    with pytest.raises(kind, match=message):
        accumulate_covariance(**arguments)
    assert not gram.any() and not total.any()


def test_a_backend_without_an_implementation_is_refused():
    with pytest.raises(pf.BackendUnavailableError, match="no implementation"):
        accumulate_covariance(random_images(2, 3), *zeros(3), backend="cuda")
