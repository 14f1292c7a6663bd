r"""What masks are made of: a set, its moments or its components; by the way that costs least.

What one noise level takes, in multiply-adds beside the N D^2 of a covariance:

| way | once | each level |
|---|---|---|
| "gram": components of the images' products | N^2 D, solver of N | N D^2 / 2 |
| "cholesky": inverse factor of S + r^2 I | covariance | 2/3 D^3 |
| "eigenvectors": components of the covariance | covariance, solver of D | D^3 / 2 |

A solver takes as long as about `SOLVER` n^3 multiply-adds of a matrix product: 190 s at n = 12,288
and 4.6 s at 3,072 on two cores of an AMD EPYC with MKL. The steps of the Cholesky way are reckoned
at three quarters of a product's speed; timings at n = 3,072 beside other work were between that and
half of it. So the choice is a function of N, D and the number of levels, and where both are near
one another it is the way that takes less memory: 4 matrices [D, D] instead of 6.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.budget import check_given, check_within, memory_budget_bytes
from pyflocality._support.memory import check_memory
from pyflocality._support.progress import progress_bar
from pyflocality._support.threads import Lock
from pyflocality.data import TrainingSet
from pyflocality.moments.basis import Basis, basis_bytes
from pyflocality.moments.limits import check_moments_fit
from pyflocality.moments.mask_tiles import (
    TILE,
    masks_by_tiles,
    masks_of,
    signed_weights_of,
    soft_weights_of,
)
from pyflocality.moments.moments import Moments
from pyflocality.moments.projector import (
    Projector,
    projector_by_cholesky,
    projector_of_components,
)
from pyflocality.moments.sums import BLOCK_BYTES
from pyflocality.moments.undetermined import blind_values
from pyflocality.posterior.sharded import ranks_of
from pyflocality.storage.blobs import BlobWriter, has_blob, read_blob
from pyflocality.weights import QueryWeights

Way = Literal["components", "gram", "cholesky", "eigenvectors"]
# Multiply-adds of a product that take as long as a solver's, by the cube of its side; and of the
# Cholesky way's, by those that it counts.
SOLVER, FACTORING = 6.0, 4.0 / 3.0
# Levels of a run that are reckoned with where nobody says how many there will be.
LEVELS = 10
# Masks over fewer inputs are built in less time than a file takes.
CACHED_INPUTS = 1024
# Part of the key of cached masks: changes with the rule.
_RULE_VERSION = 2


def chosen_way(count: int, values: int, levels: int = LEVELS) -> Way:
    """The way to masks of N images of D values that costs least, for a number of noise levels."""
    costs = {way: making_products(way, count, values, levels) for way in _OF_SETS}
    return min(_OF_SETS, key=costs.__getitem__)


_OF_SETS: tuple[Way, ...] = ("gram", "cholesky", "eigenvectors")


def making_products(way: Way, count: int, values: int, levels: int) -> float:
    """Multiply-adds of products, float64, that take as long as making the masks of some levels.

    "components" has its N components at hand. Moments are not counted: they take the same
    additions of integers, N D^2 / 2, wherever they are needed.
    """
    square = float(values) ** 2
    if way == "components":
        return levels * count * square / 2
    if way == "gram":
        # More images than values have D components.
        rank = min(count, values)
        return float(count) ** 2 * values + SOLVER * float(count) ** 3 + levels * rank * square / 2
    if way == "cholesky":
        return levels * FACTORING * (2.0 / 3.0) * square * values
    return (SOLVER + levels / 2) * square * values


def making_bytes(way: Way, count: int, values: int) -> int:
    """Most bytes that making the masks of a level takes at a time, beside the bits of all of it.

    Components and covariance are counted, though they are kept for the next level, but for
    "components", which has its N at hand.
    """
    rank, side = min(count, values), min(TILE, values)
    # A tile of numbers, what is made of it, and rows of the components.
    tile = 8 * side * (2 * side + rank)
    # Components in single precision; where they come of matrices, in what the solver worked in.
    single = 4 * rank * values
    if way == "components":
        return tile + single
    if way == "gram":
        return basis_bytes(count, values, "gram") + tile + single
    # Totals, covariance, the factor and what the solver works in; or the eigenvectors and that.
    squares = 4 if way == "cholesky" else 6
    return squares * 8 * values**2 + min(BLOCK_BYTES, count * values) + tile


def mask_bytes(values: int) -> int:
    """Bytes of the masks of images of D values."""
    return values * -(-values // 8)


def soft_bytes(values: int) -> int:
    """Bytes of the soft weights of images of D values."""
    return 4 * values**2


class Masks(NamedTuple):
    """Weights of a noise level, and what warnings are told by.

    Attributes:
        weights: The weights, [D, D].
        told: Values that the noisy image tells of: they are missed where they have no input
            (`blind_values`), bool [D].
    """

    weights: QueryWeights
    told: Tensor


class MaskSource:
    """What masks are made of, which is made itself where a mask is missing from the cache.

    Args:
        given: A set, moments or components.
        memory_budget: Working memory. Masks that exceed it lie in a file of the cache; where there
            is none they are made by tiles whenever they are used.
        progress: Whether to show what is being done.

    Attributes:
        way: By what way the masks are made.
    """

    def __init__(
        self,
        given: TrainingSet | Moments | Basis,
        *,
        memory_budget: int | str | None = None,
        progress: bool = False,
    ) -> None:
        self.given = given
        self._memory_budget, self._progress = memory_budget, progress
        self._source = None if isinstance(given, TrainingSet) else given
        self.count = given.count if isinstance(given, (Moments, Basis)) else _count_of(given)
        self._values = math.prod(given.image_shape)
        self.way = self._chosen()
        # Of the source: a batch of threads makes it once.
        self._making = Lock()

    @property
    def source(self) -> Moments | Basis:
        """Moments or components, those that were given or made of the set at first use."""
        with self._making:
            if self._source is None:
                self._source = self._made()
            return self._source

    @property
    def is_made(self) -> bool:
        """Whether moments or components are there."""
        return self._source is not None

    def masks(
        self,
        alpha: float,
        sigma: float,
        threshold: float,
        softness: float = 0.0,
        *,
        cached: bool = True,
    ) -> Masks:
        """The weights of a noise level, from the cache or made and kept there.

        Raises:
            ValueError: A budget that was given is less than making them takes; soft weights exceed
                the budget.
            MemoryError: The memory that is there does not hold it.
        """
        if softness > 0:
            return self._soft(alpha, sigma, threshold, softness, cached=cached)
        if threshold == 0:
            return self._with_told(self._signed(alpha, sigma), alpha, sigma)
        if not cached or not self._is_cached:
            return self._with_told(self._weights(alpha, sigma, threshold), alpha, sigma)
        return self._cached(self._file(alpha, sigma, threshold), alpha, sigma, threshold)

    def has_masks(
        self, alpha: float, sigma: float, threshold: float, softness: float = 0.0
    ) -> bool:
        """Whether the weights of a noise level are in the cache."""
        if threshold == 0 or not self._is_cached:
            return False
        return has_blob(self._file(alpha, sigma, threshold, softness))

    def projector(self, alpha: float, sigma: float, threshold: float) -> Projector:
        """The projector of a noise level."""
        source, ratio = self.source, sigma / alpha
        if self.way == "cholesky" and threshold > 0 and isinstance(source, Moments):
            found = projector_by_cholesky(
                source.covariance, ratio, threshold, progress=self._progress
            )
            if found is not None:
                return found
        if isinstance(source, Moments):
            if not has_components(source):
                check_moments_fit(self._memory_budget, source)
            source = source.basis(progress=self._progress)
        return projector_of_components(source.values, source.vectors, ratio, threshold)

    @property
    def _is_cached(self) -> bool:
        return self._values >= CACHED_INPUTS

    def _file(self, alpha: float, sigma: float, threshold: float, softness: float = 0.0) -> str:
        """The name of weights in the cache."""
        level = [_RULE_VERSION, self.way, self._content_key, sigma, alpha, threshold]
        if softness > 0:
            level.append(softness)
        key = hashlib.sha256(json.dumps(level).encode()).hexdigest()[:32]
        return f"masks/{key}.{'soft' if softness > 0 else 'bits'}"

    def _chosen(self) -> Way:
        if has_components(self.given):
            return "components"
        if isinstance(self.given, TrainingSet) and ranks_of(self.given.images) is None:
            return chosen_way(self.count, self._values)
        # Moments are there, or no rank has all images.
        return min(_OF_SETS[1:], key=lambda way: making_products(way, 0, self._values, LEVELS))

    @cached_property
    def _content_key(self) -> str:
        """What the masks depend on beside level, threshold and way."""
        given = self.given
        if isinstance(given, TrainingSet) and ranks_of(given.images) is not None:
            given = self.source
        return f"{type(given).__name__} {given.content_key()}"

    def _made(self) -> Moments | Basis:
        """Components or moments of the set."""
        assert isinstance(self.given, TrainingSet)
        least = making_bytes(self.way, self.count, self._values)
        what = f"the masks of {self._values} values"
        check_given(self._memory_budget, least, what)
        check_memory(least, what, "give components of fewer: Basis.from_data(data, components=...)")
        if self.way == "gram":
            return Basis.from_data(self.given, method="gram", progress=self._progress)
        return Moments.from_data(self.given, progress=self._progress)

    def _cached(self, file: str, alpha: float, sigma: float, threshold: float) -> Masks:
        """Masks that lie in a file, or are left there."""
        size, row = self._values, -(-self._values // 8)
        # The bits, and behind them those of what the noisy image tells of.
        content = read_blob(file, mask_bytes(size) + row)
        if content is None:
            masks = self._with_told(self._weights(alpha, sigma, threshold), alpha, sigma)
            with BlobWriter(file, mask_bytes(size) + row) as blob:
                if masks.weights.is_held:
                    blob.write(masks.weights.bits)
                elif blob.takes:
                    bands = torch.arange(size).split(TILE)
                    for band in progress_bar(
                        bands, description=_name(sigma), enabled=self._progress
                    ):
                        blob.write(masks.weights.tile(band).bits)
                blob.write(np.packbits(masks.told.numpy()))
            content = None if masks.weights.is_held or not blob.kept else read_blob(file)
            if content is None:
                return masks
        bits = content[: size * row].reshape(size, row)
        told = torch.from_numpy(np.unpackbits(content[size * row :], count=size)).bool()
        return Masks(QueryWeights.from_bits(bits, size), told)

    def _with_told(self, weights: QueryWeights, alpha: float, sigma: float) -> Masks:
        everything = torch.ones(self._values, dtype=torch.bool)
        return Masks(weights, blind_values(everything, self.source, (alpha, sigma)).cpu())

    def _weights(self, alpha: float, sigma: float, threshold: float) -> QueryWeights:
        projector = self.projector(alpha, sigma, threshold)
        name, progress = _name(sigma), self._progress
        if mask_bytes(self._values) <= memory_budget_bytes(self._memory_budget):
            return masks_of(projector, threshold, name=name, progress=progress).weights
        return masks_by_tiles(projector, threshold, name=name, progress=progress)

    def _soft(
        self, alpha: float, sigma: float, threshold: float, softness: float, *, cached: bool
    ) -> Masks:
        """Soft weights of what the masks of a noise level keep."""
        least = soft_bytes(self._values)
        what = f"the soft weights of {self._values} values"
        check_within(self._memory_budget, least, what)
        check_memory(least, what, "softness 0 keeps bits")
        masks = self.masks(alpha, sigma, threshold, cached=cached)
        file = self._file(alpha, sigma, threshold, softness)
        cached = cached and self._is_cached
        content = read_blob(file, least) if cached else None
        if content is not None:
            values = torch.from_numpy(content.view(np.float32).reshape(masks.weights.shape))
            return Masks(QueryWeights(values), masks.told)
        projector = self.projector(alpha, sigma, threshold)
        weights = soft_weights_of(
            projector, masks.weights, softness, name=_name(sigma), progress=self._progress
        )
        if cached:
            with BlobWriter(file, least) as blob:
                for rows in weights.dense(torch.float32).split(TILE):
                    blob.write(rows.numpy())
        return Masks(weights, masks.told)

    def _signed(self, alpha: float, sigma: float) -> QueryWeights:
        """The signed values of threshold 0."""
        # The values, and whether they are finite.
        least = 9 * self._values**2
        what = f"the signed weights of {self._values} values (threshold 0)"
        check_given(self._memory_budget, least, what)
        check_memory(least, what, "a threshold above 0 keeps bits")
        return signed_weights_of(self.projector(alpha, sigma, 0.0))


def has_components(given: TrainingSet | Moments | Basis | None) -> bool:
    """Whether components are at hand: given, or beside moments in their file."""
    if isinstance(given, Moments):
        return given.stored_basis is not None
    return isinstance(given, Basis)


def _name(sigma: float) -> str:
    return f"masks at sigma {sigma:.3g}"


def _count_of(data: TrainingSet) -> int:
    return len(data) * data.copies
