"""The one way to read a training set a few images at a time.

Whoever goes over a set, or picks images out of it, asks a `Reader`: it knows the copies of an
augmentation, whether the images lie in memory or in a file that is larger than the memory budget
(`pyflocality.storage.mapped`), and it raises where that file is changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.storage.augmentation import IDENTITY, Augmentation
from pyflocality.storage.mapped import Guarded, MappedFile, checked_around, mapped_file

# Steps of 8-bit images in a value of 1.
BYTES_PER_UNIT = 127.5

P = ParamSpec("P")
R = TypeVar("R")


class StoredSet(Protocol):
    """What has images as stored, [N, C, H, W], and the copies of them that are searched too."""

    images: Tensor
    augmentation: Augmentation | None


@dataclass(frozen=True)
class Block:
    """Images that were read together: how many from which position on, and whether from a file.

    Positions count through all copies.
    """

    first: int
    count: int
    from_file: bool


_trace: ContextVar[list[Block] | None] = ContextVar("pyflocality_blocks", default=None)


@contextmanager
def trace_blocks() -> Iterator[list[Block]]:
    """Which images readers hand out inside a `with` block, in order."""
    blocks: list[Block] = []
    token = _trace.set(blocks)
    try:
        yield blocks
    finally:
        _trace.reset(token)


@dataclass(frozen=True)
class Reader:
    """Reads a set: its images first, then copy by copy those of its augmentation.

    Attributes:
        images: Images as stored, [N, C, H, W]; of blocks and picked images without copies any
            tensor [N, ...] will do.
        augmentation: Copies that are read, too; None for the images alone.
        memory_budget: Mapped images that are larger are read from their file block by block.
    """

    images: Tensor
    augmentation: Augmentation | None = None
    memory_budget: int | str | None = None

    @classmethod
    def of(cls, data: StoredSet, memory_budget: int | str | None = None) -> Reader:
        """The reader of a training set, its copies included."""
        return cls(data.images, data.augmentation, memory_budget)

    def __len__(self) -> int:
        """Number of images, copies included."""
        return len(self.images) * (self.augmentation or IDENTITY).copies

    @cached_property
    def file(self) -> MappedFile | None:
        """The file that the images lie in, or None."""
        return mapped_file(self.images)

    @cached_property
    def from_file(self) -> bool:
        """Whether blocks are read from a file, the images being larger than the memory budget."""
        # Of a map that was written to the file has something else.
        if self.file is None or self.file.rewritten:
            return False
        return self.images.nbytes > memory_budget_bytes(self.memory_budget)

    def buffer_bytes(self, size: int) -> int:
        """Memory into which `size` images at a time are read; 0 where they lie in memory."""
        return min(size, len(self.images)) * self.images[0].nbytes if self.from_file else 0

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All images as stored, at most `size` at a time and of one copy: [n, C, H, W].

        A block that is read from a file is of use until the next one is asked for. The others
        may share memory with the images: do not write to them.
        """
        blocks = self._stored_blocks(size) if self.augmentation is None else self._copies(size)
        trace = _trace.get()
        return blocks if trace is None else self._traced(blocks, trace)

    def values(self, size: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The same as numbers in [-1, 1].

        Whoever loops over them lets go of one block, and of all that was made of it, before the
        next one is made: the budget holds one.
        """
        for block in self.blocks(size):
            yield training_values(block, dtype)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images as stored, `size` at a time but for the last ones, across copies."""
        if self.augmentation is None:
            yield from self.images.split(size)
            return
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield self.at(torch.arange(start, stop, device=self.images.device))

    def at(self, positions: Tensor) -> Tensor:
        """Images at some positions, int64 [n], copies included: new memory, as stored."""
        if self.augmentation is None:
            return self.checked(self.images.index_select, 0, positions)
        count = len(self.images)
        chosen = self.checked(self.images.index_select, 0, positions % count)
        copies = positions // count
        for copy in copies.unique().tolist():
            rows = copies == copy
            chosen[rows] = self.augmentation.transforms[copy](chosen[rows])
        return chosen

    def blocks_at(self, positions: Tensor, size: int) -> Iterator[Tensor]:
        """The same, `size` at a time."""
        for some in positions.split(size):
            yield self.at(some)

    def checked(self, read: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What a function reads of the images, once the file they may map is known as before."""
        run = read if self.file is None else checked_around(self.file, read)
        return run(*args, **kwargs)

    def _copies(self, size: int) -> Iterator[Tensor]:
        """The images, then copy by copy."""
        for transform in (self.augmentation or IDENTITY).transforms:
            for block in self._stored_blocks(size):
                yield transform(block)

    def _traced(self, blocks: Iterator[Tensor], trace: list[Block]) -> Iterator[Tensor]:
        first = 0
        for block in blocks:
            trace.append(Block(first, len(block), self.from_file))
            first += len(block)
            yield block

    def _stored_blocks(self, size: int) -> Iterator[Tensor]:
        """The images without copies."""
        if self.file is None:
            return iter(self.images.split(size))
        read = _blocks_of_file if self.from_file else _blocks_of_map
        return read(self.file, self.images, size)


def _blocks_of_map(file: MappedFile, images: Tensor, size: int) -> Iterator[Tensor]:
    with Guarded(file) as guard:
        for block in images.split(size):
            yield block
            if guard.lost:
                return


def _blocks_of_file(file: MappedFile, images: Tensor, size: int) -> Iterator[Tensor]:
    buffer = images.new_empty(images[:size].numel())
    for start in range(0, len(images), size):
        block = file.read(images[start : start + size], buffer)
        file.fetch(images[start + size : start + 2 * size])
        yield block


def training_values(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored images as values in [-1, 1]: 8-bit u means u / 127.5 - 1.

    Floats of the dtype are not copied: do not write to the result.
    """
    values = images.to(dtype)
    # In place: a block is not held twice.
    return values.div_(BYTES_PER_UNIT).sub_(1.0) if images.dtype == torch.uint8 else values


def bytes_to_values(stored: Tensor) -> Tensor:
    """Values of what is counted in the units of 8-bit images, floating point."""
    return stored / BYTES_PER_UNIT - 1.0


def values_to_bytes(values: Tensor) -> Tensor:
    """Values in the units of 8-bit images, not rounded."""
    return (values + 1.0) * BYTES_PER_UNIT
