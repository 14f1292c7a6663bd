"""Published bias-free denoisers as a yardstick: a flat one and a multi-scale one.

Networks of "Learning multi-scale local conditional probability models of images" (Kadkhodaie,
Guth, Mallat and Simoncelli, 2023), trained on grey faces of 160x160 pixels in [0, 1]. A state
dictionary tells the layers: convolutions without bias, after all but the first and the last a
scale per channel and a ReLU. All return the noise that they see.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import pyflocality as pf
from pyflocality.wavelets import analyse, synthesise

FLAT = "bfcnn_rf13.pt"
LOW = "bfcnn_multiscale_rf13_low.pt"
SCALES = ("bfcnn_multiscale_rf13_scale0.pt", "bfcnn_multiscale_rf13_scale1.pt")


class BiasFree(nn.Module):
    """A network of convolutions, scales and ReLUs, from its state dictionary."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.count = sum("conv_layers" in key for key in state)
        for layer in range(self.count):
            self.register_buffer(f"weight{layer}", state[f"module.conv_layers.{layer}.weight"])
        for layer in range(1, self.count - 1):
            gain = state[f"module.BN_layers.{layer - 1}.gammas"]
            spread = state[f"module.BN_layers.{layer - 1}.running_sd"]
            self.register_buffer(f"scale{layer}", gain / spread)

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(self.count):
            weight = getattr(self, f"weight{layer}")
            x = nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
            if 0 < layer < self.count - 1:
                x = torch.relu(x * getattr(self, f"scale{layer}"))
        return x


class Multiscale(nn.Module):
    """A network for the low-pass image, and one for the details of each level given it.

    All bands are divided by 2^j, as in training; each level's network takes the clean low-pass
    image and the three noisy details.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.low = BiasFree(folder / LOW)
        self.scales = nn.ModuleList(BiasFree(folder / name) for name in SCALES)

    def forward(self, x: Tensor) -> Tensor:
        low, details = x, []
        for _ in self.scales:
            low, bands = (0.5 * part for part in analyse(low))
            details.append(bands)
        low = low - self.low(low)
        for network, bands in zip(reversed(self.scales), reversed(details), strict=True):
            clean = bands - network(torch.cat([low, bands], 1))
            low = synthesise(2.0 * low, 2.0 * clean)
        return x - low


def published(folder: Path, image_shape: tuple[int, int, int]) -> dict[str, pf.NetworkDenoiser]:
    """The published networks in a folder as denoisers of grey images, by name."""
    modules = {
        "flat network, 13": BiasFree(folder / FLAT),
        "multi-scale network, 13": Multiscale(folder),
    }
    return {
        name: pf.NetworkDenoiser(
            module.eval(), "residual", takes="nothing", image_shape=image_shape, value_range=(0, 1)
        )
        for name, module in modules.items()
    }
