r"""The images of a set as the Wiener filter of a noise level passes them on.

With mean m, covariance :math:`S = U \operatorname{diag}(\lambda) U^\top` and the ratio
:math:`r = \sigma / \alpha` of noise and signal, the linear image of a training image v is

.. math::
    l = P (v - m), \qquad P = S (S + r^2 I)^{-1} = U \operatorname{diag}(g) U^\top, \qquad
    g_k = \frac{\lambda_k}{\lambda_k + r^2} ,

alpha times W (v - m) with :math:`W = \alpha S (\alpha^2 S + \sigma^2 I)^{-1}`: what the filter
answers of alpha v without noise, less m. So stated it stays as large as the images, whatever alpha,
and levels of one ratio share it.

**What is left out.** Images in [-1, 1] have :math:`\lVert v - m \rVert \le c`, with c the norm of
:math:`1 + |m|`. Without the components k > K no value changes by more than
:math:`\lVert P - P_K \rVert \, \lVert v - m \rVert \le g_{K+1} c`, and those are left out for which
this is at most 1e-6. Components that the basis itself has not, of covariance e at most
(`Basis.error`), change none by more than :math:`e c / (e + r^2)`, since
:math:`\lambda / (\lambda + r^2)` is operator monotone.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.budget import check_given, images_per_chunk, memory_budget_bytes
from pyflocality._support.memory import check_memory
from pyflocality._support.progress import progress_bar
from pyflocality._support.rates import product_seconds
from pyflocality._support.text import bytes_told
from pyflocality._support.threads import Lock
from pyflocality.data import TrainingSet
from pyflocality.moments.basis import Basis
from pyflocality.moments.mask_source import CACHED_INPUTS
from pyflocality.posterior.sharded import plain, ranks_of
from pyflocality.storage.blobs import BlobWriter, read_blob
from pyflocality.storage.mapped import mapped_file, remember
from pyflocality.storage.reader import Reader

# What a value may change by where components are left out: a few roundings of float32 sums.
LEFT_OUT = 1e-6
# Part of the key of cached images: changes with the rule.
_RULE_VERSION = 1
# Images that are made together: whatever the budget, so that every budget makes the same bits.
_BLOCK_BYTES, _FEWEST = 8 * 2**20, 64
# Of a value while its block is made: as float64 and centred, and the float32 of both sides.
_BLOCK_BYTES_PER_VALUE = 24
# Rows of the filter that are made together.
_ROWS = 256


class LinearImages:
    """The linear images of a set, made once for each ratio of noise and signal.

    They are float32, rounded as products of D float32 terms are, one for each image in the order
    of the set's reader, copies of an augmentation included; of a sharded set those of the rank's
    own images. Products take 2 N D^2 operations, or 4 N D K with fewer than D / 2 components K.

    On the CPU they lie in the user's cache folder, from which large ones are mapped and, where they
    exceed the memory budget, read block by block as a mapped set is; but for those of images of
    fewer than 1,024 values, which are made in less time than a file takes, and fit the budget.

    Args:
        data: The set.
        basis: Mean and components, of this set or of others of its shape.
        memory_budget: Working memory. Ratios are kept for as long as all of them fit.
        progress: Whether to show what is being done.
    """

    def __init__(
        self,
        data: TrainingSet,
        basis: Basis,
        *,
        memory_budget: int | str | None = None,
        progress: bool = False,
    ) -> None:
        self._data = data if ranks_of(data.images) is None else _own(data)
        self._basis = basis
        self._memory_budget, self._progress = memory_budget, progress
        self._kept: OrderedDict[float, Tensor] = OrderedDict()
        # Of these: a batch of threads makes them once.
        self._keeping = Lock()

    def __getstate__(self) -> dict[str, Any]:
        """All but the images, which are made or mapped again."""
        return self.__dict__ | {"_kept": OrderedDict()}

    @property
    def nbytes(self) -> int:
        """Bytes of the images of one ratio."""
        return 4 * self._data.num_values * len(self._data) * self._data.copies

    def at(self, alpha: float, sigma: float) -> Tensor:
        """The linear images of a noise level, float32 [N, C, H, W]; do not write to them.

        Raises:
            ValueError: They neither fit a budget that was given nor can be kept in the cache; or
                the images map a file that has been changed.
            MemoryError: The same, of the memory that is there.
        """
        ratio = sigma / alpha
        with self._keeping, torch.no_grad():
            if ratio not in self._kept:
                self._kept[ratio] = self._images(ratio)
            self._kept.move_to_end(ratio)
            budget, kept = memory_budget_bytes(self._memory_budget), self._kept
            while len(kept) > 1 and sum(map(_held_bytes, kept.values())) > budget:
                kept.popitem(last=False)
            return self._kept[ratio]

    def _images(self, ratio: float) -> Tensor:
        shape = -1, *self._data.image_shape
        content = self._from_cache(ratio) if self._is_cached else None
        if content is not None:
            return torch.from_numpy(content.view(np.float32)).reshape(shape)
        if self._data.device.type == "cpu":
            what = f"the linear images of {self._data.name}, which cannot be kept in the cache,"
            check_given(self._memory_budget, self.nbytes, what)
            check_memory(self.nbytes, what)
        count, values = len(self._data) * self._data.copies, self._data.num_values
        result = torch.empty(count, values, dtype=torch.float32, device=self._data.device)
        first = 0
        for block in self._blocks(ratio):
            result[first : first + len(block)] = block
            first += len(block)
        return result.reshape(shape)

    @property
    def _is_cached(self) -> bool:
        if self._data.device.type != "cpu":
            return False
        exceeds = self.nbytes > memory_budget_bytes(self._memory_budget)
        return exceeds or self._data.num_values >= CACHED_INPUTS

    def _from_cache(self, ratio: float) -> np.ndarray | None:
        """The bytes of the images, from the cache or left there; None where it takes nothing."""
        facts = [_RULE_VERSION, self._data.content_key(), self._basis.content_key(), ratio]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        name = f"linear/{key}.images"
        content = read_blob(name, self.nbytes)
        if content is None:
            with BlobWriter(name, self.nbytes) as blob:
                for block in self._blocks(ratio) if blob.takes else ():
                    blob.write(block.numpy())
            content = read_blob(name, self.nbytes) if blob.kept else None
        # Whoever replaces an entry of the cache does so by an equal one.
        remember(content, by_name=False)
        return content

    def _blocks(self, ratio: float) -> Iterator[Tensor]:
        """Linear images, some at a time: float32 [n, D]."""
        reader = Reader.of(self._data, self._memory_budget)
        values, count = self._data.num_values, len(reader)
        size = images_per_chunk(_BLOCK_BYTES, _BLOCK_BYTES_PER_VALUE * values, count)
        size = max(size, min(count, _FEWEST))
        mean, filtering = self._mean, self._filter(ratio, size)
        blocks = reader.values(size, torch.float64)
        total = self._data.copies * -(-len(self._data) // size)
        name = f"linear images at sigma / alpha {ratio:.3g} ({bytes_told(self.nbytes)}"
        if self._progress and mean.device.type == "cpu":
            seconds = product_seconds(filtering.operations * count, torch.float32)
            name += f", about {max(1.0, seconds):.0f} s"
        for block in progress_bar(
            blocks, description=f"{name})", total=total, enabled=self._progress
        ):
            yield filtering((block.flatten(1) - mean).float())

    def _filter(self, ratio: float, size: int) -> _Filter:
        """The filter that is applied to so many images at a time."""
        values, rank = self._basis.vectors.shape
        # The filter; and rows of it in float64 with what they are made of, or a block of images.
        least = 4 * values * (values if 2 * rank >= values else rank)
        least += values * max(16 * min(values, _ROWS), _BLOCK_BYTES_PER_VALUE * size)
        check_given(self._memory_budget, least, f"the filter of linear images of {values} values")
        return _Filter(self._basis, ratio)

    @cached_property
    def _mean(self) -> Tensor:
        return self._basis.mean.flatten()


class _Filter:
    """P as a matrix [D, D], or as its K leading components where these take fewer products.

    Attributes:
        rank: The components K.
        is_matrix: Whether it is a matrix.
    """

    def __init__(self, basis: Basis, ratio: float) -> None:
        gains = basis.values / (basis.values + ratio * ratio)
        longest = float((1.0 + basis.mean.abs()).norm())
        # They descend as the variances do.
        self.rank, size = int((gains * longest > LEFT_OUT).sum()), len(basis.vectors)
        gains, vectors = gains[: self.rank], basis.vectors[:, : self.rank]
        self.is_matrix = 2 * self.rank >= size
        width = size if self.is_matrix else self.rank
        self._gains = gains.float()
        self._factor = self._gains.new_empty(size, width)
        for some in range(0, size, _ROWS):
            rows = vectors[some : some + _ROWS]
            made = (rows * gains) @ vectors.T if self.is_matrix else rows
            self._factor[some : some + _ROWS] = made

    @property
    def operations(self) -> float:
        """Additions and multiplications for an image."""
        return self._factor.numel() * (2.0 if self.is_matrix else 4.0)

    def __call__(self, centred: Tensor) -> Tensor:
        """P applied to values about the mean, float32 [n, D]."""
        if self.is_matrix:
            # It is symmetric.
            return centred @ self._factor
        return (centred @ self._factor * self._gains) @ self._factor.T


def _held_bytes(images: Tensor) -> int:
    """Memory that images take of this process: none where they map a file."""
    return 0 if mapped_file(images) is not None else images.nbytes


def _own(data: TrainingSet) -> TrainingSet:
    """The images of this rank as a set of its own."""
    return TrainingSet._of_valid(plain(data.images), data.name, None, None, data.augmentation)
