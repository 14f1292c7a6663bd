"""A GPU made of the CPU, to see without one whether code brings its tensors to the right place.

A tensor on it says that it is on the device "meta", computes with a plain tensor inside, and like
one of CUDA refuses to meet tensors of the CPU: but for numbers, copies, and indices on the CPU.
Only the reference backend runs on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pyflocality._support.checks import tensors

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside a `with` block tensors on `DEVICE` have values."""
    holds = patch.object(tensors, "is_without_values", lambda where: False)
    values = patch.object(torch.Tensor, "is_meta", property(lambda tensor: False))
    with holds, values, _Factories(), _Constructors():
        yield


class OnDevice(torch.Tensor):
    """A tensor on the device."""

    plain: torch.Tensor

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> OnDevice:
        """The same values there."""
        layout = {"strides": plain.stride(), "storage_offset": plain.storage_offset()}
        found = torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, dtype=plain.dtype, device=DEVICE, **layout
        )
        found.plain = plain
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: object, types: object, args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        """Run an operation of torch."""
        return _run(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """Sees what makes tensors of none."""

    def __torch_dispatch__(
        self, func: object, types: object, args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        return _run(func, args, dict(kwargs or {}))


class _Constructors(TorchFunctionMode):
    """Sees what fills tensors with numbers, or reads them, where no operation is called."""

    def __torch_function__(
        self, func: object, types: object, args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        options = dict(kwargs or {})
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func is torch.Tensor.new_tensor:
            options = {"dtype": args[0].dtype, "device": args[0].device} | options
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            return func(*args, **options | {"device": "cpu"}).to(options.get("device"))
        return func(*args, **options)


def _run(func: Any, args: Sequence, kwargs: dict[str, Any]) -> object:  # noqa: ANN401
    given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    there = {id(one.plain): one for one in given if isinstance(one, OnDevice)}
    stays = bool(there)
    if "device" in kwargs and kwargs["device"] is not None:
        stays = torch.device(kwargs["device"]) == DEVICE
        kwargs["device"] = torch.device("cpu")
    elif func in (_aten.copy_.default, _aten.index.Tensor):
        stays = isinstance(args[0], OnDevice)
    if there and func not in _COPIES and not (func is _aten.index.Tensor and stays):
        if any(not isinstance(one, OnDevice) and one.ndim > 0 for one in given):
            raise RuntimeError(f"{func}: expected tensors on one device, got some of {DEVICE}")
    args, kwargs = tree_map(lambda one: getattr(one, "plain", one), (args, kwargs))
    found = func(*args, **kwargs)
    if not stays:
        return found

    def placed(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        # An operation in place answers its argument.
        return there[id(value)] if id(value) in there else OnDevice(value)

    return tree_map(placed, found)
