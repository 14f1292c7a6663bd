r"""Sets that are split over the processes of a torch.distributed job.

Every process (rank) holds a part of the training set, scans it, and joins what it found with the
others: the posterior weights of image :math:`i` at squared distance :math:`e_i` are
:math:`p_i \propto \exp(-\kappa e_i)`, so with a rank's smallest distance :math:`m_r` and sums
:math:`s_r = \sum_i \exp(-\kappa (e_i - m_r))`, :math:`y_r = \sum_i \exp(-\kappa (e_i - m_r)) v_i`
over its images the whole set's are

.. math::
    m = \min_r m_r, \qquad s = \sum_r e^{-\kappa (m_r - m)} s_r, \qquad
    y = \sum_r e^{-\kappa (m_r - m)} y_r,

one all-reduce for the minimum and one for the sums. Denoisers made of a sharded set need nothing
else; all ranks get the same answer, to the bit::

    import pyflocality as pf

    with pf.distributed.ranks():
        data = pf.distributed.shard(pf.TrainingSet.load("images.npy"))
        denoiser = pf.PCALocalityDenoiser(data)
        result = pf.sample(denoiser, 16, generator=torch.Generator().manual_seed(0))

under `torchrun --nproc-per-node 4 script.py`. The sums are joined in float64; what differs
between numbers of ranks is where float32 sums of the scans begin and end, a few float32 rounding
errors of the result. Moments of 8-bit images are sums of integers, bit-identical for every number
of ranks.

Where every rank can hold, or map, the whole set, the samples can be split instead:
`split_samples(denoiser)` has each rank denoise its part of a batch. `pyflocality generate` does
either when `torchrun` starts it.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pyflocality._support.checks import LevelLike, as_pair, check_callable, check_real, describe
from pyflocality.data import TrainingSet
from pyflocality.posterior.ranks import RankLostError, Ranks
from pyflocality.posterior.sharded import ShardedImages, ranks_of

__all__ = ["RankLostError", "ranks", "shard", "split_samples"]

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Numbers the blocks inside which this process joins others; every rank has as many.
_blocks = itertools.count()


@contextmanager
def ranks(*, timeout: float = 600.0) -> Iterator[None]:
    """Join the ranks that `torchrun` started, for the length of a `with` block.

    Blocks may follow one another, the same number on every rank.

    NCCL joins them where every rank of the machine has a GPU of its own, which becomes the
    current one, gloo anywhere else. A rank that ends is noticed at once or, at the latest, after
    `timeout`: the others then raise `RankLostError`.

    Args:
        timeout: Seconds that a rank waits for the others. It must exceed the time by which one
            rank's scan may take longer than another's.

    Raises:
        ValueError: `timeout` is not positive and finite, or the process was not started by
            `torchrun`.
        RuntimeError: The process has joined others already, or cannot reach them.
    """
    # A timedelta counts no more.
    seconds = check_real(timeout, "timeout", low=0.0, high=1e9, above=True)
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ValueError(
            f"the environment variable {missing[0]} is not set: start the ranks with "
            "`torchrun --nproc-per-node N script.py`"
        )
    if dist.is_initialized():
        raise RuntimeError("this process has joined a process group already")
    local, siblings = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= siblings
    if has_gpus:
        torch.cuda.set_device(local)
    backend = "cuda:nccl,cpu:gloo" if has_gpus else "gloo"
    patience = timedelta(seconds=seconds)
    store, rank, count = next(rendezvous("env://", timeout=patience))
    # The addresses of an earlier block's ranks are still in the store.
    store = PrefixStore(f"pyflocality/{next(_blocks)}", store)
    store.set_timeout(patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(data: TrainingSet, group: dist.ProcessGroup | None = None) -> TrainingSet:
    """This rank's part of a set, for denoisers and `Moments` that answer for the whole set.

    The images are split in their order into parts of almost equal length. A part shares the
    memory of the set: of a memory-mapped set a rank reads its own part only.

    What is made of the part joins the ranks on its own: the optimal, local, equivariant, PCA
    locality (exact aggregation), patch set, locally linear, filtered and Wiener denoisers, their
    first derivatives, `Moments.from_data` and `ops.nearest_images`. Everything else that would
    read the images raises. All ranks must make the same calls in the same order with the same
    arguments, so seed their generators alike: that is checked, and costs a copy of the arguments
    to the CPU.

    Args:
        data: The whole set, the same on every rank.
        group: The ranks that share it; None for all ranks of the job.

    Returns:
        The part; `len` tells how many images it holds.

    Raises:
        TypeError: `data` is not a TrainingSet.
        ValueError: `data` has fewer images than there are ranks or is sharded already, the ranks
            hold sets of different shapes, or there is no process group.
        RankLostError: A rank is gone.
    """
    if not isinstance(data, TrainingSet):
        raise TypeError(f"`data` must be a TrainingSet, got {describe(data)}")
    _check_group("shard", group)
    if ranks_of(data.images) is not None:
        raise ValueError(f"`data` must be the whole set, {data!r} is sharded already")
    holders = Ranks(group)
    holders.agree(f"shard of {len(data)} images {data.image_shape} {data.dtype}")
    if len(data) < holders.count:
        raise ValueError(
            f"`data` must have at least {holders.count} images, one for each rank, got {len(data)}"
        )
    part = copy.copy(data.subset(holders.part(len(data))))
    part.images = ShardedImages.of(part.images, holders)
    return part


def split_samples(
    denoiser: Callable[..., Tensor], group: dist.ProcessGroup | None = None
) -> Callable[..., Tensor]:
    """A denoiser of whose batches every rank does a part.

    It is made for `pyflocality.sample`::

        with pf.distributed.ranks():
            denoiser = pf.distributed.split_samples(pf.OptimalDenoiser(data))
            result = pf.sample(denoiser, 64, generator=torch.Generator().manual_seed(0))

    Every rank holds the whole set, or maps it, and gets all answers. They are the bits of
    one process where an image's answer does not depend on the others of its batch, and on the
    number of threads, else they differ by rounding.

    All ranks must make the same calls in the same order with the same arguments, so seed their
    generators alike: that is checked. No gradients are recorded.

    Args:
        denoiser: Any function (x, sigma, alpha) -> x0 of x [B, C, H, W] whose answers have the
            shape and dtype of x; sigma and alpha are numbers, or tensors [B]. Not one of a
            sharded set, which joins the ranks on its own.
        group: The ranks that share the work; None for all ranks of the job.

    Returns:
        The function, with the attributes `image_shape` and `device` of `denoiser`.

    Raises:
        TypeError: `denoiser` is not callable.
        ValueError: There is no process group, or `denoiser` is of a sharded set. Calls raise it,
            too, where the ranks make different ones.
        RankLostError: A rank is gone; its calls raise it, too.
    """
    check_callable(denoiser, "denoiser")
    _check_group("split_samples", group)
    data = getattr(denoiser, "data", None)
    if isinstance(data, TrainingSet) and ranks_of(data.images) is not None:
        raise ValueError("`denoiser` must be of a whole set: one of a sharded set joins the ranks")
    return _SplitSamples(denoiser, Ranks(group))


class _SplitSamples:
    """What `split_samples` returns."""

    def __init__(self, denoiser: Callable[..., Tensor], ranks: Ranks) -> None:
        self._denoiser, self._ranks = denoiser, ranks
        self.image_shape = getattr(denoiser, "image_shape", None)
        self.device = getattr(denoiser, "device", None)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: LevelLike, alpha: float | Tensor = 1.0) -> Tensor:
        """The answers to all of x."""
        sigma, alpha = as_pair(sigma, alpha)
        levels = [torch.as_tensor(level, dtype=torch.float64) for level in (sigma, alpha)]
        self._ranks.agree("split_samples", x, *levels)
        rows = self._ranks.part(len(x))
        own = None
        if rows.stop > rows.start:
            sigma, alpha = (
                level[rows] if isinstance(level, Tensor) and level.ndim else level
                for level in (sigma, alpha)
            )
            own = self._denoiser(x[rows], sigma, alpha)
            if own.shape != x[rows].shape or own.dtype != x.dtype:
                raise ValueError(
                    f"`denoiser` must return images like {describe(x[rows])}, got {describe(own)}"
                )
        return self._ranks.gathered(own, rows, x)


def _check_group(name: str, group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"`group` must be a torch.distributed.ProcessGroup or None, got {describe(group)}"
        )
    if not dist.is_initialized():
        raise ValueError(
            f"there is no process group: call {name} inside "
            "`with pyflocality.distributed.ranks():` or after "
            "torch.distributed.init_process_group"
        )
