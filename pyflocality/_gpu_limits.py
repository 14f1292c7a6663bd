"""Which calls the kernels for GPUs serve; importable without Triton and CuPy."""

from __future__ import annotations

import torch

from pyflocality._backends import Call
from pyflocality._problem import float32_limits, stored_images_limits

# The first whose blocks can have the shared memory that the kernels count on, and whose tensor
# cores form the products that they ask for.
CAPABILITY = (8, 0)


def capability_reason(device: torch.device) -> str | None:
    """Reason why no kernel can run on a device, or None if it is new enough or no GPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        wanted, given = (".".join(map(str, version)) for version in (CAPABILITY, found))
        return f"it needs a GPU of compute capability {wanted} or above, {device} has {given}"
    return None


def uint8_limits(call: Call) -> str | None:
    """Reason why a kernel of exact 8-bit products cannot serve a call, or None if it can."""
    reason = float32_limits(call) or stored_images_limits(call)
    stored = call.facts.get("images_dtype", torch.uint8)
    if reason is None and stored != torch.uint8:
        return f"it reads uint8 images, whose products tensor cores form exactly, not {stored}"
    return reason or capability_reason(call.device)
