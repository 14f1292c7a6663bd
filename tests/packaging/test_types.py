"""What a user's own script sees of the types, by mypy at its strictest."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyflocality as pf

SCRIPT = """
import torch
import pyflocality as pf
from torch import Tensor

data = pf.TrainingSet(torch.zeros(4, 1, 8, 8))
denoiser = pf.LocalDenoiser(data, window=3)
level = pf.DDPMSchedule()(5)
alpha, sigma = level
x = torch.randn(2, 1, 8, 8)
reveal_type(denoiser(x, level))
reveal_type(denoiser(x, sigma, alpha))
reveal_type(alpha)
reveal_type(pf.DDPMSchedule()(torch.tensor([3, 5])).sigma)
reveal_type(pf.sample(denoiser, 2).images)
reveal_type(pf.noise.v_from_x0(x, x, level))
reveal_type(pf.ops.window_posterior_mean(x, data.images, 3, level))
reveal_type(pf.analysis.sensitivity(denoiser, x, level, pixel=(0, 1, 1)))


def noise_of(level: pf.NoiseLevel) -> float:
    return level.sigma


def restored(level: pf.NoiseLevel[Tensor]) -> Tensor:
    return denoiser(x, level)
"""
REVEALED = ["Tensor", "Tensor", "float", *["Tensor"] * 5]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_script_at_its_strictest_sees_tensors_and_floats(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    place = Path(pf.__file__).parents[1]
    # mypy does not look where an editable installation points.
    environment = dict(os.environ)
    if "site-packages" not in place.parts:
        environment["MYPYPATH"] = str(place)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(?:torch\._tensor\.)?(\w+)"', done.stdout)
    assert (revealed, done.returncode) == (REVEALED, 0), done.stdout + done.stderr
