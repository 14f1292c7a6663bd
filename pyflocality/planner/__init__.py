"""What a run costs before it begins: operations, time and memory of its steps and its stages."""

from __future__ import annotations

from pyflocality.planner.stages import Job, Stage, check_fits, peak_of, stages_of
from pyflocality.planner.steps import (
    MASK_SHARE,
    WINDOW,
    Cost,
    Setting,
    cost_of,
    models,
    seconds_of,
)

__all__ = [
    "MASK_SHARE",
    "WINDOW",
    "Cost",
    "Job",
    "Setting",
    "Stage",
    "check_fits",
    "cost_of",
    "models",
    "peak_of",
    "seconds_of",
    "stages_of",
]
