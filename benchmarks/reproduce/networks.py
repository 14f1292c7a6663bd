"""Trained networks: read, checked, named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import pyflocality as pf

from ..command import Record
from ..oracle.unet import UNet

_NAMES = "ABCDEFGH"


@dataclass(frozen=True)
class Network:
    """A trained network's file and what it tells of itself.

    Attributes:
        name: "network A" for the first, "network B" for the second, ...
        path: The file.
        sha256: Checksum of the file.
        parameters: Number of parameters.
        facts: What is known about the training.
    """

    name: str
    path: Path
    sha256: str
    parameters: int
    facts: Record

    @property
    def settings(self) -> Record:
        """All that the network's answers depend on."""
        return {"model": "network", "sha256": self.sha256}

    def record(self) -> Record:
        """What a results file tells of the network; not where its file lies."""
        return {
            "name": self.name,
            "file": self.path.name,
            "sha256": self.sha256,
            "parameters": self.parameters,
            "facts": self.facts,
        }


def load(path: Path, device: torch.device | str = "cpu") -> pf.NetworkDenoiser:
    """A trained network as a denoiser, ready to denoise on a device."""
    unet = UNet.load(path).to(device)
    schedule = pf.DDPMSchedule()
    return pf.NetworkDenoiser(unet, "v", takes=schedule, image_shape=unet.image_shape)


def facts_of(denoiser: pf.NetworkDenoiser) -> Record:
    """What is known about the training of a network that was loaded."""
    if not isinstance(denoiser.module, UNet):
        raise TypeError(f"`denoiser` must be a network that `load` read, got {denoiser.module!r}")
    return denoiser.module.facts


def check_networks(
    paths: Sequence[Path], image_shape: tuple[int, int, int] | None = None
) -> list[Network]:
    """The networks of some files, in order, each another one, for images of a shape or of any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are none, too many or equal networks, a file is no network, or one is
            for images of another shape.
    """
    if not 1 <= len(paths) <= len(_NAMES):
        raise ValueError(f"`network` must be given 1 to {len(_NAMES)} times, got {len(paths)}")
    result: list[Network] = []
    for letter, path in zip(_NAMES, map(Path, paths), strict=False):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        unet = UNet.load(path)
        if image_shape is not None and unet.image_shape != tuple(image_shape):
            raise ValueError(
                f"`network` must be for images of shape {tuple(image_shape)}, {path} is for "
                f"{unet.image_shape}"
            )
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        for other in result:
            if other.sha256 == sha256:
                raise ValueError(f"`network` must name each network once, {path} is {other.path}")
        parameters = sum(tensor.numel() for tensor in unet.parameters())
        result.append(Network(f"network {letter}", path, sha256, parameters, unet.facts))
    return result
