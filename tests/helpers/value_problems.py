"""Problems with value images: every operation that answers them, and its formulas in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from posterior_calls import masks
from torch import Tensor
from truth import noisy_batch, random_images, softmax, values_of, window_weights

from pyflocality import ops

SHAPE = (2, 5, 4)
D = 40
SIGMA, ALPHA, TEMPERATURE = 0.4, 0.9, 1.3
OPS = (
    "global_posterior",
    "window_posterior",
    "masked_posterior",
    "patch_set",
    "filtered_posterior",
)


class Queries(NamedTuple):
    """Weights and responses of an operation's queries, [Q, D] each, and what its functions take."""

    weights: np.ndarray
    responses: np.ndarray
    given: tuple[object, ...]


def queries(op: str) -> Queries:
    """Those of an operation on images of `SHAPE`; windows have side 3."""
    if op == "global_posterior":
        return Queries(np.ones((1, D)), np.ones((1, D)), ())
    if op == "window_posterior":
        weights, answers = window_weights(SHAPE, 3)
        responses = np.zeros_like(weights)
        for q, answered in enumerate(answers):
            responses[q, answered] = 1
        return Queries(weights, responses, (3,))
    if op == "masked_posterior":
        chosen = masks(SHAPE)
        return Queries(chosen.dense(torch.float64).numpy(), np.eye(D), (chosen,))
    if op == "patch_set":
        inside = [p for p in range(20) if 1 <= p // 4 < 4 and 1 <= p % 4 < 3]
        weights = window_weights(SHAPE, 3)[0][inside]
        return Queries(weights, weights, (3,))
    generator = torch.Generator().manual_seed(5)
    weights, responses = torch.rand(2, 7, D, generator=generator) > 0.4
    # Every value is answered.
    responses[-1] = True
    as_numbers = (mask.double().numpy() for mask in (weights, responses))
    return Queries(*as_numbers, (weights, responses))


def functions(op: str) -> dict[str, Callable[..., object]]:
    """The functions of an operation by the kind of its variant."""
    names = {kind: f"{op}_{kind}" for kind in ("mean", "jvp", "vjp")}
    return {kind: getattr(ops, name) for kind, name in names.items() if hasattr(ops, name)}


class ValueProblem:
    """Noisy images, images and value images of a tiny set.

    Attributes:
        x: Noisy images, float64 [B, C, H, W], of values that float32 holds.
        images: Training images, [N, C, H, W].
        values: Value images, float32 [N, R, C, H, W].
        tangents: [K, B, C, H, W].
    """

    def __init__(
        self,
        generator: torch.Generator,
        count: int = 31,
        values: int = 2,
        batch: int = 3,
        stored: torch.dtype = torch.uint8,
        directions: int = 2,
    ) -> None:
        self.images = random_images(generator, count, SHAPE, stored)
        self.x = noisy_batch(self.images, batch, SIGMA, ALPHA, generator).float().double()
        # Of another size than images, and not about zero.
        self.values = 3 * torch.randn(count, values, *SHAPE, generator=generator) - 0.5
        size = (directions, batch, *SHAPE)
        self.tangents = torch.randn(size, generator=generator, dtype=torch.float64)
        self.generator = generator

    def cotangents(self, answered: int) -> Tensor:
        """Directions in the space of so many answered images, [K, B, A, C, H, W]."""
        size = (len(self.tangents), len(self.x), answered, *SHAPE)
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def answered(self, with_image: bool) -> np.ndarray:
        """What is answered of every image, float64 [N, A, D]."""
        values = self.values.double().flatten(2).numpy()
        images = values_of(self.images).reshape(len(values), 1, -1)
        return np.concatenate([images, values], 1) if with_image else values

    def truth(
        self, op: str, with_image: bool, along: Tensor | None = None, against: Tensor | None = None
    ) -> np.ndarray:
        """The formulas: answers, their derivatives along x, or against cotangents."""
        weights, responses, _ = queries(op)
        keys = values_of(self.images).reshape(len(self.images), -1)
        noisy, answered = self.x.numpy().reshape(len(self.x), -1), self.answered(with_image)
        shares, factor = responses / responses.sum(0), ALPHA / (SIGMA**2 * TEMPERATURE)
        results = []
        for b, one in enumerate(noisy):
            squares, sums = (one - ALPHA * keys) ** 2, 0
            for w, share in zip(weights, shares, strict=True):
                p = softmax(-(squares @ w) / (2 * SIGMA**2 * TEMPERATURE))
                if along is not None:
                    c = (w * along[:, b].flatten(1).numpy()) @ keys.T
                    covariance = np.einsum("i,ki,iad->kad", p, c - (c @ p)[:, None], answered)
                    sums = sums + factor * share * covariance
                elif against is not None:
                    c = np.einsum(
                        "d,kad,iad->ki", share, against[:, b].flatten(2).numpy(), answered
                    )
                    sums = sums + factor * w * ((p * (c - (c @ p)[:, None])) @ keys)
                else:
                    sums = sums + share * np.tensordot(p, answered, 1)
            results.append(sums)
        axis = 0 if along is None and against is None else 1
        stacked = np.stack(results, axis)
        return stacked.reshape(*stacked.shape[:-1], *SHAPE)

    def found(
        self, op: str, kind: str, dtype: torch.dtype, *directions: Tensor, **options: object
    ) -> tuple[Tensor, ...]:
        """What a function of an operation answers in a dtype; options may replace the values."""
        _, _, given = queries(op)
        tensors = [tensor.to(dtype) for tensor in (self.x, *directions)]
        options = {"values": self.values, "temperature": TEMPERATURE} | options
        result = functions(op)[kind](*tensors, self.images, *given, SIGMA, ALPHA, **options)
        return result if isinstance(result, tuple) else (result,)
