r"""The images of a set as a linear function of them that follows the covariance and a noise level.

With mean m, covariance :math:`S = U \operatorname{diag}(\lambda) U^\top` and the ratio
:math:`r = \sigma / \alpha` of noise and signal, the linear image of a training image v is

.. math::
    l = P (v - m), \qquad P = f(S) = U \operatorname{diag}(f(\lambda)) U^\top

with a response f to each variance, at this ratio, which directions without variance have, too:

- `Passed`, the Wiener filter: :math:`f(\lambda) = \lambda / (\lambda + r^2)`. That makes l alpha
  times W (v - m) with :math:`W = \alpha S (\alpha^2 S + \sigma^2 I)^{-1}`: what the filter answers
  of alpha v without noise, less m. So stated it stays as large as the images, whatever alpha, and
  levels of one ratio share it.
- `Whitened`: :math:`f(\lambda) = \sqrt{1 - \gamma} \, r / \sqrt{\gamma \lambda + r^2}`, in which
  noise of covariance :math:`\alpha^2 \gamma S + \sigma^2 I` is white.

**What is left out.** Images in [-1, 1] have :math:`\lVert v - m \rVert \le c`, with c the norm of
:math:`1 + |m|`. Where the components k > K count as without variance no value changes by more than
:math:`\lVert P - P_K \rVert \, \lVert v - m \rVert \le |f(\lambda_{K+1}) - f(0)| \, c`, and those
are for which this is at most 1e-6, with products in float64 2e-15. Components that the basis itself
has not, of covariance e at most (`Basis.error`), change what the Wiener filter passes by no more
than :math:`e c / (e + r^2)`, since :math:`\lambda / (\lambda + r^2)` is operator monotone.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakValueDictionary

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
from pyflocality.posterior.sharded import plain, ranks_of
from pyflocality.storage import blobs
from pyflocality.storage.blobs import BlobWriter, read_blob
from pyflocality.storage.limit import cache_limit_bytes
from pyflocality.storage.mapped import remember
from pyflocality.storage.reader import Reader

# What a value may change by where components are left out: a few roundings of sums.
LEFT_OUT = 1e-6
_LEFT_OUT = {torch.float32: LEFT_OUT, torch.float64: 2e-15}
# Part of the key of cached images: changes with the rule.
_RULE_VERSION = 2
# Images that are made together: whatever the budget, so that every budget makes the same bits.
_BLOCK_BYTES, _FEWEST = 8 * 2**20, 64
# Of a value while its block is made: as float64 and centred, and both sides of the product.
_BLOCK_BYTES_PER_VALUE = {torch.float32: 24, torch.float64: 32}
# Rows of the filter that are made together.
_ROWS = 256


@dataclass(frozen=True)
class Response:
    """What a linear image has of each component, by its variance.

    Attributes:
        name: What such images are.
        least: Dtype in which products are taken at least.
    """

    name: ClassVar[str]
    least: ClassVar[torch.dtype] = torch.float32

    def factors(self, variances: Tensor, ratio: float) -> Tensor:
        """Factors of components, from their variances, float64 [r]; falling or rising with them."""
        raise AttributeError(f"{type(self).__name__} does not define factors")


@dataclass(frozen=True)
class Passed(Response):
    """The Wiener filter's gains; see the description of the module."""

    name: ClassVar[str] = "linear images"

    def factors(self, variances: Tensor, ratio: float) -> Tensor:
        """Gains of components."""
        gains = variances / (variances + ratio * ratio)
        # No noise against no variance.
        return torch.where(variances > 0, gains, 0.0)


@dataclass(frozen=True)
class Whitened(Response):
    """Units of noise with a share gamma of the covariance; see the description of the module.

    They are compared, and differences of large numbers are what matters: products are float64.
    """

    gamma: float
    name: ClassVar[str] = "whitened images"
    least: ClassVar[torch.dtype] = torch.float64

    def factors(self, variances: Tensor, ratio: float) -> Tensor:
        """Factors of components."""
        scales = whitening(self.gamma * variances, variances.new_tensor(ratio))
        return scales * math.sqrt(1.0 - self.gamma)


PASSED = Passed()


def whitening(variances: Tensor, ratio: Tensor) -> Tensor:
    """What makes noise of variances v + r^2 noise of variance r^2; 1 where v is 0."""
    scales = (1.0 + variances / ratio.square()).rsqrt()
    return torch.where(variances > 0, scales, 1.0)


