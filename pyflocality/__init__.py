"""pyflocality: exact, fast, training-free analytical diffusion.

Denoisers that are posterior means over a training set, one posterior per pixel and
neighbourhood; streaming moments; samplers; and the analysis of why diffusion models are local.

The model throughout: a noisy image is `x = alpha * x0 + sigma * noise`; images are NCHW in
[-1, 1], and 8-bit images u mean `u / 127.5 - 1`. A denoiser is called as
`denoiser(x, sigma, alpha)` and answers an estimate of `x0`.
"""

from __future__ import annotations

from pyflocality import masks, metrics, ops
from pyflocality._backends import BackendUnavailableError, trace_backends, use_backend
from pyflocality._config import show_config
from pyflocality._version import __version__
from pyflocality.data import TrainingSet
from pyflocality.denoisers import (
    Denoiser,
    EquivariantDenoiser,
    FilteredPosteriorDenoiser,
    LocalDenoiser,
    NearestDenoiser,
    OptimalDenoiser,
    PatchSetDenoiser,
    PCALocalityDenoiser,
    WienerDenoiser,
    masks_from_maps,
)
from pyflocality.moments import Moments
from pyflocality.noise import (
    CosineSchedule,
    DDPMSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
)
from pyflocality.sampling import DDIM, Euler, Heun, Sampler, SampleResult, sample

__all__ = [
    "DDIM",
    "BackendUnavailableError",
    "CosineSchedule",
    "DDPMSchedule",
    "Denoiser",
    "EquivariantDenoiser",
    "FilteredPosteriorDenoiser",
    "Euler",
    "FlowSchedule",
    "Heun",
    "KarrasSchedule",
    "LocalDenoiser",
    "Moments",
    "NearestDenoiser",
    "NoiseSchedule",
    "OptimalDenoiser",
    "PCALocalityDenoiser",
    "PatchSetDenoiser",
    "SampleResult",
    "Sampler",
    "TrainingSet",
    "WienerDenoiser",
    "__version__",
    "masks",
    "masks_from_maps",
    "metrics",
    "ops",
    "sample",
    "show_config",
    "trace_backends",
    "use_backend",
]
