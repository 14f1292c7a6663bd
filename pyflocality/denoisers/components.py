"""Moments and components that models are given, or make of their training set."""

from __future__ import annotations

from pyflocality._support.checks import describe
from pyflocality.data import TrainingSet
from pyflocality.moments import Basis, Moments, check_moments_fit


def check_moments(moments: object, image_shape: tuple[int, int, int]) -> Moments | Basis | None:
    """The argument `moments` of a model of images of a shape; None where it makes them itself."""
    if moments is None:
        return None
    if not isinstance(moments, (Moments, Basis)):
        raise TypeError(f"`moments` must be Moments or a Basis, got {describe(moments)}")
    if tuple(moments.image_shape) != image_shape:
        raise ValueError(
            f"`moments` must be of images of shape {image_shape}, got {tuple(moments.image_shape)}"
        )
    return moments


def components_of(
    data: TrainingSet,
    moments: Moments | Basis | None,
    memory_budget: int | str | None,
    progress: bool,
) -> Basis:
    """The components of moments that were given, or of the set, on the set's device."""
    if moments is None:
        return Basis.from_data(data, memory_budget=memory_budget, progress=progress)
    if isinstance(moments, Moments):
        check_moments_fit(memory_budget, moments)
        moments = moments.basis(progress=progress)
    return moments.to(data.device)
