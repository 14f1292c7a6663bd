"""Recognises the format of a source."""

from __future__ import annotations

import os
from pathlib import Path

from pyflocality._support.checks import describe
from pyflocality._support.paths import checked_path, regular_file
from pyflocality.sources import arrays, builtin, cifar, folder, mnist_idx, packed
from pyflocality.sources.base import Loaded, Request

FORMATS = (
    "a folder of images, a .zip of images, a .npy or .npz file, an MNIST idx file (.gz or not) "
    "or the folder of its four files, a folder of CIFAR batches, a folder that `pyflocality pack` "
    "wrote"
)


def open_source(source: str | os.PathLike[str], request: Request) -> Loaded:
    """Load a source in whatever format it has.

    Raises:
        TypeError: `source` is neither a name nor a path.
        ValueError: There is no such source, or it is damaged; the message names the file.
        ImportError: The source needs a package that is not installed.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"`source` must be the name of a builtin set or a path, got {describe(source)}; "
            "arrays and tensors go to TrainingSet(...)"
        )
    if isinstance(source, str) and source in builtin.BUILTINS:
        _refuse_layout(request, f"the builtin set {source!r}")
        return builtin.load_builtin(source, request)
    path = checked_path(source, "source")
    if not path.exists():
        names = ", ".join(repr(name) for name in builtin.BUILTINS)
        raise ValueError(
            f"`source` must be a builtin set ({names}) or the path of {FORMATS}; nothing is "
            f"there: {str(source)!r}"
        )
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in (".npy", ".npz"):
        _refuse_layout(request, str(path))
    if path.is_dir():
        return _open_folder(path, request)
    regular_file(path)
    if suffix == ".zip":
        return folder.load_files(path, request)
    if suffix == ".npy":
        return arrays.load_npy(path, request)
    if suffix == ".npz":
        return arrays.load_npz(path, request)
    if mnist_idx.is_idx_file(path):
        return mnist_idx.load_idx_file(path, request)
    raise ValueError(f"{path}: not a format that is read; `source` must be {FORMATS}")


def _refuse_layout(request: Request, where: str) -> None:
    if request.layout is not None:
        raise ValueError(
            "`layout` must be left out: it tells how the axes of .npy and .npz files are to be "
            f"read, got {request.layout!r} for {where}"
        )


def _open_folder(path: Path, request: Request) -> Loaded:
    if packed.is_packed(path):
        return packed.load_packed(path, request)
    if mnist_idx.find_splits(path):
        return mnist_idx.load_idx_folder(path, request)
    if cifar.find_layout(path) is not None:
        return cifar.load_cifar(path, request)
    return folder.load_files(path, request)
