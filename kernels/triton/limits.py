"""Which calls the kernels for GPUs serve; importable without Triton and CuPy."""

from __future__ import annotations

import torch

from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import float32_limits, stored_images_limits

# The first whose tensor cores form the products that the kernels ask for.
CAPABILITY = (8, 0)
# Shared memory that a block of any kernel may count on, bytes: what every GPU of this capability
# or above gives. The tables of Hopper count on more.
SHARED_BYTES, LARGE_SHARED_BYTES = 99 * 1024, 227 * 1024
# Blocks along the second and third dimension of a grid.
LARGEST_GRID = 65535


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that a block can have on a GPU, bytes."""
    found = torch.cuda.get_device_properties(device)
    # Not by the capability alone: consumer GPUs of later generations have less. Older versions of
    # torch do not tell; the generations 9 and 10 are those of data centres.
    guess = LARGE_SHARED_BYTES if found.major in (9, 10) else SHARED_BYTES
    return getattr(found, "shared_memory_per_block_optin", guess)


def device_limits(call: Call) -> str | None:
    """Reason why no kernel can run on a call's device, or None if it can or is no GPU."""
    device = call.device
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        wanted, given = (".".join(map(str, version)) for version in (CAPABILITY, found))
        return f"it needs a GPU of compute capability {wanted} or above, {device} has {given}"
    shared = shared_bytes_of(device)
    if shared < SHARED_BYTES:
        return (
            f"its blocks need up to {SHARED_BYTES} bytes of shared memory, {device} gives a block "
            f"{shared}"
        )
    return None


def uint8_limits(call: Call) -> str | None:
    """Reason why a kernel of exact 8-bit products cannot serve a call, or None if it can."""
    reason = float32_limits(call) or stored_images_limits(call)
    stored = call.facts.get("images_dtype", torch.uint8)
    if reason is None and stored != torch.uint8:
        return f"it reads uint8 images, whose products tensor cores form exactly, not {stored}"
    return reason or device_limits(call)
