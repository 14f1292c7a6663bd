"""Filtered posteriors: any query weights, any response weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyflocality._support.checks import check_tensor
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Asked, DenoiserOptions, PosteriorDenoiser
from pyflocality.moments.undetermined import blind_values_of_set, warn_of_blind
from pyflocality.ops.filtered_posterior import FILTERED_POSTERIOR, check_pair
from pyflocality.ops.masked_posterior import MASKED_POSTERIOR
from pyflocality.ops.operation import Kind
from pyflocality.weights import QueryWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FilteredPosteriorDenoiser(PosteriorDenoiser):
    r"""Blend of posterior means, each over its own weighting of the inputs.

    .. math::
        \hat x_0[d] = \frac{\sum_q r_q[d] \sum_i p_{q,i} v_i[d]}{\sum_q r_q[d]}, \qquad
        p_q = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_d w_q[d] (x[d] - \alpha v_i[d])^2 \right)

    The other posterior models are special cases: whole-image weights and responses give the
    optimal denoiser, windows that answer their centre the local score model, windows that answer
    themselves the patch-set model. A value that no query answers gets the plain mean.

    Args:
        data: The training set.
        query_weights: w, bool or float, not negative, [Q, D] or [Q, C, H, W].
        response_weights: r, bool or float, not negative, of the same shape. None: query q
            answers value q alone, which takes Q = D.
        temperature: Divides the logits.
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The weights have the wrong shape, or are negative, NaN or above 1e9.

    References:
        Niedoba, Zwartsenberg, Murphy and Wood, Towards a mechanistic explanation of diffusion
        model generalization, 2025, and its 2026 sequel on filtered posterior mean composites.
    """

    def __init__(
        self,
        data: TrainingSet,
        query_weights: Tensor,
        response_weights: Tensor | None = None,
        *,
        temperature: float = 1.0,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        super().__init__(data, temperature, **options)
        self._weights = self._as_weights(query_weights, "query_weights")
        self._responses = None
        values = data.num_values
        if response_weights is not None:
            responses = self._as_weights(response_weights, "response_weights")
            names = "query_weights", "response_weights"
            self._weights, self._responses = check_pair(self._weights, responses, values, names)
        elif self._weights.shape != (values, values):
            raise ValueError(
                f"`query_weights` must have shape [{values}, {values}] where every query answers "
                f"its own value, got {list(self._weights.shape)}"
            )
        blind = blind_values_of_set(self._answered_blindly(), data)
        warn_of_blind(blind, "in `query_weights`")

    def _answered_blindly(self) -> Tensor:
        """Which values are answered by queries without weights alone, bool [D]."""
        empty = self._weights.empty
        if self._responses is None or not empty.any():
            return empty if self._responses is None else torch.zeros(self.data.num_values).bool()
        responses = self._responses.dense(torch.float32) > 0
        return responses[empty].any(0) & ~responses[~empty].any(0)

    def _as_weights(self, weights: object, name: str) -> QueryWeights:
        rows = check_tensor(weights, name, "a bool or float tensor [Q, D]")
        if tuple(rows.shape[1:]) == self.image_shape:
            rows = rows.flatten(1)
        return QueryWeights(rows, name=name)

    def _questions(self, kind: Kind) -> Callable[[float, float], Asked]:
        if self._responses is None:
            return lambda alpha, sigma: Asked(MASKED_POSTERIOR, (self._weights,))
        return lambda alpha, sigma: Asked(FILTERED_POSTERIOR, (self._weights, self._responses))
