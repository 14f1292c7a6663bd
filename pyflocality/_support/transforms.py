"""What torch is doing with a tensor: differentiating it, mapping over it, or tracing it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative by any of the tensors may be asked for, in any of torch's ways."""
    return any(map(_is_differentiated, tensors))


def _is_differentiated(tensor: Tensor) -> bool:
    return (
        (torch.is_grad_enabled() and tensor.requires_grad)
        or functorch.is_functorch_wrapped_tensor(tensor)
        or (torch._C._is_fwd_grad_enabled() and forward_ad.unpack_dual(tensor).tangent is not None)
    )


def is_traced() -> bool:
    """Whether operations are being recorded: by `torch.compile`, `torch.func.linearize`, .."""
    # What Dynamo reads must come first, it does not know the other questions.
    if torch.compiler.is_dynamo_compiling():
        return True
    # Where older releases compile, tensors are fake: there is nothing but their shapes.
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE))


def has_readable_values(tensor: Tensor) -> bool:
    """Whether Python may look at the values: not under `torch.vmap`, nor while it is traced."""
    if is_traced():
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
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
