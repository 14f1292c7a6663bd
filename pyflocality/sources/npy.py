"""The .npy format: headers whose damage is told, and arrays mapped from files that are open."""

from __future__ import annotations

import math
import os
from typing import IO

import numpy as np

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
    size, expected = (
        os.fstat(file.fileno()).st_size,
        file.tell() + math.prod(shape) * dtype.itemsize,
    )
    if size != expected:
        raise ValueError(
            f"its header announces {dtype} {list(shape)}, {expected} bytes in all, but the file "
            f"has {size}"
        )
    return np.memmap(file, dtype, "c", file.tell(), shape, "F" if fortran else "C")
