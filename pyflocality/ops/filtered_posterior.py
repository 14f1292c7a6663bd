"""Posterior means with free query and response weights: filtered posteriors and patch sets."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._backends import Implementation, register, select
from pyflocality._problem import posterior_problem
from pyflocality.weights import QueryWeights

register(
    "filtered_posterior",
    {
        "reference": Implementation(
            "pyflocality.reference.filtered_posterior", "filtered_posterior_mean"
        ),
    },
)


def filtered_posterior_mean(
    x: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    responses: Tensor | QueryWeights,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Blend of Q posterior means, each over its own weighting of the inputs.

    .. math::
        \hat x_0[d] = \frac{\sum_q r_q[d] \sum_i p_{q,i} v_i[d]}{\sum_q r_q[d]}, \qquad
        p_q = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_d w_q[d] (x[d] - \alpha v_i[d])^2 \right)

    A value that no query answers gets the plain mean of the training images, and so does a query
    without weights.

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        weights: Query weights w, bool or float, [Q, D] with D = C H W.
        responses: Response weights r, bool or float, [Q, D].
        sigma: Noise level, a number or [B]; 0 gives the nearest image per query.
        alpha: Signal coefficient, a number or [B], positive.
        temperature: Divides the logits.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in x's own (half precision
            computes in float32).
        memory_budget: Working memory, bytes or a string such as "2GB".
        chunk_size: Training images at a time; None derives it from the budget. The result does
            not depend on it beyond rounding.

    Returns:
        Blended posterior means in [-1, 1], dtype of x, [B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The backend asked for cannot serve this call.

    References:
        Niedoba, Zwartsenberg, Murphy and Wood, Towards a mechanistic explanation of diffusion
        model generalization, 2025 (patch set posterior composites), and its 2026 sequel
        (filtered posterior mean composites).
    """
    problem = posterior_problem(
        x,
        images,
        sigma,
        alpha,
        temperature=temperature,
        dtype=dtype,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
    )
    weights, responses = check_pair(weights, responses, problem.images[0].numel())
    run = select("filtered_posterior", problem.call(), backend)
    return run(problem, weights, responses).reshape(x.shape).to(x.dtype)


def check_pair(
    weights: Tensor | QueryWeights, responses: Tensor | QueryWeights, values: int
) -> tuple[QueryWeights, QueryWeights]:
    """Weights and responses of the same queries, with an answer for every value.

    Values that no query answers are left to one more query without weights, whose posterior is
    uniform.
    """
    pair = []
    for name, given in (("weights", weights), ("responses", responses)):
        if not isinstance(given, QueryWeights):
            given = QueryWeights(given, name=name)
        if given.shape[1] != values:
            raise ValueError(
                f"`{name}` must have shape [Q, {values}] for images of {values} values, got "
                f"{list(given.shape)}"
            )
        pair.append(given)
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"`responses` must have shape {list(pair[0].shape)} like the weights, got "
            f"{list(pair[1].shape)}"
        )
    unanswered = ~pair[1].answered
    if not unanswered.any():
        return pair[0], pair[1]
    return pair[0].with_row(torch.zeros_like(unanswered)), pair[1].with_row(unanswered)
