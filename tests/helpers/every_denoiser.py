"""One of every kind of denoiser over a training set, for tests of what they all promise."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality.calibration import CalibratedLevel, RunTrial, Trial
from pyflocality.denoisers.certificate import SubsetPlan


class ReadingSubset(pf.CertifiedSubset):
    """A certified subset that reads by its bounds even where a scan would take less time.

    Sets of tests are so small that it would call the wrapped denoiser for every image.
    """

    def plan(self, sigma: float, alpha: float = 1.0) -> SubsetPlan:
        """The plan, with all three stages and as many images as it takes."""
        index, found = self.index, super().plan(sigma, alpha)
        images = len(index.energies)
        return dataclasses.replace(found, stages=len(index.stages), pays=True, limit=images)


def golden(denoiser: pf.Denoiser) -> pf.GoldenSubset:
    """A golden subset of a quarter of the images, or half of them."""
    count = len(denoiser.data)
    return pf.GoldenSubset(denoiser, max(1, count // 4), max(1, count // 2), pool_resolution=2)


def soft_weights(queries: int, values: int) -> Tensor:
    """Random weights of all inputs."""
    return torch.rand(
        queries, values, dtype=torch.float32, generator=torch.Generator().manual_seed(queries)
    )


def near_masks(height: int, width: int) -> Tensor:
    """The pixels around every pixel."""

    def near(length: int) -> Tensor:
        place = torch.arange(length)
        return (place[:, None] - place).abs() <= 1

    return near(height)[:, None, :, None] & near(width)[None, :, None, :]


def mixture(data: pf.TrainingSet, **options: object) -> pf.MixtureDenoiser:
    """Two models in other shares at little noise than at much, and a third at much alone."""
    models = [
        pf.LocalDenoiser(data, 3, **options),
        pf.OptimalDenoiser(data, **options),
        pf.WienerDenoiser(data),
    ]
    return pf.MixtureDenoiser(models, [(0.1, (0.25, 0.75, 0)), (1.0, (0.5, 0, 0.5))])


def sloped(denoiser: pf.Denoiser) -> pf.LocallyLinearDenoiser:
    """A slope at little noise, and a smaller one at much."""
    return pf.LocallyLinearDenoiser(denoiser, [(0.1, 0.4), (1.0, 0.2)])


def calibrated(data: pf.TrainingSet, **options: object) -> pf.CalibratedDenoiser:
    """Another model at little noise than at much, as if a calibration had chosen them."""

    trials = tuple(Trial(candidate, 2, 0.1, 0.0, 0.0, None) for candidate in range(2))
    calibration = pf.Calibration(
        candidates=(pf.Candidate("patch-set", window=3), pf.Candidate("local", window=5)),
        levels=(
            CalibratedLevel(1.0, 1.0, 1.0, trials),
            CalibratedLevel(0.1, 1.0, 0.1, trials),
        ),
        runs=(RunTrial(False, ((1.0, 0.0),), (0, 1), None),),
        content_key=data.content_key(),
        image_shape=data.image_shape,
        images=len(data),
        searched=len(data),
        held_out=2,
        folds=1,
        seed=0,
        versions={},
    )
    return pf.CalibratedDenoiser(data, calibration, **options)


MAKERS = {
    "calibrated": calibrated,
    "optimal": lambda data, **o: pf.OptimalDenoiser(data, **o),
    "nearest": lambda data, **o: pf.NearestDenoiser(data, **o),
    "wiener": lambda data: pf.WienerDenoiser(data),
    "pca": lambda data, **o: pf.PCALocalityDenoiser(data, 0.1, **o),
    "pca_signed": lambda data, **o: pf.PCALocalityDenoiser(data, 0, **o),
    "pca_soft": lambda data, **o: pf.PCALocalityDenoiser(data, 0.1, softness=0.5, **o),
    "pca_batch_mean": lambda data, **o: pf.PCALocalityDenoiser(
        data, 0.1, aggregation="batch_mean", batch_size=64, **o
    ),
    "local": lambda data, **o: pf.LocalDenoiser(data, 3, **o),
    "local_schedule": lambda data, **o: pf.LocalDenoiser(
        data, lambda alpha, sigma: 3 if sigma < 0.5 * alpha else 5, **o
    ),
    "equivariant": lambda data, **o: pf.EquivariantDenoiser(data, 3, **o),
    "equivariant_broken": lambda data, **o: pf.EquivariantDenoiser(data, 3, "broken", **o),
    "patch_set": lambda data, **o: pf.PatchSetDenoiser(data, 3, **o),
    "patch_set_masks": lambda data, **o: pf.PatchSetDenoiser(
        data, masks=near_masks(*data.image_shape[1:]), **o
    ),
    "filtered": lambda data, **o: pf.FilteredPosteriorDenoiser(
        data, soft_weights(5, data.num_values), soft_weights(5, data.num_values).sqrt(), **o
    ),
    "filtered_own": lambda data, **o: pf.FilteredPosteriorDenoiser(
        data, soft_weights(data.num_values, data.num_values), **o
    ),
    "golden": lambda data, **o: golden(pf.LocalDenoiser(data, 3, **o)),
    "golden_pca": lambda data, **o: golden(pf.PCALocalityDenoiser(data, 0.1, **o)),
    "certified": lambda data, **o: ReadingSubset(pf.OptimalDenoiser(data, **o), 0),
    "mixture": mixture,
    "sloped_pca": lambda data, **o: sloped(pf.PCALocalityDenoiser(data, 0.1, **o)),
    "sloped_local": lambda data, **o: sloped(pf.LocalDenoiser(data, 3, **o)),
    "sloped_patch_set": lambda data, **o: sloped(pf.PatchSetDenoiser(data, 3, **o)),
    "gaussian_mixture": lambda data, **o: pf.GaussianMixtureDenoiser(data, 0.1, **o),
    "local_table": lambda data, **o: pf.LocalDenoiser(data, [(0.1, 1), (1.0, 5)], **o),
}
# With a slope, which the linear images of a level go with.
SLOPED = {name for name in MAKERS if name.startswith("sloped")}
