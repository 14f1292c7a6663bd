"""The training set: images in memory or memory-mapped, with their labels.

Every denoiser is a function of a set of images v_1 .. v_N with values in [-1, 1]. `TrainingSet`
holds them as they are stored, N x C x H x W: 8-bit images stay 8-bit and mean
v = u / 127.5 - 1, so a set takes a quarter of the memory of its values, and products with it can
be exact. Sets on disk stay there, mapped into memory.
"""

from __future__ import annotations

import copy
import hashlib
import math
import numbers
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.checks import (
    FLOAT_DTYPES,
    check_count,
    check_device,
    check_text,
    describe,
    known_finite,
)
from pyflocality._support.text import printable, printable_errors
from pyflocality.posterior.sharded import plain, ranks_of
from pyflocality.sources.base import Request
from pyflocality.sources.layout import check_layout
from pyflocality.sources.registry import open_source
from pyflocality.sources.validation import (
    as_image_tensor,
    as_labels,
    as_positions,
    blocks,
    check_copy,
    check_values,
    checked_names,
    checked_shape,
)
from pyflocality.storage.augmentation import IDENTITY, Augmentation, check_augmentation
from pyflocality.storage.mapped import MappedView, mapped_file
from pyflocality.storage.reader import Reader, training_values


class TrainingSet:
    """Training images [N, C, H, W] with values in [-1, 1], and their labels.

    A set is immutable by convention: nothing in the library writes to its images, and it shares
    memory with what it was made from wherever it can. `copy.deepcopy` shares the images, too. A
    memory-mapped set is pickled as the path of its file and maps it again when unpickled. Its file
    has to stay as it is: what reads a set whose file has been changed, replaced or cut short, also
    while it reads, raises ValueError.

    Args:
        images: A NumPy array, a torch tensor or any object with `__dlpack__`, [N, C, H, W] or,
            for grey images, [N, H, W]. Either uint8, where u means u / 127.5 - 1, or float32 or
            float64 in [-1, 1].
        labels: Class of each image, whole numbers [N].
        layout: `"NCHW"`, `"NHWC"` or `"NHW"`: how the axes are to be read. Without it, shapes that
            can be read in several ways are refused (`pyflocality.sources.layout`).
        name: What to call the set in messages.
        label_names: Names of the classes 0, 1, ...

    Attributes:
        images: The images as stored, uint8, float32 or float64, [N, C, H, W].
        labels: Classes, int64 [N] on the device of the images, or None.
        name: What to call the set.
        label_names: Names of the classes, or None.
        augmentation: Copies of the images that denoisers search too (see `augmented`), or None.

    Raises:
        TypeError: `images` or `labels` is of the wrong type or dtype.
        ValueError: `images` is empty, has a wrong shape, holds NaN or leaves [-1, 1], or
            `labels` does not match it; `images` or `labels` is a masked array with masked values;
            8-bit images hold 0 and 1 alone, which are both black.

    Warns:
        UserWarning: Float images lie in [0, 1], with nothing negative; three grey images may be
            the channels of one.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    label_names: tuple[str, ...] | None
    augmentation: Augmentation | None

    def __init__(
        self,
        images: object,
        labels: object = None,
        *,
        layout: str | None = None,
        name: str = "array",
        label_names: Sequence[str] | None = None,
    ) -> None:
        name = printable(check_text(name, "name"))
        tensor = checked_shape(as_image_tensor(images), check_layout(layout))
        classes = None if labels is None else as_labels(labels, tensor)
        names = None if label_names is None else checked_names(label_names, classes)
        check_values(tensor, name)
        self._assign(tensor, name, classes, names)

    def _assign(
        self,
        images: Tensor,
        name: str,
        labels: Tensor | None = None,
        label_names: tuple[str, ...] | None = None,
        augmentation: Augmentation | None = None,
        mapped: bool = False,
    ) -> None:
        self.images, self.labels = images, labels
        self.name, self.label_names = name, label_names
        self._mapped = mapped
        self.augmentation = augmentation
        self._content_key: str | None = None
        # Operations look for NaN in images that they have not seen yet.
        known_finite(plain(images))

    @classmethod
    def _of_valid(cls, *arguments: Any) -> TrainingSet:  # noqa: ANN401
        """A set of images that are known to be valid; arguments as for `_assign`."""
        data = cls.__new__(cls)
        data._assign(*arguments)
        return data

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        resolution: int | Sequence[int] | None = None,
        channels: int | None = None,
        split: str | None = None,
        layout: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> TrainingSet:
        """Load a builtin set, or images on disk.

        | source | what is read |
        |---|---|
        | `"digits"` | scikit-learn's 1,797 handwritten digits, 8x8 grey, labelled |
        | `"photos"` | 4,906 patches of scikit-learn's two photographs, 32x32 RGB, labelled |
        | `"disks"`, `"c_alpha"` | 4,096 synthetic images, 32x32 grey, float32 |
        | folder, .zip | image files; class folders or `dataset.json` (EDM) give labels |
        | .npy | [N, H, W], [N, C, H, W] or [N, H, W, C], uint8 or float, memory-mapped |
        | .npz | the same under `images`, `x` or `arr_0`; labels under `labels` or `y` |
        | MNIST idx, idx.gz | a file of images, labels beside it; or the folder of four files |
        | packed set | folder written by `pyflocality pack`, memory-mapped, with its labels |
        | CIFAR | `cifar-10-batches-py`, `cifar-10-batches-bin`, `cifar-100-python` (fine labels) |

        A builtin name wins over a folder of that name, which is `"./digits"`. The modules of
        `pyflocality.sources` describe each format, `pyflocality.sources.images` what happens
        to grey, transparent, 16-bit and rotated images.

        Decoded folders and archives of at least 1,000 images or 32 MiB, and converted .npy files
        of at least 1,000 images, are kept as memory-mapped files in `cache_dir`, under a key made
        of the source's content (a zip's names, checksums and sizes; a folder's place, names,
        sizes and times) and of the arguments below. A damaged entry is decoded again, with a
        warning; of several processes one decodes while the others wait. Entries may be deleted at
        any time. The folder is made for its user alone; one that belongs to somebody else or that
        everybody may write to, or that cannot be written, is not used, which a warning tells.

        Args:
            source: Name of a builtin set, or a path.
            resolution: Height and width, or one number for both, to bring every image to: the
                largest centred rectangle of that aspect ratio is cut out; shrinking by a whole
                factor averages blocks, other factors use Lanczos resampling. Synthetic sets are
                rendered at the size instead. None keeps the size, which must be one for all.
            channels: 1 for grey (ITU-R BT.601 luma), 3 for RGB; None keeps what is there.
            split: `"train"`, `"test"` or another part of a source that has parts: a folder or
                archive with such folders (`pyflocality.sources.selection` tells when they are
                parts and when classes), MNIST's and CIFAR's folders. None is `"train"` there.
            layout: `"NCHW"`, `"NHWC"` or `"NHW"` for .npy and .npz files: how their axes are to be
                read; needed where that cannot be told (`pyflocality.sources.layout`).
            cache_dir: Folder of decoded sets, of `PYFLOCALITY_CACHE_LIMIT` bytes at most (20 GB);
                None is `PYFLOCALITY_CACHE_DIR`, else `pyflocality` in the user's cache folder, as
                platformdirs knows it (`XDG_CACHE_HOME` or `~/.cache` on Linux).
            progress: Whether to show progress on standard error.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: There is no such source, it is damaged, empty or of mixed sizes (the
                message names the file), or an argument does not fit it.
            ImportError: The source needs a package that is not installed.
            OSError: The system does not let a file be read, or takes no such name.

        Warns:
            UserWarning: The source holds what the set does not take: how many files, the first of
                them, and why.
        """
        request = Request.checked(resolution, channels, split, cache_dir, progress, layout)
        with printable_errors():
            loaded = open_source(source, request)
            try:
                data = cls(
                    loaded.images,
                    loaded.labels,
                    layout={3: "NHW", 4: "NCHW"}.get(loaded.images.ndim),
                    name=loaded.name,
                    label_names=loaded.label_names,
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{os.fspath(source)}: {error}") from error
        data._mapped = mapped_file(data.images) is not None
        return data

    def __len__(self) -> int:
        """Number of images N, copies of an augmentation not included."""
        return self.images.shape[0]

    def __repr__(self) -> str:
        """Name, number, shape, dtype, labels and place of the images."""
        shape = "x".join(map(str, self.image_shape))
        parts = [f"{len(self)} images {shape}", str(self.dtype).removeprefix("torch.")]
        if self.labels is not None:
            parts.append(f"{len(self.labels.unique())} labels")
        if self.augmentation is not None:
            parts.append(f"{self.copies} copies each, {self.augmentation}")
        if (ranks := ranks_of(self.images)) is not None:
            parts.append(f"part {ranks.rank + 1} of {ranks.count}")
        parts.append("memory-mapped" if self._mapped else str(self.device))
        return f"TrainingSet({self.name!r}: {', '.join(parts)})"

    @property
    def copies(self) -> int:
        """How many variants of every image denoisers search, the image itself included."""
        return (self.augmentation or IDENTITY).copies

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width (C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def num_values(self) -> int:
        """Values of one image, D = C * H * W."""
        return math.prod(self.image_shape)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the images as stored."""
        return self.images.dtype

    def values(
        self, start: int = 0, stop: int | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Values of the images start..stop-1 in [-1, 1]: [n, C, H, W] on the set's device.

        They are those of the images themselves, without the copies of an augmentation.

        Args:
            start: First image; counts like a slice.
            stop: One past the last image; None for all.
            dtype: Floating-point dtype of the result. Images stored in it are not copied: do
                not write to the result.

        Raises:
            TypeError: `dtype` is not a floating-point dtype, or an end is no whole number.
            ValueError: The images map a file that has been changed.
        """
        if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
            raise TypeError(
                "`dtype` must be a floating-point dtype (float16, bfloat16, float32 or float64), "
                f"got {describe(dtype)}"
            )
        start = check_count(start, "start", minimum=-sys.maxsize)
        stop = None if stop is None else check_count(stop, "stop", minimum=-sys.maxsize)
        part = self.images[start:stop]
        return Reader(part).checked(lambda: training_values(part, dtype).contiguous())

    def augmented(self, *, flip: bool = False, shifts: int = 0) -> TrainingSet:
        """The same images, of which denoisers and `Moments` take in changed copies, too.

        Every result is that of a set with all copies, and no copy is kept: they are made
        a few images at a time while a set is read. Both arguments together give every shift of
        every image and of its mirror image. An augmentation that the set has already is replaced.

        Args:
            flip: Whether to add the images mirrored left to right.
            shifts: Add every image shifted by up to that many pixels up, down, left and right, in
                all (2 shifts + 1)^2 combinations; pixels that move in from outside repeat the
                border. Less than the height and the width.

        Raises:
            TypeError: `flip` is not a bool, or `shifts` not a whole number.
            ValueError: `shifts` is negative or too large.

        References:
            Niedoba, Zwartsenberg, Murphy and Wood, Towards a mechanistic explanation of diffusion
            model generalization, 2025 (flips), and its 2026 sequel (shifts).
        """
        augmentation = check_augmentation(Augmentation(flip, shifts), self.image_shape)
        twin = copy.copy(self)
        twin.augmentation = augmentation
        return twin

    def subset(self, indices: object) -> TrainingSet:
        """The images at some positions, in that order, with their labels.

        Args:
            indices: A slice, a range, a sequence, array or tensor of whole numbers (negative
                ones count from the end), or a mask [N] of booleans. Positions in a row share
                the memory of this set, any others are copied: of a memory-mapped set no more
                than the memory budget (`PYFLOCALITY_MEMORY_BUDGET`, 1 GB without it).

        Raises:
            TypeError: `indices` is none of these.
            ValueError: `indices` selects nothing, or leaves the set; or the copy of images that
                are scattered over a memory-mapped file exceeds the memory budget.
        """
        positions = as_positions(indices, len(self))
        start, stop = int(positions[0]), int(positions[-1]) + 1
        row = len(positions) == stop - start and bool((positions.diff() == 1).all())
        if row:
            images = self.images[start:stop]
        else:
            check_copy(self.images, len(positions), self.name)
            images = Reader(self.images).at(positions.to(self.device))
        labels = None if self.labels is None else self.labels[positions.to(self.device)]
        mapped = row and self._mapped
        return self._of_valid(
            images, self.name, labels, self.label_names, self.augmentation, mapped
        )

    def with_label(self, label: int | str) -> TrainingSet:
        """The images of one class.

        Where they lie in a row (`pyflocality pack --sort-by-label` sees to that) they share the
        memory of this set; else they are copied, as `subset` copies them.

        Args:
            label: Number of the class, or its name where the set has `label_names`.

        Raises:
            TypeError: `label` is neither a whole number nor a string.
            ValueError: The set has no labels, or no image of that class; or the copy exceeds the
                memory budget.
        """
        if isinstance(label, bool) or not isinstance(label, (numbers.Integral, str)):
            raise TypeError(f"`label` must be a whole number or a name, got {describe(label)}")
        if self.labels is None:
            raise ValueError(f"`label` cannot be {describe(label)}: {self.name} has no labels")
        names = self.label_names
        if isinstance(label, str):
            number = names.index(label) if names is not None and label in names else None
        else:
            number = int(label)
        # Of labels beyond 64 bits there are none.
        if number is not None and abs(number) < 2**63:
            positions = (self.labels == number).nonzero()[:, 0]
            if len(positions):
                return self.subset(positions)
        present = self.labels.unique().tolist()
        shown = [str(one) if names is None else f"{one} ({names[one]!r})" for one in present[:20]]
        more = f", .. ({len(present)} labels)" if len(present) > 20 else ""
        raise ValueError(
            f"`label` must be one of {', '.join(shown)}{more}, the labels of {self.name}, got "
            f"{describe(label)}"
        )

    def to(self, device: torch.device | str) -> TrainingSet:
        """This set with its images and labels on a device; itself if they are there already.

        Raises:
            TypeError: `device` is no device.
            ValueError: `device` holds no values ("meta"), or this machine has none of it.
        """
        device = check_device(device)
        images = Reader(self.images).checked(self.images.to, device)
        if images is self.images:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return self._of_valid(images, self.name, labels, self.label_names, self.augmentation)

    def content_key(self) -> str:
        """SHA-256 of the shape, the dtype and the bytes of the images, in hexadecimal.

        Computed once, reading the images in pieces. An augmentation enters, labels and names do
        not.

        Raises:
            ValueError: The images map a file that has been changed.
        """
        if self._content_key is None:
            self._content_key = Reader(self.images).checked(_content_key, self.images)
        if self.augmentation is None:
            return self._content_key
        key = f"{self._content_key} {self.augmentation}"
        return hashlib.sha256(key.encode()).hexdigest()

    def __deepcopy__(self, memo: dict[int, object]) -> TrainingSet:
        """A set that shares the images: they are immutable by convention."""
        return copy.copy(self)

    def __copy__(self) -> TrainingSet:
        """A set that shares the images."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, object]:
        """What is pickled: the path of a memory-mapped set, the images of any other.

        Raises:
            TypeError: The set is sharded: it belongs to the ranks of a running job.
        """
        if (ranks := ranks_of(self.images)) is not None:
            raise TypeError(
                f"{self.name} is part {ranks.rank + 1} of {ranks.count} of a sharded set, which "
                "cannot be pickled: pickle the whole set and shard it where it is used"
            )
        state = dict(self.__dict__)
        file = mapped_file(self.images) if self._mapped else None
        if file is not None:
            state["images"] = file.view(self.images)
            # The file may be another one by then, of the same size.
            del state["_content_key"]
        elif self.images.untyped_storage().nbytes() > self.images.nbytes:
            # A tensor is pickled with all of the memory that it is a view of.
            state["images"] = self.images.clone()
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a pickled set; raises ValueError if the file it maps is not the same any more."""
        self.__dict__.update({"_content_key": None, "augmentation": None} | state)
        if isinstance(self.images, MappedView):
            self.images = self.images.open()
        self._mapped = self._mapped and mapped_file(self.images) is not None


def _content_key(images: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(images.shape)} {images.dtype}".encode())
    for _, block in blocks(images):
        digest.update(block.contiguous().cpu().numpy().data)
    return digest.hexdigest()
