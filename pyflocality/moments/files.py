"""Moments on disk: a safetensors file with a checksum over all of it.

What the tensors have to be follows from the header, which the checksum covers; equal moments make
equal files, to the byte.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.json import POSITIVE, TEXT, check_fields, parsed_object, shape
from pyflocality._support.locks import remove_abandoned, replacing, twins_of
from pyflocality.storage.mapped import guard_of

_FORMAT, _VERSION = "pyflocality-moments", 1
_DTYPES = {torch.int64: "I64", torch.float64: "F64"}
_FIELDS = {"kind": TEXT, "count": POSITIVE, "image_shape": shape(3)}


def write_moments(
    path: Path, header: dict[str, Any], tensors: dict[str, Tensor], force: bool
) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        FileExistsError: Somebody else has written it meanwhile, and `force` is False.
        OSError: The file cannot be written, on a full disk for example.
    """
    text = json.dumps(header)
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "moments": text,
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


def read_moments(
    path: Path, layouts: dict[str, dict[str, tuple[torch.dtype, int]]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file whose contents are as they were written, on the CPU.

    Args:
        path: The file.
        layouts: For every kind of moments the tensors it has, by name: their dtype, and how many
            dimensions of as many values as an image has.

    Raises:
        ValueError: The file is damaged, or not a file of moments of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: _copied(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} does not hold moments saved by pyflocality")
    if metadata.get("version") != str(_VERSION):
        raise ValueError(
            f"{path} has version {metadata.get('version')} of the format; this release reads "
            f"version {_VERSION}"
        )
    try:
        header = _checked_header(metadata, tensors, layouts)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return header, tensors


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
    metadata: dict[str, str],
    tensors: dict[str, Tensor],
    layouts: dict[str, dict[str, tuple[torch.dtype, int]]],
) -> dict[str, Any]:
    text = metadata.get("moments", "")
    if metadata.get("sha256") != checksum(text, tensors):
        raise ValueError("its contents do not match their checksum")
    header = parsed_object(text)
    check_fields(header, _FIELDS)
    if header["kind"] not in layouts:
        raise ValueError(f"it holds moments of an unknown kind, {header['kind']!r}")
    values = math.prod(header["image_shape"])
    expected = {
        name: (dtype, [values] * dimensions)
        for name, (dtype, dimensions) in layouts[header["kind"]].items()
    }
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
