"""The .npy format: headers whose damage is told, and arrays mapped from files that are open."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from pyflocality.storage.mapped import remember

# A checksum covers every byte of files up to 256 MiB.
_BLOCK, _MAX_BLOCKS = 64 * 2**10, 4096
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    # The same in UTF-8, for names of fields that are not Latin.
    (3, 0): np.lib.format.read_array_header_2_0,
}


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran order, and dtype; the file is behind the header then.

    Raises:
        ValueError: The header is damaged, or of objects.
    """
    try:
        shape, fortran, dtype = _HEADER_READERS[np.lib.format.read_magic(file)](file)
    # NumPy parses a header as Python code, which fails in many ways.
    except Exception as error:
        raise ValueError(f"not a readable .npy header: {error}") from None
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"not an array of numbers: {dtype} {list(shape)}")
    return shape, fortran, dtype


def map_array(file: IO[bytes]) -> np.memmap:
    """Map the array of an open file, copied only where it is written to.

    Raises:
        ValueError: The header is damaged, or the file is longer or shorter than it says.
    """
    file.seek(0)
    shape, fortran, dtype = read_header(file)
    size = os.fstat(file.fileno()).st_size
    expected = file.tell() + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"its header announces {dtype} {list(shape)}, {expected} bytes in all, but the file "
            f"has {size}"
        )
    return np.memmap(file, dtype, "c", file.tell(), shape, "F" if fortran else "C")


def map_recorded(
    file: IO[bytes], record: Mapping[str, Any], dtype: str, *, by_name: bool
) -> np.memmap:
    """Map the array of an open file of which a record tells `bytes`, `checksum` and `shape`.

    Args:
        file: The file.
        record: What was noted of it.
        dtype: The dtype that it must have, by its name or as NumPy abbreviates it.
        by_name: As `pyflocality.storage.mapped.remember` takes it.

    Raises:
        ValueError: It is not as it was noted.
    """
    size = os.fstat(file.fileno()).st_size
    if size != record["bytes"]:
        raise ValueError(f"has {size} bytes, expected {record['bytes']}")
    if checksum(file) != record["checksum"]:
        raise ValueError("its contents do not match their checksum")
    images = map_array(file)
    is_right = dtype in (images.dtype.name, images.dtype.str)
    if not is_right or list(images.shape) != record["shape"]:
        has = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"has {has}, expected {dtype} {record['shape']}")
    remember(images, file.fileno(), by_name=by_name)
    return images


def checksum(file: IO[bytes]) -> int:
    """CRC-32 of a file's blocks: all of them, or 4,096 spread evenly over a large file."""
    total = -(-os.fstat(file.fileno()).st_size // _BLOCK)
    count = min(total, _MAX_BLOCKS)
    crc = 0
    for index in range(count):
        file.seek(_BLOCK * (index * (total - 1) // max(count - 1, 1)))
        crc = zlib.crc32(file.read(_BLOCK), crc)
    return crc
