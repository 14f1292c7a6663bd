r"""Leading principal components of sets of which neither products of images nor of values fit.

A random subspace is multiplied by the covariance a few times, each time in one pass over the set:

.. math::
    Q_0 = \Omega, \qquad Q_{j+1} = \operatorname{orth}(S Q_j), \qquad
    T = Q^\top S Q = W \operatorname{diag}(\lambda) W^\top, \qquad V = Q W ,

and what is left out is bounded afterwards. With :math:`F = (I - Q Q^\top) S Q` and
:math:`E = (I - Q Q^\top) S (I - Q Q^\top)`, and k components kept,

.. math::
    \lVert S - V_k \operatorname{diag}(\lambda_{1..k}) V_k^\top \rVert
    \le \max(\lambda_{k+1}, \lVert E \rVert) + \lVert F \rVert .

F is computed; the norm of E is at most its trace, and at most
:math:`10 \sqrt{2 / \pi} \max_i \lVert E \omega_i \rVert` over ten normal vectors, which a draw of
them breaks with a probability of 1e-10.

References:
    Halko, Martinsson and Tropp, Finding structure with randomness, 2011 (subspace iteration; the
    bound is lemma 4.1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.progress import progress_bar
from pyflocality.moments.eigen import Eigen
from pyflocality.moments.sums import (
    BLOCK_BYTES,
    covariance_of_bytes,
    images_per_block,
    mean_of_bytes,
    shift_of_bytes,
)
from pyflocality.storage.reader import Reader, training_values

# Directions beside those that are asked for, products with S before the last, and probes of E.
OVERSAMPLED, PROBES = 10, 10
_PRODUCTS = 3
_SEED = 0


class Leading(NamedTuple):
    """Leading components of a set and what they leave out.

    Attributes:
        mean: Mean in [-1, 1], float64, [D].
        variance: Variance of each value, float64, [D].
        eigen: Variances [r] and vectors [D, r] of the components.
        error: Bound on the spectral norm of the covariance less what these make.
    """

    mean: Tensor
    variance: Tensor
    eigen: Eigen
    error: float


def leading_of(reader: Reader, components: int, *, progress: bool) -> Leading:
    """At most so many leading components, always from the same random numbers."""
    count, values = len(reader), reader.images[0].numel()
    width = min(components + OVERSAMPLED, count, values)
    generator = torch.Generator().manual_seed(_SEED)
    passes = iter(
        progress_bar(
            range(_PRODUCTS + 2),
            description="passes over the images",
            total=_PRODUCTS + 2,
            enabled=progress,
        )
    )
    next(passes)
    mean, variance = _mean_and_variance(reader)
    device, varying = mean.device, (variance > 0).double()
    basis = torch.randn(values, width, generator=generator, dtype=torch.float64).to(device)
    for _ in range(_PRODUCTS):
        next(passes)
        basis = torch.linalg.qr(_product(reader, mean, varying, basis))[0]
    next(passes)
    probes = torch.randn(values, PROBES, generator=generator, dtype=torch.float64).to(device)
    probes -= basis @ (basis.T @ probes)
    both = _product(reader, mean, varying, torch.cat([basis, probes], 1))
    # The end of the bar.
    next(passes, None)
    image, probed = both[:, :width], both[:, width:]
    inner = basis.T @ image
    inner = (inner + inner.T) / 2
    found, turned = torch.linalg.eigh(inner)
    found, turned = found.flip(0), turned.flip(1)
    outside = image - basis @ inner
    across = math.sqrt(max(0.0, float(torch.linalg.eigvalsh(outside.T @ outside)[-1])))
    probed = probed - basis @ (basis.T @ probed)
    likely = 10.0 * math.sqrt(2.0 / math.pi) * float(probed.norm(dim=0).max())
    rest = min(likely, max(0.0, float(variance.sum() - inner.trace())))
    floor = values * torch.finfo(torch.float64).eps * found[0]
    kept = min(components, int((found > floor).sum()), max(0, count - 1))
    following = max(0.0, float(found[kept])) if kept < width else 0.0
    vectors = basis @ turned[:, :kept]
    return Leading(mean, variance, Eigen(found[:kept], vectors), max(following, rest) + across)


def _product(reader: Reader, mean: Tensor, varying: Tensor, right: Tensor) -> Tensor:
    """The covariance times [D, l], in one pass."""
    result = torch.zeros_like(right)
    for block in reader.blocks(images_per_block(reader.images)):
        # As many as there would be if they were floats.
        for part in block.split(max(1, BLOCK_BYTES // (8 * len(mean)))):
            centred = training_values(part, torch.float64).flatten(1) - mean
            # What is the same in all images has no rounding errors either.
            centred *= varying
            result.addmm_(centred.T, centred @ right)
    return result / max(1, len(reader) - 1)


def _mean_and_variance(reader: Reader) -> tuple[Tensor, Tensor]:
    """Mean and variance of each value, [D]; of bytes to the bits of `Moments`."""
    count = len(reader)
    is_bytes = reader.images.dtype == torch.uint8
    first = reader.at(torch.zeros(1, dtype=torch.int64, device=reader.images.device))
    # Of floats about the first image: what is the same in all images has no variance.
    origin = torch.full_like(first, 128, dtype=torch.float64) if is_bytes else first.double()
    origin = origin.flatten()
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for block in reader.blocks(images_per_block(reader.images)):
        for part in block.flatten(1).split(64):
            numbers = part.double() - origin
            total += numbers.sum(0)
            squares += numbers.square_().sum(0)
    if not is_bytes:
        variance = (squares - total * total / count).clamp(min=0.0) / max(1, count - 1)
        return origin + total / count, variance
    # Integers below 2^53.
    whole = total.long()
    mean = mean_of_bytes(whole, count)
    if count == 1:
        return mean, torch.zeros_like(mean)
    shift, rest = shift_of_bytes(whole, count)
    about = squares.long() - shift * whole - rest * shift
    return mean, covariance_of_bytes(about, rest * rest, count)
