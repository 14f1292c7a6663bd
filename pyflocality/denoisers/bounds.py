r"""Lower bounds on the distances of unread images, safe against their own rounding.

Let y be a noisy image divided by alpha, v a training image, both counted from the mean of the
data, and P the projection on its leading k principal components. The inner product splits into
:math:`\langle Py, Pv \rangle + \langle y_\perp, v_\perp \rangle`, and Cauchy-Schwarz bounds the
second part:

.. math::
    \lVert y - v \rVert^2 - \lVert y \rVert^2 \;\ge\; \lVert v \rVert^2
    - 2 \langle Py, Pv \rangle - 2 \lVert y_\perp \rVert \lVert v_\perp \rVert,

which is :math:`\lVert Py - Pv \rVert^2 + (\lVert y_\perp \rVert - \lVert v_\perp \rVert)^2`
without the :math:`\lVert y \rVert^2` that all images share. Images have little energy outside
their leading components, and that is what makes the bound tight.

**Rounding.** With u the unit roundoff of float32 and w that of float64, and A and V the norms of
y and the longest v, what is computed exceeds the true bound by at most

    (2 k + 64) u A V + 16 u V^2 + (2 defect + 8 sqrt(k) D w) A V
    + 32 D w (A^2 + V^2) + 16 sqrt(D) w (A + V):

coefficients are formed in float64, where a sum of D products, in any order, errs by less than D w
of the product of the norms and k of them by sqrt(k) as much, and rounded once to float32; a sum of
k products in float32 errs by less than k u; a handful of further operations in float32 by u each;
the components are orthonormal to within `defect`, the norm of U^T U - I; and the values of y and v
are themselves rounded. Norms outside the components are kept large enough for the same errors.
`margin` is that much, and a hundredth more for the products of roundoffs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._support.budget import images_per_chunk
from pyflocality._support.precision import plain_products
from pyflocality.data import TrainingSet
from pyflocality.moments import Basis
from pyflocality.storage.reader import Reader

UNIT32, UNIT64 = 2.0**-24, 2.0**-53


@dataclass(frozen=True)
class ComponentIndex:
    """Coefficients of all training images in the leading principal components.

    Attributes:
        stages: Numbers of components k_1 < k_2 < .. that bounds may use.
        centre: Mean of the data, float64 [D].
        basis: The components that each stage adds, in rows, float64 [k_j - k_{j-1}, D].
        defect: How far the components are from orthonormal.
        blocks: Coefficients k_{j-1} .. k_j of every image, float32 [N, k_j - k_{j-1}] by stage.
        residuals: Norms outside the components of each stage, rounded up, float32 [J, N].
        energies: Squared norms of the centred images, float32 [N].
        longest: The largest of their norms.
        value_range: Largest difference of two images in one value, at most 2.
    """

    stages: tuple[int, ...]
    centre: Tensor
    basis: tuple[Tensor, ...]
    defect: float
    blocks: tuple[Tensor, ...]
    residuals: Tensor
    energies: Tensor
    longest: float
    value_range: float

    @property
    def device(self) -> torch.device:
        """Where the index is."""
        return self.centre.device

    @property
    def nbytes(self) -> int:
        """Bytes of what grows with the number of images."""
        return sum(part.nbytes for part in (*self.blocks, self.residuals, self.energies))

    def margin(self, norm: float) -> float:
        """How far rounding may lift a bound, at any stage, for a query of a norm."""
        values, components, longest = len(self.centre), self.stages[-1], self.longest
        product = (2 * components + 64) * UNIT32 + 2 * self.defect
        product += 8 * components**0.5 * values * UNIT64
        own = 16 * UNIT32 * longest**2 + 32 * values * UNIT64 * (norm**2 + longest**2)
        own += 16 * values**0.5 * UNIT64 * (norm + longest)
        return 1.01 * (product * norm * longest + own)


class DistanceBounds:
    """Lower bounds of one query, sharpened stage by stage for the images that still matter.

    Args:
        index: Coefficients of the training images.
        y: Noisy image divided by alpha, float64 [D].

    Attributes:
        values: The bounds, float32 [N], counted from `energy`; infinite for images that were
            excluded. Rounding may have added as much as `margin`.
        energy: Squared norm of the centred query.
        margin: What to subtract from the bounds, whatever the stage.
    """

    def __init__(self, index: ComponentIndex, y: Tensor) -> None:
        self._index, self._centred = index, y - index.centre
        self.energy = float(self._centred.square().sum())
        self.margin = index.margin(self.energy**0.5)
        self._stage, self._inside = -1, 0.0
        self._inner = torch.zeros_like(index.energies)
        self.values = torch.full_like(index.energies, -torch.inf)
        self.sharpen(None)

    def sharpen(self, images: Tensor | None) -> None:
        """Go to the next stage for some images, int64 [n], or all: they reached this one."""
        index, self._stage = self._index, self._stage + 1
        coefficients = index.basis[self._stage] @ self._centred
        self._inside += float(coefficients.square().sum())
        energies, inner = index.energies, self._inner
        block, residuals = index.blocks[self._stage], index.residuals[self._stage]
        if images is not None:
            energies, inner = energies[images], inner[images]
            block, residuals = block.index_select(0, images), residuals[images]
        inner = inner + _product(block, coefficients.float())
        outside = _outside(self.energy, self._inside, index.defect, len(index.centre), index.stages)
        bounds = (energies - 2.0 * inner).sub_(residuals, alpha=2.0 * float(outside) ** 0.5)
        if images is None:
            self._inner, self.values = inner, bounds
        else:
            self._inner[images], self.values[images] = inner, bounds

    def up_to(self, cut: float) -> Tensor:
        """Images with a bound of at most `cut`, or a rounding error of float32 more, int64 [n]."""
        numbers = torch.finfo(torch.float32)
        limit = self.values.new_tensor(min(max(cut, numbers.min), numbers.max))
        above = torch.nextafter(limit, limit.new_tensor(torch.inf)).clamp(max=numbers.max)
        return (self.values <= above).nonzero()[:, 0]

    def exclude(self, images: Tensor) -> None:
        """Images that need no bound any more."""
        self.values[images] = torch.inf


def build_index(
    data: TrainingSet, basis: Basis, memory_budget: int | str | None, stages: Sequence[int]
) -> ComponentIndex:
    """Read the whole set once and keep the coefficients of its images.

    Of few images there are fewer components than the stages ask for: the last one has all of them.
    """
    centre = basis.mean.flatten().to(data.device)
    vectors = basis.vectors[:, : stages[-1]].to(data.device).contiguous()
    if basis.rank == 0:
        # Images that are all alike: any direction will do.
        vectors = torch.eye(len(centre), 1, dtype=torch.float64, device=data.device)
    stages = sorted({min(stage, vectors.shape[1]) for stage in stages})
    count, (values, components) = len(data), vectors.shape
    defect = float(torch.linalg.norm(vectors.T @ vectors - torch.eye(components).to(vectors)))
    defect += components * values * UNIT64
    widths = [stop - start for start, stop in zip([0, *stages[:-1]], stages, strict=True)]
    blocks = [
        torch.empty(count, width, dtype=torch.float32, device=data.device) for width in widths
    ]
    residuals = torch.empty(len(stages), count, dtype=torch.float32, device=data.device)
    energies = torch.empty(count, dtype=torch.float64, device=data.device)
    lowest, highest = centre.new_full((values,), torch.inf), centre.new_full((values,), -torch.inf)
    chunk = images_per_chunk(memory_budget, 8 * (3 * values + 2 * components), min(count, 2048))
    reader = Reader(data.images, memory_budget=memory_budget)
    read = reader.values(chunk, torch.float64)
    for start, images in zip(range(0, count, chunk), read, strict=True):
        rows, images = slice(start, start + chunk), images.flatten(1)
        lowest = torch.minimum(lowest, images.amin(0))
        highest = torch.maximum(highest, images.amax(0))
        images = images - centre
        energies[rows] = images.square().sum(1)
        coefficients = images @ vectors
        for block, part in zip(blocks, coefficients.split(widths, 1), strict=True):
            block[rows] = part
        inside = coefficients.square().cumsum(1)[:, [k - 1 for k in stages]].T
        energy = _outside(energies[rows], inside, defect, values, stages)
        outside = torch.as_tensor(energy).sqrt()
        # One ulp and a half of float32 above, so that rounding cannot take it below.
        residuals[:, rows] = outside * (1.0 + 3 * UNIT32)
    return ComponentIndex(
        tuple(stages),
        centre,
        tuple(part.contiguous() for part in vectors.T.split(widths)),
        defect,
        tuple(blocks),
        residuals,
        energies.float(),
        float(energies.max().sqrt()),
        float((highest - lowest).max()),
    )


def _outside(
    energy: float | Tensor,
    inside: float | Tensor,
    defect: float,
    values: int,
    stages: Sequence[int],
) -> float | Tensor:
    """Energy outside components that hold the energy `inside`, or a little more than it."""
    slack = 2 * defect + (16 + 4 * stages[-1] ** 0.5) * values * UNIT64
    left = energy - inside
    return (left.clamp(min=0.0) if isinstance(left, Tensor) else max(left, 0.0)) + slack * energy


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Their product in float32, also where the user has allowed torch coarser products."""
    return matrix @ vector if plain_products() else (matrix * vector).sum(1)
