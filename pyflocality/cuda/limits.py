"""What the CUDA kernels serve: predicates that need neither CuPy nor a GPU."""

from __future__ import annotations

import torch

from pyflocality._backends import Call
from pyflocality._gpu_limits import capability_reason
from pyflocality._problem import float32_limits, stored_images_limits
from pyflocality.cuda.geometry import WindowShape, plan_adjoint, plan_window


def window_posterior_limits(call: Call) -> str | None:
    """Reason why the window scan cannot serve a call, or None if it can."""
    return _call_reason(call) or _size_reason(call, False)


def patch_set_limits(call: Call) -> str | None:
    """Reason why the pass over whole windows cannot serve a call, or None if it can."""
    return _call_reason(call) or _size_reason(call, True)


def _call_reason(call: Call) -> str | None:
    return float32_limits(call) or stored_images_limits(call) or capability_reason(call.device)


def _size_reason(call: Call, whole_windows: bool) -> str | None:
    """The plan's own refusal, for calls that tell the shape of their images."""
    if "image_shape" not in call.facts:
        return None
    channels, height, width = call.facts["image_shape"]
    # The plan of the largest window fits whenever that of a smaller one does.
    window = 2 * max(height, width) - 1
    if whole_windows:
        window = min(height, width)
    stored_bytes = call.facts["images_dtype"] == torch.uint8
    shape = WindowShape(channels, height, width, window, stored_bytes, width % 4 == 0)
    try:
        plan_adjoint(shape) if whole_windows else plan_window(shape)
    except ValueError as error:
        return str(error)
    return None
