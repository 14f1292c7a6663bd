"""What `benchmarks.subsets` measures on, and how much of a set lower bounds leave to be read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality.denoisers.bounds import ComponentIndex, DistanceBounds
from pyflocality.kernels.cpu.masked_posterior import difference_tree
from pyflocality.storage.reader import training_values

from ..command import Record

SCHEDULE = pf.DDPMSchedule()
TOLERANCE = 1e-3
WINDOW = 7
_CHUNK = 2000


@dataclass(frozen=True)
class Setting:
    """What one set is measured on.

    Attributes:
        name: Key of `THRESHOLDS`.
        data: Training images, in memory.
        test: Test images.
        moments: Moments of the training images.
        batch: Noisy images of a call of the certified subset; golden subsets take half of them.
        repetitions: Timed calls.
    """

    name: str
    data: pf.TrainingSet
    test: pf.TrainingSet
    moments: pf.Moments
    batch: int
    repetitions: int

    def noisy(self, step: int) -> tuple[Tensor, float, float]:
        """Noisy test images [B, C, H, W], sigma and alpha of a step."""
        alpha, sigma = SCHEDULE(step)
        clean = self.test.values(0, self.batch)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step))
        return alpha * clean + sigma * noise, sigma, alpha


def exact_distances(y: Tensor, data: pf.TrainingSet) -> Tensor:
    """Squared distances of images y [B, D] to the training set, float64 [B, N]."""
    parts = []
    for start in range(0, len(data), _CHUNK):
        values = data.values(start, start + _CHUNK, dtype=torch.float64).flatten(1)
        energies = y.square().sum(1)[:, None] + values.square().sum(1)
        parts.append(energies - 2.0 * y @ values.T)
    return torch.cat(parts, 1)


def posterior_means(distances: Tensor, scale: float, data: pf.TrainingSet) -> Tensor:
    """Posterior means over the whole set, float64 [B, D]."""
    weights = torch.softmax(-scale * distances, 1)
    means = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(data), _CHUNK):
        values = data.values(start, start + _CHUNK, dtype=torch.float64).flatten(1)
        means = means + weights[:, start : start + _CHUNK] @ values
    return means


def global_shares(
    y: Tensor, distances: Tensor, scale: float, index: ComponentIndex
) -> dict[str, float]:
    """Mean share to be read by the number of components, and with exact distances as bounds."""
    every = torch.arange(distances.shape[1])
    result: dict[str, list[float]] = defaultdict(list)
    for image, exact in zip(y, distances, strict=True):
        bounds = DistanceBounds(index, image)
        for stage, components in enumerate(index.stages):
            if stage > 0:
                bounds.sharpen(every)
            lowest = bounds.values.double() + bounds.energy
            share = share_needed(exact, lowest, scale)
            result[str(components)].append(share)
        result["exact"].append(share_needed(exact, exact, scale))
    return _means(result)


def share_needed(exact: Tensor, bounds: Tensor, scale: float) -> float:
    """Share of the images to read, in order of their bounds, until the rest provably suffices.

    Exact squared distances and lower bounds on them are float64 [N]; the scale is their factor in
    the exponent.
    """
    lowest, order = bounds.sort()
    nearest = exact.min()
    weights = torch.exp(-(exact[order] - nearest) * scale)
    rest = torch.exp(-(lowest - nearest) * scale).flip(0).cumsum(0).flip(0)
    # Before reading image n, those before it have been read.
    read = weights.cumsum(0) - weights
    enough = (rest * (1.0 - TOLERANCE) <= TOLERANCE * read).nonzero()
    return (int(enough[0]) if len(enough) else len(exact)) / len(exact)


def local_shares(
    setting: Setting, step: int, mask: Tensor, components: Sequence[int]
) -> dict[str, float]:
    """Mean share that bounds leave to be read for a query that weighs the inputs of a mask [D]."""
    x, sigma, alpha = setting.noisy(step)
    chosen = mask.nonzero()[:, 0]
    stored = setting.data.images.flatten(1).index_select(1, chosen)
    images = training_values(stored, torch.float32)
    centre = setting.moments.mean.flatten()[chosen].float()
    images -= centre
    covariance = setting.moments.covariance[chosen][:, chosen].float()
    _, vectors = torch.linalg.eigh(covariance)
    vectors = vectors.flip(1)[:, : max(components)]
    coefficients, energies = images @ vectors, images.square().sum(1).double()
    scale = 0.5 * (alpha / sigma) ** 2
    result: dict[str, list[float]] = defaultdict(list)
    for noisy in x:
        y = noisy.flatten()[chosen] / alpha - centre
        energy, inside = float(y.square().sum()), y @ vectors
        exact = (energies + energy - 2.0 * (images @ y)).double()
        for count in components:
            ours, theirs = inside[:count], coefficients[:, :count]
            outside = (energies - theirs.square().sum(1)).clamp(min=0.0)
            outside *= max(energy - float(ours.square().sum()), 0.0)
            lowest = energies + energy - 2.0 * (theirs @ ours) - 2.0 * outside.sqrt()
            share = share_needed(exact, lowest, scale)
            result[str(count)].append(share)
        result["exact"].append(share_needed(exact, exact, scale))
    return _means(result)


def _means(result: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(shares) / len(shares) for name, shares in result.items()}


def windows_step(setting: Setting, step: int) -> Record:
    """Shares for single windows of the local score model, at the centre and in a corner."""
    channels, height, width = setting.data.image_shape
    record: Record = {"step": step, "exact_terms": 2 * channels + 4}
    for name, (row, column) in {"centre": (height // 2, width // 2), "corner": (0, 0)}.items():
        half = WINDOW // 2
        near = torch.zeros(channels, height, width, dtype=torch.bool)
        top, left = max(row - half, 0), max(column - half, 0)
        near[:, top : row + half + 1, left : column + half + 1] = True
        counts = [count for count in (4, 16, 64) if count < int(near.sum())]
        record[name] = local_shares(setting, step, near.flatten(), counts)
    return record


def outputs_step(setting: Setting, step: int, model: pf.PCALocalityDenoiser) -> Record:
    """Shares for single outputs of PCA locality, and the terms of their exact distances."""
    alpha, sigma = SCHEDULE(step)
    weights = model.weights_at(sigma, alpha)
    masks = weights.dense(torch.bool).reshape(*setting.data.image_shape, -1)
    _, height, width = setting.data.image_shape
    terms = difference_tree(weights, setting.data.images.shape[1:]).terms
    record: Record = {"step": step, "exact_terms": terms / len(weights.bits)}
    places = {"centre": (height // 2, width // 2), "side": (height // 4, width // 2)}
    for name, (row, column) in places.items():
        mask = masks[0, row, column]
        counts = [count for count in (16, 64, 256) if count < int(mask.sum())]
        record[name] = local_shares(setting, step, mask, counts) if counts else {}
        record[name]["inputs"] = int(mask.sum())
    return record
