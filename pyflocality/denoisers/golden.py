"""Golden subsets: a posterior over the training images nearest to each noisy image."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pyflocality._support.budget import images_per_chunk, memory_budget_bytes
from pyflocality._support.checks import (
    NoiseLevel,
    check_count,
    check_float_tensor,
    check_generator,
    check_magnitude,
    check_single_level,
    describe,
)
from pyflocality._support.levels import Levels
from pyflocality._support.threads import Lock
from pyflocality._support.transforms import outside_transforms, without_derivatives
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, PosteriorDenoiser
from pyflocality.denoisers.equivariant import EquivariantDenoiser
from pyflocality.denoisers.filtered import FilteredPosteriorDenoiser
from pyflocality.denoisers.local import LocalDenoiser
from pyflocality.denoisers.optimal import OptimalDenoiser
from pyflocality.denoisers.patch_set import PatchSetDenoiser
from pyflocality.denoisers.pca_locality import PCALocalityDenoiser
from pyflocality.ops.nearest import nearest_positions
from pyflocality.posterior.problem import trusted_problem
from pyflocality.storage.reader import Reader, values_to_bytes

_WRAPPED = (
    OptimalDenoiser,
    LocalDenoiser,
    PCALocalityDenoiser,
    EquivariantDenoiser,
    PatchSetDenoiser,
    FilteredPosteriorDenoiser,
)
# Images compared at a time: few enough to stay in a processor's cache.
_CACHED_IMAGES = 512


class SubsetSizes(NamedTuple):
    """How many images a noise level looks at.

    Attributes:
        pool: Candidates m that are compared at full resolution.
        kept: Images k of the posterior.
    """

    pool: int
    kept: int


def golden_sizes(
    count: int, k_min: int, k_max: int, sigma: float | NoiseLevel, alpha: float = 1.0
) -> SubsetSizes:
    r"""Sizes of pool and subset at a noise level.

    .. math::
        g = 1 - \frac{\sigma}{\sqrt{\alpha^2 + \sigma^2}}, \qquad
        m = \operatorname{round}(k_{max} + (N - k_{max}) g), \qquad
        k = \operatorname{round}(k_{max} - (k_{max} - k_{min}) g)

    With variance-preserving noise g is 1 - sigma, as published; other noise counts as the
    variance-preserving noise of the same ratio sigma / alpha.

    Args:
        count: Training images N.
        k_min: Images at no noise.
        k_max: Images at nothing but noise.
        sigma: Noise level, not negative; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.

    Raises:
        TypeError: An argument is no number.
        ValueError: Not 1 <= k_min <= k_max <= count, or a level is out of range.
    """
    count = check_count(count, "count")
    k_max = _checked_size(k_max, "k_max", count)
    k_min = _checked_size(k_min, "k_min", k_max)
    alpha, sigma = check_single_level(sigma, alpha)
    g = 1.0 - sigma / math.hypot(alpha, sigma)
    kept = max(k_min, round(k_max - (k_max - k_min) * g))
    return SubsetSizes(round(k_max + (count - k_max) * g), kept)


class GoldenSubset(Denoiser):
    """Any posterior over the training set, over a few images chosen for each noisy image.

    At every noise level a pool of m images is chosen by their distance to x / alpha after
    average pooling, the k of them nearest at full resolution are kept, and the wrapped denoiser
    runs over these k alone; `golden_sizes` tells m and k. Much noise takes few candidates and
    keeps them all, little noise compares all images and keeps the fewest. Nothing bounds the
    difference to the posterior over the whole set: see `CertifiedSubset` for that. At much noise
    that posterior spans the whole set, whose mean the nearest images do not have: sampling starts
    off wrong by that. A pool drawn at random, with `generator`, has no such bias.

    The masks of `PCALocalityDenoiser` are those of the whole set. One noisy image is answered at
    a time: k images as they are stored are all that is gathered. Pooled images are computed once
    and kept in half precision where they fit half of the memory budget, else pooled anew at each
    call. The wrapped denoiser has what both leave of the budget.

    Derivatives are those of the wrapped denoiser over the subset, which does not change with x
    but in jumps.

    Args:
        denoiser: An optimal, local, PCA-locality (exact aggregation), equivariant, patch-set or
            filtered-posterior denoiser.
        k_min: Images kept at no noise, 1 to k_max; None is a twentieth of the set.
        k_max: Images kept at nothing but noise, at most N; None is a tenth of the set.
        pool_resolution: Height and width that images are pooled to where they are larger.
        generator: Draws the pool at random instead, as the published code does, anew for every
            noisy image and call (derivatives asked for later have a draw of their own). None,
            the default, chooses by pooled distance: the same answer every time.

    Raises:
        TypeError: `denoiser` is of no such class, or an option has the wrong type.
        ValueError: An option is out of range; the PCA-locality denoiser averages over batches;
            the set is augmented; or k_max images exceed the memory budget.

    References:
        Shang et al., GoldDiff, 2026 (arXiv 2602.16498).
    """

    def __init__(
        self,
        denoiser: PosteriorDenoiser,
        k_min: int | None = None,
        k_max: int | None = None,
        *,
        pool_resolution: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(denoiser, _WRAPPED):
            names = ", ".join(kind.__name__ for kind in _WRAPPED)
            raise TypeError(f"`denoiser` must be one of {names}, got {describe(denoiser)}")
        if getattr(denoiser, "aggregation", "exact") != "exact":
            raise ValueError("`denoiser` must have aggregation='exact', got 'batch_mean'")
        refuse_augmented(denoiser)
        check_generator(generator)
        super().__init__(denoiser.image_shape)
        data = denoiser.data
        self.denoiser = denoiser
        self.symmetric_jacobian = denoiser.symmetric_jacobian
        k_max = max(1, round(len(data) / 10)) if k_max is None else k_max
        self.k_max = _checked_size(k_max, "k_max", len(data))
        k_min = max(1, min(round(len(data) / 20), self.k_max)) if k_min is None else k_min
        self.k_min = _checked_size(k_min, "k_min", self.k_max)
        self.pool_resolution = check_count(pool_resolution, "pool_resolution")
        self.generator = generator
        self._pooled: Tensor | None = None
        # Of the pooled images: a batch of threads pools them once.
        self._keeping = Lock()
        budget = memory_budget_bytes(denoiser.memory_budget)
        gathered = self.k_max * data.images[0].nbytes
        if self.k_max < len(data) and gathered > budget:
            raise ValueError(
                f"`k_max` must be at most {budget // data.images[0].nbytes}, the images that the "
                f"denoiser's memory budget of {budget} bytes holds, got {self.k_max}"
            )

    @property
    def device(self) -> torch.device:
        """Device of the training set, where inputs must be."""
        return self.denoiser.device

    def sizes(self, sigma: float | NoiseLevel, alpha: float = 1.0) -> SubsetSizes:
        """Sizes of pool and subset at a noise level; see `golden_sizes`."""
        return golden_sizes(len(self.denoiser.data), self.k_min, self.k_max, sigma, alpha)

    def select(self, x: Tensor, sigma: float | NoiseLevel, alpha: float = 1.0) -> Tensor:
        """The images of the posterior of one noisy image.

        Args:
            x: Noisy image, floating point, [C, H, W].
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Returns:
            Positions in the training set in ascending order, int64 [k].

        Raises:
            TypeError: x is not a floating-point tensor, or a level is not a number.
            ValueError: x has the wrong shape or device or holds NaN, or a level is out of range.
        """
        x = check_float_tensor(x, "x")
        if tuple(x.shape) != self.image_shape or x.device != self.device:
            expected = f"shape {list(self.image_shape)} on {self.device}"
            raise ValueError(f"`x` must have {expected}, got {describe(x)}")
        alpha, sigma = check_single_level(sigma, alpha)
        check_magnitude(x[None], alpha, "x")
        images = self.denoiser.data.images
        return Reader(images).checked(self._select, x[None], [(alpha, sigma)])[0]

    def _select(self, x: Tensor, levels: Sequence[tuple[float, float]]) -> list[Tensor]:
        """The positions of each noisy image [B, C, H, W] of levels (alpha, sigma), ascending."""
        count = len(self.denoiser.data)
        sizes = [self.sizes(sigma, alpha) for alpha, sigma in levels]
        alpha = torch.tensor([level[0] for level in levels], dtype=torch.float64)
        alpha = alpha.to(x.device)
        pools = self._pools(x, alpha, sizes)
        chosen: dict[int, Tensor] = {}
        whole: dict[int, list[int]] = {}
        for b, (pool, size) in enumerate(zip(pools, sizes, strict=True)):
            if size.kept == count:
                chosen[b] = torch.arange(count, device=self.device)
            elif pool is None:
                whole.setdefault(size.kept, []).append(b)
            elif len(pool) == size.kept:
                chosen[b] = pool
            else:
                chosen[b] = self._nearest(x[b : b + 1], alpha[b : b + 1], size.kept, pool)[0]
        # Those that keep as many of all images are ranked in one pass.
        for kept, rows in whole.items():
            places = torch.tensor(rows, device=x.device)
            some, level = x.index_select(0, places), alpha.index_select(0, places)
            chosen.update(zip(rows, self._nearest(some, level, kept), strict=True))
        return [chosen[b] for b in range(len(x))]

    def _nearest(self, x: Tensor, alpha: Tensor, k: int, among: Tensor | None = None) -> Tensor:
        """Which k images, of all or some, are nearest to each noisy image: exactly these."""
        images, budget = self.denoiser.data.images, self.denoiser.memory_budget
        problem = trusted_problem(x, images, 0.0, alpha, memory_budget=budget)
        return nearest_positions(problem, k, among, self.denoiser.backend)

    def _pools(self, x: Tensor, alpha: Tensor, sizes: Sequence[SubsetSizes]) -> list[Tensor | None]:
        """Positions of the candidates of each noisy image, ascending; None for all images."""
        count = len(self.denoiser.data)
        pools: list[Tensor | None] = [None] * len(x)
        rows = [b for b, size in enumerate(sizes) if size.pool < count]
        if self.generator is not None:
            device = self.generator.device
            for b in rows:
                drawn = torch.randperm(count, generator=self.generator, device=device)
                pools[b] = drawn[: sizes[b].pool].to(self.device).sort().values
            return pools
        # Distances of as many noisy images at a time as half of the budget holds.
        together = max(1, memory_budget_bytes(self.denoiser.memory_budget) // (8 * count))
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            places = torch.tensor(some, device=x.device)
            level = alpha.index_select(0, places)[:, None, None, None]
            y = x.index_select(0, places).double() / level
            if self.denoiser.data.images.dtype == torch.uint8:
                y = values_to_bytes(y)
            for b, distances in zip(some, self._pooled_distances(y.float()), strict=True):
                found = distances.topk(sizes[b].pool, largest=False).indices
                pools[b] = found.sort().values
        return pools

    def _pooled_distances(self, y: Tensor) -> Tensor:
        """Distances of all images to y [B, C, H, W], both pooled: float32 [B, N]."""
        targets = self._pool_images(y)
        parts = [
            torch.stack([(values - target).flatten(1).norm(dim=1) for target in targets])
            for values in self._pooled_chunks()
        ]
        return torch.cat(parts, 1)

    def _pool_images(self, values: Tensor) -> Tensor:
        height, width = values.shape[-2:]
        size = min(self.pool_resolution, height), min(self.pool_resolution, width)
        return adaptive_avg_pool2d(values, size)

    def _pooled_chunks(self) -> Iterator[Tensor]:
        """Pooled images in stored units, float32, a few at a time."""
        with self._keeping:
            pooled = self._kept_pooled()
        if pooled is None:
            # Rounded like those that are kept: the budget must not change the answer.
            for values in self._chunks():
                yield self._pool_images(values).half().float()
            return
        for part in pooled.split(_CACHED_IMAGES):
            yield part.float()

    def _kept_pooled(self) -> Tensor | None:
        """All pooled images, float16; None where they do not fit the memory budget."""
        data, budget = self.denoiser.data, self.denoiser.memory_budget
        if self._pooled is None or self._pooled.device != self.device:
            shape = self._pool_images(data.values(0, 1)).shape[1:]
            if 2 * len(data) * math.prod(shape) > memory_budget_bytes(budget) // 2:
                return None
            pooled = torch.empty(len(data), *shape, dtype=torch.float16, device=self.device)
            parts = pooled.split(self._at_a_time())
            for part, values in zip(parts, self._chunks(), strict=True):
                part.copy_(self._pool_images(values))
            # Also where torch is differentiating, and lends its tensors for that long only.
            self._pooled = without_derivatives(pooled)
        return self._pooled

    def _chunks(self) -> Iterator[Tensor]:
        """All images in stored units, float32, a few at a time."""
        reader = Reader(self.denoiser.data.images, memory_budget=self.denoiser.memory_budget)
        for stored in reader.blocks(self._at_a_time()):
            yield stored.float()

    def _at_a_time(self) -> int:
        """Images of a chunk: as stored, as numbers, and pooled or squared."""
        budget = memory_budget_bytes(self.denoiser.memory_budget) // 2
        return images_per_chunk(budget, 16 * self.denoiser.data.num_values, _CACHED_IMAGES)

    def _over_subset(self, chosen: Tensor, sigma: float, alpha: float) -> PosteriorDenoiser:
        """The wrapped denoiser with the chosen images for its training set."""
        denoiser = self.denoiser
        if isinstance(denoiser, PCALocalityDenoiser):
            # From the moments of the whole set; the twin shares them.
            denoiser.weights_at(sigma, alpha)
        twin = copy.copy(denoiser)
        kept = 0 if self._pooled is None else self._pooled.nbytes
        if len(chosen) < len(denoiser.data):
            # Plain tensors, also where torch is differentiating: a training set is made of them.
            with outside_transforms():
                images = Reader(denoiser.data.images).at(chosen)
            twin.data = TrainingSet._of_valid(images, denoiser.data.name)
            kept += images.nbytes
        twin.memory_budget = max(1, memory_budget_bytes(denoiser.memory_budget) - kept)
        return twin

    def _subsets(self, x: Tensor, levels: Levels) -> Iterator[tuple[slice, PosteriorDenoiser]]:
        """For each image of the batch its place and the denoiser over its subset."""
        pairs, images = levels.pairs(len(x)), self.denoiser.data.images
        with outside_transforms():
            chosen = Reader(images).checked(self._select, without_derivatives(x), pairs)
        for b, (alpha, sigma) in enumerate(pairs):
            yield slice(b, b + 1), self._over_subset(chosen[b], sigma, alpha)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        means = [denoiser._denoise(x[b], levels.of(b)) for b, denoiser in self._subsets(x, levels)]
        return torch.cat(means) if means else torch.zeros_like(x)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        answers = [
            denoiser._jvp(x[b], tangents[:, b], levels.of(b))
            for b, denoiser in self._subsets(x, levels)
        ]
        means, products = zip(*answers, strict=True)
        return torch.cat(means), torch.cat(products, 1)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        products = [
            denoiser._vjp(x[b], cotangents[:, b], levels.of(b))
            for b, denoiser in self._subsets(x, levels)
        ]
        return torch.cat(products, 1)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: not the pooled images, which are computed again."""
        return self.__dict__ | {"_pooled": None}

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"k_min={self.k_min}, k_max={self.k_max}"


def refuse_augmented(denoiser: PosteriorDenoiser) -> None:
    """Subsets are of the images themselves: refuse sets with further copies of them."""
    if getattr(denoiser.data, "augmentation", None) is not None:
        raise ValueError(
            "`denoiser` must have a training set without augmentation: subsets of flipped or "
            "shifted copies are not supported"
        )


def _checked_size(size: object, name: str, largest: int) -> int:
    return check_count(size, name, maximum=largest)
