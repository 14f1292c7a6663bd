"""Memory-mapped images: read ahead, forgotten behind, and checked for changes of their file.

Tensors that map a file are known by their memory, so nothing has to be carried along with them.
A set that is larger than the memory budget is read in blocks: the system is asked to read the next
block while this one is in use, and the pages of the last one are given back, so that neither the
memory of the process nor what it maps grows with the set. What was given back stays in the
system's own cache of the file for as long as nobody else needs that memory.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from pyflocality._budget import memory_budget_bytes

_PAGE = mmap.PAGESIZE
# Linux maps the pages around one that is asked for, too, so many bytes at a time.
_AROUND = 64 * 2**10
# By the address of the mapped memory.
_files: dict[int, MappedFile] = {}


class MappedFile:
    """A file that is mapped into memory.

    Attributes:
        path: The file.
    """

    def __init__(self, array: np.memmap) -> None:
        memory = array._mmap
        self.path = os.fspath(array.filename)
        self._memory = weakref.ref(memory)
        self.address = np.frombuffer(memory, np.uint8).ctypes.data
        self.size = len(memory)
        self._identity = _identity(self.path)
        weakref.finalize(memory, _files.pop, self.address, None)

    def check(self) -> None:
        """Raise unless the file is as it was when it was mapped.

        A file that was deleted is still there for those who map it.

        Raises:
            ValueError: The file has been changed, cut short or replaced.
        """
        now = _identity(self.path)
        if now is None or self._identity is None or now == self._identity:
            return
        before = self._identity
        what = "replaced by another file"
        if now[:2] == before[:2]:
            what = f"changed (it has {now[2]} bytes, and had {before[2]})"
        raise ValueError(
            f"{self.path}: the file of a memory-mapped training set was {what} while it was in "
            "use: results of it are of no use; load the set again"
        )

    def advise(self, part: Tensor, advice: str) -> None:
        """Tell the system what becomes of the memory of some images, where it takes such advice.

        Args:
            part: The images, a slice of the mapped ones.
            advice: `"MADV_WILLNEED"` to read them now, `"MADV_DONTNEED"` to give back their
                pages, but for one that the next image shares.
        """
        memory = self._memory()
        option = getattr(mmap, advice, None)
        if memory is None or option is None or part.numel() == 0:
            return
        start, stop = (bound - self.address for bound in _extent(part))
        # What is given back although it is of use is read again from the system's cache.
        start = start // _AROUND * _AROUND
        if advice == "MADV_DONTNEED":
            stop = stop // _PAGE * _PAGE
        if stop > start:
            memory.madvise(option, start, stop - start)


def _identity(path: str) -> tuple[int, ...] | None:
    """What tells a file and its contents from others, without reading it; None if it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _extent(part: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one past its last."""
    last = sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
    return part.data_ptr(), part.data_ptr() + (last + 1) * part.element_size()


def remember(array: np.ndarray) -> None:
    """Take note of an array that maps a file; of others nothing is noted."""
    if not isinstance(array, np.memmap) or getattr(array, "_mmap", None) is None:
        return
    file = MappedFile(array)
    _files.setdefault(file.address, file)


def mapped_file(images: Tensor) -> MappedFile | None:
    """The file that images lie in, or None."""
    if images.device.type != "cpu" or not _files:
        return None
    address = images.data_ptr()
    found = (file for file in _files.values() if 0 <= address - file.address < file.size)
    return next(found, None)


def checked_around(file: MappedFile, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that reads a file, with checks before and after it that the file is the same."""

    def checked(*arguments: Any) -> Any:  # noqa: ANN401
        file.check()
        result = run(*arguments)
        file.check()
        return result

    return checked


def read_checked(images: Tensor, read: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    """What a function reads of images, once the file that they may map is known to be the same."""
    file = mapped_file(images)
    return (read if file is None else checked_around(file, read))(*arguments)


def exceeds_budget(images: Tensor, memory_budget: int | str | None) -> bool:
    """Whether images are mapped and larger than the memory budget."""
    return images.nbytes > memory_budget_bytes(memory_budget) and mapped_file(images) is not None


def streamed(images: Tensor, size: int, memory_budget: int | str | None = None) -> Iterator[Tensor]:
    """Images, `size` at a time: [n, ...].

    Args:
        images: The images, [N, ...].
        size: Images at a time.
        memory_budget: Mapped images that are larger are read ahead and forgotten behind.
    """
    file = mapped_file(images) if exceeds_budget(images, memory_budget) else None
    for start in range(0, len(images), size):
        part = images[start : start + size]
        if file is None:
            yield part
            continue
        file.advise(images[start + size : start + 2 * size], "MADV_WILLNEED")
        try:
            yield part
        finally:
            file.advise(part, "MADV_DONTNEED")
