"""The pattern that is planted in images, for networks and for the study of it."""

from __future__ import annotations

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality import synthetic

# Weights of the pattern, 0 for the data as they are.
WEIGHTS = (0.0, 0.1, 0.5)


def planted(data: pf.TrainingSet, gamma: float) -> pf.TrainingSet:
    """The images with the pattern blended in with a weight, in colours that are always the same.

    Raises:
        ValueError: The images are not square, or the weight is out of range.
    """
    height, width = data.image_shape[1:]
    if height != width:
        raise ValueError(f"`data` must be of square images, those of {data.name} are not")
    return synthetic.inject_pattern(data, cross(height), gamma)


def cross(size: int) -> Tensor:
    """A thin diagonal cross, 1 on two pixels of each row and 0 elsewhere, [size, size]."""
    eye = torch.eye(size)
    return torch.maximum(eye, eye.flip(1))
