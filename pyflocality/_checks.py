"""Argument checks shared by every public entry point.

Each function either returns the argument in its canonical form or raises `ValueError` /
`TypeError` naming the argument, what was expected and what came. They run before any work.
Values that Python cannot look at, under `torch.vmap` and while a call is compiled, are left for
the check of the values that they stand for.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from pyflocality._transforms import has_readable_values

# Values whose squares, summed over an image, stay far from the end of float32.
_LARGEST = 1e12


def describe(value: object) -> str:
    """Short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def check_float_tensor(value: object, name: str) -> Tensor:
    """A floating-point tensor without NaN or infinities."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {describe(value)}")
    if not value.is_floating_point():
        raise TypeError(
            f"`{name}` must have a floating-point dtype (values in [-1, 1]), got {describe(value)}"
        )
    if has_readable_values(value) and not torch.isfinite(value.detach()).all():
        raise ValueError(f"`{name}` holds NaN or infinite values")
    return value


def check_batch(x: object, image_shape: Sequence[int], device: torch.device, name: str) -> Tensor:
    """A batch of finite images of the given shape: [B, C, H, W], on the given device."""
    expected = tuple(image_shape)
    if isinstance(x, Tensor) and (x.ndim != len(expected) + 1 or tuple(x.shape[1:]) != expected):
        shape = ", ".join(["B", *map(str, expected)])
        raise ValueError(f"`{name}` must have shape [{shape}], got {describe(x)}")
    if isinstance(x, Tensor) and x.device != device:
        raise ValueError(f"`{name}` must be on {device} like the training set, got {describe(x)}")
    return check_float_tensor(x, name)


def check_level(
    value: float | Tensor, batch: int, device: torch.device, name: str, *, allow_zero: bool
) -> Tensor:
    """A noise-schedule coefficient as a float64 tensor [B].

    Args:
        value: A number, a tensor without dimensions or a tensor [B].
        batch: Number of images B it must match.
        device: Where the result lives.
        name: Name of the argument in error messages.
        allow_zero: Whether 0 is allowed (it is for sigma: the limit of no noise).
    """
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Tensor)):
        raise TypeError(f"`{name}` must be a number or a tensor [B], got {describe(value)}")
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"`{name}` must be real, got {describe(value)}")
    try:
        level = torch.as_tensor(value, dtype=torch.float64, device=device)
    except OverflowError:
        raise ValueError(f"`{name}` must be finite, got {describe(value)}") from None
    if level.ndim > 1 or (level.ndim == 1 and level.shape[0] != batch):
        raise ValueError(
            f"`{name}` must be a number or a tensor of shape [{batch}], got {describe(value)}"
        )
    if not has_readable_values(level):
        return level.expand(batch)
    valid = torch.isfinite(level) & ((level >= 0) if allow_zero else (level > 0))
    if not valid.all():
        bound = "not negative" if allow_zero else "positive"
        raise ValueError(f"`{name}` must be finite and {bound}, got {describe(value)}")
    return level.expand(batch)


def check_one_level(value: float | Tensor, name: str, *, allow_zero: bool) -> float:
    """A noise-schedule coefficient for a single image or a whole call, as a number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {describe(value)}")
    if not (value >= 0 if allow_zero else value > 0) or value == math.inf:
        bound = "not negative" if allow_zero else "positive"
        raise ValueError(f"`{name}` must be finite and {bound}, got {describe(value)}")
    return float(value)


def check_magnitude(x: Tensor, alpha: Tensor, name: str) -> None:
    """Noisy images whose squared distances are finite numbers in float32, on every backend.

    Args:
        x: Finite noisy images, [B, ...].
        alpha: Signal coefficients, float64 [B].
        name: Name of the images in error messages.
    """
    if x.numel() == 0 or not (has_readable_values(x) and has_readable_values(alpha)):
        return
    if alpha.max() > _LARGEST:
        raise ValueError(f"`alpha` must be at most {_LARGEST:g}, got {float(alpha.max()):g}")
    largest = x.detach().abs().flatten(1).amax(1).double()
    if (largest > _LARGEST * alpha.clamp(max=1.0)).any():
        raise ValueError(
            f"`{name}` must lie within {_LARGEST:g} times alpha, and within {_LARGEST:g}, got "
            f"values up to {float(largest.max()):g} at alpha {float(alpha.min()):g}"
        )


def check_positive(value: object, name: str) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {describe(value)}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be finite and positive, got {describe(value)}")
    return float(value)


def check_count(value: object, name: str, *, minimum: int = 1) -> int:
    """A whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, got {describe(value)}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")
    return int(value)


def check_choice(value: object, name: str, choices: Sequence[str]) -> str:
    """One of a few strings."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {describe(value)}")
    return str(value)


def check_compute_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """The dtype to compute in: `dtype`, or x's own (float32 for half-precision x)."""
    if dtype is None:
        return torch.float64 if x.dtype == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}")
    return dtype
