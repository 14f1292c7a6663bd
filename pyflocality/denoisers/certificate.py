"""Reading a training set in order of bounds until the rest provably does not matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.data import TrainingSet
from pyflocality.denoisers.bounds import UNIT64, ComponentIndex, DistanceBounds
from pyflocality.storage.reader import Reader, training_values

# Components of the stages: the D-th part.
_STAGE_DIVISORS = (48, 12, 4)
# Costs over that of one value in a scan of the whole set that eight noisy images share: looking
# at the bound of an image; a coefficient, read in order; one of single images; a value of single
# images, read in float64. Measured on two CPU cores.
_LOOK_COST, _BOUND_COST, _SHARPEN_COST, _READ_COST = 400, 12, 50, 120
# Images read at once to begin with; as few in doubt are read rather than bounded more sharply.
_FIRST_READ = 16
# Unread images that weigh less than what may be skipped by this factor, as a power of e, are
# counted with the largest weight they can have.
_FAR = 30.0
# Images read in float64 at a time: few enough to stay in a processor's cache.
_CACHED_IMAGES = 128
_PILOT_IMAGES, _PILOT_QUERIES = 1024, 4
# exp underflows in float64 beyond this.
_UNDERFLOW = 746.0
# Factors of the distances are kept so far from 0 that their inverse is a number, and finite.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-200, torch.finfo(torch.float64).max


@dataclass(frozen=True)
class SubsetPlan:
    """How to answer at a noise level.

    Attributes:
        stages: Stages of the bounds to use.
        components: Components of the last of them.
        share: Share of the images that the pilot expects to be read.
        pays: Whether that costs less than a scan of the whole set.
        limit: Number of images from which on a scan costs less.
    """

    stages: int
    components: int
    share: float
    pays: bool
    limit: int


@dataclass(frozen=True)
class Reading:
    """A certified answer.

    Attributes:
        mean: Posterior mean over the images read, float64 [D].
        error_bound: Largest difference of one of its values to the mean over all images.
        read: Images read.
    """

    mean: Tensor
    error_bound: float
    read: int


def subset_stages(data: TrainingSet, budget: int) -> list[int]:
    """Components of each stage, as many as `budget` bytes hold."""
    values = data.num_values
    fitting = budget // (4 * len(data)) - len(_STAGE_DIVISORS) - 1
    wanted = [math.ceil(values / divisor) for divisor in _STAGE_DIVISORS]
    return sorted({max(1, min(components, fitting)) for components in wanted})


def plan_level(index: ComponentIndex, scale: float, tolerance: float) -> SubsetPlan:
    """Choose the number of stages for a noise level by a pilot among the coefficients.

    A few training images with noise are compared with a sample of the others. Distances by all
    components stand for the true ones; in a sample the neighbours are farther away than in the
    whole set, so that the pilot expects too much rather than too little.

    Args:
        index: Coefficients of the training images.
        scale: Factor of the squared distances in the exponent, finite or not.
        tolerance: Largest share of the posterior in unread images, above 0.
    """
    count, values = len(index.energies), len(index.centre)
    shares = [share.mean().item() for share in _pilot(index, scale, tolerance)]
    # `shares[j]` of the images are in doubt after stage j.
    costs = []
    bounding: float = count * (_LOOK_COST + _BOUND_COST * index.stages[0])
    for stage, share in enumerate(shares):
        if stage > 0:
            added = index.stages[stage] - index.stages[stage - 1]
            bounding += _SHARPEN_COST * shares[stage - 1] * count * added
        read = share * count + _FIRST_READ * (stage + 1)
        costs.append(bounding + _READ_COST * read * values)
    best = min(range(len(costs)), key=costs.__getitem__)
    return SubsetPlan(
        best + 1,
        index.stages[best],
        shares[best],
        costs[best] < count * values,
        count // _READ_COST,
    )


def _pilot(index: ComponentIndex, scale: float, tolerance: float) -> list[Tensor]:
    """Shares in doubt after every stage, [queries] each."""
    count, values, components = len(index.energies), len(index.centre), index.stages[-1]
    device = index.device
    sample = (
        torch.linspace(0, count - 1, min(count, _PILOT_IMAGES), dtype=torch.float32)
        .long()
        .unique()
        .to(device)
    )
    coefficients = torch.cat([block[sample] for block in index.blocks], 1).double()
    energies, residuals = index.energies[sample].double(), index.residuals[:, sample].double()
    chosen = torch.linspace(
        0, len(sample) - 1, min(len(sample), _PILOT_QUERIES), dtype=torch.float32
    ).long()
    factor = _finite(scale)
    deviation = (2.0 * factor) ** -0.5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(chosen), components, generator=generator, dtype=torch.float64)
    queries = coefficients[chosen] + deviation * noise.to(device)

    # An image is not a neighbour of itself.
    itself = torch.zeros(len(chosen), len(sample), dtype=torch.bool, device=device)
    itself[range(len(chosen)), chosen] = len(sample) > 1
    near = energies - 2.0 * queries @ coefficients.T
    near = torch.where(itself, torch.inf, near)
    nearest = near.amin(1, keepdim=True)
    total = torch.exp(-(near - nearest) * factor).sum(1, keepdim=True)
    cut = nearest - (tolerance * total / len(sample)).log() / factor
    shares = []
    for stage, width in enumerate(index.stages):
        outside = residuals[stage, chosen].square() + deviation**2 * (values - width)
        bound = energies - 2.0 * queries[:, :width] @ coefficients[:, :width].T
        bound = bound - 2.0 * outside.sqrt()[:, None] * residuals[stage]
        shares.append(((bound <= cut) & ~itself).double().mean(1))
    return shares


def read_certified(
    data: TrainingSet,
    index: ComponentIndex,
    y: Tensor,
    scale: float,
    tolerance: float,
    *,
    stages: int,
    limit: int | None,
    memory_budget: int | str | None,
) -> Reading | None:
    """Posterior mean over as few images as the bounds allow.

    Args:
        data: The training set.
        index: Its coefficients.
        y: Noisy image divided by alpha, float64 [D].
        scale: Factor of the squared distances in the exponent; may be infinite.
        tolerance: Largest share of the posterior in unread images, above 0.
        stages: Stages of the bounds to use.
        limit: Give up and return None before more images than this are read; None never does.
        memory_budget: Working memory for reading images.
    """
    reader = _Reader(data, y, scale, memory_budget)
    bounds = DistanceBounds(index, y)
    first = bounds.values.topk(min(_FIRST_READ, len(data)), largest=False).indices
    reader.read(first)
    bounds.exclude(first)
    stage, block = 1, _FIRST_READ
    while True:
        # The bounds count from the energy of the query, distances from 0.
        slack = bounds.margin + reader.rounding - bounds.energy
        # Images beyond the cut hold at most half of what may be skipped.
        allowed = tolerance / (1.0 - tolerance) * reader.total / 2
        cut = reader.nearest + slack + math.log(len(data) / allowed) / reader.factor
        doubtful = bounds.up_to(cut)
        if stage < stages and len(doubtful) > _FIRST_READ:
            bounds.sharpen(doubtful)
            stage += 1
            nearest = bounds.values[doubtful].topk(_FIRST_READ, largest=False).indices
            chosen = doubtful[nearest]
        else:
            chosen = _needed(bounds, doubtful, reader, slack, allowed)
            if len(chosen) == 0:
                break
            if limit is not None and reader.count + len(chosen) > limit:
                return None
            chosen, block = chosen[:block], 2 * block
        reader.read(chosen)
        bounds.exclude(chosen)
    near = bounds.up_to(cut + _FAR / reader.factor)
    gaps = bounds.values[near].double() - slack - reader.nearest
    unread = float(torch.exp(-gaps * reader.factor).sum()) + allowed * math.exp(-_FAR)
    return reader.answer(unread, index.value_range)


def _needed(
    bounds: DistanceBounds, doubtful: Tensor, reader: _Reader, slack: float, allowed: float
) -> Tensor:
    """The images to read so that the others in doubt hold at most `allowed`, nearest first."""
    values, order = bounds.values[doubtful].double().sort(stable=True)
    weights = torch.exp(-(values - slack - reader.nearest) * reader.factor)
    # What would be left unread behind each of them, itself included.
    behind = weights.flip(0).cumsum(0).flip(0)
    return doubtful[order[behind > allowed]]


def _finite(scale: float) -> float:
    return min(max(scale, _SMALLEST_FACTOR), _LARGEST_FACTOR)


class _Reader:
    """Images of the set in float64: their distances to y, and their posterior mean."""

    def __init__(
        self, data: TrainingSet, y: Tensor, scale: float, memory_budget: int | str | None
    ) -> None:
        self._data, self._y = data, y
        self.factor = _finite(scale)
        # Stored, as values, differences and squares.
        per_image = 4 * 8 * data.num_values
        fitting = memory_budget_bytes(memory_budget) // per_image
        self._chunk = max(1, min(_CACHED_IMAGES, fitting))
        self._images: list[Tensor] = []
        self._distances: list[Tensor] = []
        self.count, self.nearest, self.total = 0, math.inf, 0.0

    def read(self, images: Tensor) -> None:
        """Read the images at some positions, int64 [n], n > 0."""
        parts = [
            (self._y - values).square_().sum(1)
            for values in map(self._values, images.split(self._chunk))
        ]
        self._images.append(images)
        self._distances.append(torch.cat(parts))
        self.count += len(images)
        self.nearest = min(self.nearest, float(self._distances[-1].min()))
        self.total = float(self._weights().sum())

    @property
    def rounding(self) -> float:
        """Largest error of a distance that matters.

        A value v and its difference to y are off by less than 4 w (|y| + 1), w the unit roundoff
        of float64, and a sum of D squares, in any order, by less than (D + 2) w of itself;
        Cauchy-Schwarz sums up the former. Images farther than the underflow weigh nothing.
        """
        largest = self.nearest + _UNDERFLOW / self.factor
        count = len(self._y)
        single = 4.0 * (float(self._y.norm()) + count**0.5)
        return 1.01 * UNIT64 * ((count + 8) * largest + 2.0 * largest**0.5 * single)

    def answer(self, unread: float, value_range: float) -> Reading:
        """The posterior mean; `unread` bounds the weights of all other images."""
        weights, images = self._weights(), torch.cat(self._images)
        counting = (weights > 0).nonzero()[:, 0]
        mean = torch.zeros_like(self._y)
        for part in counting.split(self._chunk):
            mean += weights[part] @ self._values(images[part])
        mean /= self.total
        skipped = unread / (self.total + unread) if math.isfinite(unread) else 1.0
        moved = min(self._moved(), 1.0)
        # The last term: what weighing and summing the values themselves rounds.
        error = value_range * min(skipped + moved, 1.0) + (4 * self.count + 16384) * UNIT64
        return Reading(mean, error, self.count)

    def _moved(self) -> float:
        """Bound on the share of the posterior that rounding of the distances moves.

        Each weight is right to within a factor exp(rounding factor), their sum, too. Where that
        says nothing, the nearest image may be so much nearer that the others hold little anyway.
        """
        exponent = 2.0 * self.rounding * self.factor
        either_way = math.expm1(exponent) if exponent < 1.0 else 1.0
        distances = torch.cat(self._distances)
        gaps = (distances - self.nearest - 2.0 * self.rounding).clamp(min=0.0)
        others = torch.exp(-gaps * self.factor)
        others[distances.argmin()] = 0.0
        beside_nearest = 1.0 - 1.0 / self.total + float(others.sum())
        return min(either_way, beside_nearest)

    def _weights(self) -> Tensor:
        return torch.exp(-(torch.cat(self._distances) - self.nearest) * self.factor)

    def _values(self, images: Tensor) -> Tensor:
        return training_values(Reader(self._data.images).at(images), torch.float64).flatten(1)
