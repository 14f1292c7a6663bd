"""Reading from a position of an open file, in any thread."""

from __future__ import annotations

import os
import threading

# Where files are read by moving their position, one at a time does.
_moving = threading.Lock()


def read_at(descriptor: int, size: int, position: int) -> bytes:
    """Bytes from a position on: `size` of them, or fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, position)
    with _moving:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.read(descriptor, size)


def read_into(descriptor: int, content: memoryview, position: int) -> int:
    """Read into memory from a position on; how many bytes there were."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [content], position)
    piece = read_at(descriptor, len(content), position)
    content[: len(piece)] = piece
    return len(piece)
