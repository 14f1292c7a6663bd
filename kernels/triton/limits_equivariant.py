"""Which calls the Triton kernel of the equivariant posterior serves; importable without Triton."""

from __future__ import annotations

from pyflocality.kernels.triton.limits import uint8_limits
from pyflocality.posterior.call import Call

# Values of a patch in one row of pixels, which a step of the kernel holds for a tile of patches.
LONGEST_RUN = 128


def patch_limits(call: Call) -> str | None:
    """Reason why the kernel cannot serve a call, or None if it can.

    The window is looked at where the call's facts tell `window` and `image_shape` (C, H, W).
    """
    reason = uint8_limits(call)
    if reason is not None or "window" not in call.facts:
        return reason
    window, channels = call.facts["window"], call.facts["image_shape"][0]
    # Channels as the kernel stores them: a power of two, at least 2.
    stored = max(2, 1 << (channels - 1).bit_length())
    if window * stored > LONGEST_RUN:
        return (
            f"it serves windows up to {LONGEST_RUN // stored} pixels wide for images of "
            f"{channels} channels, got {window}"
        )
    return None
