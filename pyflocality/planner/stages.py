"""What a run of a model costs, stage by stage: moments, components, masks, steps, nearest images.

Operations are counted by the declarations' rule. Times are counts divided by rates that are
measured on this machine. Memory is the most that a stage takes at a time, with what earlier stages
leave behind, beside the images and the program itself; ways are chosen by the functions by which
the library chooses them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.memory import check_memory
from pyflocality._support.rates import product_seconds, shortest, solver_seconds
from pyflocality._support.text import bytes_told
from pyflocality.moments.basis import BasisMethod, basis_bytes, basis_method
from pyflocality.moments.mask_source import (
    Way,
    chosen_way,
    making_bytes,
    making_products,
    mask_bytes,
)
from pyflocality.moments.mask_tiles import TILE
from pyflocality.moments.sums import BLOCK_BYTES
from pyflocality.ops.costs import Size
from pyflocality.ops.covariance import COVARIANCE, accumulate_covariance
from pyflocality.ops.nearest import NEAREST, nearest_images
from pyflocality.planner.masks import bands, schedule_bytes, scheduled_seconds, tiles_seconds
from pyflocality.planner.steps import (
    MEASURED_SECONDS,
    Setting,
    components_of,
    cost_of,
    models,
    seconds_of,
)

_LITTLE_BYTES = 2**28
# Models made of components, and the one of them that makes masks.
_OF_COMPONENTS, _MASKED = ("pca-locality", "wiener", "ledoit-wolf"), "pca-locality"
# Of the sums of a covariance, and of the search for the nearest images, so much is measured.
_VALUES, _IMAGES, _SEARCHED, _SEARCHING = 1024, 2048, 8 * 2**20, 8
# A noisy image takes so much for each of its values in a thread: lanes of sums and states.
_BYTES_PER_VALUE = 256
# Where nobody knows the masks their memory is reckoned as if sums over them added up so much; of a
# single level they may add up to half of the inputs.
_DENSE, _DENSEST = 0.1, 0.5
# Of what masks by Cholesky factors take, the products of their tiles are counted as so much.
_PRODUCTS = 0.25
# More images than any way through their products could take.
_COUNTLESS = 10**12


@dataclass(frozen=True)
class Job:
    """A run that is planned.

    Attributes:
        setting: The images, copies included, and the samples of a batch.
        model: The model's name on the command line.
        levels: Noise levels of the run, each of which has masks of its own.
        calls: How often the model is asked for a batch.
        batches: Batches of samples, one after the other.
        missing: Levels whose masks are to be made; None for all.
        has_components: Whether the components are at hand.
        has_moments: Whether the moments are at hand.
        of_moments: Whether components are those of moments, whatever else would be cheaper.
        knows_masks: Whether the share that masks add up is that of the images' own.
        image_bytes: Bytes of a stored value.
        nearest: Whether the training images nearest to the samples are looked for.
    """

    setting: Setting
    model: str
    levels: int = 10
    calls: int = 10
    batches: int = 1
    missing: int | None = None
    has_components: bool = False
    has_moments: bool = False
    of_moments: bool = False
    knows_masks: bool = False
    image_bytes: int = 1
    nearest: bool = True

    @property
    def size(self) -> Size:
        """Images and samples, as operations count them."""
        return replace(self.setting.size, image_bytes=self.image_bytes)

    @property
    def to_make(self) -> int:
        """Levels whose masks are to be made."""
        if self.model != _MASKED:
            return 0
        return self.levels if self.missing is None else self.missing

    @property
    def way(self) -> Way | None:
        """How masks or components are made; None where none are needed."""
        needed = self.to_make > 0 if self.model == _MASKED else self.model in _OF_COMPONENTS
        if not needed or self.has_components:
            return "components" if needed else None
        count, values = self.setting.images, self.setting.values
        by_moments = self.has_moments or self.of_moments
        if self.model == _MASKED:
            # Of moments the images are not at hand, however many there were.
            return chosen_way(_COUNTLESS if by_moments else count, values)
        gram = not by_moments and basis_method(count, values) == "gram"
        return "gram" if gram else "eigenvectors"

    @property
    def makes_moments(self) -> bool:
        """Whether a covariance is summed up."""
        return self.way in ("cholesky", "eigenvectors") and not self.has_moments

    @property
    def kept_levels(self) -> int:
        """Levels whose masks are kept in memory: at least one that fits the budget."""
        if self.model != _MASKED:
            return 0
        budget = memory_budget_bytes(self.setting.memory_budget)
        return min(self.levels, budget // mask_bytes(self.setting.values))

    @property
    def rank(self) -> int:
        """Components at most."""
        return components_of(self.setting)


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        name: What it is.
        told: What it works on, in words.
        flops: Operations.
        seconds: Time on this machine; None where it was not measured.
        bytes: Most memory at a time, beside the images and the program.
        known: Where the time is from: "measured" of this very work, "counted" times a measured
            rate, or "assumed" of a share that depends on the images.
    """

    name: str
    told: str
    flops: float
    seconds: float | None
    bytes: int
    known: str


