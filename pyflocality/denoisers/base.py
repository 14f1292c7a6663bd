r"""What every denoiser has in common.

A denoiser maps a noisy image :math:`x = \alpha x_0 + \sigma \epsilon` to an estimate of
:math:`x_0`. It is called as `denoiser(x, sigma, alpha)`; sigma and alpha are numbers or one
value per image of the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.checks import (
    LevelLike,
    Noisy,
    check_choice,
    check_device,
    check_float_dtype,
    check_noise,
    check_noisy,
    check_positive,
    describe,
)
from pyflocality._support.levels import Levels, Rows
from pyflocality._support.precision import PRECISIONS, Precision
from pyflocality._support.transforms import outside_transforms
from pyflocality.autograd.operators import estimate, jvp, new_handle, vjp
from pyflocality.autograd.row_map import jvp_by_torch, vjp_by_torch
from pyflocality.backends.selection import BACKENDS
from pyflocality.data import TrainingSet
from pyflocality.denoisers.levels import join_rows, share_passes, split_levels
from pyflocality.ops.operation import Kind, Operation
from pyflocality.ops.path import Query
from pyflocality.posterior.problem import PosteriorProblem, trusted_problem
from pyflocality.storage.augmentation import Augmentation


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
        channels, height, width = image_shape
        self.image_shape = channels, height, width
        self._handle = new_handle(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickled denoiser, which is one more."""
        super().__setstate__(state)
        self._handle = new_handle(self)

    @property
    def device(self) -> torch.device:
        """Device that inputs must be on."""
        raise AttributeError(f"{type(self).__name__} does not say which device it is on")

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, sigma: LevelLike, alpha: float | Tensor = 1.0) -> Tensor:
            """As `forward`: that of torch.nn.Module answers anything."""

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
        return estimate(self, self._checked(x, sigma, alpha))

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
        return jvp(self, self._checked(x, sigma, alpha, tangents, "tangents"))

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
        return vjp(self, self._checked(x, sigma, alpha, cotangents, "cotangents"))

    def _checked(
        self,
        x: Tensor,
        sigma: LevelLike,
        alpha: float | Tensor,
        directions: Tensor | None = None,
        name: str | None = None,
    ) -> Noisy:
        """The arguments of a call, checked once for all that lies behind it."""
        return check_noisy(x, sigma, alpha, self.image_shape, self.device, directions, name)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        """The estimates for checked arguments."""
        raise AttributeError(f"{type(self).__name__} does not define _denoise")

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Estimates and derivatives along tangents [K, B, C, H, W], for checked arguments.

        A subclass defines it where it has anything better than torch's forward mode, which takes
        one pass for each tangent.
        """
        return jvp_by_torch(lambda z: self._denoise(z, levels), x, tangents)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        """Transposed derivatives for cotangents [K, B, C, H, W], for checked arguments.

        A subclass defines it where it has anything better than torch's backward mode, whose graph
        holds all that the estimate computes.
        """
        return vjp_by_torch(lambda z: self._denoise(z, levels), x, cotangents)


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


class DenoiserOptions(TypedDict, total=False):
    """Options of every denoiser that scans a training set: keywords that may be left out.

    Attributes:
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype
            (half precision computes in float32).
        memory_budget: Working memory beyond data and result, bytes or a string such as
            "2GB"; None follows the environment variable PYFLOCALITY_MEMORY_BUDGET, else 1 GB.
        precision: "exact"; or "auto", which permits errors of about 1e-3 in [-1, 1], see
            `pyflocality.ops.PosteriorOptions`.
    """

    backend: str | None
    dtype: torch.dtype | None
    memory_budget: int | str | None
    precision: Precision


class Asked(NamedTuple):
    """What a noise level asks of the training set: an operation, and what that takes."""

    operation: Operation
    query: Query = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where the same is asked; tensors and weights are the same if they are one."""
        return self.operation.name, *(v if isinstance(v, int) else id(v) for v in self.query)


class PosteriorDenoiser(Denoiser):
    """Base class of the denoisers that scan a training set.

    A subclass tells in `_questions` what it asks of the set at a noise level.

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
        self.precision: Precision = check_choice(precision, "precision", PRECISIONS)

    @property
    def device(self) -> torch.device:
        """Device of the training set, where inputs must be."""
        return self.data.images.device

    def _questions(self, kind: Kind) -> Callable[[float, float], Asked]:
        """What is asked at a noise level, as a function (alpha, sigma) that serves one call."""
        raise AttributeError(f"{type(self).__name__} does not define _questions")

    def _passes(self, kind: Kind, levels: Levels, batch: int) -> Iterable[tuple[Rows, Asked]]:
        """Groups of a batch, each served by one pass over the set, and what each asks of it."""
        split = split_levels(levels, batch)
        with outside_transforms():
            question = self._questions(kind)
            if len(split) == 1:
                return [(split[0].rows, question(split[0].alpha, split[0].sigma))]
            asked = [question(level.alpha, level.sigma) for level in split]
        return zip(*share_passes(split, asked, [one.key for one in asked]), strict=True)

    def _answers(
        self,
        kind: Kind,
        x: Tensor,
        levels: Levels,
        *directions: Tensor,
        values: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What operations of a kind answer for a batch and its directions.

        With values [N, R, C, H, W] an answer is that of the images and, in the same passes, those
        of their values: [.., B, 1 + R, C, H, W], and so are cotangents.
        """
        if kind != "scan":
            # Torch may ask for them where the estimate had no noise.
            check_noise(levels)
        groups, results = [], []
        for rows, asked in self._passes(kind, levels, len(x)):
            along = (part[:, rows] for part in directions) if directions else ()
            groups.append(rows)
            of_rows = levels.of(rows)
            results.append(self._answer(kind, asked, x[rows], of_rows, *along, values=values))
        axes = {"scan": (0,), "jvp": (0, 1), "vjp": (1,)}[kind]
        return tuple(map(join_rows, zip(*results, strict=True), itertools.repeat(groups), axes))

    def _answer(
        self,
        kind: Kind,
        asked: Asked,
        x: Tensor,
        levels: Levels,
        *directions: Tensor,
        values: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The same for images that ask the same."""
        images, augmentation = self.data.images, self.data.augmentation
        problem = self._problem(x, levels, images, augmentation, values=values)
        return self._run(kind, asked, problem, *directions)

    def _problem(
        self,
        x: Tensor,
        levels: Levels,
        images: Tensor,
        augmentation: Augmentation | None,
        *,
        temperature: float | Tensor | None = None,
        values: Tensor | None = None,
    ) -> PosteriorProblem:
        return trusted_problem(
            x,
            images,
            levels.sigma,
            levels.alpha,
            temperature=self.temperature if temperature is None else temperature,
            dtype=self.dtype,
            memory_budget=self.memory_budget,
            augmentation=augmentation,
            precision=self.precision,
            values=values,
            with_image=values is not None,
        )

    def _run(
        self, kind: Kind, asked: Asked, problem: PosteriorProblem, *directions: Tensor
    ) -> tuple[Tensor, ...]:
        operation, query = asked
        if kind == "scan":
            return (operation.mean_of(problem, query, self.backend),)
        if kind == "jvp":
            return operation.jvp_of(problem, directions[0], query, self.backend)
        return (operation.vjp_of(problem, directions[0], query, self.backend),)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        return self._answers("scan", x, levels)[0]

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        means, products = self._answers("jvp", x, levels, tangents)
        return means, products

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        return self._answers("vjp", x, levels, cotangents)[0]

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
