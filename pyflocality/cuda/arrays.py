"""The CUDA kernels on arrays of other libraries: CuPy, or any producer of DLPack capsules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyflocality.ops.window_posterior import window_posterior_mean as _mean_of_tensors


def window_posterior_mean(
    x: Any,  # noqa: ANN401
    images: Any,  # noqa: ANN401
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
) -> Any:  # noqa: ANN401
    """`pyflocality.ops.window_posterior_mean` on the cuda backend, without a copy of its inputs.

    Args:
        x: Noisy images on a GPU, an array with `__dlpack__`, float32 [B, C, H, W].
        images: Training images on the same GPU, likewise, uint8 or float32 [N, C, H, W].
        window: Odd side of the window.
        sigma: Noise level, a number or a torch tensor [B].
        alpha: Signal coefficient, a number or a torch tensor [B].
        temperature: Divides the logits.

    Returns:
        Posterior means in [-1, 1], [B, C, H, W]: a CuPy array where x is one, else a tensor.

    Raises:
        TypeError: An array does not offer its memory through DLPack.
        BackendUnavailableError: The cuda backend cannot serve this call.
    """
    result = _mean_of_tensors(
        as_tensor(x, "x"),
        as_tensor(images, "images"),
        window,
        sigma,
        alpha,
        temperature=temperature,
        backend="cuda",
    )
    if type(x).__module__.partition(".")[0] != "cupy":
        return result
    import cupy

    return cupy.from_dlpack(result)


def as_tensor(array: Any, name: str) -> Tensor:  # noqa: ANN401
    """A tensor over the memory of an array, without a copy."""
    if isinstance(array, Tensor):
        return array
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, a CuPy array or another array with `__dlpack__`, "
            f"got a {type(array).__name__}"
        )
    return torch.from_dlpack(array)
