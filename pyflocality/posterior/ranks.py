"""The ranks of a torch.distributed job that hold a training set together: collectives.

Every rank scans its part of the set; what it found is joined with what the others did, to the same
bits on every rank.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pyflocality.posterior.state import PosteriorState, finite_factor, merge_tangents, rescaled

# Bytes of the integers that stand for exact distances: whatever levels and images, they are enough.
_KEY_BYTES = 512


class RankLostError(RuntimeError):
    """Another rank of the job ended, or did not answer in time."""


class Ranks:
    """The ranks that hold a set together, and what they do with one another's results.

    Args:
        group: Their process group; None for all ranks of the job.

    Attributes:
        rank: Number of this rank.
        count: How many ranks there are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def merged(self, state: PosteriorState, scale: Tensor) -> PosteriorState:
        """The state after the images of all ranks, float64, the same bits on every rank.

        The scale [B] is the factor of the distances in the exponent.
        """
        state = PosteriorState(*(part.detach().double() for part in state))
        lowest = state.minimum.clone()
        self._reduce(lowest, dist.ReduceOp.MIN)
        state = rescaled(state, lowest, finite_factor(scale, torch.float64))
        sums = torch.cat([state.total.flatten(), state.weighted.flatten()])
        self._reduce(sums, dist.ReduceOp.SUM)
        total, weighted = sums.split([state.total.numel(), state.weighted.numel()])
        return PosteriorState(
            lowest, total.reshape(state.total.shape), weighted.reshape(state.weighted.shape)
        )

    def merged_tangents(self, state: PosteriorState, scale: Tensor, values: int) -> PosteriorState:
        """As `merged`, of a state with tangents whose queries answer `values` values."""
        state = PosteriorState(*(part.detach().double() for part in state))
        every = []
        for part in state:
            like = part.new_empty(self.count, *part.shape)
            every.append(self.gathered(part[None], slice(self.rank, self.rank + 1), like))
        scale = finite_factor(scale, torch.float64)
        partials = [PosteriorState(*part) for part in zip(*every, strict=True)]
        return functools.reduce(lambda a, b: merge_tangents(a, b, scale, values), partials)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, the same bits on every rank."""
        total = tensor.detach().clone().contiguous()
        self._reduce(total, dist.ReduceOp.SUM)
        return total

    def part(self, count: int) -> slice:
        """Which of `count` things in a row are this rank's; the parts differ by one at most."""
        start, stop = (count * (self.rank + i) // self.count for i in (0, 1))
        return slice(start, stop)

    def gathered(self, own: Tensor | None, rows: slice, like: Tensor) -> Tensor:
        """A tensor of which every rank has some rows, bit for bit the same on every rank.

        Args:
            own: The rows of this rank, or None where it has none.
            rows: Which they are; every row is some rank's, and no row two ranks'.
            like: Any tensor of the result's shape, dtype and device.
        """
        whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        if own is not None:
            whole[rows] = own
        # Sums of bytes with zeros: those of numbers would lose the sign of a zero.
        return self.summed(whole.view(torch.uint8)).view(like.dtype)

    def of_first(self, tensor: Tensor | None, like: Tensor) -> Tensor | None:
        """What rank 0 has, a tensor of the form of `like` or None, on every rank."""
        there = self.summed(torch.tensor(int(tensor is not None), device=like.device))
        return self.gathered(tensor, slice(None), like) if int(there) else None

    def text_of_first(self, text: str | None, device: torch.device) -> str:
        """A text that rank 0 has, not empty, on every rank; the others have None."""
        own = None
        if text is not None:
            own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
        length = int(self.summed(torch.tensor(0 if own is None else len(own), device=device)))
        like = torch.empty(length, dtype=torch.uint8, device=device)
        return self.gathered(own, slice(None), like).cpu().numpy().tobytes().decode()

    def nearest(
        self, indices: Tensor, distances: Tensor, keys: Sequence[Sequence[int]], count: int
    ) -> tuple[Tensor, Tensor]:
        """The nearest images of the whole set from those of the parts.

        Args:
            indices: Positions in this rank's part, image i of copy j at j `count` + i, [B, k].
            distances: Their distances, ascending, [B, k].
            keys: Integers in the order of the exact distances on all ranks, [B, k].
            count: Images of this rank's part, copies not included.

        Returns:
            Positions in the whole set, image i of copy j at j N + i, and distances, [B, k].
        """
        here = slice(self.rank, self.rank + 1)
        counts = indices.new_zeros(self.count)
        counts = self.gathered(counts.new_tensor(count), here, counts)
        whole, start = int(counts.sum()), int(counts[: self.rank].sum())
        indices = indices // count * whole + indices % count + start
        if indices.numel() == 0:
            return indices, distances
        content = [key.to_bytes(_KEY_BYTES, "big", signed=True) for row in keys for key in row]
        written = torch.frombuffer(bytearray(b"".join(content)), dtype=torch.uint8)
        written = written.reshape(*indices.shape, _KEY_BYTES).to(indices.device)
        gathered = []
        for own in (indices, distances, written):
            every = own.new_empty(self.count, *own.shape)
            gathered.append(torch.cat(list(self.gathered(own, here, every)), 1))
        orders = []
        for places, row in zip(gathered[0].tolist(), gathered[2].cpu().numpy(), strict=True):
            read = [int.from_bytes(key.tobytes(), "big", signed=True) for key in row]
            pairs = list(zip(read, places, strict=True))
            # Among equal distances the earlier image comes first.
            orders.append(sorted(range(len(pairs)), key=pairs.__getitem__)[: indices.shape[1]])
        order = indices.new_tensor(orders).reshape(indices.shape)
        return gathered[0].gather(1, order), gathered[1].gather(1, order)

    def agree(self, what: str, *tensors: Tensor) -> None:
        """Raise unless all ranks come here with the same words and the same tensors.

        Raises:
            ValueError: They do not.
            RankLostError: A rank is gone.
        """
        digest = zlib.crc32(what.encode())
        for tensor in tensors:
            digest = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest)
            content = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
            digest = zlib.crc32(content.numpy().data, digest)
        # The smallest and, negated, the largest.
        device = tensors[0].device if tensors else None
        bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
        self._reduce(bounds, dist.ReduceOp.MIN)
        if int(bounds[0]) != -int(bounds[1]):
            raise ValueError(
                f"{what}: the ranks were called with different arguments (noisy images, noise "
                "levels or operations); every rank must make the same calls in the same order: "
                "seed each rank's generator alike"
            )

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        try:
            dist.all_reduce(tensor, op, group=self.group)
        # torch has no type of its own for gloo's errors.
        except RuntimeError as error:
            # Its first sentence, without the place in torch's own sources.
            cause = re.sub(r"\[\S+:\d+\] ", "", " ".join(str(error).split())).split(". ")[0][:200]
            raise RankLostError(
                f"rank {self.rank} of {self.count} cannot reach the others: one of them has ended "
                f"or did not answer in time ({cause})"
            ) from error
