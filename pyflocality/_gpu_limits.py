"""Which calls the Triton kernels serve; importable without Triton."""

from __future__ import annotations

import torch

from pyflocality._backends import Call
from pyflocality._problem import float32_limits, stored_images_limits


def uint8_limits(call: Call) -> str | None:
    """Reason why a kernel of exact 8-bit products cannot serve a call, or None if it can."""
    reason = float32_limits(call) or stored_images_limits(call)
    stored = call.facts.get("images_dtype", torch.uint8)
    if reason is None and stored != torch.uint8:
        return f"it reads uint8 images, whose products tensor cores form exactly, not {stored}"
    return reason
