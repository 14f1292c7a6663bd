"""What a model takes at each noise level: chosen by held-out images, or by a trained network."""

from __future__ import annotations

from pyflocality.calibration.candidates import Candidate, default_candidates
from pyflocality.calibration.denoiser import CalibratedDenoiser
from pyflocality.calibration.record import (
    CalibratedLevel,
    Calibration,
    Restored,
    RunTrial,
    Trial,
)
from pyflocality.calibration.search import calibrate
from pyflocality.calibration.windows import WindowTable, calibrate_windows

__all__ = [
    "CalibratedDenoiser",
    "CalibratedLevel",
    "Calibration",
    "Candidate",
    "Restored",
    "RunTrial",
    "Trial",
    "WindowTable",
    "calibrate",
    "calibrate_windows",
    "default_candidates",
]
