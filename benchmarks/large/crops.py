"""Sets of any size: seeded crops of scikit-learn's two photographs, enlarged images of a set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_SEED = 19


def crops(count: int, side: int) -> np.ndarray:
    """Different crops of both photographs by turns, uint8 [count, 3, side, side]."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    generator = np.random.default_rng(_SEED)
    result = np.empty((count, 3, side, side), np.uint8)
    for number, photograph in enumerate(photographs):
        height, width = photograph.shape[0] - side + 1, photograph.shape[1] - side + 1
        mine = result[number :: len(photographs)]
        places = generator.choice(height * width, len(mine), replace=False)
        for image, place in zip(mine, places, strict=True):
            row, column = divmod(int(place), width)
            image[:] = photograph[row : row + side, column : column + side].transpose(2, 0, 1)
    return result


def enlarged(source: Path, count: int, side: int) -> np.ndarray:
    """Images of a set in colours, drawn with a seed, by bicubic interpolation.

    Args:
        source: The set.
        count: How many.
        side: Their new height and width.

    Returns:
        uint8 [count, 3, side, side].
    """
    from PIL import Image

    import pyflocality as pf

    data = pf.TrainingSet.load(source, progress=False)
    chosen = np.random.default_rng(_SEED).choice(len(data), count, replace=False)
    result = np.empty((count, 3, side, side), np.uint8)
    for image, place in zip(result, np.sort(chosen), strict=True):
        before = Image.fromarray(data.images[int(place)].permute(1, 2, 0).contiguous().numpy())
        after = before.resize((side, side), Image.Resampling.BICUBIC)
        image[:] = np.asarray(after).transpose(2, 0, 1)
    return result


def write_pngs(images: np.ndarray, folder: Path) -> None:
    """A folder of image files."""
    from PIL import Image

    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:05d}.png")
