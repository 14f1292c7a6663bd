"""A denoiser whose calls are recorded, and kept so that an interrupted run goes on where it ended.

The samplers of the command line are functions of the starting noise, which the seed gives, and of
the denoiser's answers. So the answers are all that has to be kept: a run that is started again
with the same settings gets them back without asking the denoiser, and makes the same images to the
bit. They lie in a hidden file in the folder of the results, which is gone once these are written.
Of several ranks rank 0 keeps the file, and hands its answers to the others.

Where samples are made batch by batch, another file takes those of the batches that are done, and
the answers are those of the batch at hand: what is kept grows with the samples, not with their
steps.
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
        resumed_samples: How many samples came from the file of batches that were done.
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
        self.resumed = self.resumed_samples = 0
        self._ask = denoiser if ask is None else ask
        self._answers, self._samples = _Records(), _Records()
        self._keeps = self._is_replaying = False

    def keep_in(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Keep the answers in the folder of the results, and give those that are kept already.

        Settings are all that the answers depend on; others have another file.
        """
        self._keeps = self._is_replaying = True
        if self.ranks is None or self.ranks.rank == 0:
            text = json.dumps(settings, sort_keys=True, default=str)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._answers = _Records(folder / f".generate-{key}.answers")
            self._samples = _Records(folder / f".generate-{key}.samples")

    def finished(self, start: Tensor, like: Tensor) -> Tensor | None:
        """What `finish` kept of the batch that comes next, a tensor of the form of `like`, or None.

        Its answers are then those that are kept from here on.
        """
        if not self._keeps:
            return None
        self._answers.rewind()
        self._is_replaying = True
        kept = self._on_all_ranks(self._samples.next(_question(start), like), like)
        self.resumed_samples += 0 if kept is None else len(start)
        return kept

    def finish(self, start: Tensor, content: Tensor) -> None:
        """Keep what a batch came to in place of its answers."""
        self._samples.add(_question(start), content)

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        """The kept answer, or else the denoiser's, which is kept."""
        question = _question(x, sigma, alpha) if self._answers.is_kept else 0
        if self._is_replaying:
            answer = self._on_all_ranks(self._answers.next(question, x), x)
            if answer is not None:
                self.resumed += 1
                return answer
            self._is_replaying = False
        answer = self._answered(x, sigma, alpha)
        self._answers.add(question, answer)
        return answer

    def forget(self) -> None:
        """Remove the files: the results are there."""
        self._answers.remove()
        self._samples.remove()

    def _on_all_ranks(self, kept: Tensor | None, like: Tensor) -> Tensor | None:
        """What rank 0 has kept."""
        return kept if self.ranks is None else self.ranks.of_first(kept, like)

    def _answered(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        call = {"alpha": alpha, "sigma": sigma}
        start = time.perf_counter()
        from pyflocality.denoisers import PCALocalityDenoiser

        weights_at: Callable[..., QueryWeights] | None = None
        if isinstance(self.denoiser, PCALocalityDenoiser):
            weights_at = self.denoiser.weights_at
        if weights_at is not None:
            weights_at(sigma, alpha)
            call["weights_seconds"] = round(time.perf_counter() - start, 4)
            start = time.perf_counter()
        answer = self._ask(x, sigma, alpha)
        if answer.is_cuda:
            import torch

            torch.cuda.synchronize(answer.device)
        call["seconds"] = round(time.perf_counter() - start, 4)
        if weights_at is not None:
            # Last: of masks that are made when they are used it is known then.
            call["density"] = weights_at(sigma, alpha).density
        self.calls.append(call)
        return answer


class _Records:
    """A file of tensors in float32, each behind a checksum of the question that it answers.

    Args:
        path: The file; None keeps nothing.

    Attributes:
        is_kept: Whether it takes more of them.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.is_kept = path is not None
        self._path, self._end = path, 0

    def rewind(self) -> None:
        """Begin anew: with what is there, or in its place."""
        self._end = 0

    def next(self, question: int, like: Tensor) -> Tensor | None:
        """The next tensor, of the form of `like`, or None where there is none to this question."""
        import numpy as np
        import torch

        if self._path is None:
            return None
        try:
            with open(self._path, "rb", opener=no_link) as file:
                file.seek(self._end)
                header = file.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    return None
                asked, checksum, size = _HEADER.unpack(header)
                content = file.read(size) if size == like.numel() * 4 else b""
        except OSError:
            return None
        # A last one that was cut short, or other noise: what follows is made anew.
        if asked != question or len(content) < size or zlib.crc32(content) != checksum:
            return None
        self._end += _HEADER.size + size
        values = np.frombuffer(content, np.float32).reshape(like.shape).copy()
        return torch.from_numpy(values).to(like.device)

    def add(self, question: int, tensor: Tensor) -> None:
        """Write a tensor behind the last one, and let go of what was there."""
        if self._path is None or not self.is_kept:
            return
        content = _bytes(tensor)
        try:
            with open(self._path, "ab", opener=no_link) as file:
                file.truncate(self._end)
                file.write(_HEADER.pack(question, zlib.crc32(content), len(content)) + content)
            self._end += _HEADER.size + len(content)
        except OSError as error:
            self.is_kept = False
            warnings.warn(
                f"{self._path} cannot be written ({error.strerror}): the steps from here on could "
                "not be resumed",
                stacklevel=2,
            )

    def remove(self) -> None:
        """Remove the file."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def _question(x: Tensor, *level: float) -> int:
    return zlib.crc32(struct.pack(f"<{len(level)}d", *level), zlib.crc32(_bytes(x)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()
