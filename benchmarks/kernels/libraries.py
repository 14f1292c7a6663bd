"""Yardsticks of other libraries: torch.compile, torch's attention, KeOps, faiss.

Each is optional. What cannot run here raises `UnavailableError` with the reason, which goes into
the record in its place; a wrong answer is an error as everywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
from torch import Tensor

# A model of training values: answers noisy images [B, C, H, W].
Model = Callable[[Tensor], Tensor]

NOT_INSTALLED = "not installed"


class UnavailableError(RuntimeError):
    """A yardstick cannot run on this machine."""


def compiled(
    function: Callable[..., Tensor], *arguments: Any, compiler: str = "inductor"
) -> Callable[..., Tensor]:
    """torch.compile of a function, whole or not at all, compiled for these arguments.

    Raises:
        UnavailableError: It cannot be compiled here.
    """
    # What was compiled before counts against the limit of variants of a function.
    torch.compiler.reset()
    result = torch.compile(function, backend=compiler, fullgraph=True, dynamic=False)
    _first_call("torch.compile", lambda: result(*arguments))
    return result


class Attention:
    """The optimal denoiser as one head of attention over the training images.

    |x - alpha v|^2 = |x|^2 - 2 alpha x v + alpha^2 |v|^2, and a softmax over the images does not
    see |x|^2: queries alpha x / sigma^2, keys and values v, bias -alpha^2 |v|^2 / (2 sigma^2).
    """

    def __init__(self, values: Tensor, sigma: float, alpha: float) -> None:
        self._keys = values.flatten(1)[None, None]
        self._bias = self._keys.square().sum(-1)[:, :, None] * (-(alpha**2) / (2 * sigma**2))
        self._scale = alpha / sigma**2

    def __call__(self, x: Tensor) -> Tensor:
        """Posterior means, [B, C, H, W]."""
        result = F.scaled_dot_product_attention(
            x.flatten(1)[None, None],
            self._keys,
            self._keys,
            attn_mask=self._bias.expand(-1, -1, len(x), -1),
            scale=self._scale,
        )
        return result.reshape(x.shape)


class KeOps:
    """The optimal denoiser as a reduction of KeOps, which compiles it at the first call.

    Raises:
        UnavailableError: KeOps is not installed, or cannot compile here.
    """

    def __init__(self, values: Tensor, sigma: float, alpha: float) -> None:
        self._values, self._sigma, self._alpha = values.flatten(1)[None], sigma, alpha
        # What it says of itself does not belong among results on standard output.
        with contextlib.redirect_stdout(sys.stderr):
            _required("pykeops").set_verbose(False)
            self._keops = _required("pykeops.torch")
            _first_call("KeOps", lambda: self(values[:1]))

    def __call__(self, x: Tensor) -> Tensor:
        """Posterior means, [B, C, H, W]."""
        noisy = self._keops.LazyTensor(x.flatten(1)[:, None])
        values = self._keops.LazyTensor(self._values)
        logits = ((noisy - self._alpha * values) ** 2).sum(-1) * (-1 / (2 * self._sigma**2))
        return logits.sumsoftmaxweight(values, axis=1).reshape(x.shape)


class Faiss:
    """Exact nearest neighbours of faiss among training values, float32 [N, C, H, W].

    Raises:
        UnavailableError: faiss is not installed.
    """

    def __init__(self, values: Tensor, alpha: float) -> None:
        faiss = _required("faiss")
        # Not above torch's threads, which a case may have set.
        faiss.omp_set_num_threads(torch.get_num_threads())
        self._index = faiss.IndexFlatL2(values[0].numel())
        self._index.add(values.flatten(1).numpy())
        self._alpha = alpha

    def __call__(self, x: Tensor) -> Tensor:
        """Positions of the nearest images, int64 [B, 1]."""
        _, indices = self._index.search((x / self._alpha).flatten(1).numpy(), 1)
        return torch.from_numpy(indices)


def _required(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{NOT_INSTALLED}: no package {name!r}") from error


def _first_call(what: str, function: Callable[[], object]) -> None:
    """Run once what compiles at its first call."""
    try:
        function()
    # Compilers and their wrappers fail in every way there is.
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        message = f"{what} cannot run here: {type(error).__name__}: {reason}"
        raise UnavailableError(message) from error
