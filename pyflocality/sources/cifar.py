"""CIFAR's batches: cifar-10 in its Python and binary versions, cifar-100 in Python's.

Python's versions are pickles. They are read by `pyflocality.sources.inert_pickle`, which knows
plain values and numeric arrays and calls nothing, so a file cannot run code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality._support.text import printable
from pyflocality.sources import inert_pickle
from pyflocality.sources.arrays import convert
from pyflocality.sources.base import Loaded, Request
from pyflocality.sources.splits import choose_split

_SHAPE = (3, 32, 32)
_VALUES = 3 * 32 * 32
# Classes of CIFAR-100, and three times the size of its largest file.
_MAX_CLASSES = 100
_MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class _Layout:
    """One version of CIFAR.

    Attributes:
        parts: Files of each split.
        labels: Name of the labels in a pickle; None for records of a label and an image.
        names: The file of the names of the classes.
        names_key: Their name in a pickle; None for lines of text.
        mark: File that must lie beside those of the splits where their names say too little.
    """

    parts: dict[str, tuple[str, ...]]
    labels: str | None
    names: str
    names_key: str | None
    mark: str | None = None

    def read(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, 3072] and labels [n] of one file."""
        if self.labels is not None:
            return _checked(path, *_unpickle(path, "data", self.labels))
        size = path.stat().st_size
        if size == 0 or size % (1 + _VALUES) != 0:
            raise ValueError(
                f"{path}: expected records of {1 + _VALUES} bytes, a label and an image; {size} "
                "bytes are not a whole number of them"
            )
        records = np.fromfile(path, np.uint8).reshape(-1, 1 + _VALUES)
        return _checked(path, records[:, 1:], records[:, 0])

    def class_names(self, folder: Path) -> tuple[str, ...] | None:
        """The names of the classes, where they lie in the folder."""
        path, key = folder / self.names, self.names_key
        if not path.is_file():
            return None
        if key is None:
            return tuple(path.read_text(encoding="utf-8").split())
        names = _unpickle(path, key)[0]
        if not isinstance(names, list) or not all(type(name) in (bytes, str) for name in names):
            raise ValueError(f"{path}: expected a list of names as {key!r}")
        try:
            return tuple(map(_text, names))
        except ValueError as error:
            raise ValueError(f"{path}: {key!r} holds a name that is no text: {error}") from error


_TRAIN_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
_LAYOUTS = (
    _Layout({"train": _TRAIN_10, "test": ("test_batch",)}, "labels", "batches.meta", "label_names"),
    _Layout(
        {"train": tuple(f"{part}.bin" for part in _TRAIN_10), "test": ("test_batch.bin",)},
        None,
        "batches.meta.txt",
        None,
    ),
    _Layout(
        {"train": ("train",), "test": ("test",)}, "fine_labels", "meta", "fine_label_names", "meta"
    ),
)


def find_layout(folder: Path) -> _Layout | None:
    """The version of CIFAR that a folder holds, or None."""
    for layout in _LAYOUTS:
        files = [folder / part for parts in layout.parts.values() for part in parts]
        marked = layout.mark is None or (folder / layout.mark).is_file()
        if marked and any(path.is_file() for path in files):
            return layout
    return None


def load_cifar(folder: Path, request: Request) -> Loaded:
    """Load one split of a folder that holds CIFAR's batches.

    Raises:
        ValueError: A batch is missing, damaged, or holds anything but arrays and plain values.
    """
    layout = find_layout(folder)
    if layout is None:
        raise ValueError(f"{folder}: holds no CIFAR batches")
    split = choose_split(request.split, sorted(layout.parts), str(folder))
    batches = []
    for part in layout.parts[split]:
        path = folder / part
        if not path.is_file():
            raise ValueError(f"{path}: this batch of CIFAR is missing")
        batches.append(layout.read(path))
    images = np.concatenate([values for values, _ in batches]).reshape(-1, *_SHAPE)
    labels = np.concatenate([numbers for _, numbers in batches])
    name = f"{folder.resolve().name}/{split}"
    return convert(Loaded(images, name, labels, layout.class_names(folder)), request)


def _unpickle(path: Path, *keys: str) -> list[Any]:
    """Entries of the dictionary that a file holds."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"has {path.stat().st_size} bytes, expected {_MAX_BYTES} at most")
        content = inert_pickle.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, expected a dict")
        entries = {_text(key): value for key, value in content.items()}
        missing = [key for key in keys if key not in entries]
        if missing:
            raise ValueError(f"holds no {missing[0]!r}")
        return [entries[key] for key in keys]
    except (OSError, ValueError) as error:
        told = printable(str(error))
        raise ValueError(f"{path}: not a readable CIFAR batch: {told}") from error


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _checked(path: Path, values: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 2:
        raise ValueError(f"{path}: `data` must be a uint8 array [n, {_VALUES}]")
    if values.shape[1] != _VALUES:
        raise ValueError(f"{path}: `data` must have shape [n, {_VALUES}], got {values.shape}")
    # Checked one by one: a list of a list of a list takes more memory as an array than in a file.
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        labels = np.array(labels)
    whole = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"
    if not whole or labels.shape != (len(values),):
        raise ValueError(f"{path}: expected {len(values)} whole numbers as labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < _MAX_CLASSES:
        raise ValueError(
            f"{path}: expected labels from 0 to {_MAX_CLASSES - 1}, got {labels.min()} to "
            f"{labels.max()}"
        )
    return values, labels.astype(np.int64)
