"""Datasets of the Hugging Face library `datasets`, from a folder: saved sets and parquet files.

Needs that library (extra `datasets`). One column holds the images: the only one of type Image, or
else the only one of `{bytes, path}` or of bytes. One may hold the classes: the only one of type
ClassLabel, or else the only one of whole numbers with a usual name such as `label`. Where there are
several, `image_column` and `label_column` choose.

Parquet files lie in the folder or up to three levels below it. What part of the set a file is, its
name tells (`train-00000-of-00001.parquet`, `test.parquet`) or the name of its folder
(`default/train/0000.parquet`).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyflocality._support.paths import regular_file
from pyflocality._support.text import printable
from pyflocality.sources import dataset_columns
from pyflocality.sources.base import Request, refuse_split
from pyflocality.sources.images import ImageFiles
from pyflocality.sources.selection import is_image
from pyflocality.sources.splits import choose_split, parts_of_files

# What `datasets` leaves in the folder of a saved set and of a set with several splits.
_MARKS = ("state.json", "dataset_dict.json")
_LEVELS = 3
# A table beside image files, which are the set then.
_TABLE_OF_IMAGES = "metadata.parquet"


def is_dataset(path: Path) -> bool:
    """Whether a folder holds a saved set or parquet files of images."""
    if not path.is_dir():
        return False
    return any((path / mark).is_file() for mark in _MARKS) or bool(_parquet_files(path))


def _parquet_files(path: Path) -> list[Path]:
    """The parquet files of a dataset; none where image files lie beside one of them."""
    files: list[Path] = []
    folders = [path]
    for level in range(_LEVELS + 1):
        below: list[Path] = []
        for folder in folders:
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
            tables = [entry for entry in entries if entry.name.lower().endswith(".parquet")]
            if tables and any(is_image(entry.name) for entry in entries):
                return []
            files += [Path(entry.path) for entry in tables if entry.name != _TABLE_OF_IMAGES]
            if level < _LEVELS:
                below += [Path(entry.path) for entry in entries if entry.is_dir()]
        folders = below
    return sorted(files)


@contextmanager
def open_files(path: Path, request: Request) -> Iterator[ImageFiles]:
    """The images of a dataset, still encoded where they are stored so.

    Raises:
        ValueError: The dataset is damaged or empty, a row has no image or no class, or it cannot be
            told which part or column is meant.
        ImportError: The library is not installed.
    """
    where = printable(str(path))
    table = _open_table(path, request.split)
    if len(table) == 0:
        raise ValueError(f"{where}: the dataset holds no images")
    images, labels = dataset_columns.choose(table.features, where, request)
    table = dataset_columns.as_stored(table, images, where)
    dataset_columns.check_images(table, images, where)
    classes = names = None
    if labels is not None:
        classes, names = dataset_columns.read_classes(table, labels, where)
    yield ImageFiles(
        [str(row) for row in range(len(table))],
        lambda row: _encoded(table[int(row)][images]),
        lambda row: f"{where}: row {row}",
        _about_total_bytes(table, images),
        path.resolve().name,
        classes,
        names,
        {"table": table._fingerprint, "columns": [images, labels]},
    )


def _open_table(path: Path, split: str | None) -> Any:  # noqa: ANN401
    where = printable(str(path))
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{where} is a dataset of the library `datasets`, which is not installed: "
            "pip install 'pyflocality[datasets]'"
        ) from error
    if "::" in str(path) or "://" in str(path):
        raise ValueError(f"{where}: `datasets` takes a path with '::' or '://' for an address")
    if any((path / mark).is_file() for mark in _MARKS):
        dataset = _opened(where, lambda: datasets.load_from_disk(str(path)))
        if isinstance(dataset, datasets.DatasetDict):
            return dataset[choose_split(split, list(dataset), where)]
        refuse_split(split, where)
        return dataset
    files = _files_of_split(path, split, where)
    # Names of files are patterns there.
    data_files = {"train": [glob.escape(str(file)) for file in files]}
    return _opened(
        where, lambda: datasets.load_dataset("parquet", data_files=data_files, split="train")
    )


def _opened(where: str, load: Any) -> Any:  # noqa: ANN401
    try:
        return load()
    # The library raises errors of many kinds for damaged files.
    except Exception as error:
        raise ValueError(f"{where}: not a readable dataset: {error}") from error


def _files_of_split(path: Path, split: str | None, where: str) -> list[Path]:
    """The parquet files of the part that is asked for."""
    parts: dict[str | None, list[Path]] = {}
    origins: dict[str, str] = {}
    files = _parquet_files(path)
    places = [file.relative_to(path).parts[:-1] for file in files]
    told = parts_of_files([(file.stem, at) for file, at in zip(files, places, strict=True)])
    for file, folders, part in zip(files, places, told, strict=True):
        parts.setdefault(part, []).append(file)
        config = "/".join(name for name in folders if name not in (part, "data"))
        origins.setdefault(config, file.relative_to(path).as_posix())
    if len(origins) > 1:
        listed = ", ".join(f"'{printable(file)}'" for file in sorted(origins.values())[:3])
        raise ValueError(f"{where}: holds several datasets ({listed}): name the folder of one")
    if None not in parts:
        return parts[choose_split(split, sorted(map(str, parts)), where)]
    if len(parts) > 1:
        raise ValueError(
            f"{where}: cannot tell which part of the set '{printable(parts[None][0].name)}' is; "
            f"others are {', '.join(sorted(repr(part) for part in parts if part is not None))}"
        )
    refuse_split(split, where)
    return parts[None]


def _encoded(cell: dict[str, Any]) -> bytes:
    if cell["bytes"] is not None:
        return cell["bytes"]
    path = Path(cell["path"])
    regular_file(path)
    return path.read_bytes()


def _about_total_bytes(table: Any, images: str) -> int:  # noqa: ANN401
    """Sizes of all images together, as the first few of them tell."""
    few = min(len(table), 16)
    return sum(len(_encoded(table[row][images])) for row in range(few)) * len(table) // few
