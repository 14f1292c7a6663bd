"""Devices by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def parse_device(text: str) -> torch.device:
    """A device that torch knows and this machine has."""
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"`device` must be cpu or cuda[:number], got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be cpu or cuda[:number], got {text!r}")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ValueError(f"`device` must be one of {available} CUDA devices, got {text!r}")
    return device
