"""Analytical denoisers: posterior means over a training set."""

from __future__ import annotations

from pyflocality.denoisers.base import Denoiser
from pyflocality.denoisers.local import LocalDenoiser
from pyflocality.denoisers.nearest import NearestDenoiser
from pyflocality.denoisers.optimal import OptimalDenoiser
from pyflocality.denoisers.pca_locality import PCALocalityDenoiser
from pyflocality.denoisers.wiener import WienerDenoiser

__all__ = [
    "Denoiser",
    "LocalDenoiser",
    "NearestDenoiser",
    "OptimalDenoiser",
    "PCALocalityDenoiser",
    "WienerDenoiser",
]
