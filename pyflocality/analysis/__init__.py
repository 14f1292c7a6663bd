"""Why diffusion models are local, in which basis they shrink, and when they recite.

Everything here is matrix-free and takes any denoiser with `jvp` and `vjp`: the analytical ones of
this library, and trained networks in `NetworkDenoiser`.
"""

from __future__ import annotations

from pyflocality.analysis.concentration import Concentration, posterior_concentration
from pyflocality.analysis.memorization import (
    Memorization,
    MemorizationCurve,
    memorization,
    memorization_curve,
)
from pyflocality.analysis.sensitivity import (
    SensitivityRun,
    high_snr_projection,
    pattern_variance,
    sensitivity,
    sensitivity_along_run,
    snr_ruler,
)
from pyflocality.analysis.spectrum import (
    SingularSpectrum,
    Spectrum,
    Trace,
    jacobian_singular,
    jacobian_spectrum,
    jacobian_trace,
    local_linearity,
)

__all__ = [
    "Concentration",
    "Memorization",
    "MemorizationCurve",
    "SensitivityRun",
    "SingularSpectrum",
    "Spectrum",
    "Trace",
    "high_snr_projection",
    "jacobian_singular",
    "jacobian_spectrum",
    "jacobian_trace",
    "local_linearity",
    "memorization",
    "memorization_curve",
    "pattern_variance",
    "posterior_concentration",
    "sensitivity",
    "sensitivity_along_run",
    "snr_ruler",
]
