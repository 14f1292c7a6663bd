r"""Linear denoisers for few images: shrinkage of the covariance, and training on noise.

The Wiener filter needs the covariance of the data. The sample covariance of N images of D values
is a poor estimate where N is not much larger than D: its eigenvalues spread too far, down to
exact zeros for N <= D, and the filter trusts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyflocality._support.budget import images_per_chunk
from pyflocality._support.checks import (
    LevelLike,
    check_generator,
    check_levels,
    check_magnitude,
    check_positive,
    check_rounds,
)
from pyflocality._support.levels import Levels
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, check_set, device_after
from pyflocality.denoisers.levels import join_rows, split_levels
from pyflocality.denoisers.wiener import WienerDenoiser
from pyflocality.moments import Moments
from pyflocality.storage.reader import Reader

_BLOCK_BYTES = 64 * 2**20
# Seeds the noise where no generator is given, so that a denoiser is always the same.
_SEED = 0
_MOST_NOISE = 1e150


class LedoitWolfDenoiser(WienerDenoiser):
    r"""Wiener filter of a covariance that is shrunk towards a multiple of the identity.

    .. math::
        S^* = (1 - \rho) S + \rho \, m I, \qquad m = \frac{\operatorname{tr} S}{D}, \qquad
        \rho = \min\Bigl(1, \frac{\frac1N \bigl( \frac1N \sum_i \lVert v_i - \mu \rVert^4
            - \lVert S \rVert_F^2 \bigr)}{\lVert S - m I \rVert_F^2} \Bigr)

    with S the covariance with N in the denominator. :math:`\rho` is a consistent estimate of the
    weight for which :math:`S^*` is closest to the true covariance in the mean square; no further
    assumption is made on the data. It is near 0 for N far above D and grows where images are few.

    Args:
        data: The training set; it is read twice.

    Attributes:
        shrinkage: The weight rho, in [0, 1].
        mean: Mean of the data, float64 [D].
        eigenvalues: Eigenvalues of the shrunk covariance in the directions in which the images
            vary, descending, float64 [R].
        eigenvectors: Their eigenvectors in columns, float64 [D, R].
        remainder: Its eigenvalue rho m in all other directions.

    Raises:
        TypeError: `data` is not a TrainingSet.

    References:
        Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices,
        2004.
    """

    def __init__(self, data: TrainingSet) -> None:
        super().__init__(check_set(data))
        count = len(data) * data.copies
        fourth = 0.0
        for values in _centred_blocks(data, self.mean):
            fourth += float(values.square().sum(1).square().sum())
        sample = self.eigenvalues * ((count - 1) / count)
        others = data.num_values - len(sample)
        level = float(sample.sum()) / data.num_values
        spread = float((sample - level).square().sum()) + others * level**2
        error = (fourth / count - float(sample.square().sum())) / count
        # Without any spread both estimates are the same.
        self.shrinkage = min(1.0, max(0.0, error) / spread) if spread > 0 else 1.0
        self.remainder = self.shrinkage * level
        self.eigenvalues = (1.0 - self.shrinkage) * sample + self.remainder

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"shrinkage={self.shrinkage:.4g}"


class NoiseTrainedDenoiser(Denoiser):
    r"""The linear denoiser that least squares finds on noisy copies of the training images.

    Each image is seen K times with fresh noise, of r times the standard deviation that is to be
    removed; the mean is known:

    .. math::
        W = \arg\min_W \sum_{i,k} \lVert (v_i - \mu) - W (\alpha (v_i - \mu) + r \sigma z_{ik})
        \rVert^2, \qquad \hat x_0 = \mu + W (x - \alpha \mu) .

    That is how a linear network without a bias would be trained. As K grows, W becomes the Wiener
    filter of the sample covariance at the noise r sigma, so that r > 1 shrinks it: a ridge
    penalty. With few copies W also learns the accidents of the noise, most of all where N K is
    near D. Where N K < D the solution of least norm is taken.

    The noise is drawn once, so that W is a smooth function of the noise level; each level costs
    an eigendecomposition of a [D, D] matrix.

    Args:
        data: The training set.
        copies: Noisy copies K of each image.
        ratio: Standard deviation r of the training noise, in units of the noise to remove.
        generator: Source of the noise; None always gives the same.

    Attributes:
        mean: Mean of the data, float64 [D].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `copies` or `ratio` is not positive.

    References:
        Ghane, Akhtiamov and Hassibi, Precise performance of linear denoisers in the proportional
        regime, 2026.
    """

    mean: Tensor
    _signal: Tensor
    _mixed: Tensor
    _noise: Tensor

    def __init__(
        self,
        data: TrainingSet,
        copies: int = 1,
        *,
        ratio: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(check_set(data).image_shape)
        self.copies = check_rounds(copies, "copies")
        self.ratio = check_positive(ratio, "ratio")
        check_generator(generator)
        source = torch.Generator("cpu").manual_seed(_SEED) if generator is None else generator
        moments = Moments.from_data(data)
        mean, size = moments.mean.flatten(), data.num_values
        mixed = torch.zeros(size, size, dtype=torch.float64, device=data.device)
        noise = torch.zeros_like(mixed)
        for _ in range(self.copies):
            for values in _centred_blocks(data, mean):
                z = torch.randn(
                    values.shape, generator=source, dtype=torch.float64, device=source.device
                ).to(values.device)
                mixed += values.T @ z
                noise += z.T @ z
        count = moments.count * self.copies
        self.register_buffer("mean", mean)
        # Means over all pairs of v v^T, of v z^T and of z z^T.
        share = (moments.count - 1) / moments.count
        self.register_buffer("_signal", share * moments.covariance)
        self.register_buffer("_mixed", mixed / count)
        self.register_buffer("_noise", noise / count)

    @property
    def device(self) -> torch.device:
        """Device of the sums, where inputs must be."""
        return self.mean.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseTrainedDenoiser:
        # Follows moves between devices; stays in float64 whatever dtype the module is cast to.
        device = device_after(fn, self.device)
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def matrix(self, sigma: LevelLike, alpha: float | Tensor = 1.0) -> Tensor:
        """The matrix W of one noise level, numbers or tensors without dimensions: [D, D].

        Args:
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Raises:
            TypeError: A level is not a number.
            ValueError: A level is out of range.
        """
        levels = check_levels(sigma, alpha, 1)
        check_magnitude(torch.zeros(1, 1), levels.alpha, "alpha")
        return self._matrix(levels)

    def _matrix(self, levels: Levels) -> Tensor:
        """The matrix of the first of some levels, which are all the same."""
        alpha, sigma = (level[0] for level in levels.tensors(1, self.device))
        # Beyond it W is 0 to the last digit, and squares are no numbers.
        noise = (self.ratio * sigma).clamp(max=_MOST_NOISE)
        target = alpha * self._signal + noise * self._mixed
        mixed = alpha * noise * self._mixed
        seen = alpha**2 * self._signal + mixed + mixed.T + noise**2 * self._noise
        return target @ torch.linalg.pinv(seen, hermitian=True)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        values = x.double().flatten(1)
        alpha, _ = levels.columns(1, x.device)
        centred = values - alpha * self.mean
        result = self.mean + self._filtered(centred[None], levels, transposed=False)[0]
        return result.reshape(x.shape).to(x.dtype)

    def _filtered(self, values: Tensor, levels: Levels, *, transposed: bool) -> Tensor:
        """W, or its transpose, applied to values [K, B, D]."""
        rows = [level.rows for level in split_levels(levels, values.shape[1])]
        matrices = (self._matrix(levels.of(some)) for some in rows)
        products = [
            values[:, some] @ (matrix if transposed else matrix.T)
            for some, matrix in zip(rows, matrices, strict=True)
        ]
        return join_rows(products, rows, 1)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        products = self._filtered(tangents.double().flatten(2), levels, transposed=False)
        return self._denoise(x, levels), products.reshape(tangents.shape).to(x.dtype)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        products = self._filtered(cotangents.double().flatten(2), levels, transposed=True)
        return products.reshape(cotangents.shape).to(x.dtype)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"copies={self.copies}, ratio={self.ratio}"


def _centred_blocks(data: TrainingSet, mean: Tensor) -> Iterator[Tensor]:
    """Values of a set, its copies included, less their mean [D]: blocks float64 [n, D]."""
    size = images_per_chunk(_BLOCK_BYTES, 24 * data.num_values, len(data))
    for values in Reader.of(data).values(size, torch.float64):
        yield values.flatten(1) - mean
