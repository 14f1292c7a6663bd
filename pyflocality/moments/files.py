"""Moments and components on disk: a safetensors file with a checksum over all of it.

What the tensors have to be follows from the header, which the checksum covers; what is equal makes
equal files, to the byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflocality._support.json import (
    COUNT,
    POSITIVE,
    TEXT,
    Kind,
    check_fields,
    parsed_object,
    shape,
)
from pyflocality._support.locks import remove_abandoned, replacing, twins_of
from pyflocality._support.paths import check_result
from pyflocality.storage.mapped import guard_of

_DTYPES = {torch.int64: "I64", torch.float64: "F64"}


@dataclass(frozen=True)
class Form:
    """What the files of a kind are.

    Attributes:
        what: What they hold, in a word: `pyflocality-` and this is their format, and in their
            metadata their header has this name.
        fields: What the fields of their header may hold.
        layout: What their tensors are by name, dtype and shape, from the header; ValueError where
            that is none.
        version: The version that is written, and read.
    """

    what: str
    fields: Mapping[str, Kind]
    layout: Callable[[dict[str, Any]], dict[str, tuple[torch.dtype, list[int]]]]
    version: int = 1

    @property
    def format(self) -> str:
        """Name of the format."""
        return f"pyflocality-{self.what}"


def _basis_layout(header: dict[str, Any]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Tensors of a file of components."""
    sides, rank = header["image_shape"], header["rank"]
    values = math.prod(sides)
    shapes = {"mean": sides, "values": [rank], "variance": [values], "vectors": [values, rank]}
    return {name: (torch.float64, sizes) for name, sizes in shapes.items()}


_BOUND = Kind(
    "a number, not negative",
    lambda value: isinstance(value, (int, float)) and 0 <= value < math.inf,
)
BASIS = Form(
    "basis",
    {
        "count": POSITIVE,
        "image_shape": shape(3),
        "rank": COUNT,
        "method": TEXT,
        "error": _BOUND,
        "key": TEXT,
        # The checksum of the file of moments that they lie beside.
        "of": TEXT.or_none(),
    },
    _basis_layout,
)


class StoredBasis(NamedTuple):
    """A file of components beside one of moments.

    Attributes:
        path: The file.
        key: Content key of what it holds.
    """

    path: Path
    key: str


def basis_file(moments: Path) -> Path:
    """Where the components of a file of moments lie: `m.basis.safetensors` of `m.safetensors`."""
    return moments.with_name(f"{moments.stem}.basis{moments.suffix}")


def stored_basis(moments: Path) -> StoredBasis | None:
    """The file of components beside one of moments, if there is one and it is of these."""
    path = basis_file(moments)
    if not path.is_file():
        return None
    try:
        header = header_of(path, BASIS)
        own = read_metadata(moments).get("sha256")
        if header["of"] != own:
            raise ValueError(f"{path} is of other moments than those of {moments.name}")
    except ValueError as error:
        warnings.warn(f"components are computed anew: {error}", stacklevel=4)
        return None
    return StoredBasis(path, header["key"])


def check_free(path: Path, force: bool) -> None:
    """Refuse to write a file where something else is, or nothing could be.

    Raises:
        FileExistsError: `path` exists and `force` is False; it is a pipe or a device.
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: The folder of `path` does not exist.
    """
    # A link that leads nowhere is there, too; a link is replaced, not what it leads to.
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path} exists: pass force=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder to save {path.name} in")
    check_result(path)


def write_tensors(
    path: Path, form: Form, header: dict[str, Any], tensors: dict[str, Tensor], force: bool
) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        FileExistsError: Somebody else has written it meanwhile, and `force` is False.
        OSError: The file cannot be written, on a full disk for example.
    """
    text = json.dumps(header)
    metadata = {
        "format": form.format,
        "version": str(form.version),
        form.what: text,
        "sha256": checksum(text, tensors),
    }
    remove_abandoned(twins_of(path))
    try:
        with replacing(path, 0o666, force=force) as file:
            file.write(_safetensors_header(metadata, tensors))
            for name in sorted(tensors):
                file.write(_bytes_of(tensors[name]))
    except OSError as error:
        # Writes to an open file that fail do not tell which.
        if error.filename is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def _safetensors_header(metadata: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    """What stands before the bytes of the tensors, those in the order of their names.

    The library of that name writes metadata in any order, and large files beside a copy of theirs.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        dtype, offsets = _DTYPES[tensor.dtype], [start, end]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path, form: Form) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file whose contents are as they were written, on the CPU.

    Raises:
        ValueError: The file is damaged, or not one of this form and version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Those of another form are not read.
            names = file.keys() if metadata.get("format") == form.format else []
            tensors = {name: _copied(file.get_tensor(name)) for name in names}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from error
    _check_form(path, form, metadata)
    try:
        return _checked_header(form, metadata, tensors), tensors
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What stands before the tensors of a safetensors file, none of which is read or checked.

    Raises:
        ValueError: It is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from error


def _check_form(path: Path, form: Form, metadata: Mapping[str, str]) -> None:
    """Raise ValueError unless a file with this metadata is one of this form and version."""
    if metadata.get("format") != form.format:
        raise ValueError(f"{path} does not hold {form.what} saved by pyflocality")
    if metadata.get("version") != str(form.version):
        raise ValueError(
            f"{path} has version {metadata.get('version')} of the format; this release reads "
            f"version {form.version}"
        )


def header_of(path: Path, form: Form) -> dict[str, Any]:
    """The header of a file of this form, whose tensors and checksum are not looked at.

    Raises:
        ValueError: It is none of this form and version.
    """
    metadata = read_metadata(path)
    _check_form(path, form, metadata)
    try:
        header = parsed_object(metadata.get(form.what, ""))
        check_fields(header, form.fields)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return header


def _damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path} is damaged or not a safetensors file: {error}")


def _copied(mapped: Tensor) -> Tensor:
    """A tensor in memory of its own: its file may be written to or cut short."""
    storage = mapped.untyped_storage()
    guard = guard_of(storage.data_ptr(), storage.nbytes())
    try:
        tensor, lost = mapped.clone(), guard.lost
    finally:
        guard.release()
    if lost:
        raise ValueError("it was cut short while it was read")
    return tensor


def _checked_header(
    form: Form, metadata: Mapping[str, str], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    text = metadata.get(form.what, "")
    if metadata.get("sha256") != checksum(text, tensors):
        raise ValueError("its contents do not match their checksum")
    header = parsed_object(text)
    check_fields(header, form.fields)
    expected = form.layout(header)
    layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    if layout != expected:
        raise ValueError(f"it holds the tensors {layout}, expected {expected}")
    return header


def checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a header and named tensors, in hexadecimal."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes_of(tensors[name]))
    return digest.hexdigest()
