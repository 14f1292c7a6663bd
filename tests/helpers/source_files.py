"""Image files and folders that the tests of sources write and load."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import torch
from PIL import Image

from pyflocality.data import TrainingSet

_RNG = np.random.default_rng(1)
GREY = _RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = _RNG.integers(0, 256, (6, 3, 5, 4), dtype=np.uint8)


def encoded(pixels, form="PNG", **options):
    """Bytes of an image file: [H, W], [3, H, W] or a Pillow image."""
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0).copy())
    buffer = io.BytesIO()
    pixels.save(buffer, form, **options)
    return buffer.getvalue()


def write_tree(root, files, kind):
    """Write files by name into a folder or a zip archive; returns its path."""
    if kind == "zip":
        path = root.with_name(f"{root.name}.zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    root.mkdir(exist_ok=True)
    return root


def load(source, **arguments):
    return TrainingSet.load(source, **{"progress": False} | arguments)


def assert_images(data, expected):
    assert data.dtype == torch.uint8
    np.testing.assert_array_equal(data.images.numpy(), expected)


def luma(colour):
    red, green, blue = colour.astype(np.float64)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def save_npy(tmp_path, array):
    path = tmp_path / "set.npy"
    np.save(path, array)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])
