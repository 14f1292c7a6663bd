"""What the schedulers of diffusers say about noise: their tables, and the levels they visit.

Most go by the table `alphas_cumprod` of alpha^2 at whole times. Some choose noise levels between
those of the table (Karras' sigmas, for one), keep them as `sigmas`, which are sigma / alpha, and
tell the model the nearest time, or one between whole times: there the time does not tell the
level. None of them is needed here, all is read by attribute.
"""

from __future__ import annotations

from torch import Tensor

from pyflocality._support.checks import check_tensor, describe

# Schedulers that show their model images of another noise level than that of the time.
_OTHER_LEVELS = {
    "DDIMInverseScheduler": "tells the model the time that a step leads to, not that of its images",
    "DPMSolverSDEScheduler": "asks the model at noise levels between those it keeps",
}


def option(scheduler: object, name: str, default: object = None) -> object:
    """An option of a scheduler."""
    return getattr(getattr(scheduler, "config", None), name, default)


def table_of(scheduler: object, name: str) -> Tensor:
    """alpha^2 at the whole times of a scheduler of diffusers, or of a schedule of ours, float64.

    Args:
        scheduler: Anything with the table as `alphas_cumprod` (diffusers) or `alpha_cumprod`.
        name: Name of the argument in error messages.

    Raises:
        TypeError: It has neither.
        ValueError: Its noise is not that of its table.
    """
    kind = type(scheduler).__name__
    table = getattr(scheduler, "alphas_cumprod", getattr(scheduler, "alpha_cumprod", None))
    if not isinstance(table, Tensor):
        shown = describe(scheduler)
        shown = shown if kind in shown else f"a {kind}"
        raise TypeError(
            f"`{name}` must be a diffusers scheduler with `alphas_cumprod`, or a schedule of "
            f"whole times such as DDPMSchedule, got {shown}"
        )
    if option(scheduler, "use_flow_sigmas", False):
        raise ValueError(
            f"`{name}` must be without `use_flow_sigmas`: the noise of that {kind} is not that "
            "of its `alphas_cumprod`"
        )
    return check_tensor(table, name).double().cpu()


def has_continuous_times(scheduler: object) -> bool:
    """Whether the times that a model gets are logarithms of the noise, not those of the table."""
    continuous = option(scheduler, "timestep_type") == "continuous"
    return continuous and option(scheduler, "prediction_type") == "v_prediction"


def refuse_as_sampler(scheduler: object, name: str) -> None:
    """Refuse a scheduler that could not sample with an exact denoiser for its model."""
    kind = type(scheduler).__name__
    if kind in _OTHER_LEVELS:
        raise ValueError(f"`{name}` must not be a {kind}, which {_OTHER_LEVELS[kind]}")
    if has_continuous_times(scheduler):
        raise ValueError(
            f"`{name}` must tell the model times of its table, got a {kind} with `timestep_type` "
            "'continuous'"
        )
    variance = option(scheduler, "variance_type")
    if isinstance(variance, str) and variance.startswith("learned"):
        raise ValueError(
            f"`{name}` must have a fixed variance, as a denoiser learns none, got a {kind} with "
            f"`variance_type` {variance!r}"
        )


def visited_ratio(scheduler: object, time: Tensor) -> float | None:
    """The ratio sigma / alpha of the images that a scheduler shows its model at a time.

    Args:
        scheduler: The scheduler, its `set_timesteps` called.
        time: The time, without dimensions.

    Returns:
        The ratio; None where the table tells it.

    Raises:
        ValueError: The table does not tell it, and the time is none of those that are visited.
    """
    times, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    # Every second time of some lies between two levels.
    between = getattr(scheduler, "sigmas_interpol", None)
    place = None
    # As they are made some hold the levels of the whole table, in another order than the times.
    if isinstance(times, Tensor) and isinstance(sigmas, Tensor) and len(sigmas) > len(times):
        places = (times.cpu() == time.cpu()).nonzero()[:, 0].tolist()
        # Times that are rounded may be the same for several levels.
        now = getattr(scheduler, "step_index", None)
        place = now if now in places else next(iter(places), None)
    if place is None or sigmas is None:
        if between is not None or _has_own_levels(scheduler):
            raise ValueError(
                f"`timestep` must be one that the {type(scheduler).__name__} given to "
                "`as_diffusers` visits, whose times do not tell its noise levels: call its "
                f"`set_timesteps` and sample with it, got {time.item():g}"
            )
        return None
    if between is not None and place % 2 == 1:
        ancestral = hasattr(scheduler, "sigmas_up")
        return float(between[place - 1 if ancestral else place])
    return float(sigmas[place])


def _has_own_levels(scheduler: object) -> bool:
    """Whether the times of a scheduler do not tell its noise levels."""
    names = ("karras", "exponential", "beta")
    options = [*(f"use_{name}_sigmas" for name in names), "use_lu_lambdas"]
    own = any(option(scheduler, name, False) for name in options)
    return own or option(scheduler, "interpolation_type") == "log_linear"
