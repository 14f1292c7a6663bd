"""The nearest training image."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._support.levels import Levels
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import PosteriorDenoiser
from pyflocality.ops.nearest import NEAREST
from pyflocality.storage.reader import Reader, training_values


class NearestDenoiser(PosteriorDenoiser):
    r"""The training image nearest to the input: what the optimal denoiser recites.

    .. math:: \hat x_0(x) = v_{i^*}, \qquad i^* = \arg\min_i \lVert x - \alpha v_i \rVert^2

    Among equal distances the earlier image wins; distances are compared without rounding, in every
    dtype. The noise level sigma does not matter.
    The derivative is zero almost everywhere, and zero is the answer everywhere.

    Args:
        data: The training set.
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype.
        memory_budget: Working memory, bytes or a string such as "2GB".
    """

    def __init__(
        self,
        data: TrainingSet,
        *,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(data, backend=backend, dtype=dtype, memory_budget=memory_budget)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        images, augmentation = self.data.images, self.data.augmentation
        problem = self._problem(x, Levels(levels.alpha, 0.0), images, augmentation)
        indices, _ = NEAREST.run("scan", problem, (1,), self.backend)
        return training_values(Reader(images, augmentation).at(indices[:, 0]), x.dtype)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        # It jumps from image to image and is constant in between.
        return self._denoise(x, levels), torch.zeros_like(tangents)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        return torch.zeros_like(cotangents)