@dataclass(frozen=True)
class _Asked:
    """Which linear images are meant."""

    ratio: float
    response: Response
    dtype: torch.dtype

    @property
    def product(self) -> torch.dtype:
        """The dtype of products."""
        return torch.promote_types(self.dtype, self.response.least)


class LinearImages:
    """The linear images of a set, made once for each ratio of noise and signal.

    They are rounded as products of D terms are, one for each image in the order of the set's
    reader, copies of an augmentation included; of a sharded set those of the rank's own images.
    Products take 2 N D^2 operations, or 4 N D K with fewer than D / 2 components K.

    On the CPU they lie in the user's cache folder, from which they are mapped and, where they
    exceed the memory budget, read block by block as a mapped set is; but for those of less than
    64 MiB, which are made in little time and fit the budget.

    Args:
        data: The set.
        basis: Mean and components, of this set or of others of its shape.
        memory_budget: Working memory. Ratios are kept for as long as all of them fit; mapped ones,
            whose files stay in the cache while they are open, half of what the cache may hold.
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
        self._kept: OrderedDict[_Asked, Tensor] = OrderedDict()
        # Of these: a batch of threads makes them once.
        self._keeping = Lock()

    @classmethod
    def shared(
        cls,
        data: TrainingSet,
        basis: Basis,
        *,
        memory_budget: int | str | None = None,
        progress: bool = False,
    ) -> LinearImages:
        """The same object for all who ask for it: models of one set and basis make images once."""
        set_of = id(plain(data.images)), id(data.augmentation)
        key = (*set_of, basis.key, str(basis.device), memory_budget, progress)
        with _sharing:
            found = _shared.get(key)
            if found is None:
                found = cls(data, basis, memory_budget=memory_budget, progress=progress)
                _shared[key] = found
            return found

    def __getstate__(self) -> dict[str, Any]:
        """All but the images, which are made or mapped again."""
        return self.__dict__ | {"_kept": OrderedDict()}

    def nbytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the images of one ratio."""
        return dtype.itemsize * self._data.num_values * len(self._data) * self._data.copies

    def at(
        self,
        alpha: float,
        sigma: float,
        response: Response = PASSED,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The linear images of a noise level, float32 or float64 [N, C, H, W].

        They are the same object for as long as they are kept; do not write to them.

        Raises:
            ValueError: They neither fit a budget that was given nor can be kept in the cache; or
                the images map a file that has been changed.
            MemoryError: The same, of the memory that is there.
        """
        asked = _Asked(sigma / alpha, response, dtype)
        with self._keeping, torch.no_grad():
            if asked not in self._kept:
                self._kept[asked] = self._images(asked)
            self._kept.move_to_end(asked)
            return self._kept[asked]

    def _images(self, asked: _Asked) -> Tensor:
        shape = -1, *self._data.image_shape
        size, budget = self.nbytes(asked.dtype), memory_budget_bytes(self._memory_budget)
        content = None
        if self._data.device.type == "cpu" and (size >= blobs.MAPPED or size > budget):
            self._let_go(size, cache_limit_bytes() // 2 if size >= blobs.MAPPED else budget)
            content = self._from_cache(asked)
        if content is not None:
            kind = np.float64 if asked.dtype == torch.float64 else np.float32
            return torch.from_numpy(content.view(kind)).reshape(shape)
        self._let_go(size, budget)
        if self._data.device.type == "cpu":
            what = f"the {asked.response.name} of {self._data.name}, which cannot be kept in the "
            what += "cache,"
            check_given(self._memory_budget, size, what)
            check_memory(size, what)
        count, values = len(self._data) * self._data.copies, self._data.num_values
        result = torch.empty(count, values, dtype=asked.dtype, device=self._data.device)
        first = 0
        for block in self._blocks(asked):
            result[first : first + len(block)] = block
            first += len(block)
        return result.reshape(shape)

    def _let_go(self, size: int, limit: int) -> None:
        """Drop those not used for longest, until so many bytes more are within a limit."""
        while self._kept and size + sum(one.nbytes for one in self._kept.values()) > limit:
            self._kept.popitem(last=False)

    def _from_cache(self, asked: _Asked) -> np.ndarray | None:
        """The bytes of the images, from the cache or left there; None where it takes nothing."""
        facts = [_RULE_VERSION, self._data.content_key(), self._basis.content_key()]
        facts += [asked.ratio, repr(asked.response), str(asked.dtype)]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        name, size = f"linear/{key}.images", self.nbytes(asked.dtype)
        content = read_blob(name, size)
        if content is None:
            with BlobWriter(name, size) as blob:
                for block in self._blocks(asked) if blob.takes else ():
                    blob.write(block.numpy())
            content = read_blob(name, size) if blob.kept else None
        # Whoever replaces an entry of the cache does so by an equal one, and all who use it set its
        # time of change.
        remember(content, by_name=False, by_time=False)
        return content

    def _blocks(self, asked: _Asked) -> Iterator[Tensor]:
        """Linear images, some at a time: [n, D]."""
        reader = Reader.of(self._data, self._memory_budget)
        values, count = self._data.num_values, len(reader)
        per_image = _BLOCK_BYTES_PER_VALUE[asked.product] * values
        size = images_per_chunk(_BLOCK_BYTES, per_image, count)
        size = max(size, min(count, _FEWEST))
        mean, filtering = self._mean, self._filter(asked, size * per_image)
        blocks = reader.values(size, torch.float64)
        total = self._data.copies * -(-len(self._data) // size)
        name = f"{asked.response.name} at sigma / alpha {asked.ratio:.3g} "
        name += f"({bytes_told(self.nbytes(asked.dtype))}"
        if self._progress and mean.device.type == "cpu":
            seconds = product_seconds(filtering.operations * count, asked.product)
            name += f", about {max(1.0, seconds):.0f} s"
        for block in progress_bar(
            blocks, description=f"{name})", total=total, enabled=self._progress
        ):
            yield filtering((block.flatten(1) - mean).to(asked.product)).to(asked.dtype)

    def _filter(self, asked: _Asked, block: int) -> _Filter:
        """The filter, applied to images that take so many bytes at a time."""
        values, rank = self._basis.vectors.shape
        # The filter; and rows of it in float64 with what they are made of, or a block of images.
        least = asked.product.itemsize * values * (values if 2 * rank >= values else rank)
        least += max(16 * values * min(values, _ROWS), block)
        what = f"the filter of {asked.response.name} of {values} values"
        check_given(self._memory_budget, least, what)
        return _Filter(self._basis, asked)

    @cached_property
    def _mean(self) -> Tensor:
        return self._basis.mean.flatten()


# Those that somebody has, by what they are made of, which they keep alive.
_shared: WeakValueDictionary[tuple[Hashable, ...], LinearImages] = WeakValueDictionary()
_sharing = threading.Lock()


class _Filter:
    """P as a matrix [D, D], or as its K leading components where these take fewer products.

    Attributes:
        rank: The components K.
        is_matrix: Whether it is a matrix.
    """

    def __init__(self, basis: Basis, asked: _Asked) -> None:
        none = basis.values.new_zeros(1)
        rest = asked.response.factors(none, asked.ratio)
        gains = asked.response.factors(basis.values, asked.ratio) - rest
        longest = float((1.0 + basis.mean.abs()).norm())
        # They fall as the variances do.
        kept = gains.abs() * longest > _LEFT_OUT[asked.product]
        self.rank, size = int(kept.sum()), len(basis.vectors)
        gains, vectors = gains[: self.rank], basis.vectors[:, : self.rank]
        self.is_matrix = 2 * self.rank >= size
        width = size if self.is_matrix else self.rank
        self._rest, self._gains = float(rest), gains.to(asked.product)
        self._factor = self._gains.new_empty(size, width)
        for some in range(0, size, _ROWS):
            rows = vectors[some : some + _ROWS]
            made = (rows * gains) @ vectors.T if self.is_matrix else rows
            self._factor[some : some + _ROWS] = made
        if self.is_matrix:
            self._factor.diagonal().add_(self._rest)

    @property
    def operations(self) -> float:
        """Additions and multiplications for an image."""
        return self._factor.numel() * (2.0 if self.is_matrix else 4.0)

    def __call__(self, centred: Tensor) -> Tensor:
        """P applied to values about the mean, [n, D]."""
        if self.is_matrix:
            # It is symmetric.
            return centred @ self._factor
        products = (centred @ self._factor * self._gains) @ self._factor.T
        return products + self._rest * centred if self._rest > 0 else products


def _own(data: TrainingSet) -> TrainingSet:
    """The images of this rank as a set of its own."""
    return TrainingSet._of_valid(plain(data.images), data.name, None, None, data.augmentation)
