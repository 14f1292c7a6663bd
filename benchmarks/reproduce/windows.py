"""Windows by noise level that follow a network."""

from __future__ import annotations

import torch

import pyflocality as pf

from . import networks
from .methods import CALIBRATED
from .networks import Network
from .runs import STEPS, KeptRuns

CALIBRATION_SAMPLES = 16


def calibrated_windows(
    name: str,
    data: pf.TrainingSet,
    network: Network,
    kept: KeptRuns,
    *,
    seed: int,
    progress: bool,
) -> pf.WindowTable:
    """The windows of a model that are most similar to a network, made unless they are kept.

    The seed is not that of the noise on which models are compared.
    """
    settings = {
        "calibrated": name,
        "network": network.sha256,
        "calibration_samples": CALIBRATION_SAMPLES,
        "calibration_seed": seed,
    }
    path = kept.path(f"windows-{name}", settings, ".json")
    if path.exists():
        return pf.WindowTable.load(path)
    result = pf.calibrate_windows(
        data,
        networks.load(network.path, data.device),
        steps=STEPS,
        samples=CALIBRATION_SAMPLES,
        model=CALIBRATED[name],
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path)
    return result
