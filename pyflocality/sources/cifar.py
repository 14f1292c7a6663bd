"""CIFAR's batches: cifar-10 in its Python and binary versions, cifar-100 in Python's.

Python's versions are pickles. They are read by an unpickler that knows NumPy arrays and nothing
else, so a file cannot run code.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyflocality.sources.arrays import convert
from pyflocality.sources.base import Loaded, Request, choose_split

_SHAPE = (3, 32, 32)
_VALUES = 3 * 32 * 32
_NUMPY_BUILDERS = {
    builder.__name__: builder
    for builder in (np.empty(0).__reduce__()[0], np.empty(0).__reduce_ex__(5)[0])
}


@dataclass(frozen=True)
class _Layout:
    """One version of CIFAR.

    Attributes:
        parts: Files of each split.
        read: Reads images [n, 3072] and labels [n] of one file.
        names: Reads the names of the classes in a folder.
        mark: File that must lie beside those of the splits where their names say too little.
    """

    parts: dict[str, tuple[str, ...]]
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    names: Callable[[Path], tuple[str, ...] | None]
    mark: str | None = None


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
    return convert(Loaded(images, name, labels, layout.names(folder)), request)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        # How pickles of the oldest protocols spell bytes.
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if module.split(".")[0] == "numpy" and name in _NUMPY_BUILDERS:
            return _NUMPY_BUILDERS[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


def _unpickle(path: Path, *keys: str) -> list[Any]:
    """Entries of the dictionary that a file holds."""
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        entries = {_text(key): value for key, value in content.items()}
        return [entries[key] for key in keys]
    # Damaged pickles raise nearly anything.
    except Exception as error:
        raise ValueError(f"{path}: not a readable CIFAR batch: {error!r}") from error


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _checked(path: Path, values: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 2:
        raise ValueError(f"{path}: `data` must be a uint8 array [n, {_VALUES}]")
    if values.shape[1] != _VALUES:
        raise ValueError(f"{path}: `data` must have shape [n, {_VALUES}], got {values.shape}")
    numbers = np.asarray(labels)
    if numbers.shape != (len(values),) or numbers.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected {len(values)} whole numbers as labels")
    return values, numbers.astype(np.int64)


def _read_pickled_10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    return _checked(path, *_unpickle(path, "data", "labels"))


def _read_pickled_100(path: Path) -> tuple[np.ndarray, np.ndarray]:
    return _checked(path, *_unpickle(path, "data", "fine_labels"))


def _read_binary_10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    size = path.stat().st_size
    if size == 0 or size % (1 + _VALUES) != 0:
        raise ValueError(
            f"{path}: expected records of {1 + _VALUES} bytes, a label and an image; {size} bytes "
            "are not a whole number of them"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, 1 + _VALUES)
    return _checked(path, records[:, 1:], records[:, 0])


def _pickled_names(file: str, key: str) -> Callable[[Path], tuple[str, ...] | None]:
    def read(folder: Path) -> tuple[str, ...] | None:
        path = folder / file
        return tuple(map(_text, _unpickle(path, key)[0])) if path.is_file() else None

    return read


def _listed_names(folder: Path) -> tuple[str, ...] | None:
    path = folder / "batches.meta.txt"
    return tuple(path.read_text(encoding="utf-8").split()) if path.is_file() else None


_TRAIN_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
_LAYOUTS = (
    _Layout(
        {"train": _TRAIN_10, "test": ("test_batch",)},
        _read_pickled_10,
        _pickled_names("batches.meta", "label_names"),
    ),
    _Layout(
        {"train": tuple(f"{part}.bin" for part in _TRAIN_10), "test": ("test_batch.bin",)},
        _read_binary_10,
        _listed_names,
    ),
    _Layout(
        {"train": ("train",), "test": ("test",)},
        _read_pickled_100,
        _pickled_names("meta", "fine_label_names"),
        mark="meta",
    ),
)
