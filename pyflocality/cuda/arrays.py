"""The CUDA kernels on arrays of other libraries: CuPy, or any producer of DLPack capsules.

The functions are those of `pyflocality.ops` of the same names on the cuda backend, with arrays in
the place of tensors; what is answered is as x is, CuPy or torch.

Training images are read where they lie if they are contiguous, else copied a piece at a time. x
and directions, which are of the size of the batch, are copied into the units of the kernels.

Kernels run on torch's current stream, which waits for what the arrays' own libraries have yet to do
with them. A function returns before its kernels are done, and nothing keeps the memory of the
arrays in the meantime: keep them, unchanged, until the answer is there (`torch.cuda.synchronize`),
or work on one stream. CuPy's current stream waits for an answer that is a CuPy array; its memory is
torch's, so keep it, too, until other streams are done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflocality import ops
from pyflocality._support.checks import check_level, check_tensor
from pyflocality.backends.selection import BackendUnavailableError, reason
from pyflocality.kernels.cuda.window_rows import window_posterior_rows as _rows_of_problem
from pyflocality.ops.window_posterior import check_window
from pyflocality.posterior.problem import posterior_problem

# An array with `__dlpack__`.
Array = Any


def window_posterior_mean(
    x: Array,
    images: Array,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
) -> Array:
    """Posterior means over square windows, one posterior for each pixel.

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
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The cuda backend cannot serve this call.
    """
    arrays = {"x": x, "images": images}
    return _answer(ops.window_posterior_mean, arrays, window, sigma, alpha, temperature=temperature)


def window_posterior_jvp(
    x: Array,
    tangents: Array,
    images: Array,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """`window_posterior_mean` and its derivatives along K tangents.

    Args:
        x: Noisy images, float32 [B, C, H, W].
        tangents: Directions in the space of x, float32 [K, B, C, H, W].
        images: Training images, uint8 or float32 [N, C, H, W].
        window: Odd side of the window.
        sigma: Noise level, a number or a torch tensor [B], positive.
        alpha: Signal coefficient, a number or a torch tensor [B].
        temperature: Divides the logits.

    Returns:
        Posterior means [B, C, H, W] and derivatives [K, B, C, H, W].

    Raises:
        TypeError: An array does not offer its memory through DLPack.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The cuda backend cannot serve this call.
    """
    arrays = {"x": x, "tangents": tangents, "images": images}
    return _answer(ops.window_posterior_jvp, arrays, window, sigma, alpha, temperature=temperature)


def window_posterior_vjp(
    x: Array,
    cotangents: Array,
    images: Array,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
) -> Array:
    """Transposed derivatives of `window_posterior_mean` along K cotangents.

    Args:
        x: Noisy images, float32 [B, C, H, W].
        cotangents: Directions in the space of the means, float32 [K, B, C, H, W].
        images: Training images, uint8 or float32 [N, C, H, W].
        window: Odd side of the window.
        sigma: Noise level, a number or a torch tensor [B], positive.
        alpha: Signal coefficient, a number or a torch tensor [B].
        temperature: Divides the logits.

    Returns:
        Transposed derivatives, [K, B, C, H, W].

    Raises:
        TypeError: An array does not offer its memory through DLPack.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The cuda backend cannot serve this call.
    """
    arrays = {"x": x, "cotangents": cotangents, "images": images}
    return _answer(ops.window_posterior_vjp, arrays, window, sigma, alpha, temperature=temperature)


def window_posterior_rows(
    x: Array,
    images: Array,
    outputs: Sequence[tuple[int, int, int]],
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
) -> Array:
    """Derivatives of chosen values of `window_posterior_mean` by the noisy image.

    Args:
        x: Noisy images, float32 [B, C, H, W].
        images: Training images, uint8 or float32 [N, C, H, W].
        outputs: The values as (channel, row, column), R >= 1 of them.
        window: Odd side of the window.
        sigma: Noise level, a number or a torch tensor [B], positive.
        alpha: Signal coefficient, a number or a torch tensor [B].
        temperature: Divides the logits.

    Returns:
        Rows of the Jacobian, dtype of x, [B, R, C, H, W].

    Raises:
        TypeError: An array does not offer its memory through DLPack.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The cuda backend cannot serve this call.
    """
    return _answer(
        _rows, {"x": x, "images": images}, outputs, window, sigma, alpha, temperature=temperature
    )


def patch_set_mean(
    x: Array,
    images: Array,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
) -> Array:
    """Posterior means of all square windows inside an image, laid over one another.

    Args:
        x: Noisy images, float32 [B, C, H, W].
        images: Training images, uint8 or float32 [N, C, H, W].
        window: Side of the window, odd or even.
        sigma: Noise level, a number or a torch tensor [B].
        alpha: Signal coefficient, a number or a torch tensor [B].
        temperature: Divides the logits.

    Returns:
        Blended posterior means in [-1, 1], [B, C, H, W].

    Raises:
        TypeError: An array does not offer its memory through DLPack.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The cuda backend cannot serve this call.
    """
    arrays = {"x": x, "images": images}
    return _answer(ops.patch_set_mean, arrays, window, sigma, alpha, temperature=temperature)


def as_tensor(array: Array, name: str) -> Tensor:
    """A tensor over the memory of an array, without a copy.

    Raises:
        TypeError: The array does not offer its memory through DLPack.
        ValueError: It runs backwards along an axis, which torch has no tensors for, or holds no
            values.
    """
    if isinstance(array, Tensor):
        return check_tensor(array, name)
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, a CuPy array or another array with `__dlpack__`, "
            f"got a {type(array).__name__}"
        )
    # What torch would end the process for.
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        raise ValueError(f"`{name}` must not have negative strides: pass a copy of it")
    try:
        return torch.from_dlpack(array)
    except BufferError as error:
        raise TypeError(f"`{name}` cannot be passed through DLPack: {error}") from error


def _answer(
    operation: Callable[..., Any],
    arrays: dict[str, Array],
    *arguments: Any,  # noqa: ANN401
    temperature: float,
) -> Any:  # noqa: ANN401
    """What an operation answers to arrays and its further arguments, in the kind of array of x."""
    tensors = [as_tensor(array, name) for name, array in arrays.items()]
    result = operation(*tensors, *arguments, temperature=temperature, backend="cuda")
    if type(arrays["x"]).__module__.partition(".")[0] != "cupy":
        return result
    import cupy

    if isinstance(result, tuple):
        return tuple(cupy.from_dlpack(part) for part in result)
    return cupy.from_dlpack(result)


def _rows(
    x: Tensor,
    images: Tensor,
    outputs: Sequence[tuple[int, int, int]],
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor,
    *,
    temperature: float,
    backend: str,
) -> Tensor:
    problem = posterior_problem(x, images, sigma, alpha, temperature=temperature)
    check_level(sigma, len(x), x.device, "sigma", allow_zero=False)
    window = check_window(window, *x.shape[-2:])
    # The kernels of the rows serve what those of the means do.
    why_not = reason("window_posterior", backend, problem.call(window=window))
    if why_not is not None:
        raise BackendUnavailableError(backend, "window_posterior_rows", why_not, ())
    return _rows_of_problem(problem, outputs, window).to(x.dtype)
