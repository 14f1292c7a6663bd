"""Which calls the kernels serve; importable without Triton, CuPy and the native extension.

A predicate answers None, or the reason why a kernel cannot serve a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyflocality.kernels.devices import CAPABILITY, SHARED_BYTES, shared_bytes_of
from pyflocality.kernels.geometry import WindowPlan, WindowShape, plan_vjp, plan_window
from pyflocality.posterior.call import Call

# Values of a patch in one row of pixels, which a step of the Triton kernel of the equivariant
# posterior holds for a tile of patches.
LONGEST_RUN = 128
_NO_DERIVATIVE = "it has no derivative, and one may be asked of this call"


def float32_limits(call: Call) -> str | None:
    """Limits of a float32 kernel without derivatives."""
    if call.dtype != torch.float32:
        return f"it computes in float32, {call.dtype} was asked for"
    if call.requires_grad:
        return _NO_DERIVATIVE
    stored = call.facts.get("images_dtype", torch.uint8)
    if stored not in (torch.uint8, torch.float32):
        return f"it reads uint8 or float32 images, these are {stored}"
    return None


def bytes_limits(call: Call) -> str | None:
    """Limits of a kernel of exact products with bytes, in any dtype and without derivatives."""
    if call.requires_grad:
        return _NO_DERIVATIVE
    stored = call.facts.get("images_dtype", torch.uint8)
    return None if stored == torch.uint8 else f"it reads uint8 images, these are {stored}"


def mask_limits(call: Call) -> str | None:
    """Limits of a float32 kernel for masks."""
    if not call.facts.get("is_mask", True):
        return "it serves masks (weights of 0 and 1), these weights are not boolean"
    return float32_limits(call)


def weight_limits(call: Call) -> str | None:
    """Limits of a float32 kernel for masks and weights."""
    if call.facts.get("is_signed", False):
        return "it serves weights that are not negative, some of these are"
    return float32_limits(call)


def device_limits(call: Call) -> str | None:
    """Limits of every kernel for GPUs: what a call's device must have, if it is one."""
    device = call.device
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        wanted, given = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        return f"it needs a GPU of compute capability {wanted} or above, {device} has {given}"
    shared = shared_bytes_of(device)
    if shared < SHARED_BYTES:
        return (
            f"its blocks need up to {SHARED_BYTES} bytes of shared memory, {device} gives a block "
            f"{shared}"
        )
    return None


def uint8_limits(call: Call) -> str | None:
    """Limits of a GPU kernel of exact 8-bit products."""
    reason = float32_limits(call) or _stored_images_limits(call)
    stored = call.facts.get("images_dtype", torch.uint8)
    if reason is None and stored != torch.uint8:
        return f"it reads uint8 images, whose products tensor cores form exactly, not {stored}"
    return reason or device_limits(call)


def patch_limits(call: Call) -> str | None:
    """Limits of the Triton kernel of the equivariant posterior.

    The window is looked at where the call's facts tell `window` and `image_shape` (C, H, W).
    """
    reason = uint8_limits(call)
    if reason is not None or "window" not in call.facts:
        return reason
    window, (channels, _, _) = _window_of(call)
    # Channels as the kernel stores them: a power of two, at least 2.
    stored = max(2, 1 << (channels - 1).bit_length())
    if window * stored > LONGEST_RUN:
        return (
            f"it serves windows up to {LONGEST_RUN // stored} pixels wide for images of "
            f"{channels} channels, got {window}"
        )
    return None


def window_posterior_limits(call: Call) -> str | None:
    """Limits of the CUDA scan of windows."""
    return _window_limits(call, plan_window)


def window_vjp_limits(call: Call) -> str | None:
    """Limits of the CUDA pass that applies weights to whole windows."""
    return _window_limits(call, plan_vjp)


def _window_limits(call: Call, plan: Callable[[WindowShape], WindowPlan]) -> str | None:
    """The plan's own refusal, where the call's facts tell `window` and `image_shape` (C, H, W)."""
    reason = float32_limits(call) or _stored_images_limits(call) or device_limits(call)
    if reason is not None or "window" not in call.facts:
        return reason
    window, (channels, height, width) = _window_of(call)
    stored_bytes, vector = call.facts["images_dtype"] == torch.uint8, width % 4 == 0
    try:
        plan(WindowShape(channels, height, width, window, stored_bytes, vector))
    except ValueError as error:
        return str(error)
    return None


def _window_of(call: Call) -> tuple[int, tuple[int, int, int]]:
    """The window and the shape of an image, (C, H, W)."""
    facts: Mapping[str, Any] = call.facts
    return facts["window"], tuple(facts["image_shape"])


def _stored_images_limits(call: Call) -> str | None:
    """Limits of a kernel that reads the images as they are stored."""
    if call.facts.get("augmented", False):
        return "it reads images as they are stored, this set has mirrored or shifted copies"
    return None
