"""The CUDA kernels on arrays of other libraries: CuPy, or any producer of DLPack capsules.

Every function of `pyflocality.ops` that the cuda backend serves has one of the same name here, with
arrays in the place of tensors; what is answered is as x is, CuPy or torch.

Training images are read where they lie if they are contiguous, else copied a piece at a time. x
and directions, which are of the size of the batch, are copied into the units of the kernels.

Kernels run on torch's current stream, which waits for what the arrays' own libraries have yet to do
with them. A function returns before its kernels are done, and nothing keeps the memory of the
arrays in the meantime: keep them, unchanged, until the answer is there (`torch.cuda.synchronize`),
or work on one stream. CuPy's current stream waits for an answer that is a CuPy array; its memory is
torch's, so keep it, too, until other streams are done with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pyflocality import ops
from pyflocality._support.checks import LevelLike, as_pair, check_level, check_tensor
from pyflocality.backends.selection import BackendUnavailableError, reason
from pyflocality.kernels.cuda._window_rows import window_posterior_rows as _rows_of_problem
from pyflocality.ops.operation import OPERATIONS
from pyflocality.ops.window_posterior import check_window
from pyflocality.posterior.problem import posterior_problem

# An array with `__dlpack__`.
Array = Any


def window_posterior_rows(
    x: Array,
    images: Array,
    outputs: Sequence[tuple[int, int, int]],
    window: int,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
) -> Array:
    """Derivatives of chosen values of `window_posterior_mean` with respect to x.

    Args:
        x: Noisy images, float32 [B, C, H, W].
        images: Training images, uint8 or float32 [N, C, H, W].
        outputs: The values as (channel, row, column), R >= 1 of them.
        window: Odd side of the window.
        sigma: Noise level, a number or a torch tensor [B], positive; or a `NoiseLevel`.
        alpha: Signal coefficient, a number or a torch tensor [B].
        temperature: Divides the logits.

    Returns:
        Rows of the Jacobian, dtype of x, [B, R, C, H, W].

    Raises:
        TypeError: An array does not offer its memory through DLPack.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The cuda backend cannot serve this call.
    """
    given = {"outputs": outputs, "window": window, "sigma": sigma, "alpha": alpha}
    return _answer(_rows, {"x": x, "images": images, **given}, ("x", "images"), temperature)


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
        return from_dlpack(array)
    except BufferError as error:
        raise TypeError(f"`{name}` cannot be passed through DLPack: {error}") from error


def _answer(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    arrays: Sequence[str],
    temperature: float,
) -> Any:  # noqa: ANN401  (arrays of x's library)
    """What a function answers, some of whose arguments are arrays, in the kind of array of x."""
    tensors = {name: as_tensor(arguments[name], name) for name in arrays}
    result = function(**{**arguments, **tensors}, temperature=temperature, backend="cuda")
    if type(arguments["x"]).__module__.partition(".")[0] != "cupy":
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
    sigma: LevelLike,
    alpha: float | Tensor,
    *,
    temperature: float,
    backend: str,
) -> Tensor:
    sigma, alpha = as_pair(sigma, alpha)
    problem = posterior_problem(x, images, sigma, alpha, temperature=temperature)
    check_level(sigma, len(x), x.device, "sigma", allow_zero=False)
    window = check_window(window, *x.shape[-2:])
    # The kernels of the rows serve what those of the means do.
    why_not = reason("window_posterior", backend, problem.call(window=window))
    if why_not is not None:
        raise BackendUnavailableError(backend, "window_posterior_rows", why_not, ())
    return _rows_of_problem(problem, outputs, window).to(x.dtype)


def _on_arrays(function: Callable[..., Any]) -> Callable[..., Array]:
    """A function of `pyflocality.ops` on the cuda backend, with arrays in the place of tensors."""
    parameters = [
        one.replace(annotation=Array if one.annotation == "Tensor" else one.annotation)
        for one in inspect.signature(function).parameters.values()
        if one.name not in ("backend", "options")
    ]
    arrays = [one.name for one in parameters if one.annotation is Array]
    temperature = inspect.Parameter("temperature", inspect.Parameter.KEYWORD_ONLY, default=1.0)
    signature = inspect.Signature([*parameters, temperature], return_annotation=Array)

    def on_arrays(*arguments: Any, **named: Any) -> Array:  # noqa: ANN401
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        given = dict(bound.arguments)
        return _answer(function, given, arrays, given.pop("temperature"))

    name = function.__name__
    on_arrays.__name__ = on_arrays.__qualname__ = name
    on_arrays.__signature__ = signature  # type: ignore[attr-defined]  # what `help` shows
    options = "        temperature: Divides the logits.\n"
    text = re.sub(r"        backend: .*\n        options: .*\n", options, function.__doc__ or "")
    on_arrays.__doc__ = text.replace("    Args:\n", f"{_ARRAYS}    Args:\n", 1)
    return on_arrays


# What the functions are told of in addition to those of `pyflocality.ops`.
_ARRAYS = """    x, images and directions are arrays with `__dlpack__` on one GPU, float32; images
    may be uint8. What is answered is a CuPy array where x is one, else a tensor.

"""

for _operation in OPERATIONS.values():
    for _kind, _variant in _operation.variants.items():
        if "cuda" in _variant.backends:
            _name = f"{_operation.name}_{'mean' if _kind == 'scan' else _kind}"
            globals()[_name] = _on_arrays(getattr(ops, _name))

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Array]: ...
