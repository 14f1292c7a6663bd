"""Analytical denoisers: posterior means over a training set."""

from __future__ import annotations

from pyflocality.denoisers.base import Denoiser
from pyflocality.denoisers.equivariant import EquivariantDenoiser
from pyflocality.denoisers.filtered import FilteredPosteriorDenoiser
from pyflocality.denoisers.local import LocalDenoiser
from pyflocality.denoisers.nearest import NearestDenoiser
from pyflocality.denoisers.optimal import OptimalDenoiser
from pyflocality.denoisers.patch_set import PatchSetDenoiser, masks_from_maps
from pyflocality.denoisers.pca_locality import PCALocalityDenoiser
from pyflocality.denoisers.wiener import WienerDenoiser

__all__ = [
    "Denoiser",
    "EquivariantDenoiser",
    "FilteredPosteriorDenoiser",
    "LocalDenoiser",
    "NearestDenoiser",
    "OptimalDenoiser",
    "PCALocalityDenoiser",
    "PatchSetDenoiser",
    "WienerDenoiser",
    "masks_from_maps",
]
