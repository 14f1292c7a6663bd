"""Every declared posterior operation, its variants and the backends that can run here."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.backends import machine_reason
from pyflocality.ops.costs import Size
from pyflocality.ops.operation import OPERATIONS, Operation

SHAPE = (2, 5, 6)


def variants() -> list[tuple[str, str, str]]:
    """Operation, variant and backend; operations that answer no images have tests of their own."""
    return [
        (name, kind, backend)
        for name, operation in sorted(OPERATIONS.items())
        if name not in ("covariance", "nearest")
        for kind, variant in operation.variants.items()
        for backend in variant.backends
        if backend not in ("triton", "cuda") and machine_reason(backend) is None
    ]


class Problem:
    """Images, noisy images and directions of an operation, with its own example of a query.

    Attributes:
        operation: The operation.
        x: Noisy images, float64 [B, C, H, W].
        images: Training images, uint8 [N, C, H, W].
        directions: [K, B, C, H, W].
    """

    def __init__(self, name: str, count: int = 31, batch: int = 2) -> None:
        generator = torch.Generator().manual_seed(0)
        self.operation: Operation = OPERATIONS[name]
        size = (count, *SHAPE)
        self.images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        self.x = torch.randn(batch, *SHAPE, generator=generator).double()
        self.directions = torch.randn(3, batch, *SHAPE, generator=generator).double()
        terms = self.x[0].numel() ** 2 / 3 if batch else 1
        example = Size(count, SHAPE, batch, window=3, terms=terms)
        self.given = self.operation.example(example, generator)

    def answers(
        self, kind: str, backend: str, dtype: torch.dtype = torch.float64, **options: object
    ) -> tuple[Tensor, ...]:
        """What a variant answers."""
        level = (0.8, 0.9)
        x, directions = self.x.to(dtype), self.directions.to(dtype)
        if kind == "scan":
            return (self.operation.mean(x, self.images, self.given, *level, backend, options),)
        function = self.operation.jvp if kind == "jvp" else self.operation.vjp
        found = function(x, directions, self.images, self.given, *level, backend, options)
        return found if isinstance(found, tuple) else (found,)

    def log_sum_exp(self, backend: str) -> Tensor:
        """Log-sum-exps of the posteriors."""
        x, level = self.x.float(), (0.8, 0.9)
        return self.operation.log_sum_exp(x, self.images, self.given, *level, backend, {})
