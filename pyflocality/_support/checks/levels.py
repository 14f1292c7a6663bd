"""Checks of noise levels."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from pyflocality._support.checks.describing import describe
from pyflocality._support.checks.numeric import check_real
from pyflocality._support.checks.tensors import REAL_DTYPES, check_tensor
from pyflocality._support.transforms import has_readable_values, is_traced

# Values whose squares, summed over an image, stay far from the end of float32.
LARGEST = 1e12


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
    if not isinstance(value, Tensor):
        if is_traced() and isinstance(value, numbers.Real) and not isinstance(value, bool):
            return torch.as_tensor(value, dtype=torch.float64, device=device).expand(batch)
        if not isinstance(value, numbers.Real):
            raise TypeError(f"`{name}` must be a number or a tensor [B], got {describe(value)}")
        number = check_real(value, name, low=0.0, above=not allow_zero)
        return torch.tensor(number, dtype=torch.float64, device=device).expand(batch)
    if check_tensor(value, name).dtype not in REAL_DTYPES:
        raise TypeError(f"`{name}` must be real, got {describe(value)}")
    level = value.to(device=device, dtype=torch.float64)
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
    if isinstance(value, Tensor):
        if check_tensor(value, name).dtype not in REAL_DTYPES or value.numel() != 1:
            raise TypeError(f"`{name}` must be a number, got {describe(value)}")
        value = value.item()
    return check_real(value, name, low=0.0, above=not allow_zero)


def check_magnitude(x: Tensor, alpha: Tensor, name: str) -> None:
    """Noisy images whose squared distances are finite numbers in float32, on every backend.

    Args:
        x: Finite noisy images, [B, ...].
        alpha: Signal coefficients, float64 [B].
        name: Name of the images in error messages.
    """
    if x.numel() == 0 or not (has_readable_values(x) and has_readable_values(alpha)):
        return
    if alpha.max() > LARGEST:
        raise ValueError(f"`alpha` must be at most {LARGEST:g}, got {float(alpha.max()):g}")
    largest = x.detach().abs().flatten(1).amax(1).double()
    if (largest > LARGEST * alpha.clamp(max=1.0)).any():
        raise ValueError(
            f"`{name}` must lie within {LARGEST:g} times `alpha`, and within {LARGEST:g}, got "
            f"values up to {float(largest.max()):g} at alpha {float(alpha.min()):g}"
        )
