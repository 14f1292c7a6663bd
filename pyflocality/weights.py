"""Weights of the inputs for a set of queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.checks import (
    FLOAT_DTYPES,
    check_count,
    check_device,
    check_flag,
    check_instance,
    check_tensor,
    check_text,
    describe,
)

# Weighted squared distances of the largest images allowed stay finite in float32.
_LARGEST = 1e9
# Bits that are looked at together.
_BLOCK_BYTES = 2**24
# Ones of a byte.
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


class QueryWeights:
    """Weights of D inputs for Q queries, kept small and expanded on demand.

    Boolean weights (masks) are kept as bits, float weights as they are.

    Args:
        weights: bool or float [Q, D]; float weights must be finite, and at most 1e9.
        signed: Whether negative weights are taken. The published PCA-locality rule has them at
            threshold 0; for anything else they are a mistake.
        name: What error messages call them.

    Attributes:
        shape: (Q, D).
        is_mask: Whether the weights are boolean.
        is_signed: Whether some are negative.
        is_held: Whether the weights are held, or made whenever some of them are asked for.
        bits: The rows of a mask, eight inputs a byte, the first in the highest bit.

    Raises:
        TypeError: The weights are neither a bool nor a float tensor.
        ValueError: They are not a matrix, or hold NaN, infinities, unwanted negatives or values
            beyond 1e9.
    """

    is_held = True
    is_signed = False

    def __init__(self, weights: Tensor, *, signed: bool = False, name: str = "weights") -> None:
        name, signed = check_text(name, "name"), check_flag(signed, "signed")
        expected = "a bool or float tensor [Q, D]"
        check_tensor(weights, name, expected)
        if weights.dtype != torch.bool and weights.dtype not in FLOAT_DTYPES:
            raise TypeError(f"`{name}` must be {expected}, got {describe(weights)}")
        if weights.ndim != 2 or weights.numel() == 0:
            raise ValueError(f"`{name}` must have shape [Q, D], got {describe(weights)}")
        self.shape: tuple[int, int] = (weights.shape[0], weights.shape[1])
        self.is_mask = weights.dtype == torch.bool
        if self.is_mask:
            self.bits = np.packbits(weights.cpu().contiguous().numpy(), axis=1)
        else:
            if not torch.isfinite(weights).all():
                raise ValueError(f"`{name}` holds NaN or infinite values")
            lowest, highest = weights.aminmax()
            self.is_signed = bool(lowest < 0)
            if self.is_signed and not signed:
                raise ValueError(f"`{name}` holds negative values")
            if max(-float(lowest), float(highest)) > _LARGEST:
                raise ValueError(
                    f"`{name}` must be at most {_LARGEST:g}, got values from {float(lowest):g} to "
                    f"{float(highest):g}"
                )
            self._values = weights.detach()

    @classmethod
    def from_bits(cls, bits: np.ndarray, inputs: int) -> QueryWeights:
        """Masks from their `bits`, uint8 [Q, ceil(D / 8)], for D inputs."""
        inputs = check_count(inputs, "inputs")
        row = -(-inputs // 8)
        is_array = isinstance(bits, np.ndarray) and bits.dtype == np.uint8
        if not is_array or bits.ndim != 2 or bits.shape[1] != row or bits.size == 0:
            raise ValueError(
                f"`bits` must be uint8 [Q, {row}] for `inputs` {inputs}, got {describe(bits)}"
            )
        # Bits past the last input count as nothing.
        past = np.uint8(0xFF >> inputs % 8 if inputs % 8 else 0)
        if (bits[:, -1] & past).any():
            bits = bits.copy()
            bits[:, -1] &= ~past
        masks = cls.__new__(cls)
        masks.shape, masks.is_mask, masks.bits = (len(bits), inputs), True, bits
        return masks

    @cached_property
    def density(self) -> float:
        """Share of weights that are not zero."""
        if not self.is_mask:
            return float(self._values.bool().double().mean())
        return sum(int(ONES[bits].sum()) for bits in self._blocks()) / math.prod(self.shape)

    @property
    def answered(self) -> Tensor:
        """Which of the D columns hold a weight above zero, bool [D]."""
        if not self.is_mask:
            return self._values.bool().any(0).cpu()
        held = np.bitwise_or.reduce([np.bitwise_or.reduce(bits) for bits in self._blocks()])
        return torch.from_numpy(np.unpackbits(held, count=self.shape[1])).bool()

    @property
    def empty(self) -> Tensor:
        """Which queries have no weight but 0, bool [Q]."""
        if not self.is_mask:
            return ~self._values.bool().any(1).cpu()
        return torch.from_numpy(np.concatenate([~bits.any(axis=1) for bits in self._blocks()]))

    def with_row(self, row: Tensor) -> QueryWeights:
        """These weights and one more query with a mask, bool [D]."""
        dtype = torch.bool if self.is_mask else self._values.dtype
        if check_tensor(row, "row").dtype != torch.bool or row.shape != (self.shape[1],):
            raise ValueError(f"`row` must be bool [{self.shape[1]}], got {describe(row)}")
        dense = self.dense(dtype)
        return QueryWeights(torch.cat([dense, row[None].to(dtype)]), signed=True)

    def row(self, query: int) -> Tensor:
        """The weights of one query, bool or float [D]; negative numbers count from the end."""
        count = self.shape[0]
        query = check_count(query, "query", minimum=-count, maximum=count - 1)
        if self.is_mask:
            bits = np.unpackbits(self.bits[query], count=self.shape[1])
            return torch.from_numpy(bits).bool()
        return self._values[query]

    def tile(self, outputs: Tensor) -> QueryWeights:
        """The weights of some of the queries, int64 [n]."""
        chosen, count = check_tensor(outputs, "outputs"), self.shape[0]
        if chosen.dtype != torch.int64 or chosen.ndim != 1 or len(chosen) == 0:
            raise ValueError(f"`outputs` must be int64 [n], got {describe(chosen)}")
        if chosen.min() < 0 or chosen.max() >= count:
            raise ValueError(f"`outputs` must be from 0 to {count - 1}, got {describe(chosen)}")
        if self.is_mask:
            return QueryWeights.from_bits(self.bits[chosen.numpy()], self.shape[1])
        return QueryWeights(self._values[chosen.to(self._values.device)], signed=True)

    def _blocks(self) -> Iterator[np.ndarray]:
        """The bits of masks, a few queries at a time."""
        size = max(1, _BLOCK_BYTES // self.bits.shape[1])
        for first in range(0, len(self.bits), size):
            yield self.bits[first : first + size]

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self.bits.nbytes if self.is_mask else self._values.nbytes

    def dense(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The weights as a matrix [Q, D] of the given dtype (torch.bool for a mask as it is)."""
        check_instance(dtype, "dtype", torch.dtype)
        device = check_device(device)
        if self.is_mask:
            mask = np.unpackbits(self.bits, axis=1, count=self.shape[1])
            return torch.from_numpy(mask).to(device=device, dtype=dtype)
        return self._values.to(device=device, dtype=dtype)
