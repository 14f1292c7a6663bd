"""Checks of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from pyflocality._support.checks.describing import describe
from pyflocality._support.transforms import has_readable_values, is_traced

# What torch computes with everywhere; float8 and float4 are for storage alone.
FLOAT_DTYPES = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64])
REAL_DTYPES = FLOAT_DTYPES | {
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}


def is_without_values(where: Tensor | torch.device) -> bool:
    """Whether a tensor, or those on a device, are shapes alone."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "meta"


def check_tensor(value: object, name: str, expected: str = "a torch.Tensor") -> Tensor:
    """A tensor whose memory holds its values: strided, not nested, not quantized, not on meta."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be {expected}, got {describe(value)}")
    if is_traced():
        return value
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        raise TypeError(
            f"`{name}` must be a dense tensor (strided, neither sparse nor nested nor quantized), "
            f"got {describe(value)}"
        )
    if value.is_meta or is_lazy(value):
        raise ValueError(f"`{name}` must hold values, got {describe(value)}")
    # Kernels read the memory, where the values of a negative view have the other sign.
    return value.resolve_neg() if value.is_neg() else value


def check_float_tensor(value: object, name: str, *, finite: bool = True) -> Tensor:
    """A floating-point tensor, without NaN and infinities unless they are allowed."""
    tensor = check_tensor(value, name)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must have a floating-point dtype (values in [-1, 1]; float16, bfloat16, "
            f"float32 or float64), got {describe(value)}"
        )
    if finite and has_readable_values(tensor) and not torch.isfinite(tensor.detach()).all():
        raise ValueError(f"`{name}` holds NaN or infinite values")
    return tensor


def check_batch(
    x: object, image_shape: Sequence[int], device: torch.device, name: str, *, finite: bool = True
) -> Tensor:
    """A batch of images of the given shape: [B, C, H, W], on the given device."""
    # An error of the place says more of a tensor without values than that it has none.
    if isinstance(x, Tensor) and x.device != device:
        raise ValueError(f"`{name}` must be on {device} like the training set, got {describe(x)}")
    batch = check_float_tensor(x, name, finite=False)
    if batch.ndim != len(image_shape) + 1 or batch.shape[1:] != tuple(image_shape):
        shape = ", ".join(["B", *map(str, image_shape)])
        raise ValueError(f"`{name}` must have shape [{shape}], got {describe(x)}")
    return check_float_tensor(batch, name) if finite else batch


def check_directions(
    directions: object, x: Tensor, name: str, image_shape: Sequence[int]
) -> Tensor:
    """K batches of images of a shape, as many as noisy images x, of their dtype: [K, B, ..]."""
    shape = (len(x), *image_shape)
    if isinstance(directions, Tensor) and directions.device != x.device:
        raise ValueError(f"`{name}` must be on {x.device} like `x`, got {describe(directions)}")
    along = check_float_tensor(directions, name, finite=False)
    if along.ndim != len(shape) + 1 or tuple(along.shape[1:]) != shape:
        expected = ", ".join(["K", *map(str, shape)])
        raise ValueError(f"`{name}` must have shape [{expected}], got {describe(along)}")
    if along.dtype != x.dtype:
        raise TypeError(f"`{name}` must be {x.dtype} like `x`, got {describe(along)}")
    return along


# Memory that is known to hold finite values: of storages by their address, with the version of
# the values, and the first and the last element of each piece.
_Known = tuple[StorageWeakRef, int, list[tuple[torch.dtype, int, int]]]
_known: dict[int, _Known] = {}
# Entries of storages that are gone are dropped where there are more.
_MOST_KNOWN = 256
_MOST_PIECES = 64


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """A tensor without NaN and infinities, which is looked at once for as long as it is unchanged.

    For what is passed again and again, such as training images; `known_finite` is the memory.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0 or not has_readable_values(tensor):
        return tensor
    if not _is_known(tensor):
        # One pass, without a temporary: NaN and infinities are among the ends.
        if not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
            raise ValueError(f"`{name}` holds NaN or infinite values")
        known_finite(tensor)
    return tensor


def known_finite(tensor: Tensor) -> Tensor:
    """Note that a tensor holds finite values, for `check_finite`."""
    piece = _piece(tensor) if tensor.is_floating_point() else None
    if piece is None:
        return tensor
    storage = tensor.untyped_storage()
    entry = _known.get(storage._cdata)
    if entry is None or entry[1] != tensor._version or entry[0].expired():
        if len(_known) >= _MOST_KNOWN:
            _forget()
        entry = _known[storage._cdata] = (StorageWeakRef(storage), tensor._version, [])
    if len(entry[2]) >= _MOST_PIECES:
        entry[2].clear()
    entry[2].append(piece)
    return tensor


def _is_known(tensor: Tensor) -> bool:
    piece = _piece(tensor)
    if piece is None:
        return False
    entry = _known.get(tensor.untyped_storage()._cdata)
    if entry is None or entry[1] != tensor._version or entry[0].expired():
        return False
    dtype, first, last = piece
    return any(kind == dtype and low <= first and last <= high for kind, low, high in entry[2])


def _piece(tensor: Tensor) -> tuple[torch.dtype, int, int] | None:
    """The elements of the storage that a tensor reads; None where it does not read all of them."""
    if tensor.is_inference() or tensor.numel() == 0:
        # Tensors of inference mode do not count their changes.
        return None
    extent: int = 1 + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if extent != tensor.numel():
        return None
    first = int(tensor.storage_offset())
    return tensor.dtype, first, first + extent


def _forget() -> None:
    # Other threads may do the same.
    entries = list(_known.items())
    gone = [address for address, entry in entries if entry[0].expired()]
    for address in gone or [address for address, _ in entries[: _MOST_KNOWN // 2]]:
        _known.pop(address, None)
