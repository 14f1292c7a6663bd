r"""Spectra of a denoiser's Jacobian, without ever forming it.

At a noisy image y a denoiser acts as its Jacobian does where it is locally linear,
:math:`f(y) \approx J y = \sum_k \lambda_k \langle y, e_k \rangle e_k`: the eigenvectors are the
basis in which it shrinks and the eigenvalues are the shrinkage factors. Products with J are
`Denoiser.jvp`, products with its transpose `Denoiser.vjp`; the solvers are SciPy's ARPACK and
count every product, which is what costs a pass over the training set.

References:
    Kadkhodaie, Guth, Simoncelli and Mallat, Generalization in diffusion models arises from
    geometry-adaptive harmonic representations, ICLR 2024.
    Mohan, Kadkhodaie, Simoncelli and Fernandez-Granda, Robust and interpretable blind image
    denoising via bias-free convolutional neural networks, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.checks import (
    LevelLike,
    NoiseLevel,
    as_pair,
    check_batch,
    check_count,
    check_flag,
    check_generator,
    check_level,
    check_rounds,
    check_tensor,
    describe,
)
from pyflocality.denoisers.base import Denoiser, check_denoiser

# Relative accuracy asked of the solvers: products in float32 are good for some 1e-6.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Probes of the trace that share a pass over the training set.
_PROBES_AT_A_TIME = 8


class Spectrum(NamedTuple):
    """Leading eigenpairs of a Jacobian.

    Attributes:
        values: Eigenvalues, largest first (by absolute value if complex), [k]; float64, or
            complex128 where the Jacobian was not symmetrised.
        vectors: Unit eigenvectors, [k, C, H, W].
        residuals: Norms |J e - lambda e|, float64 [k].
        products: Products with the Jacobian or its transpose that it took.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


