"""A zip in the cache of decoded images."""

from __future__ import annotations

from source_files import (
    GREY,
    assert_images,
    truncate,
)

ZIP_ORDER, ZIP_LABELS = [0, 2, 4, 1, 3, 5], [0, 0, 0, 1, 1, 1]


def check_cached_zip(data):
    assert_images(data, GREY[ZIP_ORDER][:, None])
    assert data.labels.tolist() == ZIP_LABELS
    assert (data.label_names, data.name) == (("0", "1"), "set.zip")
    assert "memory-mapped" in repr(data)


def damage_entry(array, entry):
    truncate(entry)
