"""Answers of a denoiser kept as a run goes, so that an interrupted one goes on where it ended.

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
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyflocality._support.paths import no_link

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality.posterior.ranks import Ranks
    from pyflocality.sampling import DenoiserFunction

# Checksums of a question and of the answer to it, and the size of the answer in bytes.
_HEADER = struct.Struct("<IIQ")


class KeptAnswers:
    """A denoiser whose answers are kept in a file and come from it where they are there.

    Args:
        denoiser: The denoiser that answers.
        folder: Folder of the results.
        settings: All that the answers depend on; other settings have another file.
        ranks: The ranks that ask alike; None for one process alone.

    Attributes:
        path: The file.
        found: How many answers came from the file so far.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        folder: Path,
        settings: Mapping[str, Any],
        ranks: Ranks | None = None,
    ) -> None:
        self.denoiser, self.ranks = denoiser, ranks
        self.image_shape, self.device = denoiser.image_shape, denoiser.device
        text = json.dumps(settings, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = folder / f".generate-{key}.answers"
        self.found = 0
        self._end = 0
        self._replaying = True
        self._keeping = ranks is None or ranks.rank == 0

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        """The kept answer, or else the denoiser's, which is kept."""
        question = zlib.crc32(struct.pack("<dd", sigma, alpha), zlib.crc32(_bytes(x)))
        answer = self._kept(question, x) if self._replaying and self._keeping else None
        if self._replaying and self.ranks is not None:
            answer = self.ranks.of_first(answer, x)
        if answer is not None:
            self.found += 1
            return answer
        self._replaying = False
        answer = self.denoiser(x, sigma, alpha)
        if self._keeping:
            self._keep(question, answer)
        return answer

    def forget(self) -> None:
        """Remove the file: the results are there."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _kept(self, question: int, x: Tensor) -> Tensor | None:
        """The next answer in the file, or None where there is none to this question."""
        import numpy as np
        import torch

        try:
            with open(self.path, "rb", opener=no_link) as file:
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

    def _keep(self, question: int, answer: Tensor) -> None:
        content = _bytes(answer)
        try:
            with open(self.path, "ab", opener=no_link) as file:
                file.truncate(self._end)
                file.write(_HEADER.pack(question, zlib.crc32(content), len(content)) + content)
            self._end += _HEADER.size + len(content)
        except OSError as error:
            self._keeping = False
            warnings.warn(
                f"{self.path} cannot be written ({error.strerror}): the steps from here on "
                "could not be resumed",
                stacklevel=2,
            )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()
