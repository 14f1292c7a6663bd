r"""What every denoiser has in common.

A denoiser maps a noisy image :math:`x = \alpha x_0 + \sigma \epsilon` to an estimate of
:math:`x_0`. It is called as `denoiser(x, sigma, alpha)`; sigma and alpha are numbers or one
value per image of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.checks import (
    LevelLike,
    as_pair,
    check_batch,
    check_choice,
    check_device,
    check_float_dtype,
    check_level,
    check_magnitude,
    check_positive,
    describe,
)
from pyflocality._support.precision import PRECISIONS, Precision
from pyflocality._support.transforms import (
    in_full_precision,
    is_differentiated,
    is_traced,
    outside_transforms,
    without_derivatives,
)
from pyflocality.autograd.function import (
    directional,
    estimate,
    has_parameters,
    jvp_by_torch,
    transposed,
    vjp_by_torch,
)
from pyflocality.autograd.operators import new_handle
from pyflocality.backends.selection import BACKENDS
from pyflocality.data import TrainingSet
from pyflocality.posterior.problem import check_noise
from pyflocality.posterior.tangents import check_directions


class Denoiser(nn.Module):
    """Base class: checks the call, then asks the subclass for the estimate.

    Calls are differentiable by x, sigma and alpha: by `backward`, forward-mode differentiation
    and everything in `torch.func` (jvp, vjp, linearize, vmap, jacrev, jacfwd, hessian), to any
    order. The estimate runs on the fastest backend all the same and keeps nothing but its
    arguments; first derivatives by x are those of `jvp` and `vjp`, within the memory budget. All
    others go through the reference backend. By sigma and alpha they are taken with the windows,
    masks and patches of the noise level as they are. `torch.compile` sees one operator, also with
    fullgraph=True, and its first derivatives by x; what a graph would lose or get wrong (torch.func
    inside it, forward-mode tangents, derivatives by the level) raises an error.

    Any number of threads may call one denoiser, its derivatives included, and get what one would.
    Torch's forward mode is one for the whole process: derivatives that need it wait for each
    other, and are found by two backward passes, equal to rounding, where a caller has it open
    (`torch.autograd.forward_ad.dual_level`, `torch.func.jvp`). Torch itself lets one thread alone
    into such a block at a time.

    A subclass defines `_denoise`, in operations that torch differentiates wherever its arguments
    are differentiated, and better derivatives than torch's in `_jvp` and `_vjp`. Where it has
    parameters, all its operations are left to torch, `torch.autocast` included; others compute in
    full precision inside it.

    Args:
        image_shape: Shape (C, H, W) of the images it denoises.

    Attributes:
        symmetric_jacobian: Whether the Jacobian is known to be symmetric.
    """

    symmetric_jacobian = False

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self._handle = new_handle(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickled denoiser, which is one more."""
        super().__setstate__(state)
        self._handle = new_handle(self)

    @property
    def device(self) -> torch.device:
        """Device that inputs must be on."""
        raise AttributeError(f"{type(self).__name__} does not say which device it is on")

    def forward(self, x: Tensor, sigma: LevelLike, alpha: float | Tensor = 1.0) -> Tensor:
        """Estimate the clean images.

        Args:
            x: Noisy images x = alpha x0 + sigma noise, floating point, [B, C, H, W].
            sigma: Noise level, a number or a tensor [B], not negative; 0 is the limit of no
                noise. Or a `NoiseLevel`, as schedules answer it, for both coefficients.
            alpha: Signal coefficient, a number or a tensor [B], positive.

        Returns:
            Estimates of x0 in [-1, 1], dtype and device of x, [B, C, H, W].

        Raises:
            TypeError: x is not a floating-point tensor, or a level is not a number.
            ValueError: x has the wrong shape or device or holds NaN, or a level is out of range.
        """
        return estimate(self, *self._checked(x, sigma, alpha))

    def jvp(
        self,
        x: Tensor,
        tangents: Tensor,
        sigma: LevelLike,
        alpha: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        r"""The estimates and their derivatives J u along K tangents u of the noisy images.

        With J the Jacobian of the estimate by x. All tangents go through the training set
        together, in as many passes as one does.

        Args:
            x: Noisy images, [B, C, H, W].
            tangents: Directions u in the space of x, dtype of x, [K, B, C, H, W].
            sigma: Noise level, a number or a tensor [B], positive; or a `NoiseLevel` for both.
            alpha: Signal coefficient, a number or a tensor [B], positive.

        Returns:
            Estimates [B, C, H, W] and derivatives [K, B, C, H, W], dtype and device of x; they
            can themselves be differentiated, by the reference backend.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: An argument has the wrong shape, device or range; sigma is 0, where the
                posterior jumps from image to image.
            BackendUnavailableError: The backend asked for has no derivatives of this denoiser.
        """
        x, sigma, alpha = self._checked(x, sigma, alpha, derivatives=True)
        tangents = check_directions(tangents, x, "tangents")
        in_parts = is_traced() or tangents.numel() == 0
        if in_parts or is_differentiated(x, tangents, sigma, alpha):
            found = directional(self, x, sigma, alpha, tangents)
            return estimate(self, x, sigma, alpha), found
        own = nullcontext() if has_parameters(self) else in_full_precision(x.device)
        with torch.no_grad(), own:
            return self._jvp(x, tangents, sigma, alpha)

    def vjp(
        self,
        x: Tensor,
        cotangents: Tensor,
        sigma: LevelLike,
        alpha: float | Tensor = 1.0,
    ) -> Tensor:
        r"""Transposed derivatives :math:`J^\top g` along K cotangents g of the estimates.

        They are the gradients by x of the sums of g times the estimate; the counterpart of `jvp`,
        with the same shapes.

        Args:
            x: Noisy images, [B, C, H, W].
            cotangents: Directions g in the space of the estimates, dtype of x, [K, B, C, H, W].
            sigma: Noise level, a number or a tensor [B], positive; or a `NoiseLevel` for both.
            alpha: Signal coefficient, a number or a tensor [B], positive.

        Returns:
            Gradients [K, B, C, H, W], dtype and device of x; they can themselves be
            differentiated, by the reference backend.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: An argument has the wrong shape, device or range; sigma is 0.
            BackendUnavailableError: The backend asked for has no derivatives of this denoiser.
        """
        x, sigma, alpha = self._checked(x, sigma, alpha, derivatives=True)
        cotangents = check_directions(cotangents, x, "cotangents")
        return transposed(self, x, sigma, alpha, cotangents)

    def _checked(
        self,
        x: Tensor,
        sigma: LevelLike,
        alpha: float | Tensor,
        *,
        derivatives: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of a call in canonical form: levels are float64 [B]."""
        x = check_batch(x, self.image_shape, self.device, "x")
        sigma, alpha = as_pair(sigma, alpha)
        level = check_level(sigma, len(x), x.device, "sigma", allow_zero=True)
        if derivatives:
            check_noise(level, sigma)
        alpha = check_level(alpha, len(x), x.device, "alpha", allow_zero=False)
        check_magnitude(x, alpha, "x")
        return x, level, alpha

    def _denoise(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        """The estimate for checked arguments; sigma and alpha are float64 [B]."""
        raise AttributeError(f"{type(self).__name__} does not define _denoise")

    def _jvp(
        self, x: Tensor, tangents: Tensor, sigma: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Estimates and derivatives along tangents [K, B, C, H, W], for checked arguments.

        A subclass defines it where it has anything better than torch's forward mode, which takes
        one pass for each tangent.
        """
        return jvp_by_torch(self._denoise, x, tangents, sigma, alpha)

    def _vjp(self, x: Tensor, cotangents: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        """Transposed derivatives for cotangents [K, B, C, H, W], for checked arguments.

        A subclass defines it where it has anything better than torch's backward mode, whose graph
        holds all that the estimate computes.
        """
        return vjp_by_torch(self._denoise, x, cotangents, sigma, alpha)


# Some images of a batch: their positions, int64 [b], or a slice of all.
Members = Tensor | slice
_Choice = TypeVar("_Choice")


class Level(NamedTuple):
    """The images of a batch that share a noise level.

    Attributes:
        sigma: Noise level.
        alpha: Signal coefficient.
        members: Which images.
    """

    sigma: float
    alpha: float
    members: Members


def split_levels(sigma: Tensor, alpha: Tensor) -> list[Level]:
    """The distinct noise levels of a batch, sigma and alpha [B], and the images of each."""
    with outside_transforms():
        levels = torch.stack([without_derivatives(sigma), without_derivatives(alpha)], 1)
        distinct, group = levels.unique(dim=0, return_inverse=True)
        if len(distinct) == 1:
            return [Level(*distinct[0].tolist(), slice(None))]
        return [
            Level(*level, (group == number).nonzero()[:, 0])
            for number, level in enumerate(distinct.tolist())
        ]


def share_passes(
    levels: Sequence[Level], choices: Sequence[_Choice]
) -> tuple[list[Members], list[_Choice]]:
    """The images of all levels with the same choice, which one pass serves, and the choices.

    Args:
        levels: The noise levels of a batch.
        choices: What each of them takes, such as a window; tensors are the same if they are one
            object.
    """
    groups: dict[int, list[int]] = {}
    for number, choice in enumerate(choices):
        groups.setdefault(choice if isinstance(choice, int) else id(choice), []).append(number)
    if len(groups) == 1:
        return [slice(None)], [choices[0]]
    with outside_transforms():
        members = [
            torch.cat([levels[number].members for number in numbers]) for numbers in groups.values()
        ]
    return members, [choices[numbers[0]] for numbers in groups.values()]


def join_levels(parts: Sequence[Tensor], levels: Sequence[Level], axis: int = 0) -> Tensor:
    """What was computed for each level, as one batch in its order along an axis."""
    return join_batch(parts, [level.members for level in levels], axis)


def join_batch(parts: Sequence[Tensor], members: Sequence[Members], axis: int = 0) -> Tensor:
    """What was computed for groups of images, as one batch in its order along an axis."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), axis).index_select(axis, torch.cat(list(members)).argsort())


def device_after(fn: Callable[[Tensor], Tensor], device: torch.device) -> torch.device:
    """Where a function of `torch.nn.Module.to` and its like takes what is on a device.

    Raises:
        ValueError: It is none that holds values.
    """
    return check_device(fn(torch.empty(0, device=device)).device)


def check_denoiser(denoiser: object) -> None:
    """A denoiser of this library."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            "`denoiser` must be a Denoiser (NetworkDenoiser wraps a trained network), got "
            f"{describe(denoiser)}"
        )


def check_set(data: object) -> TrainingSet:
    """A training set."""
    if not isinstance(data, TrainingSet):
        raise TypeError(
            f"`data` must be a TrainingSet (TrainingSet(images) makes one), got {describe(data)}"
        )
    return data


class PosteriorDenoiser(Denoiser):
    """Base class of the denoisers that scan a training set.

    Args:
        data: The training set.
        temperature: Divides the logits of the posterior, positive.
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype
            (half precision computes in float32).
        memory_budget: Working memory beyond data and result, bytes or a string such as
            "2GB"; None follows the environment variable PYFLOCALITY_MEMORY_BUDGET, else 1 GB.
        precision: "exact"; or "auto", which permits errors of about 1e-3 in [-1, 1], see
            `pyflocality.ops.PosteriorOptions`.

    Raises:
        TypeError: `data` is not a TrainingSet, or an option has the wrong type.
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        data: TrainingSet,
        temperature: float = 1.0,
        *,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
        precision: Precision = "exact",
    ) -> None:
        super().__init__(check_set(data).image_shape)
        if backend is not None:
            check_choice(backend, "backend", BACKENDS)
        check_float_dtype(dtype)
        memory_budget_bytes(memory_budget)
        self.data = data
        self.temperature = check_positive(temperature, "temperature")
        self.backend = backend
        self.dtype = dtype
        self.memory_budget = memory_budget
        self.precision = check_choice(precision, "precision", PRECISIONS)

    @property
    def device(self) -> torch.device:
        """Device of the training set, where inputs must be."""
        return self.data.device

    @property
    def _options(self) -> dict[str, Any]:
        """Options that every operation takes."""
        return {
            "augmentation": self.data.augmentation,
            "backend": self.backend,
            "dtype": self.dtype,
            "memory_budget": self.memory_budget,
        }

    @property
    def _posterior_options(self) -> dict[str, Any]:
        """Options that every operation with a posterior takes."""
        own = {"temperature": self.temperature, "precision": self.precision}
        return own | self._options

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PosteriorDenoiser:
        # The set is no buffer: `.half()` must not touch its values and `state_dict` must not
        # hold them. Only a move to another device concerns it.
        device = device_after(fn, self.data.device)
        super()._apply(fn, recurse)
        self.data = self.data.to(device)
        return self

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.data!r}, temperature={self.temperature}"
