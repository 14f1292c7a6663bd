"""The U-Net of denoising diffusion models, without attention."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..command import Record

_GROUP = 8


class ResidualBlock(nn.Module):
    """Two convolutions, the time added between them."""

    def __init__(self, inputs: int, outputs: int, time: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(inputs // _GROUP, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(outputs // _GROUP, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        # The block is the identity at first.
        silence(self.conv2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = y + self.time(time)[:, :, None, None]
        y = self.conv2(self.dropout(functional.silu(self.norm2(y))))
        return self.skip(x) + y


class UNet(nn.Module):
    """A denoising U-Net: residual blocks at halved resolutions and back, joined by skips.

    That of Ho, Jain and Abbeel (Denoising diffusion probabilistic models, 2020) without its
    attention. It is called with noisy images [B, C, H, W] and times [B] in 0 .. 999 and predicts
    v = alpha noise - sigma x0 (Salimans and Ho 2022), from which x0 = alpha x - sigma v at every
    noise level with the error of v at most; a predicted noise's error would be multiplied by
    sigma / alpha, which is 60 in the first step of sampling.

    Args:
        image_shape: Shape (C, H, W) of the images.
        width: Channels at full resolution, a multiple of 8.
        multipliers: Channels at each resolution, in multiples of the width.
        blocks: Residual blocks at each resolution.
        dropout: Share of values that training drops inside a block.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        dropout: float = 0.15,
    ) -> None:
        super().__init__()
        self.architecture = {
            "image_shape": list(image_shape),
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "dropout": dropout,
        }
        self.facts: Record = {}
        self.image_shape = tuple(image_shape)
        self.width, time = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(image_shape[0], width, 3, padding=1)
        channels, skips = width, [width]
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
            for _ in range(blocks):
                self.down.append(ResidualBlock(channels, multiplier * width, time, dropout))
                channels = multiplier * width
                skips.append(channels)
        self.middle = nn.ModuleList(
            ResidualBlock(channels, channels, time, dropout) for _ in range(2)
        )
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                inputs = channels + skips.pop()
                self.up.append(ResidualBlock(inputs, multiplier * width, time, dropout))
                channels = multiplier * width
            if level > 0:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.norm = nn.GroupNorm(channels // _GROUP, channels)
        self.last = nn.Conv2d(channels, image_shape[0], 3, padding=1)
        silence(self.last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction of v, [B, C, H, W]."""
        time = functional.silu(self.time(_waves(t, self.width).to(self.first.weight.dtype)))
        y = self.first(x)
        skips = [y]
        for part in self.down:
            y = part(y, time) if isinstance(part, ResidualBlock) else part(y)
            skips.append(y)
        for block in self.middle:
            y = block(y, time)
        for part in self.up:
            if isinstance(part, ResidualBlock):
                y = part(torch.cat([y, skips.pop()], 1), time)
            else:
                # The resolution of the next skip: odd sizes have been rounded up on the way down.
                y = part(functional.interpolate(y, skips[-1].shape[2:], mode="nearest"))
        return self.last(functional.silu(self.norm(y)))

    def save(self, path: Path | str, facts: Record) -> None:
        """Write the parameters as float16, with the architecture and facts about the training."""
        from safetensors.torch import save_file

        tensors = {
            name: value.detach().to("cpu", torch.float16).contiguous()
            for name, value in self.state_dict().items()
        }
        metadata = {"architecture": json.dumps(self.architecture), "facts": json.dumps(facts)}
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: Path | str) -> UNet:
        """Read what `save` wrote: float32 parameters, ready to denoise; `facts` as given then.

        Raises:
            ValueError: The file is none that `save` wrote.
        """
        from safetensors import SafetensorError, safe_open

        if zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is a checkpoint of torch.save, as published baselines are: it holds no "
                "architecture, and theirs is not known here; expected a .safetensors file of "
                "benchmarks.oracle"
            )
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            architecture = json.loads(metadata["architecture"])
            facts = json.loads(metadata["facts"])
            unet = cls(
                tuple(architecture.pop("image_shape")),
                multipliers=tuple(architecture.pop("multipliers")),
                **architecture,
            )
            unet.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a network of benchmarks.oracle: {error}") from error
        unet.facts = facts
        return unet.eval()


def silence(layer: nn.Module) -> None:
    """Let a layer answer 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _waves(t: Tensor, count: int) -> Tensor:
    """Sines and cosines of times, [B, count]."""
    half = count // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000.0) * steps / half)
    return torch.cat([angles.sin(), angles.cos()], 1)
