"""Answers of a reproduction: as it writes them, and as they must be."""

from __future__ import annotations

import pyflocality as pf
from pyflocality.benchmarks.reproduce import (  # noqa: E402
    methods,
    networks,
)


def truth(denoiser, x_T):  # noqa: N803
    """Clipped answers of a run in float64, [steps, n, D]."""
    out = pf.sample(denoiser, x_T=x_T.double(), steps=10, progress=False)
    return out.x0.clamp(-1, 1).flatten(2).numpy()


def loaded(folder):
    return methods.load_mixed(str(folder / "set.npz"), progress=False)


def network_truth(path, x_T):  # noqa: N803
    network = networks.load(path)
    network.module.double()
    return truth(network, x_T)
