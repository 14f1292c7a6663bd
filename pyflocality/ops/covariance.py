"""Exact covariance sums of 8-bit images."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._support.checks import check_tensor, describe
from pyflocality.backends.selection import select
from pyflocality.ops.operation import Operation, Served, Variant, declare, unproven
from pyflocality.ops.path import performed
from pyflocality.posterior.call import Call
from pyflocality.storage.mapped import mapped_file

COVARIANCE = declare(
    Operation(
        "covariance",
        {
            "scan": Variant(
                {
                    "triton": unproven("device_limits"),
                    "cpu": Served(),
                    "reference": Served(),
                },
                # A product and a sum for every pair of values of an image, each pair once.
                lambda s: s.images * s.values * (s.values + 1),
            ),
        },
        answers_state=False,
        # Sums in 64 bits, read and written.
        beside=lambda s: 16 * (s.values**2 + s.values),
    )
)


def accumulate_covariance(
    images: Tensor, gram: Tensor, total: Tensor, *, backend: str | None = None
) -> None:
    r"""Add the sums behind mean and covariance of 8-bit images to running totals.

    With :math:`c = u - 128` for the stored bytes u,

    .. math::
        G_{ab} \mathrel{+}= \sum_i c_{ia} c_{ib} \quad (a \le b), \qquad
        s_a \mathrel{+}= \sum_i c_{ia}.

    Both are sums of integers, kept in int64, so they are exact: bit-identical however the images
    are ordered and split into calls, on every backend, device and number of threads. They
    overflow beyond 5e14 images.

    A call costs reading and writing G once for every few thousand images and at least once, so
    many images at a time are cheaper than few.

    Args:
        images: Bytes, uint8, [n, D].
        gram: G, int64, contiguous, changed in place, [D, D]. Only its upper triangle is used.
        total: s, int64, contiguous, changed in place, [D].
        backend: Backend to run on; None follows `pyflocality.use_backend`.

    Raises:
        TypeError: An argument is not a tensor of its dtype.
        ValueError: A shape, device or memory layout does not fit.
        BackendUnavailableError: The backend that was asked for cannot serve the call.
        KeyboardInterrupt: Interrupted: the totals hold some of the images and are of no use.
    """
    _check(images, "images", torch.uint8)
    _check(gram, "gram", torch.int64)
    _check(total, "total", torch.int64)
    if images.ndim != 2 or images.shape[1] == 0:
        raise ValueError(f"`images` must have shape [n, D], got {describe(images)}")
    values = images.shape[1]
    for tensor, name, shape in ((gram, "gram", (values, values)), (total, "total", (values,))):
        if tensor.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {describe(tensor)}")
        if tensor.device != images.device:
            raise ValueError(
                f"`{name}` must be on {images.device} like the images, got {describe(tensor)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous, got strides {tensor.stride()}")
    file = mapped_file(images)
    facts = {"files": () if file is None else (file,)}
    call = Call(device=images.device, dtype=torch.uint8, facts=facts)
    performed(select("covariance", call, backend), call, images, gram, total)


def _check(value: object, name: str, dtype: torch.dtype) -> None:
    expected = f"a {dtype} tensor"
    if check_tensor(value, name, expected).dtype != dtype:
        raise TypeError(f"`{name}` must be {expected}, got {describe(value)}")