@dataclass(frozen=True)
class _Part:
    """A stage by itself: what it takes while it runs, and what it leaves behind."""

    name: str
    told: str
    flops: float
    seconds: Callable[[float], float | None]
    working: int
    kept: int = 0
    known: str = "counted"


def stages_of(job: Job, aim: float | None = MEASURED_SECONDS) -> list[Stage]:
    """The stages of a run, in order.

    Args:
        job: The run.
        aim: About how long a measurement may take, in seconds; None measures nothing.
    """
    held, stages = 0, []
    for part in (_moments(job), _components(job), _masks(job), _steps(job), _nearest(job)):
        if part is None:
            continue
        seconds = None if aim is None else part.seconds(aim)
        most = held + part.working
        stages.append(Stage(part.name, part.told, part.flops, seconds, most, part.known))
        held += part.kept
    return stages


def check_fits(job: Job, instead: str) -> None:
    """Refuse a run that the memory which is there cannot hold.

    Args:
        job: The run.
        instead: What would run, as the end of a sentence.

    Raises:
        MemoryError: There is less.
    """
    most = max(stages_of(job, aim=None), key=lambda stage: stage.bytes)
    # What is not worth to be held against anything.
    if most.bytes > _LITTLE_BYTES:
        check_memory(most.bytes, f"{job.model}: {most.name} ({most.told})", instead)


def peak_of(stages: Sequence[Stage]) -> int:
    """Most memory that a run takes at a time, beside the images and the program."""
    return max((stage.bytes for stage in stages), default=0)


def _moments(job: Job) -> _Part | None:
    if not job.makes_moments:
        return None
    values, size = job.setting.values, job.size
    flops = COVARIANCE.work("scan", size).flops
    square = 8 * values**2
    is_float = job.image_bytes > 1
    # Of floats the blocks in float64, about their mean, and the products of one.
    working = square + _blocks_bytes(job.setting) + (square if is_float else 0)
    return _Part(
        "moments",
        f"covariance of {values:,} values over {job.setting.images:,} images",
        flops,
        lambda aim: product_seconds(flops) if is_float else _sums_seconds(flops),
        working,
        square,
    )


def _components(job: Job) -> _Part | None:
    if job.way not in ("gram", "eigenvectors"):
        return None
    count, values, rank = job.setting.images, job.setting.values, job.rank
    method: BasisMethod = "gram" if job.way == "gram" else "covariance"
    side = count if method == "gram" else values
    sums = products = 0.0
    if method == "gram":
        sums = float(values) * count * (count + 1)
        # The vectors, and once more what makes them orthonormal.
        products = 2.0 * values * rank * count + 3.0 * values * rank**2
    # Counted as a reduction, its solution and the way back.
    solver = 9.0 * side**3
    most, kept = basis_bytes(count, values, method), 8 * values * (rank + 4)
    if method == "covariance":
        # The totals are counted already where they were made; the covariance stays beside them.
        most -= 0 if job.has_moments else 8 * values**2
        kept = 16 * values**2

    def seconds(aim: float) -> float:
        made = product_seconds(sums) if job.image_bytes > 1 else _sums_seconds(sums)
        return made + product_seconds(products) + solver_seconds(side)

    matrix = f"{count:,} images" if method == "gram" else f"{values:,} values"
    return _Part(
        "components",
        f"eigenvectors of the products of {matrix}",
        sums + products + solver,
        seconds,
        most,
        kept,
    )


