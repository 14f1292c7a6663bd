"""Checks of noise levels, and of noisy images at their levels."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from pyflocality._support.checks.describing import describe
from pyflocality._support.checks.noise_level import LevelLike, as_pair
from pyflocality._support.checks.numeric import check_real
from pyflocality._support.checks.tensors import (
    REAL_DTYPES,
    check_batch,
    check_directions,
    check_tensor,
)
from pyflocality._support.levels import Levels
from pyflocality._support.transforms import (
    has_readable_values,
    is_traced,
    outside_transforms,
    without_derivatives,
)

# Values whose squares, summed over an image, stay far from the end of float32.
LARGEST = 1e12


class Noisy(NamedTuple):
    """A batch of noisy images, checked.

    Attributes:
        x: The images, [B, C, H, W].
        levels: Their noise levels.
        directions: Directions of derivatives, [K, B, C, H, W]; x itself where there are none.
        looked_at: Whether Python could look at the values: else they are checked where they exist,
            inside of what is mapped or recorded.
    """

    x: Tensor
    levels: Levels
    directions: Tensor
    looked_at: bool


def check_noisy(
    x: object,
    sigma: LevelLike,
    alpha: float | Tensor,
    image_shape: Sequence[int],
    device: torch.device,
    directions: object = None,
    name: str | None = None,
    along_shape: Sequence[int] | None = None,
) -> Noisy:
    """The arguments of a call about noisy images; values on their device are looked at once.

    Args:
        x: Noisy images, [B, C, H, W].
        sigma: Noise level, as `check_levels` takes it.
        alpha: Signal coefficient, as `check_levels` takes it.
        image_shape: Shape (C, H, W) that the images must have.
        device: Where they must be.
        directions: Directions of derivatives, [K, B, C, H, W].
        name: Name of the directions in error messages, None where derivatives are not asked for.
        along_shape: Shape of one direction of one image, if it is another than that of the images.
    """
    x = check_batch(x, image_shape, device, "x", finite=False)
    levels = check_levels(sigma, alpha, len(x), derivatives=name is not None)
    shape = image_shape if along_shape is None else along_shape
    along = x if name is None else check_directions(directions, x, name, shape)
    looked_at = has_readable_values(x, *levels)
    if looked_at:
        seen = name is not None and along.numel() > 0 and has_readable_values(along)
        with outside_transforms():
            largest = _sizes(without_derivatives(x))
            if seen:
                largest = torch.cat([largest, _sizes(without_derivatives(along)[None])])
            sizes = largest.tolist()
        if not all(map(math.isfinite, sizes[: len(x)])):
            raise ValueError("`x` holds NaN or infinite values")
        if seen and not math.isfinite(sizes.pop()):
            raise ValueError(f"`{name}` holds NaN or infinite values")
        _check_sizes(sizes, levels.alpha, "x")
    return Noisy(x, levels, along, looked_at)


def check_magnitude(x: Tensor, alpha: float | Tensor, name: str) -> None:
    """Refuse finite images [B, ...] whose squared distances float32 cannot hold."""
    if x.numel() > 0 and has_readable_values(x, alpha):
        _check_sizes(_sizes(x.detach()).tolist(), alpha, name)


def _sizes(x: Tensor) -> Tensor:
    """The largest magnitude of every image [B, ...], NaN where there is one, [B]."""
    return torch.linalg.vector_norm(x, torch.inf, dim=tuple(range(1, x.ndim)))


def _check_sizes(sizes: list[float], alpha: float | Tensor, name: str) -> None:
    alphas = _numbers(alpha) if isinstance(alpha, Tensor) else [alpha] * len(sizes)
    if alphas and max(alphas) > LARGEST:
        raise ValueError(f"`alpha` must be at most {LARGEST:g}, got {max(alphas):g}")
    for size, one in zip(sizes, alphas, strict=True):
        if size > LARGEST * min(one, 1.0):
            raise ValueError(
                f"`{name}` must lie within {LARGEST:g} times `alpha`, and within {LARGEST:g}, got "
                f"values up to {max(sizes):g} at alpha {min(alphas):g}"
            )


def check_levels(
    sigma: LevelLike,
    alpha: float | Tensor,
    batch: int,
    *,
    derivatives: bool = False,
    positive: bool = False,
) -> Levels:
    """The noise levels of a batch.

    Args:
        sigma: Noise level: a number, a tensor without dimensions or a tensor [B]; 0 is the limit
            of no noise. Or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive, likewise.
        batch: Number of images B.
        derivatives: Whether derivatives are asked for, which have no limit as sigma falls to 0.
        positive: Whether sigma must not be 0 for another reason.
    """
    # As most levels are: nothing to convert and nothing wrong.
    if isinstance(sigma, float) and isinstance(alpha, float):
        plain = type(sigma) is float and type(alpha) is float
        if plain and not torch.compiler.is_dynamo_compiling():
            if 0 < sigma < math.inf and 0 < alpha < math.inf:
                return Levels(alpha, sigma)
    sigma, alpha = as_pair(sigma, alpha)
    noise = _checked(sigma, batch, "sigma", allow_zero=not positive, derivatives=derivatives)
    return Levels(_checked(alpha, batch, "alpha", allow_zero=False), noise)


def check_level(
    value: object, batch: int, device: torch.device, name: str, *, allow_zero: bool
) -> Tensor:
    """A coefficient of a schedule, a number or a tensor [] or [B], as float64 [B] on a device."""
    level = _checked(value, batch, name, allow_zero=allow_zero)
    return torch.as_tensor(level, dtype=torch.float64, device=device).expand(batch)


def check_one_level(value: object, name: str, *, allow_zero: bool) -> float:
    """A coefficient of a noise schedule for a single image or a whole call, as a number."""
    if isinstance(value, Tensor):
        if check_tensor(value, name).dtype not in REAL_DTYPES or value.numel() != 1:
            raise TypeError(f"`{name}` must be a number, got {describe(value)}")
        value = value.item()
    return check_real(value, name, low=0.0, above=not allow_zero)


def check_single_level(sigma: LevelLike, alpha: float | Tensor) -> tuple[float, float]:
    """One noise level for a whole call, as numbers (alpha, sigma); 0 is allowed for sigma."""
    sigma, alpha = as_pair(sigma, alpha)
    sigma = check_one_level(sigma, "sigma", allow_zero=True)
    return check_one_level(alpha, "alpha", allow_zero=False), sigma


def _checked(
    value: object, batch: int, name: str, *, allow_zero: bool, derivatives: bool = False
) -> float | Tensor:
    """A number as a float, a tensor as float64 [B] on the CPU."""
    if not isinstance(value, Tensor):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"`{name}` must be a number or a tensor [B], got {describe(value)}")
        if is_traced() and not isinstance(value, bool):
            # A symbol, which has a value where the graph runs.
            return torch.as_tensor(value, dtype=torch.float64).expand(batch)
        number = check_real(value, name, low=0.0, above=not allow_zero)
        if derivatives and number == 0:
            _refuse_derivatives(value)
        return number
    if check_tensor(value, name).dtype not in REAL_DTYPES:
        raise TypeError(f"`{name}` must be real, got {describe(value)}")
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
        raise ValueError(
            f"`{name}` must be a number or a tensor of shape [{batch}], got {describe(value)}"
        )
    level = value.to(device="cpu", dtype=torch.float64)
    seen = _numbers(level) if has_readable_values(level) else [1.0]
    least = min(seen, default=1.0)
    if not all(map(math.isfinite, seen)) or least < 0 or (least == 0 and not allow_zero):
        bound = "not negative" if allow_zero else "positive"
        raise ValueError(f"`{name}` must be finite and {bound}, got {describe(value)}")
    if derivatives and 0 in seen:
        _refuse_derivatives(value)
    return level.expand(batch)


def check_noise(levels: Levels) -> None:
    """Noise levels, checked but for 0, at which posteriors have derivatives."""
    sigma = levels.sigma
    if 0 in (_numbers(sigma) if isinstance(sigma, Tensor) else [sigma]):
        _refuse_derivatives(sigma)


def _refuse_derivatives(sigma: object) -> NoReturn:
    raise ValueError(
        "`sigma` must be positive for derivatives, which have no limit as it falls to 0, got "
        f"{describe(sigma)}"
    )


def _numbers(level: Tensor) -> list[float]:
    """The values of a tensor of levels, [] or [B]."""
    with outside_transforms():
        return without_derivatives(level).reshape(-1).tolist()
