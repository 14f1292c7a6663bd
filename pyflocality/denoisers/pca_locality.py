"""PCA locality: masks from the data's covariance."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.checks import (
    NoiseLevel,
    check_choice,
    check_count,
    check_flag,
    check_single_level,
)
from pyflocality._support.levels import Levels, Rows
from pyflocality._support.threads import Lock
from pyflocality._support.transforms import is_differentiated, outside_transforms
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Asked, DenoiserOptions
from pyflocality.denoisers.components import check_moments
from pyflocality.denoisers.levels import split_levels
from pyflocality.denoisers.queries import QueryDenoiser
from pyflocality.masks import check_softness, check_threshold
from pyflocality.moments import Basis, Moments
from pyflocality.moments.mask_source import Masks, MaskSource
from pyflocality.moments.undetermined import warn_of_blind, warn_of_few_images
from pyflocality.ops.masked_posterior import MASKED_POSTERIOR
from pyflocality.ops.operation import Kind
from pyflocality.storage.reader import Reader
from pyflocality.weights import QueryWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PCALocalityDenoiser(QueryDenoiser):
    r"""Analytical model whose neighbourhoods follow the covariance of the data.

    Every output value m (pixel and channel) has a posterior over the inputs that its column of
    the thresholded Wiener filter keeps at this noise level:

    .. math::
        \hat x_0[m] = \sum_i p_{m,i} \, v_i[m], \qquad
        p_m = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_d w_m[d] (x[d] - \alpha v_i[d])^2 \right)

    with w from `pyflocality.masks.pca_locality_weights`. Published thresholds: 0.05 for
    CIFAR-10, 0.02 for CelebA-HQ and AFHQ at 64 x 64, 0.005 for MNIST and Fashion-MNIST.

    **Aggregation.** `"exact"` is the softmax over the whole set. `"batch_mean"` is what the
    published code computes: a softmax within each batch of `batch_size` consecutive images,
    and the plain average of the batch results. Its answer depends on the batch size and on the
    order of the images, it is a different estimator, and it is here to reproduce published
    numbers.

    The weights of a noise level are built at its first use and kept as bits while they fit the
    memory budget; large masks are also kept in the user's cache folder, and nothing is computed of
    a set whose masks are there. They are made of the components of the N x N products of the images
    or of the covariance, whichever takes less (a function of N and D; `way` tells). A level takes
    about N D^2 / 2 or D^3 multiply-adds then, tile by tile. A budget that is given must hold the
    components or the covariance. Masks whose bits (D^2 / 8 bytes) exceed the budget are read from
    their file, or made, by tiles of outputs whenever they are used.

    **Softness.** An input of a mask counts whole, however little it tells of the output. A softness
    p > 0 weighs it by its share of the projector instead, :math:`\min(1, |M[n,m]| / M[n,n])^p`.
    Such weights are float32 numbers, 4 D^2 bytes a level, within the memory budget. Sums over them
    are not had from one another as those of masks are: a scan takes a multiply-add for each input
    that an output weighs, where masks take one for what they differ in: 1.6 to 2.7 times the
    processor time for masks that keep 2 to 19% of 784 and 1,728 inputs. The native CPU kernel
    serves the answers, the Triton backend their jvp, too; other derivatives are the reference's,
    and there is none with respect to the noise level.

    A batch of several noise levels is scanned once for each of them, as their weights differ;
    reading the images again is little beside what the posteriors cost.

    Args:
        data: The training set.
        mask_threshold: Share h of the largest magnitude that an input needs to be listened to,
            in [0, 1); 0 takes the signed values of the filter as weights.
        temperature: Divides the logits.
        aggregation: "exact" or "batch_mean".
        batch_size: Images a batch for "batch_mean".
        moments: Moments of the data or its components (`Basis`), where they are at hand; None
            makes what is needed at the first mask that is not cached.
        progress: Whether to show what is being done where weights are built.
        softness: p, not negative; 0 is the published model. Above 0 it takes a threshold above 0.
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.

    Attributes:
        weights_seconds: Time spent on building the weights of noise levels so far.
        way: How weights are made: of "components" or a covariance that were given ("cholesky",
            "eigenvectors"), or of a set: "gram", "cholesky" or "eigenvectors".

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or the moments are of images of another shape; in
            calls, a given budget is too small for the making of the weights.
        MemoryError: In calls: the memory that is there is too small for that.

    Warns:
        UserWarning: There are no more images than values that vary (said once, at the first
            call), or values that the Wiener filter would move by more than half a step of
            8-bit images have no input at a noise level (said for the first one).

    References:
        Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from
        data statistics, 2025.
    """

    def __init__(
        self,
        data: TrainingSet,
        mask_threshold: float = 0.02,
        temperature: float = 1.0,
        aggregation: Literal["exact", "batch_mean"] = "exact",
        batch_size: int = 256,
        moments: Moments | Basis | None = None,
        progress: bool = False,
        softness: float = 0.0,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        super().__init__(data, temperature, **options)
        self.mask_threshold = check_threshold(mask_threshold, "mask_threshold")
        self.softness = check_softness(softness, self.mask_threshold, "mask_threshold")
        self.aggregation = check_choice(aggregation, "aggregation", ("exact", "batch_mean"))
        self.batch_size = check_count(batch_size, "batch_size")
        moments = check_moments(moments, self.image_shape)
        self.progress = check_flag(progress, "progress")
        self.weights_seconds = 0.0
        self._masks = self._source_of(data if moments is None else moments)
        self._weights: OrderedDict[tuple[float, float], Masks] = OrderedDict()
        self._told_of_few = self._told_of_masks = False
        # Of the weights: a batch of threads builds them once.
        self._keeping = Lock()

    def _source_of(self, given: TrainingSet | Moments | Basis) -> MaskSource:
        return MaskSource(given, memory_budget=self.memory_budget, progress=self.progress)

    @property
    def moments(self) -> Moments | Basis:
        """What the masks are made of: as given, or made of the training set at first use."""
        return self._masks.source

    @property
    def way(self) -> str:
        """How the weights are made."""
        return self._masks.way

    def weights_at(self, sigma: float | NoiseLevel, alpha: float = 1.0) -> QueryWeights:
        """The query weights [D, D] of a noise level."""
        return self._masks_at(*check_single_level(sigma, alpha)).weights

    def _masks_at(self, alpha: float, sigma: float) -> Masks:
        level = alpha, sigma
        with self._keeping:
            if level not in self._weights:
                self._build_weights(level)
            self._weights.move_to_end(level)
            return self._weights[level]

    def _build_weights(self, level: tuple[float, float]) -> None:
        """Build the weights of a noise level, and drop those not used for longest."""
        start = time.perf_counter()
        with outside_transforms():
            masks = self._masks.masks(*level, self.mask_threshold, self.softness)
        self.weights_seconds += time.perf_counter() - start
        self._weights[level] = masks
        if masks.weights.is_held:
            self._warn(level, masks)
        budget, kept = memory_budget_bytes(self.memory_budget), self._weights
        while len(kept) > 1 and sum(masks.weights.nbytes for masks in kept.values()) > budget:
            kept.popitem(last=False)

    def _warn(self, level: tuple[float, float], masks: Masks) -> None:
        """Say once what the moments, and once what the masks leave undetermined."""
        if not self._told_of_few:
            self._told_of_few = True
            warn_of_few_images(self._masks.given, "PCA locality")
        if not self._told_of_masks:
            place = "at sigma {:.3g} and alpha {:.3g}".format(*reversed(level))
            place += f", where `mask_threshold` {self.mask_threshold:g} keeps none"
            self._told_of_masks = warn_of_blind(masks.weights.empty & masks.told, place)

    def _questions(self, kind: Kind) -> Callable[[float, float], Asked]:
        return lambda alpha, sigma: Asked(MASKED_POSTERIOR, (self._masks_at(alpha, sigma).weights,))

    def _passes(self, kind: Kind, levels: Levels, batch: int) -> Iterator[tuple[Rows, Asked]]:
        # One level after the other: its weights need not outlive its pass.
        for alpha, sigma, rows in split_levels(levels, batch):
            masks = self._masks_at(alpha, sigma)
            weights = masks.weights
            if not weights.is_mask and is_differentiated(*levels):
                where = f"softness={self.softness:g}" if self.softness > 0 else "mask_threshold=0"
                raise NotImplementedError(
                    f"no derivative by `sigma` or `alpha` at {where}, where the weights themselves "
                    "change with the noise level"
                )
            yield rows, Asked(MASKED_POSTERIOR, (weights,))
            if not weights.is_held:
                # All of them have been made once.
                self._warn((alpha, sigma), masks)

    def _answer(
        self,
        kind: Kind,
        asked: Asked,
        x: Tensor,
        levels: Levels,
        *directions: Tensor,
        values: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.aggregation == "exact":
            return super()._answer(kind, asked, x, levels, *directions, values=values)
        reader = Reader(self.data.images, self.data.augmentation)
        answers = (
            self._run(kind, asked, self._problem(x, levels, images, None), *directions)
            for images in reader.batches(self.batch_size)
        )
        sums, count = next(answers), 1
        for one in answers:
            sums, count = tuple(map(torch.add, sums, one)), count + 1
        return tuple(total / count for total in sums)

    def _looked_at(self) -> Callable[[float, float], Asked]:
        if self.aggregation != "exact":
            raise TypeError(
                "`aggregation` must be 'exact' where posteriors are looked at, got "
                f"{self.aggregation!r}"
            )
        return super()._looked_at()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PCALocalityDenoiser:
        before = self.data
        super()._apply(fn, recurse)
        if self._masks.given is before and not self._masks.is_made:
            self._masks = self._source_of(self.data)
        return self

    def extra_repr(self) -> str:
        """What `repr` shows."""
        soft = f", softness={self.softness}" if self.softness > 0 else ""
        return (
            f"{super().extra_repr()}, mask_threshold={self.mask_threshold}, "
            f"aggregation={self.aggregation!r}{soft}"
        )
