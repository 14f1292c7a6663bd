"""A tiny set of images of three classes, and tiny networks, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pyflocality.benchmarks.oracle.unet import UNet

SHAPE = (1, 8, 8)
COUNT = 24


def write_sets(folder: Path) -> None:
    """Waves and noise, sorted by class: set.npz with labels, plain.npz without."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.linspace(0, 3, 8)
    waves = torch.stack([torch.outer((rows * k).cos(), (rows + k).sin()) for k in (1, 2, 3)])
    labels = torch.arange(3).repeat_interleave(COUNT // 3)
    values = waves[labels] + 0.4 * torch.randn(COUNT, 8, 8, generator=generator)
    images = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)[:, None].numpy()
    np.savez(folder / "set.npz", images=images, labels=labels.numpy())
    np.savez(folder / "plain.npz", images=images)


def write_network(path: Path, seed: int) -> None:
    """A network whose answers are not zero, as an untrained one's are."""
    torch.manual_seed(seed)
    network = UNet(SHAPE, width=8, multipliers=(1, 2), blocks=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.save(path, {"seed": seed})
