"""Analytical denoisers: posterior means over a training set."""

from __future__ import annotations

from pyflocality.denoisers.base import Denoiser, DenoiserOptions
from pyflocality.denoisers.certified import CertifiedResult, CertifiedSubset
from pyflocality.denoisers.equivariant import EquivariantDenoiser
from pyflocality.denoisers.filtered import FilteredPosteriorDenoiser
from pyflocality.denoisers.gaussian_mixture import GaussianMixtureDenoiser
from pyflocality.denoisers.golden import GoldenSubset, golden_sizes
from pyflocality.denoisers.linear import LedoitWolfDenoiser, NoiseTrainedDenoiser
from pyflocality.denoisers.local import LocalDenoiser
from pyflocality.denoisers.locally_linear import LocallyLinearDenoiser
from pyflocality.denoisers.mixture import MixtureDenoiser
from pyflocality.denoisers.multiscale import MultiscaleDenoiser
from pyflocality.denoisers.nearest import NearestDenoiser
from pyflocality.denoisers.network import NetworkDenoiser
from pyflocality.denoisers.optimal import OptimalDenoiser
from pyflocality.denoisers.patch_set import PatchSetDenoiser, masks_from_maps
from pyflocality.denoisers.pca_locality import PCALocalityDenoiser
from pyflocality.denoisers.shrinkage import FourierWienerDenoiser, WaveletShrinkageDenoiser
from pyflocality.denoisers.wiener import WienerDenoiser

__all__ = [
    "CertifiedResult",
    "CertifiedSubset",
    "Denoiser",
    "DenoiserOptions",
    "EquivariantDenoiser",
    "FilteredPosteriorDenoiser",
    "FourierWienerDenoiser",
    "GaussianMixtureDenoiser",
    "GoldenSubset",
    "LedoitWolfDenoiser",
    "LocalDenoiser",
    "LocallyLinearDenoiser",
    "MixtureDenoiser",
    "MultiscaleDenoiser",
    "NearestDenoiser",
    "NetworkDenoiser",
    "NoiseTrainedDenoiser",
    "OptimalDenoiser",
    "PCALocalityDenoiser",
    "PatchSetDenoiser",
    "WaveletShrinkageDenoiser",
    "WienerDenoiser",
    "golden_sizes",
    "masks_from_maps",
]
