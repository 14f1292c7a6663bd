"""Principal components of a training set, by the cheapest exact way."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.checks import (
    check_choice,
    check_count,
    check_device,
    check_flag,
    describe,
)
from pyflocality._support.paths import checked_path
from pyflocality.data import TrainingSet
from pyflocality.moments.eigen import Eigen, check_fits, eigen_bytes, eigen_of
from pyflocality.moments.files import BASIS, check_free, read_metadata, read_tensors, write_tensors
from pyflocality.moments.gram import BAND_BYTES, components_of, gram_of
from pyflocality.moments.moments import Moments
from pyflocality.moments.randomized import OVERSAMPLED, PROBES, leading_of
from pyflocality.moments.sums import BLOCK_BYTES, check_images
from pyflocality.posterior.sharded import ranks_of
from pyflocality.storage.reader import Reader

BasisMethod = Literal["gram", "covariance", "randomized"]
BASIS_METHODS: tuple[BasisMethod, ...] = get_args(BasisMethod)
# Part of the key: changes with what the methods compute.
_RULE_VERSION = 1
# Matrices [D, l] that live at a time where components are randomized.
_RANDOMIZED = 5
_TENSORS = ("mean", "values", "vectors", "variance")


@dataclass(frozen=True, eq=False, repr=False)
class Basis:
    r"""Mean and principal components of a training set, [D, r] instead of a covariance [D, D].

    .. math::
        S = V \operatorname{diag}(\lambda) V^\top , \qquad V^\top V = I

    with S the covariance of N images over D = C H W values, as `Moments` has it. Fewer images than
    values span N - 1 directions at most, so r < N: their components come from the N x N products
    of the images, in O(N^2 D) operations and O(N D) memory, where a covariance takes O(D^3) and
    O(D^2).

    Attributes:
        count: Number of images N, copies of an augmentation included.
        mean: Mean image in [-1, 1], float64, [C, H, W]; exact for 8-bit images as that of
            `Moments`.
        values: Variances of the components, float64, descending and positive, [r].
        vectors: The components in orthonormal columns, float64, [D, r]. Their signs are arbitrary.
        variance: Variance of each value, the diagonal of S, float64, [D]; exact for 8-bit images.
        method: How they were computed: "gram", "covariance" or "randomized".
        error: Bound on the spectral norm of S less what `values` and `vectors` make; 0 where no
            component was left out.
        key: What `content_key` answers.
    """

    count: int
    mean: Tensor
    values: Tensor
    vectors: Tensor
    variance: Tensor
    method: BasisMethod
    error: float
    key: str

    @classmethod
    def from_data(
        cls,
        data: TrainingSet | Tensor,
        *,
        method: BasisMethod | None = None,
        components: int | None = None,
        memory_budget: int | str | None = None,
        progress: bool = False,
    ) -> Basis:
        """The components of a training set, with their rounding errors as `Moments.eigh` has them.

        Variances below D eps of the largest are rounding errors of zero and left out.

        Args:
            data: A `TrainingSet`, or images as `Moments.from_data` takes them. Memory-mapped images
                are read block by block. The copies of an augmented set count as images. Every rank
                of a sharded set gets the components of the whole set.
            method: "gram": from the products of the images, [N, N]. "covariance": from that of
                the values, [D, D]. None takes the smaller matrix, and the covariance of a sharded
                set, whose products no rank has. "randomized": leading components, from a few passes
                over the set and always the same random numbers, for sets of which neither fits;
                `error` bounds what they leave out (see `pyflocality.moments.randomized`).
            components: How many of the leading components to keep; None keeps all, and as many as
                half of the budget holds where they are randomized.
            memory_budget: Working memory, bytes or a string such as "2GB"; None follows the
                environment variable PYFLOCALITY_MEMORY_BUDGET. Where neither is given, nothing is
                refused.
            progress: Whether to show what is being done.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: There are no images, an argument is out of range, the set is sharded and
                `method` is not "covariance", or a budget is less than the method takes: the least
                is named.
            MemoryError: The method takes more than there is.
        """
        data = _checked_set(data)
        chosen = _chosen_method(data, method)
        most = min(len(data) * data.copies, data.num_values)
        if components is not None:
            components = check_count(components, "components")
        progress = check_flag(progress, "progress")
        memory_budget_bytes(memory_budget)
        count, values = len(data) * data.copies, data.num_values
        if chosen == "randomized":
            components = components or randomized_components(count, values, memory_budget)
        least = basis_bytes(count, values, chosen, components)
        what = f"components of {count} images of {values} values by method={chosen!r}"
        if chosen != "randomized":
            what += " (method='randomized' with few `components` takes less)"
        check_fits(least, what, data.device, memory_budget)
        if chosen == "randomized" and components is not None:
            return _randomized(data, components, progress)
        if chosen == "covariance":
            moments = Moments.from_data(data, progress=progress)
            basis = moments.basis(progress=progress)
            if ranks_of(data.images) is None:
                basis = replace(basis, key=basis_key(data, chosen))
        else:
            basis = _of_images(data, progress)
        return basis if components is None or components >= most else basis.leading(components)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        channels, height, width = self.mean.shape
        return channels, height, width

    @property
    def rank(self) -> int:
        """Number of components r."""
        return len(self.values)

    @property
    def device(self) -> torch.device:
        """Where the numbers live."""
        return self.mean.device

    def content_key(self) -> str:
        """Hash of the images and of how the components were computed, not of these."""
        return self.key

    def leading(self, components: int) -> Basis:
        """The same with the leading components alone.

        Raises:
            TypeError: `components` is no whole number.
            ValueError: It is less than 1.
        """
        kept = check_count(components, "components")
        if kept >= self.rank:
            return self
        return replace(
            self,
            values=self.values[:kept].clone(),
            vectors=self.vectors[:, :kept].contiguous(),
            error=self.error + float(self.values[kept]),
            key=_hashed(self.key, "leading", kept),
        )

    def to(self, device: torch.device | str) -> Basis:
        """This basis on a device, as a new object; itself if it is there already.

        Raises:
            TypeError: `device` is no device.
            ValueError: `device` holds no values or is not there.
        """
        device = check_device(device)
        if self.device == device:
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the components to a safetensors file, from which `load` reads the same bits.

        Args:
            path: The file; its folder must exist. It appears whole or not at all; what is equal
                makes equal files.
            force: Whether to replace a file that is there.

        Raises:
            FileExistsError: `path` exists and `force` is False; it is a pipe or a device.
            IsADirectoryError: `path` is a folder.
            FileNotFoundError: The folder of `path` does not exist.
            OSError: The file cannot be written, on a full disk for example.
        """
        path, force = checked_path(path, "path"), check_flag(force, "force")
        check_free(path, force)
        self._write(path, None, force)

    def _write(self, path: Path, of: str | None, force: bool) -> None:
        header = {
            "count": self.count,
            "image_shape": list(self.image_shape),
            "rank": self.rank,
            "method": self.method,
            "error": self.error,
            "key": self.key,
            "of": of,
        }
        write_tensors(path, BASIS, header, {name: getattr(self, name) for name in _TENSORS}, force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Basis:
        """Read what `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The system does not let it be read, or takes no such name.
            ValueError: The file is damaged, or not a file of components of this version.
        """
        path = checked_path(path, "path")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        header, tensors = read_tensors(path, BASIS)
        return cls(
            count=header["count"],
            mean=tensors["mean"],
            values=tensors["values"],
            vectors=tensors["vectors"],
            variance=tensors["variance"],
            method=header["method"],
            error=header["error"],
            key=header["key"],
        )

    def __repr__(self) -> str:
        shape = f"image_shape={self.image_shape}"
        return f"Basis(count={self.count}, {shape}, rank={self.rank}, {self.method!r})"


def basis_method(count: int, values: int) -> BasisMethod:
    """How the components of N images of D values are computed: from the smaller matrix."""
    return "gram" if count <= values else "covariance"


def randomized_components(count: int, values: int, memory_budget: int | str | None) -> int:
    """How many components are found by random numbers where nobody says: half of the budget's."""
    fitting = memory_budget_bytes(memory_budget) // (2 * _RANDOMIZED * 8 * values) - OVERSAMPLED
    return max(1, min(fitting, count, values))


def basis_bytes(
    count: int, values: int, method: BasisMethod | None = None, components: int | None = None
) -> int:
    """Most bytes that components of N images of D values take at a time, these included.

    `components` tells how many there are where they are randomized.
    """
    method = method or basis_method(count, values)
    if method == "randomized":
        columns = min((components or 1) + OVERSAMPLED, count, values) + PROBES
        return _RANDOMIZED * 8 * values * columns + 2 * min(BLOCK_BYTES, 8 * count * values)
    # Images in float64, and what is made of them.
    block = 2 * min(BLOCK_BYTES, 8 * count * values)
    if method == "covariance":
        # Totals and covariance; or totals and products of a block.
        square = 8 * values**2
        return max(2 * square + eigen_bytes(values), 2 * square + block)
    square = 8 * count**2
    bands = 2 * min(BAND_BYTES, 8 * count * values) + block
    return max(
        2 * square + bands,
        square + eigen_bytes(count),
        2 * square + 8 * count * values + bands,
    )


def basis_key(
    source: TrainingSet | Moments | Basis,
    method: BasisMethod | None = None,
    components: int | None = None,
) -> str:
    """What the `content_key` of a basis is, without making it.

    Args:
        source: What it is made of: a set that is not sharded, or moments; or the basis.
        method: As for `Basis.from_data`, of a set.
        components: As for `Basis.from_data`; fewer than there are. Of a randomized one it must be
            given.
    """
    if isinstance(source, Basis):
        key = source.key
    elif isinstance(source, Moments):
        stored = source.stored_basis
        key = _hashed("moments", source.content_key()) if stored is None else stored.key
    else:
        method = _chosen_method(source, method)
        key = _hashed("images", source.content_key(), method)
        if method == "randomized":
            return _hashed(key, components or 0)
    return key if components is None else _hashed(key, "leading", components)


def _hashed(*facts: str | int) -> str:
    text = json.dumps(["pyflocality-basis", _RULE_VERSION, *facts])
    return hashlib.sha256(text.encode()).hexdigest()


def _checked_set(data: object) -> TrainingSet:
    if isinstance(data, TrainingSet):
        return data
    if isinstance(data, Tensor):
        check_images(data, "data")
        return TrainingSet._of_valid(data, "data")
    raise TypeError(f"`data` must be a TrainingSet or a torch.Tensor, got {describe(data)}")


def _chosen_method(data: TrainingSet, method: BasisMethod | None) -> BasisMethod:
    sharded = ranks_of(data.images) is not None
    if method is None:
        whole = len(data) * data.copies
        return "covariance" if sharded else basis_method(whole, data.num_values)
    if check_choice(method, "method", BASIS_METHODS) != "covariance" and sharded:
        raise ValueError(
            f"`method` must be 'covariance' for a sharded set, of which no rank has all images, "
            f"got {method!r}"
        )
    return method


@torch.no_grad()
def _of_images(data: TrainingSet, progress: bool) -> Basis:
    """The components of a set from the products of its images."""
    reader = Reader.of(data)

    def made() -> Basis:
        gram = gram_of(reader, progress=progress)
        inner = eigen_of(gram.matrix, progress=progress)
        values, vectors = components_of(reader, inner, progress=progress)
        return Basis(
            count=len(reader),
            mean=gram.mean.reshape(data.image_shape),
            values=values,
            vectors=vectors,
            variance=gram.variance,
            method="gram",
            error=0.0,
            key=basis_key(data, "gram"),
        )

    return reader.checked(made)


@torch.no_grad()
def _randomized(data: TrainingSet, components: int, progress: bool) -> Basis:
    """Leading components of a set from random numbers."""
    reader = Reader.of(data)
    found = reader.checked(lambda: leading_of(reader, components, progress=progress))
    return Basis(
        count=len(reader),
        mean=found.mean.reshape(data.image_shape),
        values=found.eigen.values,
        vectors=found.eigen.vectors,
        variance=found.variance,
        method="randomized",
        error=found.error,
        key=basis_key(data, "randomized", components),
    )


def save_beside(basis: Basis, moments: Path, path: Path) -> None:
    """Write components as those of a file of moments, whose name is that of `files.basis_file`."""
    basis._write(path, read_metadata(moments)["sha256"], force=True)


def stored_source(path: str | os.PathLike[str]) -> Moments | Basis:
    """What a file holds, moments or components.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The system does not let it be read, or takes no such name.
        ValueError: The file is damaged, or holds neither.
    """
    path = checked_path(path, "path")
    if path.is_file() and read_metadata(path).get("format") == BASIS.format:
        return Basis.load(path)
    return Moments.load(path)


def basis_of_moments(moments: Moments, eigen: Eigen) -> Basis:
    """The components of moments, from all of their eigenvectors."""
    rank = int((eigen.values > 0).sum())
    return Basis(
        count=moments.count,
        mean=moments.mean,
        values=eigen.values[:rank],
        vectors=eigen.vectors[:, :rank],
        variance=moments.variance,
        method="covariance",
        error=0.0,
        key=_hashed("moments", moments.content_key()),
    )
