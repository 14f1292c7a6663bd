"""What torch is doing with a tensor: differentiating it, mapping over it, or tracing it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad


def is_differentiated(*values: float | Tensor) -> bool:
    """Whether a derivative with respect to any of the tensors may be asked for, in any way."""
    grad, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
    for value in values:
        if isinstance(value, Tensor) and (
            (grad and value.requires_grad)
            or functorch.is_functorch_wrapped_tensor(value)
            or (forward and forward_ad.unpack_dual(value).tangent is not None)
        ):
            return True
    return False


def is_traced() -> bool:
    """Whether operations are being recorded: by `torch.compile`, `torch.func.linearize`, .."""
    # What Dynamo reads must come first, it does not know the other questions.
    if torch.compiler.is_dynamo_compiling():
        return True
    # Where older releases compile, tensors are fake: there is nothing but their shapes.
    modes, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    return mode(modes.PROXY) is not None or mode(modes.FAKE) is not None


def has_readable_values(*values: float | Tensor) -> bool:
    """Whether Python may look at the values: not under `torch.vmap`, nor while they are traced."""
    if is_traced():
        return False
    for value in values:
        while isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
            if functorch.is_batchedtensor(value):
                return False
            value = functorch.get_unwrapped(value)
    return True


def without_forward_mode() -> AbstractContextManager[None]:
    """A block without derivatives by forward mode."""
    return forward_ad._set_fwd_grad_enabled(False)


def in_full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A block in which `torch.autocast` lowers no precision."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def outside_transforms() -> AbstractContextManager[None]:
    """A block whose tensors are plain ones, whatever `torch.func` does around it."""
    return torch._C._DisableFuncTorch()


def without_derivatives(tensor: Tensor) -> Tensor:
    """The values of a tensor with readable values, as a constant."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.detach()
