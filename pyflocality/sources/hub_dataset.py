"""Datasets of the Hugging Face library `datasets`, from a folder: saved sets and parquet files.

Needs that library (extra `datasets`). The images are the column of type Image; the classes are the
column of type ClassLabel, or whole numbers named `label`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality.sources.base import Request
from pyflocality.sources.images import ImageFiles, LabelledFiles
from pyflocality.sources.splits import choose_split

# What `datasets` leaves in the folder of a saved set and of a set with several splits.
_MARKS = ("state.json", "dataset_dict.json")


def is_dataset(path: Path) -> bool:
    """Whether a folder holds a saved set or parquet files."""
    return path.is_dir() and (
        any((path / mark).is_file() for mark in _MARKS) or any(_parquet_files(path))
    )


def _parquet_files(path: Path) -> list[Path]:
    return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])


@contextmanager
def open_files(path: Path, request: Request) -> Iterator[LabelledFiles]:
    """The images of a dataset, still encoded where they are stored so."""
    table = _open_table(path, request.split)
    if len(table) == 0:
        raise ValueError(f"{path}: the dataset holds no images")
    images, labels = _columns(table, path)
    names = classes = None
    if labels is not None:
        classes = np.array(table[labels], np.int64)
        names = getattr(table.features[labels], "names", None)
    files = ImageFiles(
        [str(row) for row in range(len(table))],
        lambda row: _encoded(table[int(row)][images]),
        lambda row: f"{path}: row {row}",
        _about_total_bytes(table, images),
    )
    names = None if names is None else tuple(names)
    yield LabelledFiles(files, path.resolve().name, classes, names, {"table": table._fingerprint})


def _open_table(path: Path, split: str | None) -> Any:  # noqa: ANN401
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path} is a dataset of the library `datasets`, which is not installed: "
            "pip install 'pyflocality[datasets]'"
        ) from error
    try:
        if any((path / mark).is_file() for mark in _MARKS):
            found = datasets.load_from_disk(str(path))
        else:
            by_split: dict[str, list[str]] = {}
            for file in _parquet_files(path):
                by_split.setdefault(file.stem.split("-")[0], []).append(str(file))
            found = datasets.load_dataset("parquet", data_files=by_split)
    # The library raises errors of many kinds for damaged files.
    except Exception as error:
        raise ValueError(f"{path}: not a readable dataset: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = found[choose_split(split, list(found), str(path))]
    elif split is not None:
        raise ValueError(f"`split` must be left out: {path} has no parts, got {split!r}")
    column = _columns(found, path)[0]
    return found.cast_column(column, datasets.Image(decode=False))


def _columns(table: Any, path: Path) -> tuple[str, str | None]:  # noqa: ANN401
    """Names of the columns of images and of classes."""
    import datasets

    features = table.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise ValueError(
            f"{path}: expected one column of type Image, got {len(images)} among "
            f"{', '.join(features)}"
        )
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not classes and getattr(features.get("label"), "dtype", "").startswith(("int", "uint")):
        classes = ["label"]
    return images[0], classes[0] if len(classes) == 1 else None


def _encoded(cell: dict[str, Any]) -> bytes:
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def _about_total_bytes(table: Any, images: str) -> int:  # noqa: ANN401
    """Sizes of all images together, as the first few of them tell."""
    few = min(len(table), 16)
    return sum(len(_encoded(table[row][images])) for row in range(few)) * len(table) // few
