"""What the CUDA kernels serve: predicates that need neither CuPy nor a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyflocality.kernels.cuda.geometry import WindowPlan, WindowShape, plan_adjoint, plan_window
from pyflocality.kernels.triton.limits import device_limits
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import float32_limits, stored_images_limits


def window_posterior_limits(call: Call) -> str | None:
    """Reason why the window scan cannot serve a call, or None if it can."""
    return _call_reason(call) or _size_reason(call, plan_window)


def window_adjoint_limits(call: Call) -> str | None:
    """Reason why the pass over whole windows cannot serve a call, or None if it can."""
    return _call_reason(call) or _size_reason(call, plan_adjoint)


def _call_reason(call: Call) -> str | None:
    return float32_limits(call) or stored_images_limits(call) or device_limits(call)


def _size_reason(call: Call, plan: Callable[[WindowShape], WindowPlan]) -> str | None:
    """The plan's own refusal, where the call's facts tell `window` and `image_shape` (C, H, W)."""
    if "window" not in call.facts:
        return None
    channels, height, width = call.facts["image_shape"]
    stored_bytes, vector = call.facts["images_dtype"] == torch.uint8, width % 4 == 0
    try:
        plan(WindowShape(channels, height, width, call.facts["window"], stored_bytes, vector))
    except ValueError as error:
        return str(error)
    return None
