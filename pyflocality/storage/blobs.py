"""Bytes in the cache folder, of any size: written piece by piece, checked, mapped where large.

A file is a header of 64 bytes and the content. The header holds what tells our files from those
of others, the size of the content and its SHA-256; so the content can be mapped as numbers of any
dtype. Whatever is wrong with the cache, work goes on without it, and one warning tells why.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import IO

import numpy as np

from pyflocality._support.caller import caller_level
from pyflocality._support.locks import replacing
from pyflocality.storage.cache import (
    cache_folder,
    make_folder,
    mark_used,
    open_entry,
    remove_leftovers,
    tell_unwritable,
)
from pyflocality.storage.limit import BLOB_MAGIC, make_room

# What tells it, the size of the content, and its digest.
_HEADER = struct.Struct("<16sQ8x32s")
# Content from this size on is mapped; below, an open file for each would be the dearer way.
MAPPED = 64 * 2**20
_PIECE = 2**20


class BlobWriter:
    """A `with` block that leaves bytes in the cache: all of them, or nothing.

    Nothing is left where the block ends in an error or writes less than it said, and where the
    cache cannot be written to, which one warning tells: the work is done again next time.

    Attributes:
        kept: Whether the bytes are there, after the block.
    """

    def __init__(self, name: str, size: int) -> None:
        self.kept = False
        self._size = size
        *parts, last = name.split("/")
        self._folder, self._last = cache_folder(*parts), last
        self._file: IO[bytes] | None = None
        self._stack = ExitStack()
        self._failure: OSError | None = None

    def __enter__(self) -> BlobWriter:
        """Make room for the bytes."""
        whole = _HEADER.size + self._size
        if self._folder is not None and make_room(self._folder.parent, whole):
            try:
                make_folder(self._folder)
                remove_leftovers(self._folder)
                self._file = self._stack.enter_context(replacing(self._folder / self._last))
                # A header without meaning, until there is one.
                self._file.write(bytes(_HEADER.size))
            except OSError as error:
                self._failure = error
        return self

    @property
    def takes(self) -> bool:
        """Whether what is written goes anywhere."""
        return self._file is not None and self._failure is None

    def write(self, content: np.ndarray | bytes, at: int | None = None) -> None:
        """Write bytes behind those that were written last.

        Args:
            content: Bytes, or an array whose values lie in a row in memory.
            at: Where they lie in the whole; None goes on behind the last ones.
        """
        if self._file is None or self._failure is not None:
            return
        view = _bytes_of(content)
        start = self._file.tell() - _HEADER.size if at is None else at
        if not 0 <= start <= self._size - len(view):
            raise ValueError(f"`at` must leave {len(view)} of {self._size} bytes room, got {start}")
        try:
            if at is not None:
                self._file.seek(_HEADER.size + at)
            self._file.write(view)
        except OSError as error:
            self._failure = error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it."""
        if self._file is None or self._folder is None:
            if self._failure is not None and self._folder is not None:
                tell_unwritable(self._folder, self._failure)
            return
        dropped: BaseException | None = error or self._failure
        if dropped is None:
            dropped = self._sealed(self._file)
        try:
            self._stack.__exit__(type(dropped) if dropped else None, dropped, None)
            self.kept = dropped is None
        except OSError as failure:
            self._failure = failure
        if error is None and self._failure is not None:
            tell_unwritable(self._folder, self._failure)

    def _sealed(self, file: IO[bytes]) -> BaseException | None:
        """Write the header; why the file is not to be kept, or None."""
        try:
            file.flush()
            if os.fstat(file.fileno()).st_size != _HEADER.size + self._size:
                return ValueError("fewer bytes than were announced")
            digest = _digest(file, self._size)
            file.seek(0)
            file.write(_HEADER.pack(BLOB_MAGIC, self._size, digest))
        except OSError as error:
            self._failure = error
            return error
        return None


def write_blob(name: str, content: np.ndarray | bytes) -> bool:
    """Leave bytes at once, as `BlobWriter` does; whether they are there."""
    with BlobWriter(name, len(_bytes_of(content))) as blob:
        blob.write(content)
    return blob.kept


def has_blob(name: str) -> bool:
    """Whether bytes were left under a name; whether they are damaged is not looked at."""
    *parts, last = name.split("/")
    folder = cache_folder(*parts)
    return folder is not None and (folder / last).is_file()


def read_blob(name: str, size: int | None = None) -> np.ndarray | None:
    """Bytes that were left, uint8 [size], or None where there are none or they are damaged.

    Large ones are mapped, copied only where they are written to, and nobody removes them from the
    cache for as long as the array lives. A damaged file is reported by a warning.

    Args:
        name: The name that they were left under.
        size: How many there must be; None takes any number.
    """
    *parts, last = name.split("/")
    folder = cache_folder(*parts)
    if folder is None:
        return None
    path = folder / last
    try:
        with open_entry(path) as file:
            mark_used(file)
            content = _content(file, size)
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(
            f"{path}: the cached file cannot be used ({error})", stacklevel=caller_level()
        )
        return None
    if content is None:
        warnings.warn(
            f"{path}: the cached file is damaged and made anew", stacklevel=caller_level()
        )
    return content


def _bytes_of(content: np.ndarray | bytes) -> memoryview:
    return memoryview(content if isinstance(content, bytes) else content.data).cast("B")


def _content(file: IO[bytes], size: int | None) -> np.ndarray | None:
    """The checked content of an open file, or None where it is damaged."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    magic, stated, digest = _HEADER.unpack(header)
    there = os.fstat(file.fileno()).st_size - _HEADER.size
    if magic != BLOB_MAGIC or stated != there or (size is not None and size != there):
        return None
    if there < MAPPED:
        content = np.empty(there, np.uint8)
        file.readinto(content.data)  # type: ignore[attr-defined]  # files of bytes have it
        return content if hashlib.sha256(content.data).digest() == digest else None
    if _digest(file, there) != digest:
        return None
    return np.memmap(file, np.uint8, "c", _HEADER.size, (there,))


def _digest(file: IO[bytes], size: int) -> bytes:
    """SHA-256 of the content of an open file."""
    file.seek(_HEADER.size)
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(_PIECE, size))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()
