"""Sets that need no files: scikit-learn's digits and photographs, and synthetic images."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
from torch import Tensor

from pyflocality.sources import drawn
from pyflocality.sources.arrays import convert
from pyflocality.sources.base import Loaded, Request, refuse_split

PATCH = 32
# (factor of reduction, distance between patches): neighbours overlap by half at full size, and
# by more where the photographs are smaller, so that each scale gives a fair share of the set.
PHOTO_SCALES = ((1, 16), (2, 8), (4, 4))

SYNTHETIC_IMAGES = 4096
SYNTHETIC_SIZE = 32


def load_builtin(name: str, request: Request) -> Loaded:
    """Load a builtin set by its name, one of `BUILTINS`."""
    refuse_split(request.split, f"the builtin set {name!r}")
    return convert(BUILTINS[name](request), request)


def digits(request: Request) -> Loaded:
    """1,797 handwritten digits, 8x8 grey with 17 levels, labelled 0..9."""
    bunch = _sklearn_datasets("digits").load_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    return Loaded(images, "digits", bunch.target, names)


def photos(request: Request) -> Loaded:
    """4,906 natural patches, 32x32 RGB, of two photographs: a temple ("china") and a flower.

    The patches lie on regular grids over each photograph at its full size, every 16 pixels, at
    half the size, every 8 pixels, and at a quarter, every 4 pixels. The smaller photographs are
    averages over blocks of pixels. Labels tell the photograph.
    """
    bunch = _sklearn_datasets("photos").load_sample_images()
    patches, labels = [], []
    for label, photo in enumerate(bunch.images):
        for factor, stride in PHOTO_SCALES:
            grid = _grid_patches(_area_average(photo, factor), stride)
            patches.append(grid)
            labels.append(np.full(len(grid), label))
    names = tuple(path.rsplit("/", 1)[-1].split(".")[0] for path in bunch.filenames)
    return Loaded(np.concatenate(patches), "photos", np.concatenate(labels), names)


def _area_average(photo: np.ndarray, factor: int) -> np.ndarray:
    """Means over factor x factor pixels, rounded: [H, W, 3] -> [H // factor, W // factor, 3]."""
    height, width = photo.shape[0] // factor, photo.shape[1] // factor
    blocks = photo[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.floor(blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def _grid_patches(photo: np.ndarray, stride: int) -> np.ndarray:
    """All patches on a regular grid: [H, W, 3] -> [n, 3, 32, 32]."""
    windows = np.lib.stride_tricks.sliding_window_view(photo, (PATCH, PATCH), axis=(0, 1))
    return windows[::stride, ::stride].reshape(-1, 3, PATCH, PATCH)


def _drawn(name: str, draw: Callable[[int], Tensor]) -> Callable[[Request], Loaded]:
    def load(request: Request) -> Loaded:
        # Drawn at the size asked for, where it is square: nothing is lost by resampling.
        size = max(request.resolution or (SYNTHETIC_SIZE,))
        return Loaded(draw(size).numpy(), name)

    return load


def _disks(size: int) -> Tensor:
    coordinates = drawn.disk_coordinates(SYNTHETIC_IMAGES, size, drawn.seeded(None))
    return drawn.disks(coordinates, size).float()


def _c_alpha(size: int) -> Tensor:
    return drawn.c_alpha(SYNTHETIC_IMAGES, size, 2.0, drawn.seeded(None))


def _sklearn_datasets(name: str) -> ModuleType:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ImportError(
            f"the builtin set {name!r} comes with scikit-learn, which is not installed: "
            "pip install 'pyflocality[sets]'"
        ) from error
    return sklearn.datasets


BUILTINS: dict[str, Callable[[Request], Loaded]] = {
    "digits": digits,
    "photos": photos,
    "disks": _drawn("disks", _disks),
    "c_alpha": _drawn("c_alpha", _c_alpha),
}
