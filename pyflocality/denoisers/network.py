"""Trained networks as denoisers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from pyflocality._support.checks import (
    check_choice,
    check_image_shape,
    check_real,
    check_sequence,
    describe,
)
from pyflocality._support.levels import Levels
from pyflocality._support.transforms import is_differentiated
from pyflocality.autograd.forward_mode import Derivative, in_forward_mode
from pyflocality.denoisers.base import Denoiser
from pyflocality.noise import NoiseSchedule
from pyflocality.noise.schedules import check_invertible, time_at

_PREDICTIONS = ("x0", "noise", "residual", "v")
# Tangents that go through the network together.
_TOGETHER = 64


class NetworkDenoiser(Denoiser):
    r"""Any trained torch network, called like every other denoiser.

    A network knows noisy images :math:`y = a u_0 + s \epsilon` of clean images :math:`u_0` in a
    range [low, high] of its own. A call `denoiser(x, sigma, alpha)` with
    :math:`x = \alpha x_0 + \sigma \epsilon` and :math:`x_0` in [-1, 1] shows it the same image
    in its own terms,

    .. math::
        y = \frac{a h}{\alpha} x + a c, \qquad s = \frac{a h}{\alpha} \sigma, \qquad
        h = \frac{high - low}{2}, \quad c = \frac{high + low}{2},

    and reads its output as

    .. math::
        u_0 = \begin{cases}
            output & \text{predicts x0} \\
            (y - s \, output) / a & \text{predicts noise } \epsilon \\
            (y - output) / a & \text{predicts residual } s \epsilon \\
            (a y - s \, output) / (a^2 + s^2) & \text{predicts v } = a \epsilon - s u_0
        \end{cases}
        \qquad \hat x_0 = (u_0 - c) / h .

    The scale a, and what the network is told about the noise, follow from `takes`:

    - "sigma": called as `module(y, s)` with s [B]; a = 1 (EDM and other variance-exploding ones).
    - "nothing": a blind network, called as `module(y)`; a = 1.
    - a schedule: called as `module(y, t)` with times t [B] and a = alpha of that schedule at t; t
      is the time at which the schedule's sigma / alpha is :math:`h \sigma / \alpha`. Schedules of
      whole times, `DDPMSchedule` for one, give the nearest time in log(sigma / alpha), int64. At
      the schedule's own levels, and with values in [-1, 1], y is x itself.

    The network is evaluated in the dtype and on the device of its parameters, in the mode
    (`.train()` or `.eval()`) it is in; the rest is computed in at least float32. Gradients flow
    as through any module, to x and to the parameters. `jvp` sends its directions through it in
    batches (`torch.vmap` over forward mode), `vjp` goes back through one graph for each; both
    keep what is needed for further derivatives, by the parameters too, only where x, the
    directions or a level require grad. They refuse a network whose dropout or batch
    normalisation is in training mode, which is another function at every call.

    Args:
        module: The network; its output has the shape of its input.
        predicts: "x0", "noise", "residual" or "v".
        takes: "sigma", "nothing" or a `NoiseSchedule` whose time it takes.
        image_shape: Shape (C, H, W) of the images.
        value_range: The range (low, high) of clean images that the network was trained on.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `predicts`, `takes` or `value_range` is none of the possible ones, or
            `image_shape` is not three positive numbers; on a call, the network answers with
            another shape, or derivatives are asked of dropout in training mode.

    References:
        Ho, Jain and Abbeel, Denoising diffusion probabilistic models, 2020 (noise).

        Salimans and Ho, Progressive distillation for fast sampling of diffusion models, 2022 (v).

        Kadkhodaie, Guth, Simoncelli and Mallat, Generalization in diffusion models arises from
        geometry-adaptive harmonic representations, 2024 (blind networks that predict residuals).
    """

    _place: Tensor

    def __init__(
        self,
        module: nn.Module,
        predicts: str = "x0",
        *,
        takes: str | NoiseSchedule,
        image_shape: Sequence[int],
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"`module` must be a torch.nn.Module, got {describe(module)}")
        super().__init__(check_image_shape(image_shape))
        self.predicts = check_choice(predicts, "predicts", _PREDICTIONS)
        if isinstance(takes, str):
            check_choice(takes, "takes", ("sigma", "nothing"))
        else:
            check_invertible(takes, "takes")
        self.takes = takes
        self.value_range = _check_range(value_range)
        self.module = module
        place = next(_tensors(module), torch.empty(0))
        # Says where a network without parameters is.
        self.register_buffer("_place", torch.empty(0, device=place.device), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the network, where inputs must be."""
        return next(_tensors(self.module), self._place).device

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        alpha, sigma = levels.tensors(len(x), x.device)
        low, high = self.value_range
        half, centre = (high - low) / 2, (high + low) / 2
        own = next((t.dtype for t in _tensors(self.module) if t.is_floating_point()), x.dtype)
        compute = torch.promote_types(torch.promote_types(x.dtype, own), torch.float32)
        told, scale = self._noise_level(half * sigma / alpha, own)
        stretch = scale * half / alpha

        def column(level: Tensor) -> Tensor:
            return level.to(compute)[:, None, None, None]

        y = column(stretch) * x.to(compute) + column(scale * centre)
        output = self.module(y.to(own), *told)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise ValueError(
                f"`module` must return images of shape {list(x.shape)}, got {describe(output)}"
            )
        clean = self._clean(y, output.to(compute), column(scale), column(stretch * sigma))
        return ((clean - centre) / half).to(x.dtype)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        _check_same_every_time(self.module)
        estimates = self._denoise(x, levels)
        if tangents.numel() == 0:
            return estimates, torch.zeros_like(tangents)
        parts = tangents.split(max(1, _TOGETHER // len(x)))

        def products(derivative: Derivative) -> Tensor:
            def along(tangent: Tensor) -> Tensor:
                return derivative(lambda z: self._denoise(z, levels), x, tangent)[1]

            return torch.cat([torch.vmap(along)(part) for part in parts])

        with _ForwardMode():
            return estimates, in_forward_mode(products)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        _check_same_every_time(self.module)
        products = super()._vjp(x, cotangents, levels)
        # Parameters alone are no reason to keep the graph.
        differentiated = is_differentiated(x, cotangents, *levels)
        return products if differentiated else products.detach()

    def _noise_level(self, ratio: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the module is told of noise levels sigma / alpha [B], and its scale a [B]."""
        if isinstance(self.takes, NoiseSchedule):
            time = time_at(self.takes, ratio)
            scale, _ = self.takes(time)
            # At a time without signal the image is shown as it is, scaled to variance 1.
            scale = torch.where(scale > 0, scale, (1.0 + ratio.square()).rsqrt())
            return (time.to(dtype) if time.is_floating_point() else time,), scale
        told = (ratio.to(dtype),) if self.takes == "sigma" else ()
        return told, torch.ones_like(ratio)

    def _clean(self, y: Tensor, output: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The clean images that an output means, in the network's range: [B, C, H, W]."""
        if self.predicts == "x0":
            return output
        if self.predicts == "noise":
            return (y - s * output) / a
        if self.predicts == "residual":
            return (y - output) / a
        return (a * y - s * output) / (a.square() + s.square())

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"predicts={self.predicts!r}, takes={self.takes!r}, value_range={self.value_range}"


class _ForwardMode(TorchFunctionMode):
    """Lets torch's forward mode through a network, in this thread alone.

    Fused attention has no forward mode: attention is computed by its formula, as
    `torch.nn.attention.sdpa_kernel` would have it for all threads. The derivative of group
    normalisation asks for contiguous tangents, which those behind attention are not.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation of torch."""
        options = options or {}
        if function is nn.functional.group_norm:
            arguments = (arguments[0].contiguous(), *arguments[1:])
        elif function is nn.functional.scaled_dot_product_attention:
            return _attention(*arguments, **options)
        elif function is nn.functional.multi_head_attention_forward:
            # It takes the formula where the weights are asked for.
            wanted = options.get("need_weights", True)
            output, weights = function(*arguments, **options | {"need_weights": True})
            return output, weights if wanted else None
        return function(*arguments, **options)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, by its formula."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        barred = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = barred.masked_fill(~attn_mask, -torch.inf)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _check_same_every_time(module: nn.Module) -> None:
    """Refuse derivatives of what is another function at every call."""
    for name, part in module.named_modules():
        dropout = isinstance(part, _DropoutNd) and part.p > 0
        norm = isinstance(part, _BatchNorm) and part.track_running_stats
        if part.training and (dropout or norm):
            raise ValueError(
                "`module` must be in evaluation mode for derivatives (call `.eval()`), its "
                f"{type(part).__name__} {name!r} is in training mode"
            )


def _check_range(value_range: object) -> tuple[float, float]:
    pair = check_sequence(value_range, "value_range", "two numbers (low, high)", length=2)
    low, high = (check_real(end, "value_range") for end in pair)
    if not low < high:
        raise ValueError(f"`value_range` must be finite and rising, got {describe(value_range)}")
    return low, high
