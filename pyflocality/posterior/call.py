"""A call of an operation, as those see it who choose its backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Call:
    """What a predicate needs to know of a call.

    Attributes:
        device: Device of the tensors.
        dtype: Dtype of the computation.
        requires_grad: Whether a derivative may be asked of the result.
        facts: Further facts of the one operation, by name.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    facts: Mapping[str, object] = field(default_factory=dict)
