"""What the posterior operations share: checked arguments in canonical form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from pyflocality._support.budget import check_least, images_per_chunk, memory_budget_bytes
from pyflocality._support.checks import (
    FLOAT_DTYPES,
    LevelLike,
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_float_dtype,
    check_noisy,
    check_positive,
    check_tensor,
    describe,
)
from pyflocality._support.precision import PRECISIONS, Precision
from pyflocality._support.transforms import is_differentiated
from pyflocality.posterior.call import Call
from pyflocality.posterior.ranks import Ranks
from pyflocality.posterior.sharded import ShardedImages, plain
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.value_images import check_values, value_blocks
from pyflocality.storage.augmentation import IDENTITY, Augmentation, check_augmentation
from pyflocality.storage.mapped import MappedFile, mapped_file
from pyflocality.storage.reader import Reader

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PosteriorOptions(TypedDict, total=False):
    """Options of every posterior operation, all of them keywords that may be left out.

    Attributes:
        temperature: Divides the logits of the posterior, positive; 1 by default.
        dtype: float32 or float64 to compute in; by default x's own (half precision computes in
            float32).
        memory_budget: Working memory beyond the images and the result, bytes or a string such as
            "2GB"; by default the environment variable PYFLOCALITY_MEMORY_BUDGET, else 1 GB. The
            reference backend refuses a call that needs more, and names the least; up to 16 MB are
            always allowed.
        chunk_size: Training images at a time; by default what fits the budget. The result does
            not depend on it beyond rounding.
        augmentation: Copies of the images that are searched too, as `TrainingSet.augmentation`
            tells them; by default the images alone.
        precision: "exact", the default, is as accurate as `dtype`. "auto" permits coarser
            arithmetic where it is expected to move no answer in [-1, 1] by more than 1e-3 (an
            estimate that held on CIFAR-10, no proven bound). Only `triton` has any:
            `masked_posterior_mean` and `equivariant_posterior_mean` then keep noisy images in one
            float16 number a value instead of two, for half of the products. That is decided for
            each noisy image alone, from its noise level: at much noise, where the posterior
            spans many images. Other backends and operations, derivatives, value images and
            log-sum-exps included, are exact either way.
        values: Value images, float32 [N, R, C, H, W] for N images, copies of an augmentation
            included (image i of copy j of n images at j n + i): of them a posterior answers
            what it answers of the image, in its place. Answers are [B, R, C, H, W] then, their
            derivatives [K, B, R, C, H, W], and so are cotangents. By default the images
            themselves, [B, C, H, W]; log-sum-exps have none. Values that map a file and are
            larger than the budget are read from it block by block.
        with_image: Whether the image itself is answered, too, before its R value images.
    """

    temperature: float
    dtype: torch.dtype | None
    memory_budget: int | str | None
    chunk_size: int | None
    augmentation: Augmentation | None
    precision: Precision
    values: Tensor | None
    with_image: bool


@dataclass(frozen=True)
class PosteriorProblem:
    """A batch of queries against a set of training images.

    Attributes:
        x: Noisy images in the dtype of the computation, [B, C, H, W].
        images: Training images as stored, uint8 or float, [N, C, H, W].
        alpha: Signal coefficients, float64 [B].
        scale: Factors 1 / (2 sigma^2 temperature) of the squared distances, float64 [B];
            infinite at sigma = 0.
        memory_budget: Working memory, as `memory_budget_bytes` takes it.
        chunk_size: Training images at a time; None derives it from the budget.
        augmentation: Copies of the images that are searched too, or None.
        ranks: The ranks that hold the set together; `images` are those of this one. None for a
            set that is not sharded.
        precision: "exact", or "auto" where a backend may trade accuracy for time.
        dtype: Dtype of the answers: that of the noisy images as they were given.
        values: What is answered in the place of the images, float32 [N, R, C, H, W]; None for
            the images themselves.
        with_image: Whether the images are answered beside their values, too.
    """

    x: Tensor
    images: Tensor
    alpha: Tensor
    scale: Tensor
    memory_budget: int | str | None = None
    chunk_size: int | None = None
    augmentation: Augmentation | None = None
    ranks: Ranks | None = None
    precision: Precision = "exact"
    dtype: torch.dtype = torch.float32
    values: Tensor | None = None
    with_image: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width (C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def reader(self) -> Reader:
        """The images and their copies, a few at a time."""
        return Reader(self.images, self.augmentation, self.memory_budget)

    @property
    def count(self) -> int:
        """Images that are searched, copies included."""
        return len(self.reader)

    @property
    def answered(self) -> int:
        """How many images are answered for a noisy one, A: value images, the image, or both."""
        return 1 if self.values is None else self.values.shape[1] + self.with_image

    @property
    def answers_image(self) -> bool:
        """Whether the image itself is answered, before its value images if there are any."""
        return self.values is None or self.with_image

    @property
    def answer_shape(self) -> tuple[int, ...]:
        """What is answered for a noisy image: (C, H, W), or (A, C, H, W) where there are values."""
        return self.image_shape if self.values is None else (self.answered, *self.image_shape)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that the images and their values lie in."""
        value_file = None if self.values is None else mapped_file(self.values)
        return tuple(file for file in (self.reader.file, value_file) if file is not None)

    def call(self, *directions: Tensor, **facts: object) -> Call:
        """The call as a backend's predicate sees it, with further facts of the operation."""
        facts |= {
            "images_dtype": self.images.dtype,
            "image_shape": tuple(self.images.shape[1:]),
            "augmented": self.augmentation is not None,
            "ranks": self.ranks,
            "files": self.files,
            "values": self.values is not None,
        }
        further = directions if self.values is None else (self.values, *directions)
        tensors = (self.x, self.images, self.alpha, self.scale, *further)
        differentiated = is_differentiated(*tensors)
        return Call(self.x.device, self.x.dtype, differentiated, facts)

    def merged(self, state: PosteriorState, scale: Tensor) -> PosteriorState:
        """The state after the images of all ranks, for operations that scan twice."""
        if self.ranks is None:
            return state
        merged = self.ranks.merged(state, scale)
        return PosteriorState(*(part.to(state.minimum.dtype) for part in merged))

    def summed(self, sums: Tensor) -> Tensor:
        """Sums over the images of all ranks, from those over this rank's."""
        return sums if self.ranks is None else self.ranks.summed(sums)

    def images_at_a_time(self, bytes_per_image: int, fixed: int = 0) -> int:
        """Images of a chunk: as asked for, or as many as fit the budget with their temporaries.

        Beside the bytes of each image there are fixed ones, whatever their number, and those of
        the values that `pairs` reads with it.

        Raises:
            ValueError: Not even one image fits, and it takes more than any call may.
        """
        per_image = bytes_per_image + self.reader.buffer_bytes(1)
        if self.values is not None:
            # As they are stored, and as numbers.
            number = self.values.element_size() + self.x.element_size()
            per_image += self.answered * self.images[0].numel() * number
        check_least(self.memory_budget, fixed + per_image)
        budget = memory_budget_bytes(self.memory_budget)
        # Of what is always allowed: small budgets are not spent on one image at a time.
        rest = max(budget - fixed, budget // 4, 1)
        return self.chunk_size or images_per_chunk(rest, per_image, self.count)

    def chunks(self, chunk_size: int) -> Iterator[Tensor]:
        """The training values in [-1, 1], `chunk_size` images at a time: [n, C, H, W]."""
        return self.reader.values(chunk_size, self.x.dtype)

    def pairs(self, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, and what is answered of each image: [n, C, H, W] and [n, A, C, H, W]."""
        if self.values is None:
            for images in self.chunks(chunk_size):
                yield images, images[:, None]
                del images
            return
        blocks = value_blocks(self.values, len(self.images), chunk_size, self.memory_budget)
        # Not `zip`, which would hold one block while the next is made.
        for images in self.chunks(chunk_size):
            values = next(blocks).to(self.x.dtype)
            if self.with_image:
                values = torch.cat([images[:, None], values], 1)
            yield images, values
            del images, values


def check_images(images: object) -> Tensor:
    """A non-empty set of finite images [N, C, H, W], uint8 or float in [-1, 1]."""
    images = check_tensor(images, "images", "a torch.Tensor [N, C, H, W]")
    if images.dtype != torch.uint8 and images.dtype not in FLOAT_DTYPES:
        raise TypeError(f"`images` must be uint8 or floating point, got {describe(images)}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"`images` must be a non-empty tensor [N, C, H, W], got {describe(images)}"
        )
    if images.is_floating_point():
        Reader(plain(images)).checked(check_finite, plain(images), "images")
    return images


def posterior_problem(
    x: Tensor,
    images: Tensor,
    sigma: LevelLike,
    alpha: float | Tensor,
    **options: Unpack[PosteriorOptions],
) -> PosteriorProblem:
    """Check the arguments that every posterior operation takes; see `PosteriorOptions`."""
    return problem_along(x, images, sigma, alpha, options)[0]


def problem_along(
    x: Tensor,
    images: Tensor,
    sigma: LevelLike,
    alpha: float | Tensor,
    options: PosteriorOptions,
    directions: Tensor | None = None,
    name: str | None = None,
    *,
    transposed: bool = False,
) -> tuple[PosteriorProblem, Tensor]:
    """The problem of checked arguments, and checked directions of derivatives [K, B, C, H, W].

    `name` is that of the directions in error messages, None where derivatives are not asked for;
    transposed ones are directions in the space of what is answered.
    """
    # What is cheap to see comes before what takes a pass over the values.
    known = _known(**options)
    images = check_images(images)
    known["augmentation"] = check_augmentation(known["augmentation"], images.shape[1:])
    values, shape = known["values"], tuple(images.shape[1:])
    if values is not None:
        copies = (known["augmentation"] or IDENTITY).copies
        values = known["values"] = check_values(values, images, copies)
    answers = (values.shape[1] + known["with_image"],) if transposed and values is not None else ()
    x, levels, directions, _ = check_noisy(
        x, sigma, alpha, shape, images.device, directions, name, (*answers, *shape)
    )
    return trusted_problem(x, images, levels.sigma, levels.alpha, **known), directions


def _known(
    *,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    augmentation: Augmentation | None = None,
    precision: Precision = "exact",
    values: Tensor | None = None,
    with_image: bool = False,
) -> PosteriorOptions:
    """All options, those checked that are told of nothing else."""
    if chunk_size is not None:
        chunk_size = check_count(chunk_size, "chunk_size")
    memory_budget_bytes(memory_budget)
    temperature = check_positive(temperature, "temperature")
    check_choice(precision, "precision", PRECISIONS)
    if check_flag(with_image, "with_image") and values is None:
        raise ValueError("`with_image` must be False without `values`, got True")
    return {
        "temperature": temperature,
        "dtype": check_float_dtype(dtype),
        "memory_budget": memory_budget,
        "chunk_size": chunk_size,
        "augmentation": augmentation,
        "precision": precision,
        "values": values,
        "with_image": with_image,
    }


def trusted_problem(
    x: Tensor,
    images: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    augmentation: Augmentation | None = None,
    precision: Precision = "exact",
    values: Tensor | None = None,
    with_image: bool = False,
) -> PosteriorProblem:
    """The problem of arguments that were checked before.

    Levels and temperature are numbers or float64 [B].
    """
    noise = torch.as_tensor(sigma, dtype=torch.float64)
    signal = torch.as_tensor(alpha, dtype=torch.float64)
    scale = 1.0 / (2.0 * noise.square() * temperature)
    ranks = None
    if isinstance(images, ShardedImages):
        ranks, images = images.ranks, images.own
    if dtype is None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return PosteriorProblem(
        x.to(dtype),
        images,
        # From pageable memory of our own, which is read before the call returns: without a wait,
        # and whatever the caller writes to a tensor of levels afterwards.
        signal.clone().to(x.device, non_blocking=True).expand(len(x)),
        scale.to(x.device, non_blocking=True).expand(len(x)),
        memory_budget,
        chunk_size,
        augmentation,
        ranks,
        precision,
        x.dtype,
        values,
        with_image,
    )
