"""Columns of datasets of the library `datasets`: which hold images and classes, and which ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from pyflocality._support.caller import caller_level
from pyflocality._support.text import printable
from pyflocality.sources.base import Request

_LABELS = frozenset(
    "label labels class class_id class_label target targets y cls fine_label coarse_label "
    "category".split()
)


def choose(features: Mapping[str, Any], where: str, request: Request) -> tuple[str, str | None]:
    """Names of the columns of images and of classes, None where there are no classes.

    Raises:
        ValueError: A column that is asked for is not there or holds something else; or there are
            several that may be meant.
    """
    return _images(features, where, request.image_column), _classes(
        features, where, request.label_column
    )


def _images(features: Mapping[str, Any], where: str, asked: str | None) -> str:
    kinds = {name: _image_kind(feature) for name, feature in features.items()}
    if asked is not None:
        kind = _asked(kinds, asked, "image_column", where)
        if kind not in ("Image", "encoded", "bytes"):
            _refuse(asked, "image_column", features, "one encoded image a row", where)
        return asked
    for wanted in ("Image", "encoded", "bytes"):
        result = [name for name, kind in kinds.items() if kind == wanted]
        if result:
            return _only(result, "image_column", "images", where)
    lists = [name for name, kind in kinds.items() if kind == "lists"]
    if lists:
        _refuse(lists[0], "image_column", features, "one image a row", where)
    listed = printable(", ".join(features))
    raise ValueError(f"{where}: expected a column of type Image, got none among {listed}")


def _image_kind(feature: Any) -> str | None:  # noqa: ANN401
    """How a column holds images, if it does."""
    import datasets

    if isinstance(feature, datasets.Image):
        return "Image"
    if _is_list(feature):
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = getattr(inner, "feature", inner)
        return "lists" if _image_kind(inner) in ("Image", "encoded", "lists") else None
    if isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}:
        return "encoded"
    return "bytes" if getattr(feature, "dtype", None) in ("binary", "large_binary") else None


def _is_list(feature: Any) -> bool:  # noqa: ANN401
    return isinstance(feature, list) or hasattr(feature, "feature")


def _classes(features: Mapping[str, Any], where: str, asked: str | None) -> str | None:
    kinds = {name: _label_kind(feature) for name, feature in features.items()}
    if asked is not None:
        if _asked(kinds, asked, "label_column", where) is None:
            _refuse(asked, "label_column", features, "ClassLabel or whole numbers", where)
        return asked
    result = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if not result:
        numbers = [name for name, kind in kinds.items() if kind == "numbers"]
        result = [name for name in numbers if name.lower() in _LABELS]
    if not result:
        _warn_of_text([name for name in kinds if name.lower() in _LABELS], features, where)
    return _only(result, "label_column", "classes", where) if result else None


def _warn_of_text(names: Sequence[str], features: Mapping[str, Any], where: str) -> None:
    if names:
        warnings.warn(
            f"{where}: no labels: column '{printable(names[0])}' holds neither ClassLabel nor "
            f"whole numbers but {printable(repr(features[names[0]]))[:80]}",
            stacklevel=caller_level(),
        )


def _label_kind(feature: Any) -> str | None:  # noqa: ANN401
    """How a column holds classes, if it does."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "ClassLabel"
    dtype = getattr(feature, "dtype", None)
    return "numbers" if isinstance(dtype, str) and dtype.startswith(("int", "uint")) else None


def _asked(kinds: Mapping[str, str | None], asked: str, argument: str, where: str) -> str | None:
    if asked not in kinds:
        listed = printable(", ".join(map(repr, kinds)))
        raise ValueError(
            f"`{argument}` must be one of {listed}, the columns of {where}, got {asked!r}"
        )
    return kinds[asked]


def _only(result: Sequence[str], argument: str, what: str, where: str) -> str:
    if len(result) > 1:
        listed = printable(", ".join(map(repr, result)))
        raise ValueError(
            f"`{argument}` must be given: {where} has several columns of {what}, {listed}"
        )
    return result[0]


def _refuse(
    name: str, argument: str, features: Mapping[str, Any], expected: str, where: str
) -> NoReturn:
    holds = "lists" if _is_list(features[name]) else repr(features[name])
    raise ValueError(
        f"{where}: column '{printable(name)}' holds {printable(holds)[:200]}, expected {expected} "
        f"(`{argument}` chooses another)"
    )


def as_stored(table: Any, images: str, where: str) -> Any:  # noqa: ANN401
    """The dataset with its images as they are stored, not decoded."""
    import datasets

    try:
        return table.cast_column(images, datasets.Image(decode=False))
    # The library raises errors of many kinds for what it cannot convert.
    except Exception as error:
        raise ValueError(
            f"{where}: column '{printable(images)}' cannot be read as images: {error}"
        ) from error


def check_images(table: Any, images: str, where: str) -> None:  # noqa: ANN401
    """Raise if a row has no image."""
    import pyarrow.compute as compute

    column = _column(table, images)
    content, path = (compute.struct_field(column, field) for field in ("bytes", "path"))
    missing = compute.and_(compute.is_null(content), compute.is_null(path))
    _refuse_rows(compute.or_(compute.is_null(column), missing), images, "no image", where)


def read_classes(
    table: Any,  # noqa: ANN401
    labels: str,
    where: str,
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """The class of every row, if it is told, and the names of the classes, if they have some."""
    import pyarrow.compute as compute

    column = _column(table, labels)
    _refuse_rows(compute.is_null(column), labels, "no class", where)
    classes = column.to_numpy()
    names = getattr(table.features[labels], "names", None)
    if names is not None and (classes == -1).all():
        # How sets for competitions keep the classes of a part to themselves.
        warnings.warn(
            f"{where}: no labels: column '{printable(labels)}' has -1 in every row",
            stacklevel=caller_level(),
        )
        return None, None
    highest = np.iinfo(np.int64).max if names is None else len(names) - 1
    lowest = np.iinfo(np.int64).min if names is None else 0
    outside = np.flatnonzero((classes < lowest) | (classes > highest))
    if len(outside):
        bounds = "64 bits" if names is None else f"0..{highest}, for which there are names"
        raise ValueError(
            f"{where}: row {outside[0]} has class {classes[outside[0]]} in column "
            f"'{printable(labels)}', expected {bounds}"
        )
    return classes.astype(np.int64), None if names is None else tuple(names)


def _column(table: Any, name: str) -> Any:  # noqa: ANN401
    """A column as Arrow has it, in the order of the rows."""
    if table._indices is not None:
        table = table.select_columns([name]).flatten_indices()
    return table.data.column(name)


def _refuse_rows(missing: Any, name: str, what: str, where: str) -> None:  # noqa: ANN401
    rows = np.flatnonzero(missing.to_numpy())
    if len(rows):
        raise ValueError(
            f"{where}: {len(rows)} rows have {what} in column '{printable(name)}', first row "
            f"{rows[0]}"
        )
