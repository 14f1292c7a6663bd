"""Independent float64 truth: the formulas of the documentation, written out in NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def values_of(images: Tensor) -> np.ndarray:
    """Training values in [-1, 1], float64 [N, C, H, W]."""
    array = images.numpy().astype(np.float64)
    return array / 127.5 - 1 if images.dtype == torch.uint8 else array


def noisy_batch(
    images: Tensor, batch: int, sigma: float, alpha: float, rng: torch.Generator
) -> Tensor:
    """Chosen images with noise, float64."""
    chosen = torch.randint(len(images), (batch,), generator=rng)
    values = torch.from_numpy(values_of(images[chosen]))
    noise = torch.randn(values.shape, generator=rng, dtype=torch.float64)
    return alpha * values + sigma * noise


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the first axis."""
    weights = np.exp(logits - logits.max(0))
    return weights / weights.sum(0)


def filtered_posterior_mean(
    x: Tensor,
    images: Tensor,
    weights: np.ndarray,
    answers: list[np.ndarray],
    sigma: np.ndarray,
    alpha: np.ndarray,
    temperature: float = 1.0,
) -> np.ndarray:
    """Query q weighs the inputs by weights[q] and answers the values answers[q]: [B, D]."""
    values = values_of(images).reshape(len(images), -1)
    noisy = x.double().numpy().reshape(len(x), -1)
    result = np.zeros_like(noisy)
    for b in range(len(x)):
        squares = (noisy[b] - alpha[b] * values) ** 2
        for q, answered in enumerate(answers):
            posterior = softmax(-(squares @ weights[q]) / (2 * sigma[b] ** 2 * temperature))
            result[b, answered] = posterior @ values[:, answered]
    return result.reshape(x.shape)


def window_weights(shape: tuple[int, int, int], window: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Weights [H W, D] of square windows and the values that each pixel answers."""
    channels, height, width = shape
    rows, columns = np.divmod(np.arange(height * width), width)
    half = window // 2
    near = (np.abs(rows[:, None] - rows) <= half) & (np.abs(columns[:, None] - columns) <= half)
    answers = [np.arange(channels) * height * width + q for q in range(height * width)]
    return np.tile(near, (1, channels)).astype(np.float64), answers


def random_images(
    generator: torch.Generator, count: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """Smooth random images: neighbours alike, like photographs."""
    noise = torch.randn(count, *shape, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    values = (smooth / smooth.abs().max()).clamp(-1, 1)
    if dtype == torch.uint8:
        return ((values + 1) * 127.5).round().to(torch.uint8)
    return values.to(dtype)


def patch_posterior_mean(
    x: Tensor,
    images: Tensor,
    window: int,
    sigma: np.ndarray,
    alpha: np.ndarray,
    boundary: str,
    temperature: float = 1.0,
) -> np.ndarray:
    """Equivariant models, pair by pair of query pixel and patch centre: [B, C, H, W]."""
    values, noisy = values_of(images), x.double().numpy()
    height, width = x.shape[-2:]
    half = window // 2
    if boundary == "circular":
        padded_values = values
        padded_noisy = np.pad(noisy, [(0, 0), (0, 0), (half, half), (half, half)], "wrap")
        shift = 0
    else:
        pad = [(0, 0), (0, 0), (half, half), (half, half)]
        padded_values, padded_noisy, shift = np.pad(values, pad), np.pad(noisy, pad), half

    def interior(place: int, length: int) -> bool:
        return half <= place < length - half

    def compared(query: int, patch: int, length: int) -> bool:
        if boundary == "circular":
            return interior(patch, length)
        both = interior(query, length) and interior(patch, length)
        return query == patch or both

    result = np.zeros_like(noisy)
    for b in range(len(x)):
        for qy in range(height):
            for qx in range(width):
                around = padded_noisy[b, :, qy : qy + window, qx : qx + window]
                logits, answers = [], []
                for py in filter(lambda place: compared(qy, place, height), range(height)):
                    for px in filter(lambda place: compared(qx, place, width), range(width)):
                        top, left = py + shift - half, px + shift - half
                        patches = padded_values[:, :, top : top + window, left : left + window]
                        gap = ((around - alpha[b] * patches) ** 2).sum((1, 2, 3))
                        logits.append(-gap / (2 * sigma[b] ** 2 * temperature))
                        answers.append(values[:, :, py, px])
                weights = softmax(np.concatenate(logits))
                result[b, :, qy, qx] = weights @ np.concatenate(answers)
    return result