def _masks(job: Job) -> _Part | None:
    if job.way is None or not job.to_make:
        return None
    setting, bits = job.setting, mask_bytes(job.setting.values)
    by_factors = job.way == "cholesky"
    way: Way = "cholesky" if by_factors else "components"
    # A count of components, where there are some.
    of = setting.images if by_factors else job.rank
    # Beyond the budget a search for the largest entry comes first, and tiles serve one side alone.
    times = 1 if job.kept_levels else 3
    flops = 2.0 * times * making_products(way, of, setting.values, job.to_make)
    side = -(-setting.values // TILE)
    # The totals are held already.
    most = making_bytes(way, of, setting.values) - by_factors * 8 * setting.values**2
    kept = job.kept_levels * bits

    def seconds(aim: float) -> float:
        factors = product_seconds((1 - _PRODUCTS) * flops) if by_factors else 0.0
        # Of a triangular factor a tile takes what both of its sides have.
        terms = setting.values * (side + 2) // (3 * side)
        rank = terms if by_factors else job.rank
        return factors + job.to_make * times * tiles_seconds(side, rank)

    covariance = 0
    if by_factors:
        covariance = 8 * setting.values**2
        # And blocks in which it was made, which allocators are slow to give back.
        most += 4 * min(BLOCK_BYTES, covariance)
        covariance += 4 * min(BLOCK_BYTES, covariance)
    return _Part(
        "masks",
        f"{job.to_make} noise levels, {bytes_told(bits)} each",
        flops,
        seconds,
        # Levels that were used before have their schedules.
        most + kept + (bits if job.kept_levels else 0) + _kept_schedules(job),
        kept + covariance,
    )


def _steps(job: Job) -> _Part:
    calls = job.calls * job.batches
    told = f"{calls} steps of {job.setting.batch} samples"
    if job.model == "nearest":
        return replace(_search(job, job.calls), name="steps", told=told)
    if job.model == "fourier":
        # Two transforms of each sample, in memory that is no more than a few times theirs.
        values, batch = job.setting.values, job.setting.batch
        flops = 10.0 * calls * batch * values * math.log2(values + 1)
        return _Part("steps", told, flops, lambda aim: product_seconds(flops), 64 * batch * values)
    model = job.model if job.model in models() else "wiener"
    flops = calls * cost_of(model, job.setting).flops

    def seconds(aim: float) -> float | None:
        one = seconds_of(model, job.setting, aim)
        made = _schedules_seconds(job) if model == _MASKED else 0.0
        return None if one is None else calls * one + made

    working, kept = _scan_bytes(job.setting), 0
    if model == "wiener":
        # The components in float32.
        working = 4 * job.setting.values * job.rank + 64 * job.setting.batch * job.setting.values
    if model == _MASKED:
        kept = _kept_schedules(job)
        # And one more while it is made.
        working += kept + schedule_bytes(job.setting.shape, _DENSEST)
    known = "assumed" if model == _MASKED and not job.knows_masks else "counted"
    return _Part("steps", told, flops, seconds, working, kept, known)


def _nearest(job: Job) -> _Part | None:
    return _search(job) if job.nearest else None


def _search(job: Job, times: int = 1) -> _Part:
    """The search for the training images nearest to the samples, some times over."""
    setting, searches = job.setting, times * job.batches
    # More samples than are measured take as much longer.
    batch = min(setting.batch, _SEARCHING)

    def seconds(aim: float) -> float:
        each = _search_seconds(setting.shape, batch) * setting.batch / batch
        return searches * each * setting.images

    return _Part(
        "nearest images",
        f"among {setting.images:,}",
        searches * NEAREST.work("scan", job.size).flops,
        seconds,
        _search_bytes(setting),
    )


def _scan_bytes(setting: Setting) -> int:
    """Working memory of a scan by the native kernels: at most the budget."""
    per_thread = setting.batch * setting.values * _BYTES_PER_VALUE
    most = per_thread * (torch.get_num_threads() + 1)
    return min(most, memory_budget_bytes(setting.memory_budget)) + _blocks_bytes(setting)


def _kept_schedules(job: Job) -> int:
    """Schedules of the sums over masks that are kept: those of the levels that are, if whole."""
    shape, share = job.setting.shape, job.setting.mask_share
    if bands(shape) > 1:
        return 0
    share = share if job.knows_masks else max(share, _DENSE)
    return job.kept_levels * schedule_bytes(shape, share)


def _schedules_seconds(job: Job) -> float:
    """What making schedules takes: once for a level that is kept, or for every call."""
    is_kept = job.kept_levels and bands(job.setting.shape) == 1
    times = job.levels if is_kept else job.calls * job.batches
    return times * job.setting.values**2 * scheduled_seconds(job.setting.mask_share)


def _search_bytes(setting: Setting) -> int:
    """Working memory of a search: images as values with their bounds, at most the budget."""
    values, batch = setting.values, setting.batch
    most = setting.images * 4 * (2 * values + 4 * batch)
    return min(most, memory_budget_bytes(setting.memory_budget)) + 48 * max(2**16, values)


def _blocks_bytes(setting: Setting) -> int:
    """Blocks of images, as stored and as float64."""
    return min(3 * BLOCK_BYTES, 9 * setting.images * setting.values)


@functools.cache
def _sums_rate() -> float:
    """Seconds for an operation of the exact sums of a covariance."""
    generator = torch.Generator().manual_seed(0)
    size = (_IMAGES, _VALUES)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    gram, total = (torch.zeros(shape, dtype=torch.int64) for shape in ((_VALUES,) * 2, _VALUES))
    seconds = shortest(lambda: accumulate_covariance(images, gram, total))
    return seconds / COVARIANCE.work("scan", Size(_IMAGES, (1, 1, _VALUES), 1)).flops


def _sums_seconds(flops: float) -> float:
    return flops * _sums_rate() if flops else 0.0


@functools.cache
def _search_seconds(shape: tuple[int, int, int], batch: int) -> float:
    """Seconds for an image of the search for the nearest ones."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, _SEARCHED // math.prod(shape))
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    x = torch.randn(batch, *shape, generator=generator)
    return shortest(lambda: nearest_images(x, images, backend="auto")) / count
