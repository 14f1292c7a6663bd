r"""Mean and covariance of a training set, streaming and exact for 8-bit images.

Over the D = C H W values v of N images, in [-1, 1],

.. math::
    \mu = \frac1N \sum_i v_i, \qquad
    S = \frac1{N-1} \sum_i (v_i - \mu)(v_i - \mu)^\top .

8-bit images are summed as integers: with c = u - 128, so that v = (c + 1/2) / 127.5, the totals
:math:`s = \sum c` and :math:`G = \sum c c^\top` are exact in int64. Mean and covariance are then a
fixed function of integers, bit-identical for every order, split and merge of the same images, and
on every backend and device.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyflocality._support.checks import (
    check_choice,
    check_device,
    check_flag,
    check_real,
    check_tensor,
    describe,
)
from pyflocality._support.paths import checked_path
from pyflocality._support.progress import progress_bar
from pyflocality._support.threads import Lock
from pyflocality.backends.selection import BACKENDS, BackendUnavailableError
from pyflocality.data import TrainingSet
from pyflocality.moments.eigen import Eigen, check_fits, eigen_bytes, eigen_of
from pyflocality.moments.files import (
    StoredBasis,
    check_free,
    checksum,
    read_tensors,
    stored_basis,
    write_tensors,
)
from pyflocality.moments.sums import (
    KINDS,
    MOMENTS,
    Blend,
    Sums,
    Totals,
    check_alike,
    check_images,
    images_per_block,
    kind_of_sums,
)
from pyflocality.posterior.sharded import plain, ranks_of
from pyflocality.storage.reader import Reader

if TYPE_CHECKING:
    from pyflocality.moments.basis import Basis


class Moments:
    """Streaming mean and covariance of images.

    Start empty and call `update` with batches, or use `from_data` or `load`. All batches of one
    object are either uint8 or floating-point.

    uint8 (u means u / 127.5 - 1) is exact: `mean` is correctly rounded, `covariance` is
    bit-identical for any order, chunking and merging of the same images, and exactly 0 for
    values that are the same in every image. Floating-point batches are combined in float64 with
    the pairwise update of Chan, Golub and LeVeque: results for other orders or splits agree to
    rounding, not to the bit.

    The totals live on the device of the first batch and take 8 D^2 bytes; the covariance and
    its eigenvectors take as much again each, from their first use on.

    References:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample
        variances, 1979.
    """

    def __init__(self) -> None:
        self._totals: Totals | None = None
        self._image_shape = (0, 0, 0)
        self._interrupted = False
        self._covariance: Tensor | None = None
        self._eigen: Eigen | None = None
        self._key: str | None = None
        self.stored_basis: StoredBasis | None = None
        self._basis: Basis | None = None
        # Of these: a batch of threads computes them once.
        self._caching = Lock()

    @classmethod
    def from_data(
        cls, data: TrainingSet | Tensor, *, progress: bool = False, backend: str | None = None
    ) -> Moments:
        """Moments of a training set.

        Args:
            data: A `TrainingSet`, or images as `update` takes them, [N, C, H, W]. Memory-mapped
                images are read block by block. The copies of an augmented set count as images.
                Every rank of a sharded set gets the moments of the whole set.
            progress: Whether to show a progress bar.
            backend: Backend of the exact sums; None follows `pyflocality.use_backend`.

        Raises:
            TypeError: `data` is neither.
            ValueError: There are no images, or they hold NaN or infinite values.
        """
        if not isinstance(data, (TrainingSet, Tensor)):
            raise TypeError(f"`data` must be a TrainingSet or a torch.Tensor, got {describe(data)}")
        progress = check_flag(progress, "progress")
        if backend is not None:
            check_choice(backend, "backend", BACKENDS)
        images = check_tensor(data, "data") if isinstance(data, Tensor) else data.images
        ranks, images = ranks_of(images), plain(images)
        moments, augmentation = cls(), getattr(data, "augmentation", None)
        reader = Reader(images, augmentation)

        def read() -> None:
            check_images(images, "data")
            size = images_per_block(images)
            total = len(reader) // len(images) * -(-len(images) // size)
            blocks = reader.blocks(size)
            for block in progress_bar(blocks, description="moments", total=total, enabled=progress):
                moments._take(block, backend)

        reader.checked(read)
        sums = None if ranks is None else moments._sums()
        if ranks is not None and sums is not None:
            ranks.agree(f"Moments of {sums.kind} {moments._image_shape} {augmentation}")
            moments._totals = sums.over(ranks)
        return moments

    @property
    def count(self) -> int:
        """Number of images N so far."""
        return 0 if self._totals is None else self._whole().count

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image; ValueError before the first batch."""
        self._whole()
        return self._image_shape

    @property
    def device(self) -> torch.device:
        """Where the totals live; ValueError before the first batch."""
        return self._whole().device

    @property
    def mean(self) -> Tensor:
        """Mean image in [-1, 1], float64, [C, H, W]."""
        return self._whole().mean().reshape(self.image_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each value, the diagonal of the covariance, float64, [D]."""
        return self._whole().variance()

    @property
    def covariance(self) -> Tensor:
        """Covariance S (N - 1 in the denominator), float64, [D, D]. Zero where N = 1.

        It is kept until the next `update`: do not change it in place.
        """
        sums = self._whole()
        with self._caching:
            if self._covariance is None:
                values = len(sums.vector)
                check_fits(8 * values**2, f"the covariance of {values} values", sums.device)
                self._covariance = sums.covariance()
            return self._covariance

    def eigh(self, *, progress: bool = False) -> Eigen:
        """Eigenvalues and eigenvectors of the covariance, kept until the next `update`.

        Eigenvalues below D eps max(eigenvalues) are rounding errors of zero and set to exactly
        0. Fewer images than values (N <= D) always give such zeros: the covariance has rank at
        most N - 1, and the eigenvectors of the null space are an arbitrary basis of it.

        An interruption (KeyboardInterrupt) is raised at once, though the solver cannot be
        stopped: it keeps a core busy until it is done.

        Args:
            progress: Whether to show the time it takes.

        Returns:
            `values` [D] descending and `vectors` [D, D] in columns, float64.
        """
        progress = check_flag(progress, "progress")
        sums = self._whole()
        with self._caching:
            if self._eigen is None:
                values = len(sums.vector)
                what = f"eigenvectors of the covariance of {values} values"
                check_fits(eigen_bytes(values), what, sums.device)
                self._eigen = eigen_of(self.covariance, progress=progress)
            return self._eigen

    def basis(self, *, progress: bool = False) -> Basis:
        """The principal components of positive variance.

        They are those of `eigh`, whose memory they share; of moments that were loaded from a file
        with components beside it, as the command `moments` writes them, those.

        Args:
            progress: Whether to show the time it takes.

        Raises:
            ValueError: The file of components has been changed meanwhile.
        """
        from pyflocality.moments.basis import Basis, basis_of_moments

        stored = self.stored_basis
        if stored is None:
            return basis_of_moments(self, self.eigh(progress=progress))
        self._whole()
        with self._caching:
            if self._basis is None:
                basis = Basis.load(stored.path)
                if basis.key != stored.key:
                    raise ValueError(f"{stored.path} has been changed since the moments were read")
                self._basis = basis.to(self.mean.device)
            return self._basis

    def update(self, batch: Tensor, *, backend: str | None = None) -> None:
        """Take in a batch of images; moments that were `blended` take in none.

        Large batches cost less: each call reads and writes the D x D totals.

        Args:
            batch: uint8 (u means u / 127.5 - 1) or floating-point images in [-1, 1],
                [n, C, H, W] with n >= 1.
            backend: Backend of the exact sums of uint8 images; None follows
                `pyflocality.use_backend`. Floating-point sums are plain torch.

        Raises:
            TypeError: `batch` is not a tensor, or neither uint8 nor floating-point.
            ValueError: The shape, device or kind of dtype differs from the first batch's, there
                are no images, they hold NaN or infinite values, or these moments are `blended`.
            BackendUnavailableError: The backend that was asked for cannot run here.
        """
        check_images(batch, "batch")
        if backend is not None:
            check_choice(backend, "backend", BACKENDS)
        sums = self._sums("take in no further images")
        if sums is not None:
            self._check_fits(batch, sums)
        self._take(batch, backend)

    def merge(self, other: Moments) -> Moments:
        """Moments of the images of both, as a new object.

        Raises:
            TypeError: `other` is not `Moments`.
            ValueError: The image shapes, devices or kinds of dtype differ, or either is `blended`.
        """
        mine, theirs = self._sums_of_both(other, "cannot be merged")
        merged = Moments()
        if mine is None or theirs is None:
            some, of = (theirs, other) if mine is None else (mine, self)
            if some is not None:
                merged._totals, merged._image_shape = some.copy(), of._image_shape
            return merged
        merged._totals, merged._image_shape = mine.merged(theirs), self._image_shape
        return merged

    def without(self, other: Moments) -> Moments:
        """Moments of the images but for those of `other`, which are among them, as a new object.

        Of 8-bit images bit for bit those of the images that stay, of floating-point images to
        rounding. Images that are not among these are not noticed.

        Args:
            other: Moments of some of the images, fewer than all.

        Raises:
            TypeError: `other` is not `Moments`.
            ValueError: The image shapes, devices or kinds of dtype differ, either is `blended` or
                holds no images, or no image would stay.
        """
        mine, theirs = self._sums_of_both(other, "have no images to leave out")
        if mine is None or theirs is None or theirs.count >= mine.count:
            raise ValueError(
                f"`other` must hold fewer images than these moments, {self.count}, and one at "
                f"least, got {other.count}"
            )
        result = Moments()
        result._totals, result._image_shape = mine.without(theirs), self._image_shape
        return result

    def blended(self, other: Moments, share: float) -> Moments:
        r"""Moments of a few images with a covariance that leans on that of many, as a new object.

        Mean and count are those of these moments, and with covariances :math:`S` of these and
        :math:`S'` of `other`

        .. math::
            S_{\text{blend}} = (1 - \text{share})\, S + \text{share}\, S' .

        A class of n images has a covariance of rank n - 1 at most: it is singular where n <= D,
        and its eigenvectors are mostly noise where n is not many times D. The covariance of all
        classes, blended in, gives it full rank and steadies it; with share 0 it is the class's
        own, with share 1 all classes have the same.

        A blend is no sum over images any more: `update` and `merge` refuse it.

        Args:
            other: Moments of images of the same shape, on the same device.
            share: Weight of `other`, from 0 to 1.

        Raises:
            TypeError: `other` is not `Moments`, or `share` not a number.
            ValueError: Image shapes or devices differ, `share` leaves 0..1, or either has no
                images.

        References:
            Friedman, Regularized discriminant analysis, 1989.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"`other` must be Moments, got {describe(other)}")
        share = check_real(share, "share", low=0.0, high=1.0)
        sums, device = self._whole(), other._whole().device
        if other.image_shape != self.image_shape:
            raise ValueError(
                f"`other` must have image shape {self.image_shape}, got {other.image_shape}"
            )
        if device != sums.device:
            raise ValueError(f"`other` must be on {sums.device}, got moments on {device}")
        covariance = self.covariance * (1.0 - share)
        covariance.add_(other.covariance, alpha=share)
        result = Moments()
        result._totals = Blend(sums.count, sums.mean(), covariance)
        result._image_shape = self._image_shape
        return result

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the totals, or a blend, to a safetensors file from which `load` goes on exactly.

        Args:
            path: The file; its folder must exist. It appears whole or not at all; equal moments
                make equal files.
            force: Whether to replace a file that is there.

        Raises:
            FileExistsError: `path` exists and `force` is False; it is a pipe or a device.
            IsADirectoryError: `path` is a folder.
            FileNotFoundError: The folder of `path` does not exist.
            OSError: The file cannot be written, on a full disk for example.
            ValueError: There are no images yet.
        """
        path, force = checked_path(path, "path"), check_flag(force, "force")
        sums = self._whole()
        check_free(path, force)
        header = {"kind": sums.kind, "count": sums.count, "image_shape": list(self.image_shape)}
        write_tensors(path, MOMENTS, header, sums.tensors(), force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what `save` wrote; the totals are on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The system does not let it be read, or takes no such name.
            ValueError: The file is damaged, or not a file of moments of this version.
        """
        path = checked_path(path, "path")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        header, tensors = read_tensors(path, MOMENTS)
        kind, moments = KINDS[header["kind"]], cls()
        channels, height, width = header["image_shape"]
        moments._image_shape = channels, height, width
        moments.stored_basis = stored_basis(path)
        moments._totals = kind(header["count"], *(tensors[name] for name in kind.layout))
        return moments

    def to(self, device: torch.device | str) -> Moments:
        """These moments on a device, as a new object; themselves if they are there already.

        Covariance and eigenvectors go along where they have been computed.

        Raises:
            TypeError: `device` is no device.
            ValueError: There are no images yet, or `device` holds no values or is not there.
            RuntimeError: An update was interrupted.
        """
        device = check_device(device)
        sums = self._whole()
        totals, moved = sums.to(device), Moments()
        if totals.vector is sums.vector and totals.matrix is sums.matrix:
            return self
        moved._totals, moved._image_shape = totals, self._image_shape
        if self._covariance is not None:
            moved._covariance = self._covariance.to(device)
        if self._eigen is not None:
            moved._eigen = Eigen(*(tensor.to(device) for tensor in self._eigen))
        moved._key, moved.stored_basis = self._key, self.stored_basis
        return moved

    def content_key(self) -> str:
        """Hash of the moments, the same for the same images in any order (8-bit images)."""
        sums = self._whole()
        with self._caching:
            if self._key is None:
                header = f"{sums.kind} {sums.count} {list(self.image_shape)}"
                self._key = checksum(header, sums.tensors())
            return self._key

    def __repr__(self) -> str:
        if self._totals is None:
            return "Moments(count=0)"
        sums = self._whole()
        return f"Moments(count={sums.count}, image_shape={self._image_shape}, {sums.kind})"

    def _check_fits(self, batch: Tensor, sums: Sums) -> None:
        for name, expected, got in (
            ("shape [n, C, H, W] with (C, H, W) =", self._image_shape, tuple(batch.shape[1:])),
            ("kind of dtype", sums.kind, kind_of_sums(batch).kind),
            ("device", sums.device, batch.device),
        ):
            if expected != got:
                raise ValueError(
                    f"`batch` must have {name} {expected} like the batches before it, got "
                    f"{describe(batch)}"
                )

    @torch.no_grad()
    def _take(self, batch: Tensor, backend: str | None) -> None:
        """Take in a batch that has been checked."""
        sums = self._sums()
        # Whatever stops the loop midway leaves some images counted.
        self._interrupted = sums is not None
        if sums is None:
            sums = kind_of_sums(batch).empty(batch[0].numel(), batch.device)
        self._covariance = self._eigen = self._key = self.stored_basis = self._basis = None
        try:
            for block in Reader(batch).blocks(images_per_block(batch)):
                sums.add(block.reshape(len(block), -1), backend)
        except BackendUnavailableError:
            # Refused before any work: what was counted before still holds.
            self._interrupted = False
            raise
        self._totals, self._interrupted = sums, False
        self._image_shape = batch.shape[1], batch.shape[2], batch.shape[3]

    def _sums_of_both(self, other: object, what: str) -> tuple[Sums | None, Sums | None]:
        """Totals of these moments and of others, of images alike where both have some."""
        if not isinstance(other, Moments):
            raise TypeError(f"`other` must be Moments, got {describe(other)}")
        mine, theirs = self._sums(what), other._sums(what)
        if mine is not None and theirs is not None:
            check_alike("other", (self._image_shape, mine), (other._image_shape, theirs))
        return mine, theirs

    def _sums(self, what: str = "") -> Sums | None:
        """Totals that take in images; None where there are none yet.

        Args:
            what: What moments that were blended cannot do, for the message.
        """
        totals = None if self._totals is None else self._whole()
        if totals is None or isinstance(totals, Sums):
            return totals
        raise ValueError(
            f"moments that were blended {what}: they are no sums over images; blend again "
            "after the moments they were made of have changed"
        )

    def _whole(self) -> Totals:
        """The totals, where they are of use."""
        if self._totals is None:
            raise ValueError("these moments hold no images yet: call `update` first")
        if self._interrupted:
            raise RuntimeError(
                "an update of these moments was interrupted, so some of its images are counted: "
                "start again from a new object or a saved file"
            )
        return self._totals
