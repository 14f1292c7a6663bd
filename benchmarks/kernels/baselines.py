"""Yardsticks: the algorithms of the published codes in plain torch, and bare memory and matmul.

Each takes noisy images x [B, C, H, W] and training values [N, C, H, W] as float32 in [-1, 1], as
those codes hold them, and materialises what they materialise, in chunks that fit the memory. The
answers are posterior means [B, C, H, W].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
from torch import Tensor

# Images a batch of the published code's loader.
LOADER_BATCH = 256
_CHUNK_BYTES = 256 * 2**20
# Side of the tiles of core and fringe, in pixels.
_TILE = 4


class _Posterior:
    """Softmax over batches of images, each taken by itself and joined by its log-sum-exp."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []
        self._lse: list[Tensor] = []

    def add(self, logits: Tensor, mean: Tensor) -> None:
        """Logits [B, n, Q] and posterior means of one batch."""
        self._lse.append(torch.logsumexp(logits, 1))
        self._means.append(mean)

    def mean(self) -> Tensor:
        """Posterior means over all batches, [B, ...]."""
        if len(self._means) == 1:
            return self._means[0]
        share = torch.softmax(torch.stack(self._lse), 0)
        means = torch.stack(self._means)
        return (share.reshape(*share.shape, *[1] * (means.ndim - share.ndim)) * means).sum(0)


def masked_einsum(x: Tensor, values: Tensor, mask: Tensor, sigma: float, alpha: float) -> Tensor:
    """PCA locality: squared differences [B, n, D] of a loader batch, einsum with the dense mask.

    The mask has inputs in the row, outputs in the column, float32 [D, D].
    """
    noisy, posterior = x.flatten(1), _Posterior()
    for batch in values.flatten(1).split(LOADER_BATCH):
        squares = (noisy[:, None] - alpha * batch).square()
        logits = torch.einsum("bnd,dm->bnm", squares, mask) / (-2 * sigma**2)
        posterior.add(logits, (torch.softmax(logits, 1) * batch).sum(1))
    return posterior.mean().reshape(x.shape)


def window_unfolded_patches(
    x: Tensor, values: Tensor, window: int, sigma: float, alpha: float
) -> Tensor:
    """Local score: patches of queries and images unfolded, differences of all pairs squared."""
    half = window // 2
    noisy = F.unfold(x, window, padding=half)
    chunk = _images(4 * noisy.numel())
    posterior = _Posterior()
    for batch in values.split(chunk):
        patches = F.unfold(batch, window, padding=half)
        distance = (noisy[:, None] - alpha * patches).square().sum(2)
        _answer_pixels(posterior, distance, batch, sigma)
    return posterior.mean().transpose(1, 2).reshape(x.shape)


def window_unfolded_differences(
    x: Tensor, values: Tensor, window: int, sigma: float, alpha: float
) -> Tensor:
    """Local score with less to unfold: squared differences, summed over the channels first."""
    batch_size, _, height, width = x.shape
    chunk = _images(4 * batch_size * window**2 * height * width)
    posterior = _Posterior()
    for batch in values.split(chunk):
        squares = (x[:, None] - alpha * batch).square().sum(2)
        unfolded = F.unfold(squares.reshape(-1, 1, height, width), window, padding=window // 2)
        distance = unfolded.sum(1).reshape(batch_size, len(batch), height * width)
        _answer_pixels(posterior, distance, batch, sigma)
    return posterior.mean().transpose(1, 2).reshape(x.shape)


def _answer_pixels(posterior: _Posterior, distance: Tensor, batch: Tensor, sigma: float) -> None:
    """Every pixel's posterior [B, n, H W] answers the channels of that pixel: [B, H W, C]."""
    logits = distance / (-2 * sigma**2)
    weights = torch.softmax(logits, 1)
    mean = torch.stack([(weights * plane).sum(1) for plane in batch.flatten(2).unbind(1)], -1)
    posterior.add(logits, mean)


def equivariant_convolution(
    x: Tensor, values: Tensor, window: int, sigma: float, alpha: float
) -> Tensor:
    """Equivariant local score: images convolved with the patches of each query.

    The square is expanded as |q|^2 - 2 alpha q v + alpha^2 |v|^2; queries are padded circularly,
    images are searched where a patch fits.
    """
    _, channels, height, width = x.shape
    half = window // 2
    padded = F.pad(x, (half,) * 4, mode="circular")
    filters = F.unfold(padded, window).transpose(1, 2)
    ones = x.new_ones(1, channels, window, window)
    chunk = _images(4 * filters.shape[1] * (height - 2 * half) * (width - 2 * half))
    rows = []
    for patches in filters:
        posterior = _Posterior()
        for batch in values.split(chunk):
            inner = F.conv2d(batch, patches.reshape(-1, channels, window, window))
            norm = F.conv2d(batch.square(), ones)
            # [n, H W, positions] -> [1, n positions, H W]
            distance = (
                (alpha**2 * norm - 2 * alpha * inner).flatten(2).transpose(1, 2).flatten(0, 1)
            )
            logits = ((distance + patches.square().sum(1)) / (-2 * sigma**2))[None]
            inside = batch[:, :, half : height - half, half : width - half]
            centres = inside.flatten(2).transpose(1, 2).flatten(0, 1)
            posterior.add(logits, torch.softmax(logits, 1).transpose(1, 2) @ centres)
        rows.append(posterior.mean())
    return torch.cat(rows).transpose(1, 2).reshape(x.shape)


def global_broadcast(x: Tensor, values: Tensor, sigma: float, alpha: float) -> Tensor:
    """Optimal denoiser: differences of all pairs [B, n, D] by broadcasting, squared and summed."""
    noisy, posterior = x.flatten(1), _Posterior()
    for batch in values.flatten(1).split(_images(4 * noisy.numel())):
        distance = (noisy[:, None] - alpha * batch).square().sum(2)
        logits = (distance / (-2 * sigma**2))[..., None]
        posterior.add(logits, torch.softmax(logits[..., 0], 1) @ batch)
    return posterior.mean().reshape(x.shape)


def read_bytes(images: Tensor) -> Tensor:
    """One sequential read of all bytes: their sum as 64-bit words, the odd last bytes left out."""
    flat = images.reshape(-1).view(torch.uint8)
    return flat[: len(flat) // 8 * 8].view(torch.int64).sum()


def core_fringe_terms(mask: Tensor, shape: tuple[int, int, int]) -> int:
    """Multiply-adds per query and image of core and fringe in tiles of 4 x 4 outputs.

    Inputs that every mask of a tile holds (the core) give one sum that its outputs share; inputs
    that some hold (the fringe) are a column for each output. The mask, bool [D, D], has outputs in
    the row, inputs in the column; the outputs of a tile are of one channel.
    """
    terms = 0
    for plane in mask.reshape(*shape, -1):
        for rows in plane.split(_TILE):
            for tile in rows.split(_TILE, 1):
                core = int(tile.all(1).all(0).sum())
                union = int(tile.any(1).any(0).sum())
                terms += core + (union - core) * tile.shape[0] * tile.shape[1]
    return terms


def _images(bytes_per_image: int) -> int:
    return max(1, _CHUNK_BYTES // bytes_per_image)
