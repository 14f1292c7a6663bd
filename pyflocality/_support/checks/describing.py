"""Values in error messages."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._support.text import printable

_LONGEST = 80


def describe(value: object) -> str:
    """Short description of a value for an error message; of any value, it cannot fail."""
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    try:
        text = printable(repr(value))
    except Exception:
        # A repr of somebody else's, or a whole number beyond what Python writes out.
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"a {type(value).__name__}"


def _describe_tensor(tensor: Tensor) -> str:
    kind = "" if tensor.layout == torch.strided else f"{tensor.layout} ".removeprefix("torch.")
    kind = "nested " if tensor.is_nested else kind
    try:
        shape = f"of shape {tuple(tensor.shape)}"
    except RuntimeError:
        # Nested tensors have none, and neither have the parameters of lazy modules.
        shape = "without a shape"
    return f"a {kind}{tensor.dtype} tensor {shape} on {tensor.device}"
