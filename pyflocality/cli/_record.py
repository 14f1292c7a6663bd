"""What a run tells about the calls of its denoiser."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality.denoisers import Denoiser


class ObservedDenoiser:
    """A denoiser that notes level and time of each call.

    Args:
        denoiser: The denoiser that answers.

    Attributes:
        calls: For each call sigma, alpha and seconds; for a model whose weights are built for
            each noise level also the seconds of that and the share of weights not zero.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.image_shape, self.device = denoiser.image_shape, denoiser.device
        self.calls: list[dict[str, float]] = []

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        """The denoiser's answer."""
        call = {"alpha": alpha, "sigma": sigma}
        start = time.perf_counter()
        if hasattr(self.denoiser, "weights_at"):
            weights = self.denoiser.weights_at(sigma, alpha)
            call["density"] = weights.density
            call["weights_seconds"] = round(time.perf_counter() - start, 4)
            start = time.perf_counter()
        answer = self.denoiser(x, sigma, alpha)
        if answer.is_cuda:
            import torch

            torch.cuda.synchronize(answer.device)
        call["seconds"] = round(time.perf_counter() - start, 4)
        self.calls.append(call)
        return answer
