"""pyflocality: exact, fast, training-free analytical diffusion.

Denoisers that are posterior means over a training set, one posterior per pixel and
neighbourhood; streaming moments; samplers; and the analysis of why diffusion models are local.

The model throughout: a noisy image is `x = alpha * x0 + sigma * noise`; images are NCHW in
[-1, 1], and 8-bit images u mean `u / 127.5 - 1`. A denoiser is called as
`denoiser(x, sigma, alpha)`, or `denoiser(x, schedule(t))`, and answers an estimate of `x0`.
"""

from __future__ import annotations

from pyflocality import (
    adapters,
    analysis,
    distributed,
    masks,
    metrics,
    ops,
    packing,
    synthetic,
    wavelets,
)
from pyflocality._version import __version__
from pyflocality.ascent import AscentResult, AscentStage, ascend
from pyflocality.backends.report import show_config
from pyflocality.backends.selection import BackendUnavailableError, trace_backends, use_backend
from pyflocality.calibration import (
    CalibratedDenoiser,
    Calibration,
    Candidate,
    WindowTable,
    calibrate,
    calibrate_windows,
)
from pyflocality.data import TrainingSet
from pyflocality.denoisers import (
    CertifiedSubset,
    Denoiser,
    EquivariantDenoiser,
    FilteredPosteriorDenoiser,
    FourierWienerDenoiser,
    GaussianMixtureDenoiser,
    GoldenSubset,
    LedoitWolfDenoiser,
    LocalDenoiser,
    LocallyLinearDenoiser,
    MixtureDenoiser,
    MultiscaleDenoiser,
    NearestDenoiser,
    NetworkDenoiser,
    NoiseTrainedDenoiser,
    OptimalDenoiser,
    PatchSetDenoiser,
    PCALocalityDenoiser,
    WaveletShrinkageDenoiser,
    WienerDenoiser,
    masks_from_maps,
)
from pyflocality.moments import Basis, Moments
from pyflocality.noise import (
    CosineSchedule,
    DDPMSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseLevel,
    NoiseSchedule,
)
from pyflocality.sampling import DDIM, Euler, Heun, Sampler, SampleResult, sample

__all__ = [
    "AscentResult",
    "AscentStage",
    "DDIM",
    "BackendUnavailableError",
    "Basis",
    "CalibratedDenoiser",
    "Calibration",
    "Candidate",
    "CertifiedSubset",
    "CosineSchedule",
    "DDPMSchedule",
    "Denoiser",
    "EquivariantDenoiser",
    "FilteredPosteriorDenoiser",
    "Euler",
    "FlowSchedule",
    "FourierWienerDenoiser",
    "GaussianMixtureDenoiser",
    "GoldenSubset",
    "Heun",
    "KarrasSchedule",
    "LedoitWolfDenoiser",
    "LocalDenoiser",
    "LocallyLinearDenoiser",
    "MixtureDenoiser",
    "Moments",
    "MultiscaleDenoiser",
    "NearestDenoiser",
    "NetworkDenoiser",
    "NoiseTrainedDenoiser",
    "NoiseLevel",
    "NoiseSchedule",
    "OptimalDenoiser",
    "PCALocalityDenoiser",
    "PatchSetDenoiser",
    "SampleResult",
    "Sampler",
    "TrainingSet",
    "WaveletShrinkageDenoiser",
    "WienerDenoiser",
    "WindowTable",
    "__version__",
    "adapters",
    "analysis",
    "ascend",
    "calibrate",
    "calibrate_windows",
    "distributed",
    "masks",
    "masks_from_maps",
    "metrics",
    "ops",
    "packing",
    "sample",
    "show_config",
    "synthetic",
    "trace_backends",
    "use_backend",
    "wavelets",
]
