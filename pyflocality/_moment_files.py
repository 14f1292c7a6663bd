"""Moments on disk: a safetensors file with a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from torch import Tensor

_FORMAT, _VERSION = "pyflocality-moments", 1


def write_moments(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: The file cannot be written, on a full disk for example.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps(header)
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "moments": text,
        "sha256": checksum(text, tensors),
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_moments(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file whose contents are as they were written, on the CPU.

    Raises:
        ValueError: The file is damaged, or not a file of moments of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} does not hold moments saved by pyflocality")
    if metadata.get("version") != str(_VERSION):
        raise ValueError(
            f"{path} has version {metadata.get('version')} of the format; this release reads "
            f"version {_VERSION}"
        )
    if metadata.get("sha256") != checksum(metadata.get("moments", ""), tensors):
        raise ValueError(f"{path} is damaged: its contents do not match their checksum")
    return json.loads(metadata["moments"]), tensors


def checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a header and named tensors, in hexadecimal."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().numpy())
    return digest.hexdigest()
