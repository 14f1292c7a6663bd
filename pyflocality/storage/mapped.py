"""Memory-mapped images: scanned in blocks, read ahead, and checked for changes of their file.

Tensors that map a file are known by their memory, so nothing has to be carried along with them.
A set that is larger than the memory budget is scanned in blocks that are read from its file into
one buffer, while the system is asked to fetch the block after them: neither the memory of the
process nor what it maps grows with the set, and a file that somebody cuts short, or a disk that
fails, ends the scan with an error that names the file. What was read stays in the system's own
cache for as long as nobody else needs that memory.

Sets within the budget stay where they are: kernels read them from the map, which reading into a
buffer first would slow down by a third or more where they do little else. So do those who pick
single images (`TrainingSet.values`, subsets, golden subsets). Such reads are checked before and
after, and guarded: where the file is cut short in between, zeros take the place of what is gone
(`csrc/cpu/mapped_guard.h`), and the error comes after the scan. Without the native extension, and
where a program reads `TrainingSet.images` by itself, such a file takes the process with it
(SIGBUS), as it does for every program that maps it.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.read_at import read_into
from pyflocality.storage.cache import open_entry

# By the address of the mapped memory.
_files: dict[int, MappedFile] = {}
# Where the native extension is missing.
_NO_GUARD = SimpleNamespace(lost=False, release=lambda: None)


@dataclass(frozen=True)
class MappedView:
    """How to map a tensor again that lies in a file, in another process for example.

    Attributes:
        path: The file.
        file_size: Its size in bytes; another size means another file.
        modified: When it was written, in nanoseconds; another time means another file, too.
        by_name: Whether another file in its place is a change of the set; whoever replaces an
            entry of the cache does so by an equal one.
        by_time: Whether another time of change is one; of what is checked whenever it is opened,
            every use sets it.
        start: Where the first value lies in the file.
        dtype: Dtype of the values.
        shape: Shape of the tensor.
        strides: Its steps in memory, in values.
    """

    path: str
    file_size: int
    modified: int
    by_name: bool
    by_time: bool
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def open(self) -> Tensor:
        """Map the tensor, copied only where it is written to.

        Raises:
            ValueError: The file is missing, or is not the one that was described.
        """
        steps = zip(self.shape, self.strides, strict=True)
        values = 1 + sum((length - 1) * stride for length, stride in steps)
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        try:
            with open(self.path, "rb") if self.by_name else open_entry(Path(self.path)) as file:
                self._check(os.fstat(file.fileno()))
                array = np.memmap(file, dtype, "c", self.start, (values,))
                remember(array, file.fileno(), by_name=self.by_name, by_time=self.by_time)
        except FileNotFoundError as error:
            raise ValueError(self._useless("is missing")) from error
        except OSError as error:
            what = f"cannot be opened ({error.strerror or error})"
            raise ValueError(self._useless(what)) from error
        return torch.from_numpy(array).as_strided(self.shape, self.strides)

    def _check(self, status: os.stat_result) -> None:
        if status.st_size != self.file_size:
            what = f"has {status.st_size} bytes, expected {self.file_size} bytes"
            raise ValueError(self._useless(what))
        # The name of a cache entry is that of its content.
        if self.by_name and status.st_mtime_ns != self.modified:
            raise ValueError(self._useless("was written to since the set was loaded"))

    def _useless(self, what: str) -> str:
        return f"{self.path}: the file of a memory-mapped training set {what}: load the set again"


class MappedFile:
    """A file that is mapped into memory, and open for as long as it is.

    Attributes:
        path: The file.
        address: Where its memory starts.
        size: Bytes that are mapped.
        lost: Whether some of it could not be read, and is zero since.
        rewritten: Whether the map holds something else than the file.
    """

    def __init__(
        self,
        array: np.memmap,
        address: int,
        size: int,
        descriptor: int | None,
        *,
        by_name: bool,
        by_time: bool,
    ) -> None:
        self.path = os.fspath(array.filename or "")
        self.address, self.size = address, size
        # Maps start at whole pages of the file.
        self._start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        # Also what was deleted or replaced can be read on, as it can be from the map.
        if descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        else:
            self._descriptor = os.dup(descriptor)
        self._by_name, self._by_time = by_name, by_time
        self.lost, self.rewritten = False, False
        self._identity = identity_of(os.fstat(self._descriptor))

    def close(self) -> None:
        """Close the file once nothing maps it any more."""
        os.close(self._descriptor)

    def begins_with(self, content: np.ndarray) -> bool:
        """Whether the file has all that is mapped, and first of all these bytes."""
        if os.fstat(self._descriptor).st_size < self._start + self.size:
            return False
        result = np.empty_like(content)
        self._fill(result.data, self._start)
        return bool((result == content).all())

    def check(self) -> None:
        """Raise unless the file is as it was when it was mapped.

        A file that was deleted is still there for those who map it, and so is a cache entry that
        somebody has replaced by an equal one.

        Raises:
            ValueError: The file has been changed, cut short or replaced, or could not be read.
        """
        before = self._identity
        named = _identity_of_path(self.path) if self._by_name else None
        # What has the name has the contents, too, where it is the same file.
        now = before if named == before else identity_of(os.fstat(self._descriptor))
        if now[:3] != before[:3] or (self._by_time and now != before):
            what = f"changed (it has {now[2]} bytes, and had {before[2]})"
            raise ValueError(_useless(self.path, what))
        if named is not None and named[:2] != before[:2]:
            raise ValueError(_useless(self.path, "replaced by another file"))
        if self.lost:
            raise ValueError(_useless(self.path, "not readable everywhere (did its disk fail?)"))

    def view(self, part: Tensor) -> MappedView:
        """How to map some of it again."""
        start = self._start + part.data_ptr() - self.address
        _, _, size, modified = self._identity
        shape, strides = tuple(part.shape), part.stride()
        known = self.path, size, modified, self._by_name, self._by_time
        return MappedView(*known, start, part.dtype, shape, strides)

    def read(self, part: Tensor, buffer: Tensor) -> Tensor:
        """The values of some images, read from the file and not from the map.

        Args:
            part: The images, any slice of the mapped ones, [n, C, H, W].
            buffer: Memory for them, one-dimensional, of the same dtype.

        Returns:
            The images in the memory of the buffer, in the order in which the file has them.

        Raises:
            ValueError: The file has been changed or ends too early.
            OSError: It cannot be read.
        """
        order = _file_order(part)
        stored = part.permute(order)
        inner = _dense_dimensions(stored)
        outer = stored.shape[: stored.ndim - inner]
        target = buffer[: part.numel()].reshape(stored.shape)
        run = part.nbytes // max(1, int(np.prod(outer)))
        content = target.reshape(-1).view(torch.uint8).numpy().data
        first, steps = self._start + part.data_ptr() - self.address, stored.stride()
        for number, index in enumerate(np.ndindex(*outer)):
            ahead = sum(i * step for i, step in zip(index, steps, strict=False))
            piece = content[number * run : (number + 1) * run]
            self._fill(piece, first + ahead * part.element_size())
        return target.permute([order.index(axis) for axis in range(len(order))])

    def fetch(self, part: Tensor) -> None:
        """Have the system read some images, where it takes such advice and they lie in a row."""
        if part.numel() == 0 or not hasattr(os, "posix_fadvise"):
            return
        if _dense_dimensions(part.permute(_file_order(part))) == part.ndim:
            start = self._start + part.data_ptr() - self.address
            os.posix_fadvise(self._descriptor, start, part.nbytes, os.POSIX_FADV_WILLNEED)

    def _fill(self, content: memoryview, position: int) -> None:
        """Fill memory with what the file has from a position on."""
        filled = 0
        while filled < len(content):
            try:
                got = read_into(self._descriptor, content[filled:], position + filled)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from error
            if got == 0:
                self.check()
                raise ValueError(_useless(self.path, "cut short"))
            filled += got


class Guarded:
    """A `with` block that reads a map, and ends in an error unless the file stays as it was.

    What cannot be read is zero inside the block, where the native extension is there.

    Raises:
        ValueError: The file has been changed, cut short or replaced, or could not be read.
    """

    __slots__ = ("_file", "_guard")

    def __init__(self, file: MappedFile) -> None:
        self._file = file

    def __enter__(self) -> Guarded:
        self._guard = guard_of(self._file.address, self._file.size)
        try:
            self._file.check()
        except ValueError:
            self._end()
            raise
        return self

    @property
    def lost(self) -> bool:
        """Whether something could not be read so far."""
        return self._guard.lost

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._end()
        # Of an error the file may be the cause; an interruption has its own.
        if error is None or isinstance(error, Exception):
            try:
                self._file.check()
            except ValueError as useless:
                raise useless from error

    def _end(self) -> None:
        # In this order: whoever begins in between has the flag of this guard, or finds it here.
        if self._guard.lost:
            self._file.lost = True
        self._guard.release()


def guard_of(address: int, size: int) -> Any:  # noqa: ANN401
    """Replace what cannot be read of mapped memory by zeros, until `release` is called.

    Its `lost` tells whether there was any; it never does without the native extension.
    """
    make = _guard_type()
    return _NO_GUARD if make is None else make(address, size)


@functools.cache
def _guard_type() -> Callable[[int, int], Any] | None:
    try:
        return importlib.import_module("pyflocality._C").MappedGuard
    except ImportError:
        return None


def _useless(path: str, what: str) -> str:
    return (
        f"{path}: the file of a memory-mapped training set was {what} while it was in use: "
        "results of it are of no use; load the set again"
    )


def _identity_of_path(path: str) -> tuple[int, int, int, int] | None:
    try:
        return identity_of(os.stat(path))
    except OSError:
        return None


def identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a file and its contents from others, without reading it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _file_order(part: Tensor) -> list[int]:
    """The dimensions of a tensor, those of the largest steps in memory first."""
    strides = part.stride()
    return sorted(range(part.ndim), key=lambda axis: (part.shape[axis] > 1, -strides[axis]))


def _dense_dimensions(stored: Tensor) -> int:
    """How many of the last dimensions lie in memory without gaps."""
    run = 1
    for count, axis in enumerate(reversed(range(stored.ndim))):
        if stored.shape[axis] > 1 and stored.stride(axis) != run:
            return count
        run *= stored.shape[axis]
    return stored.ndim


def remember(
    array: object, descriptor: int | None = None, *, by_name: bool = True, by_time: bool = True
) -> None:
    """Take note of an array that maps a file and holds what the file holds; not of others.

    Args:
        array: Any array.
        descriptor: The open file that it maps; None opens it by its name.
        by_name: Whether another file in its place is a change of the set.
        by_time: Whether another time of change is one.
    """
    memory = getattr(array, "_mmap", None)
    if not isinstance(array, np.memmap) or memory is None:
        return
    content = np.frombuffer(memory, np.uint8)
    address = content.ctypes.data
    if address in _files:
        return
    try:
        file = MappedFile(array, address, len(memory), descriptor, by_name=by_name, by_time=by_time)
    except OSError:
        # Deleted by now: the map is all there is.
        return
    if descriptor is not None or file.begins_with(content[: mmap.PAGESIZE]):
        _files[address] = file
        weakref.finalize(memory, _forget, address)
    else:
        # Replaced by now.
        file.close()


def _forget(address: int) -> None:
    _files.pop(address).close()


def without(images: Tensor, positions: Tensor) -> Tensor:
    """Images of a file but for some, none of which are copied: the last ones take their places.

    The file is mapped once more. What is written to that map, which are the images that take the
    places of others, stays in the memory of this process, and so it is never read from the file
    by blocks.

    Args:
        images: Images that lie in a file, one after the other, [N, C, H, W].
        positions: Which of them are left out, int64 [n] in ascending order, fewer than all.
    """
    with Guarded(_file_of(images)):
        twin = _file_of(images).view(images).open()
        _file_of(twin).rewritten = True
        left, out = len(images) - len(positions), set(positions.tolist())
        free = positions[positions < left]
        # Of those behind the end as many stay as places are free before it.
        moved = [index for index in range(left, len(images)) if index not in out]
        twin[free] = images[torch.tensor(moved, dtype=torch.int64)]
    return twin[:left]


def _file_of(images: Tensor) -> MappedFile:
    file = mapped_file(images)
    if file is None:
        raise ValueError(f"`images` must lie in a mapped file, got {tuple(images.shape)}")
    return file


def mapped_file(images: Tensor) -> MappedFile | None:
    """The file that images lie in, or None."""
    if images.device.type != "cpu" or not _files:
        return None
    # The images that a rank holds lie in a file as any others.
    with torch._C.DisableTorchFunctionSubclass():
        address = images.data_ptr()
    result = (file for file in _files.values() if 0 <= address - file.address < file.size)
    return next(result, None)


def checked_around(file: MappedFile, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that reads a file, with checks before and after it that the file is the same."""

    def checked(*arguments: Any) -> Any:  # noqa: ANN401
        with Guarded(file):
            return run(*arguments)

    return checked
