"""A denoiser whose calls are recorded, and kept so that an interrupted run goes on where it ended.

The samplers of the command line are functions of the starting noise, which the seed gives, and of
the denoiser's answers. So the answers are all that has to be kept: a run that is started again
with the same settings gets them back without asking the denoiser, and makes the same images to the
bit. They lie in a hidden file in the folder of the results, which is gone once these are written.
Of several ranks rank 0 keeps the file, and hands its answers to the others.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyflocality._support.paths import no_link

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality.denoisers import Denoiser
    from pyflocality.posterior.ranks import Ranks
    from pyflocality.sampling import DenoiserFunction
    from pyflocality.weights import QueryWeights

# Checksums of a question and of the answer to it, and the size of the answer in bytes.
_HEADER = struct.Struct("<IIQ")


class RecordedDenoiser:
    """A denoiser that notes level and time of each call, and may keep its answers.

    Args:
        denoiser: The denoiser.
        ask: What is asked in its place, where ranks divide its work.
        ranks: The ranks that ask alike; None for one process alone.

    Attributes:
        calls: For each call that the denoiser answered sigma, alpha and seconds; for a model whose
            weights are built for each noise level also the seconds of that and the share of
            weights not zero.
        resumed: How many answers came from the file so far.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        ask: DenoiserFunction | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.denoiser, self.ranks = denoiser, ranks
        self.image_shape, self.device = denoiser.image_shape, denoiser.device
        self.calls: list[dict[str, float]] = []
        self.resumed = 0
        self._ask = denoiser if ask is None else ask
        self._file: Path | None = None
        self._end = 0
        self._is_replaying = self._is_keeping = False

    def keep_in(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Keep the answers in the folder of the results, and give those that are kept already.

        Settings are all that the answers depend on; others have another file.
        """
        self._is_replaying = True
        if self.ranks is None or self.ranks.rank == 0:
            text = json.dumps(settings, sort_keys=True, default=str)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._file, self._is_keeping = folder / f".generate-{key}.answers", True

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        """The kept answer, or else the denoiser's, which is kept."""
        question = 0
        if self._is_keeping:
            question = zlib.crc32(struct.pack("<dd", sigma, alpha), zlib.crc32(_bytes(x)))
        if self._is_replaying:
            answer = self._kept(question, x)
            if self.ranks is not None:
                answer = self.ranks.of_first(answer, x)
            if answer is not None:
                self.resumed += 1
                return answer
            self._is_replaying = False
        answer = self._answered(x, sigma, alpha)
        if self._file is not None and self._is_keeping:
            self._keep(self._file, question, answer)
        return answer

    def forget(self) -> None:
        """Remove the file: the results are there."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _answered(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        call = {"alpha": alpha, "sigma": sigma}
        start = time.perf_counter()
        weights_at: Callable[..., QueryWeights] | None = getattr(self.denoiser, "weights_at", None)
        if weights_at is not None:
            call["density"] = weights_at(sigma, alpha).density
            call["weights_seconds"] = round(time.perf_counter() - start, 4)
            start = time.perf_counter()
        answer = self._ask(x, sigma, alpha)
        if answer.is_cuda:
            import torch

            torch.cuda.synchronize(answer.device)
        call["seconds"] = round(time.perf_counter() - start, 4)
        self.calls.append(call)
        return answer

    def _kept(self, question: int, x: Tensor) -> Tensor | None:
        """The next answer in the file, or None where there is none to this question."""
        import numpy as np
        import torch

        if self._file is None:
            return None
        try:
            with open(self._file, "rb", opener=no_link) as file:
                file.seek(self._end)
                header = file.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    return None
                asked, checksum, size = _HEADER.unpack(header)
                content = file.read(size) if size == x.numel() * 4 else b""
        except OSError:
            return None
        # A last answer that was cut short, or other noise: the denoiser is asked from here on.
        if asked != question or len(content) < size or zlib.crc32(content) != checksum:
            return None
        self._end += _HEADER.size + size
        values = np.frombuffer(content, np.float32).reshape(x.shape).copy()
        return torch.from_numpy(values).to(x.device)

    def _keep(self, path: Path, question: int, answer: Tensor) -> None:
        content = _bytes(answer)
        try:
            with open(path, "ab", opener=no_link) as file:
                file.truncate(self._end)
                file.write(_HEADER.pack(question, zlib.crc32(content), len(content)) + content)
            self._end += _HEADER.size + len(content)
        except OSError as error:
            self._is_keeping = False
            warnings.warn(
                f"{path} cannot be written ({error.strerror}): the steps from here on could not "
                "be resumed",
                stacklevel=2,
            )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()
