"""What the kernels for GPUs count on; importable without Triton and CuPy."""

from __future__ import annotations

import torch

# The first whose tensor cores form the products that the kernels ask for.
CAPABILITY = (8, 0)
# Shared memory that a block of any kernel may count on, bytes: what every GPU of this capability
# or above gives. The tables of Hopper count on more.
SHARED_BYTES, LARGE_SHARED_BYTES = 99 * 1024, 227 * 1024
# Blocks along the second and third dimension of a grid.
LARGEST_GRID = 65535


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that a block can have on a GPU, bytes."""
    properties = torch.cuda.get_device_properties(device)
    # Not by the capability alone: consumer GPUs of later generations have less. Older versions of
    # torch do not tell; the generations 9 and 10 are those of data centres.
    guess = LARGE_SHARED_BYTES if properties.major in (9, 10) else SHARED_BYTES
    return getattr(properties, "shared_memory_per_block_optin", guess)
