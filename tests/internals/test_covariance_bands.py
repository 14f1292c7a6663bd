"""The reference's covariance sums in bands and blocks."""

from __future__ import annotations

import numpy as np
from integer_sums import random_images, truth, zeros

from pyflocality.reference import covariance as reference


def test_reference_is_exact_in_bands_and_blocks(monkeypatch):
    images = random_images(50, 37)
    gram, total = zeros(37)
    # Bands of 5 rows and blocks of 5 images, so neither divides its size.
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 8 * 37 * 5)
    reference.scan(images, gram, total)
    np.testing.assert_array_equal(gram.numpy(), truth(images)[0])
    np.testing.assert_array_equal(total.numpy(), truth(images)[1])