class SingularSpectrum(NamedTuple):
    """Leading singular triplets J = sum_k s_k l_k r_k^T.

    Attributes:
        values: Singular values, largest first, float64 [k].
        left: Left singular vectors (outputs), [k, C, H, W].
        right: Right singular vectors (inputs), [k, C, H, W].
        products: Products with the Jacobian or its transpose that it took.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    products: int


class Trace(NamedTuple):
    """A stochastic estimate of the trace of the Jacobian.

    Attributes:
        value: Mean over the probes, float64 [B].
        standard_error: Standard deviation of that mean, float64 [B].
    """

    value: Tensor
    standard_error: Tensor


def jacobian_spectrum(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float | NoiseLevel,
    alpha: float = 1.0,
    k: int = 20,
    *,
    symmetrized: bool = True,
    seed: int = 0,
) -> Spectrum:
    r"""Leading eigenvalues and eigenvectors of the Jacobian at one noisy image.

    Args:
        denoiser: Any denoiser of this library.
        x: One noisy image, [C, H, W] or [1, C, H, W].
        sigma: Noise level, positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.
        k: Number of eigenpairs, at most C H W - 2.
        symmetrized: Take :math:`(J + J^\top) / 2`, whose eigenvalues are real. The Jacobian of
            the optimal denoiser is symmetric as it is, those of patch models are not. Without
            it eigenvalues and eigenvectors are complex.
        seed: Seed of the solver's starting vector.

    Returns:
        Eigenpairs and their residuals, on the CPU: symmetrised, the k largest eigenvalues; else
        the k largest by absolute value. Products are computed in float64 if x is, else in
        float32. All eigenvalues are 0 where the Jacobian is, as where one image is recited.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape or range.
        ImportError: SciPy is not installed.
    """
    symmetrized = check_flag(symmetrized, "symmetrized")
    linalg = _solvers()
    jacobian = _Jacobian(denoiser, x, sigma, alpha)
    k = jacobian.check_k(k)
    start = jacobian.start(seed)
    options = {"v0": start, "tol": jacobian.tolerance}
    product = jacobian.symmetric if symmetrized else jacobian.jvp
    operator = jacobian.operator(linalg, product, None)
    if jacobian.is_zero(product, start):
        kind = np.float64 if symmetrized else np.complex128
        values, vectors = np.zeros(k, kind), np.eye(jacobian.size, k, dtype=kind)
        residuals = torch.zeros(k, dtype=torch.float64)
        return Spectrum(
            torch.from_numpy(values), jacobian.images(vectors), residuals, jacobian.products
        )
    if symmetrized:
        values, vectors = linalg.eigsh(operator, k, which="LA", **options)
        order = np.argsort(-values)
    else:
        values, vectors = linalg.eigs(operator, k, which="LM", **options)
        order = np.argsort(-np.abs(values), kind="stable")
    values, vectors = values[order], vectors[:, order]
    products = jacobian.products
    norms = [_residual(operator, values[i], vectors[:, i]) for i in range(k)]
    return Spectrum(
        torch.from_numpy(values),
        jacobian.images(vectors),
        torch.tensor(norms, dtype=torch.float64),
        products,
    )


def jacobian_singular(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float | NoiseLevel,
    alpha: float = 1.0,
    k: int = 20,
    *,
    seed: int = 0,
) -> SingularSpectrum:
    """Leading singular triplets of the Jacobian at one noisy image.

    Arguments and errors as for `jacobian_spectrum`.
    """
    linalg = _solvers()
    jacobian = _Jacobian(denoiser, x, sigma, alpha)
    k = jacobian.check_k(k)
    operator = jacobian.operator(linalg, jacobian.jvp, jacobian.vjp)
    start = jacobian.start(seed)
    if jacobian.is_zero(lambda v: jacobian.vjp(jacobian.jvp(v)), start):
        vectors = jacobian.images(np.eye(jacobian.size, k))
        zeros = torch.zeros(k, dtype=torch.float64)
        return SingularSpectrum(zeros, vectors, vectors.clone(), jacobian.products)
    left, values, right = linalg.svds(operator, k, v0=start, tol=jacobian.tolerance)
    order = np.argsort(-values)
    return SingularSpectrum(
        torch.from_numpy(values[order].copy()),
        jacobian.images(left[:, order]),
        jacobian.images(right[order].T),
        jacobian.products,
    )


def jacobian_trace(
    denoiser: Denoiser,
    x: Tensor,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    probes: int = 32,
    generator: torch.Generator | None = None,
) -> Trace:
    r"""Trace of the Jacobian by Hutchinson's estimator: the mean of :math:`z^\top J z`.

    With random signs z its expectation is :math:`\sum_k \lambda_k`, the number of directions
    that are kept: the effective dimension of what the denoiser takes for signal. For the optimal
    denoiser with alpha = 1 the expected squared error is sigma^2 times the mean trace (Stein).

    Args:
        denoiser: Any denoiser of this library.
        x: Noisy images, [B, C, H, W].
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        probes: Number of probes, at least 2; the standard error falls as its square root.
        generator: Source of randomness; by default a fixed seed.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape or range.
    """
    check_denoiser(denoiser)
    x = check_batch(x, denoiser.image_shape, denoiser.device, "x")
    probes = check_rounds(probes, "probes", minimum=2)
    generator = check_generator(generator) or torch.Generator().manual_seed(0)
    estimates = []
    for start in range(0, probes, _PROBES_AT_A_TIME):
        number = min(_PROBES_AT_A_TIME, probes - start)
        signs = torch.randint(2, (number, *x.shape), generator=generator, device=generator.device)
        signs = (2 * signs - 1).to(x)
        _, products = denoiser.jvp(x, signs, sigma, alpha)
        estimates.append((signs.double() * products.double()).flatten(2).sum(2))
    values = torch.cat(estimates)
    return Trace(values.mean(0), values.std(0) / probes**0.5)


def local_linearity(
    denoiser: Denoiser, x: Tensor, sigma: LevelLike, alpha: float | Tensor = 1.0
) -> Tensor:
    """How far a denoiser is from its own linearisation: |J x - f(x)| / |f(x)|, float64 [B].

    0 for bias-free networks, which are piecewise linear, if their range of values is centred on 0
    (another one adds a constant to x), and for the Wiener filter of centred data.

    Args:
        denoiser: Any denoiser of this library.
        x: Noisy images, [B, C, H, W].
        sigma: Noise level, a number or [B]; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape or range.
    """
    check_denoiser(denoiser)
    x = check_batch(x, denoiser.image_shape, denoiser.device, "x")
    answer, product = denoiser.jvp(x, x[None], sigma, alpha)
    answer, product = answer.double().flatten(1), product[0].double().flatten(1)
    return (product - answer).norm(dim=1) / answer.norm(dim=1)


class _Jacobian:
    """The Jacobian at one noisy image as a linear operator on vectors of D values."""

    def __init__(
        self, denoiser: Denoiser, x: Tensor, sigma: LevelLike, alpha: float | Tensor
    ) -> None:
        check_denoiser(denoiser)
        if check_tensor(x, "x").ndim == 3:
            x = x[None]
        if tuple(x.shape) != (1, *denoiser.image_shape):
            raise ValueError(
                f"`x` must be one image {list(denoiser.image_shape)}, got {describe(x)}"
            )
        sigma, alpha = as_pair(sigma, alpha)
        sigma = check_level(sigma, 1, x.device, "sigma", allow_zero=False)
        alpha = check_level(alpha, 1, x.device, "alpha", allow_zero=False)
        x = check_batch(x, denoiser.image_shape, denoiser.device, "x").detach()
        # In half precision the products would be too coarse for the solvers.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.denoiser, self.x, self.level = denoiser, x, (sigma, alpha)
        self.size = x.numel()
        self.tolerance = _TOLERANCE[x.dtype]
        self.products = 0

    def check_k(self, k: int) -> int:
        """A number of eigenpairs that the solvers can find."""
        return check_count(k, "k", maximum=self.size - 2)

    def start(self, seed: int) -> np.ndarray:
        """A starting vector for the solvers."""
        seed = check_count(seed, "seed", minimum=0)
        return np.random.default_rng(seed).standard_normal(self.size)

    def is_zero(self, product: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> bool:
        """Whether a random vector is mapped to 0, and with it, for sure, every vector.

        So it is where a model recites one image. The solvers refuse such an operator.
        """
        return not product(start[:, None]).any()

    def jvp(self, vectors: np.ndarray) -> np.ndarray:
        """J v of vectors [D, n]."""
        return self._apply(vectors, lambda u: self.denoiser.jvp(self.x, u, *self.level)[1])

    def vjp(self, vectors: np.ndarray) -> np.ndarray:
        """J^T v of vectors [D, n]."""
        return self._apply(vectors, lambda u: self.denoiser.vjp(self.x, u, *self.level))

    def symmetric(self, vectors: np.ndarray) -> np.ndarray:
        """(J + J^T) v / 2 of vectors [D, n]."""
        if self.denoiser.symmetric_jacobian:
            return self.jvp(vectors)
        return (self.jvp(vectors) + self.vjp(vectors)) / 2

    def operator(
        self,
        linalg: Any,  # noqa: ANN401
        product: Callable[[np.ndarray], np.ndarray],
        vjp: Callable[[np.ndarray], np.ndarray] | None,
    ) -> Any:  # noqa: ANN401
        """A SciPy operator."""

        def column(function: Callable[[np.ndarray], np.ndarray]) -> Callable:
            return lambda vector: function(vector.reshape(self.size, 1))[:, 0]

        return linalg.LinearOperator(
            (self.size, self.size),
            matvec=column(product),
            matmat=product,
            rmatvec=None if vjp is None else column(vjp),
            rmatmat=vjp,
            dtype=np.float64,
        )

    def images(self, vectors: np.ndarray) -> Tensor:
        """Columns [D, k] as images [k, C, H, W]."""
        columns = torch.from_numpy(np.ascontiguousarray(vectors.T))
        return columns.reshape(-1, *self.denoiser.image_shape)

    def _apply(self, vectors: np.ndarray, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        # Complex vectors come from the residuals of complex eigenpairs.
        if np.iscomplexobj(vectors):
            return self._apply(vectors.real, function) + 1j * self._apply(vectors.imag, function)
        self.products += vectors.shape[1]
        directions = torch.from_numpy(np.ascontiguousarray(vectors.T)).to(self.x)
        result = function(directions.reshape(-1, *self.x.shape))
        return result.detach().double().cpu().reshape(-1, self.size).numpy().T


def _residual(operator: Any, value: complex, vector: np.ndarray) -> float:  # noqa: ANN401
    return float(np.linalg.norm(operator @ vector - value * vector))


def _solvers() -> Any:  # noqa: ANN401
    try:
        from scipy.sparse import linalg
    except ImportError as error:
        raise ImportError(
            "spectra need SciPy: pip install 'pyflocality[analysis]' or pip install scipy"
        ) from error
    return linalg
