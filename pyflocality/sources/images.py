"""Decoding of many image files, by Pillow.

What becomes of a file:

- 8-bit grey and bilevel images are grey, everything else is colour. A set is grey if all its
  images are, unless `channels` says otherwise.
- An alpha channel that is opaque everywhere is dropped. Transparent pixels are refused, unless
  `channels` is given: then the image is composited over white.
- 16-bit, 32-bit and floating-point grey images are refused: their range is anybody's guess.
- The orientation a camera noted (EXIF, XMP) is applied, whatever else it noted and whether that is
  sound or not. Of several frames the first counts.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyflocality._support.text import printable
from pyflocality.sources.base import DecodeJob, Request
from pyflocality.sources.orientation import upright, without_metadata
from pyflocality.sources.pixels import resize

if TYPE_CHECKING:
    from PIL import Image

_BLOCK = 128
# Below this Pillow spends its time in Python code, where threads only get in each other's way:
# measured with two threads, 32x32 takes twice as long and 256x256 half as long.
_MIN_BYTES_FOR_THREADS = 4096


@dataclass(frozen=True)
class ImageFiles:
    """Image files that belong together, still encoded, and their classes.

    Attributes:
        names: Their names, in order.
        read: Reads one of them.
        path: How messages name one of them.
        total_bytes: Their sizes together.
        name: What to call the set, made fit for messages.
        labels: Class of each image [N], or None.
        label_names: Name of each class, or None.
        fingerprint: What identifies the source, cheaply.
    """

    names: Sequence[str]
    read: Callable[[str], bytes]
    path: Callable[[str], str]
    total_bytes: int
    name: str
    labels: np.ndarray | None
    label_names: tuple[str, ...] | None
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))


class ColourFoundError(Exception):
    """A colour image in a set that was grey so far."""


class _RefusedError(ValueError):
    """An image that could be decoded but is not what a set may hold."""


@dataclass(frozen=True)
class _Decoder:
    """Decodes files to one shape.

    Attributes:
        files: The files.
        request: Size and channels asked for.
        channels: Channels of the result, or None to take those of the image.
        shape: Shape [C, H, W] that every image must have, or None for any.
    """

    files: ImageFiles
    request: Request
    channels: int | None = None
    shape: tuple[int, ...] | None = None

    def decode(self, name: str) -> np.ndarray:
        """Decode one file: uint8 [C, H, W]."""
        try:
            pixels = self._decoded(self.files.read(name))
        except ColourFoundError:
            raise
        # Whatever a decoder trips over, the reader must learn which file it was.
        except Exception as error:
            raise ValueError(f"{self.files.path(name)}: {_cause(error)}") from error
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if self.shape is not None and pixels.shape != self.shape:
            raise ValueError(
                f"{self.files.path(name)}: is {_size(pixels.shape)}, but "
                f"{self.files.names[0]} is {_size(self.shape)} (height x width): pass "
                "resolution= to bring all images to one size"
            )
        return pixels

    def _decoded(self, content: bytes) -> np.ndarray:
        try:
            return self._pixels(content)
        except (ColourFoundError, _RefusedError):
            raise
        except Exception:
            # A sound picture with notes that Pillow cannot make sense of?
            plain = without_metadata(content)
            if plain is None:
                raise
        return self._pixels(plain)

    def _pixels(self, content: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as opened:
            image = self._convert(upright(opened))
            if self.request.resolution is not None:
                image = resize(image, self.request.resolution)
            return np.asarray(image)

    def decode_block(self, start: int) -> list[np.ndarray]:
        """Decode the files from `start` on, a block of them."""
        return [self.decode(name) for name in self.files.names[start : start + _BLOCK]]

    def decode_all(self, first: int = 0) -> Generator[np.ndarray, None, None]:
        """Decode all files from one on, in order, large images in several threads."""
        starts = range(first, len(self.files.names), _BLOCK)
        if self.files.total_bytes < _MIN_BYTES_FOR_THREADS * len(self.files.names):
            for start in starts:
                yield from self.decode_block(start)
            return
        workers = min(8, os.cpu_count() or 1)
        pending: deque[Future[list[np.ndarray]]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for start in starts:
                    pending.append(pool.submit(self.decode_block, start))
                    # Bounds what lies decoded in memory.
                    if len(pending) > 2 * workers:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _convert(self, image: Image.Image) -> Image.Image:
        """The image in mode "L" or "RGB"."""
        from PIL import Image

        if image.mode.startswith(("I", "F")):
            raise _RefusedError(
                f"mode {image.mode!r} (more than 8 bits a value) is not read: convert to 8 bits"
            )
        grey = image.mode in ("L", "1", "LA", "La")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image.getchannel("A")).min() < 255:
                if self.request.channels is None:
                    raise _RefusedError(
                        "has transparent pixels: pass channels=1 or 3 to put it on white"
                    )
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB")
        if self.channels == 1 and self.request.channels is None and not grey:
            raise ColourFoundError
        channels = self.channels or (1 if grey else 3)
        if channels == 1 and not grey:
            image = image.convert("RGB")
        return image.convert("L" if channels == 1 else "RGB")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"


def _cause(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, _RefusedError):
        return str(error)
    return f"cannot be decoded: {type(error).__name__}: {error}"


def decode_job(files: ImageFiles, request: Request, *, colour: bool = False) -> DecodeJob:
    """Prepare the decoding of a set; the first image decides about its shape.

    Args:
        files: The files, at least one.
        request: Size and channels asked for.
        colour: Whether the set is known to hold colour images.

    Raises:
        ValueError: A file cannot be decoded or differs in size; here or during the job.
        ColourFoundError: During the job, if `channels` is not asked for: the first image is
            grey and a later one is not. Start again with `colour=True`.
    """
    channels = request.channels or (3 if colour else None)
    first = _Decoder(files, request, channels).decode(files.names[0])
    decoder = _Decoder(files, request, len(first), first.shape)
    return DecodeJob((len(files.names), *first.shape), first.dtype, decoder.decode_all)


def decode_from(
    files: ImageFiles, request: Request, shape: tuple[int, ...], first: int
) -> Generator[np.ndarray, None, None]:
    """Go on with a job of `decode_job` from a file on; its images have a known shape [C, H, W]."""
    return _Decoder(files, request, shape[0], shape).decode_all(first)
