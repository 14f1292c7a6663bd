"""Files that save work: where they lie, and how they are written and trusted."""

from __future__ import annotations

import hashlib
import os
import uuid
import warnings
from pathlib import Path


def default_cache_dir() -> Path:
    """`PYFLOCALITY_CACHE_DIR`, else `pyflocality` in `XDG_CACHE_HOME` or in `~/.cache`."""
    own = os.environ.get("PYFLOCALITY_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "pyflocality"


def read_blob(path: Path, size: int) -> bytes | None:
    """Bytes that `write_blob` left, or None where there are none or they are damaged.

    A damaged file is reported by a warning.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, payload = content[:32], content[32:]
    if len(payload) != size or hashlib.sha256(payload).digest() != digest:
        warnings.warn(f"{path}: the cached file is damaged and made anew", stacklevel=3)
        return None
    return payload


def write_blob(path: Path, payload: bytes) -> None:
    """Leave bytes with their checksum; the file appears whole or not at all.

    Where it cannot be written a warning says so: the work is done again next time.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({error}): set PYFLOCALITY_CACHE_DIR to a writable folder",
            stacklevel=3,
        )
