"""Between this library and others: their networks as denoisers, our denoisers as their models.

| from | to | how |
|---|---|---|
| a diffusers `UNet2DModel` and its scheduler | a denoiser | `from_diffusers` |
| a network `D(x, sigma)` of EDM or k-diffusion | a denoiser | `from_edm` |
| a denoiser | a model for diffusers' schedulers and pipelines | `as_diffusers` |
| a denoiser | a denoiser for azula's samplers | `as_azula` |
| a denoiser | a model for k-diffusion's samplers | nothing to do: they call `model(x, sigma)` |

None of these packages is needed here: what is converted is used by its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pyflocality._support.checks import (
    NoiseLevel,
    check_batch,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_level,
    check_tensor,
    describe,
)
from pyflocality.denoisers.base import Denoiser, check_denoiser
from pyflocality.denoisers.network import NetworkDenoiser
from pyflocality.noise.conversions import noise_from_x0, v_from_x0
from pyflocality.noise.schedulers import (
    has_continuous_times,
    option,
    refuse_as_sampler,
    visited_ratio,
)
from pyflocality.noise.schedules import NO_SIGNAL, check_times
from pyflocality.noise.tables import TableSchedule

__all__ = [
    "AzulaDenoiser",
    "AzulaPosterior",
    "DiffusersModel",
    "DiffusersOutput",
    "TableSchedule",
    "as_azula",
    "as_diffusers",
    "from_diffusers",
    "from_edm",
]

_PREDICTIONS = {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}


def from_diffusers(
    unet: nn.Module, scheduler: object, *, class_labels: int | None = None
) -> NetworkDenoiser:
    """A diffusers `UNet2DModel` as a denoiser.

    It gets the time of the scheduler's table whose noise level is nearest (`NetworkDenoiser`),
    and its output is read by the scheduler's `prediction_type`. Where it has twice the channels
    of its input, the first half counts: the other is a learned variance. Sample with the same
    noise levels, spaced as the scheduler's `timestep_spacing` says, by
    `pf.sample(denoiser, schedule=denoiser.takes)`.

    Args:
        unet: The network, called as `unet(x, t).sample`, with `config.in_channels` and
            `config.sample_size`.
        scheduler: The scheduler it was trained with: `alphas_cumprod`, `config.prediction_type`.
        class_labels: Class to denoise for, where the network is conditioned on one.

    Raises:
        TypeError: An argument lacks these attributes.
        ValueError: The prediction type is none of "epsilon", "sample" and "v_prediction", or the
            network's noise is not that of the scheduler's table, or its time not one of it.
    """
    config = getattr(unet, "config", None)
    size = getattr(config, "sample_size", None)
    channels = getattr(config, "in_channels", None)
    if not isinstance(unet, nn.Module) or channels is None or size is None:
        raise TypeError(
            "`unet` must be a torch.nn.Module with `config.in_channels` and `config.sample_size`, "
            f"got {describe(unet)}"
        )
    if class_labels is not None:
        class_labels = check_count(class_labels, "class_labels", minimum=0)
    takes = TableSchedule.of(scheduler, "scheduler")
    prediction = _prediction_of(scheduler, "scheduler")
    if has_continuous_times(scheduler):
        raise ValueError(
            f"`scheduler` must tell the network times of its table, got a "
            f"{type(scheduler).__name__} with `timestep_type` 'continuous'"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return NetworkDenoiser(
        _DiffusersOutput(unet, class_labels),
        _PREDICTIONS[prediction],
        takes=takes,
        image_shape=(channels, height, width),
    )


def from_edm(
    network: nn.Module,
    image_shape: Sequence[int] | None = None,
    *,
    class_labels: Tensor | None = None,
) -> NetworkDenoiser:
    """A network `D(x, sigma)` that answers clean images, alpha = 1, as a denoiser.

    That is the form of EDM's preconditioned networks (Karras et al. 2022) and of k-diffusion's
    models. For other alpha it sees x / alpha at the noise level sigma / alpha.

    Args:
        network: The network, called as `network(x, sigma)` with sigma [B].
        image_shape: Shape (C, H, W); by default EDM's attributes `img_channels` and
            `img_resolution`.
        class_labels: Conditioning as the network takes it for one image, [1, L]; the network is
            then called as `network(x, sigma, class_labels)` with [B, L].

    Raises:
        TypeError: An argument has the wrong type, or the image shape is unknown.
        ValueError: `image_shape` is not three positive numbers, or `class_labels` not [1, L].
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"`network` must be a torch.nn.Module, got {describe(network)}")
    if image_shape is None:
        channels = getattr(network, "img_channels", None)
        resolution = getattr(network, "img_resolution", None)
        if channels is None or resolution is None:
            raise TypeError(
                "`image_shape` must be given for a network without `img_channels` and "
                f"`img_resolution`, got None with {type(network).__name__}"
            )
        image_shape = (channels, resolution, resolution)
    if class_labels is not None:
        check_tensor(class_labels, "class_labels")
        if class_labels.ndim != 2 or len(class_labels) != 1:
            raise ValueError(f"`class_labels` must be [1, L], got {describe(class_labels)}")
        network = _Conditioned(network, class_labels)
    return NetworkDenoiser(network, "x0", takes="sigma", image_shape=image_shape)


def _prediction_of(scheduler: object, name: str) -> str:
    prediction = option(scheduler, "prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise ValueError(
            f"`{name}` must predict one of {', '.join(_PREDICTIONS)}, got {describe(prediction)} "
            f"of a {type(scheduler).__name__}"
        )
    return prediction


def as_diffusers(denoiser: Denoiser, schedule: object) -> DiffusersModel:
    """A denoiser as a model for diffusers' schedulers, and for its DDPM and DDIM pipelines.

    Args:
        denoiser: Any denoiser of this library.
        schedule: What says alpha and sigma at the scheduler's times: best the diffusers scheduler
            itself, whose prediction type tells what the model answers; or a schedule of whole
            times such as `DDPMSchedule`, which differs from the scheduler's float32 table by its
            rounding. Where the scheduler has noise levels of its own (Karras' sigmas, for one),
            it must be the one that samples.

    Raises:
        TypeError: `denoiser` is no denoiser, or `schedule` has no table (flow matching and EDM).
        ValueError: The scheduler expects a prediction other than "epsilon", "sample" and
            "v_prediction", or its images have other noise levels than those of its times.
    """
    check_denoiser(denoiser)
    refuse_as_sampler(schedule, "schedule")
    prediction = _prediction_of(schedule, "schedule")
    return DiffusersModel(denoiser, TableSchedule.of(schedule, "schedule"), schedule, prediction)


def as_azula(
    denoiser: Denoiser, schedule: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> AzulaDenoiser:
    """A denoiser for azula's samplers.

    Args:
        denoiser: Any denoiser of this library.
        schedule: Maps times t, from 0 (data) to 1 (noise), to (alpha_t, sigma_t): a schedule of
            azula, or `CosineSchedule`.

    Raises:
        TypeError: `denoiser` is no denoiser, or `schedule` cannot be called.
    """
    return AzulaDenoiser(denoiser, schedule)


@dataclass(frozen=True, eq=False)
class DiffusersOutput:
    """What diffusers reads of a model's answer.

    Attributes:
        sample: What the model predicts, [B, C, H, W].
    """

    sample: Tensor


class DiffusersModel(nn.Module):
    """A denoiser that answers the noise (x - alpha x0) / sigma, x0 or v; see `as_diffusers`.

    Attributes:
        schedule: The noise levels of whole times.
        prediction: What it answers: "epsilon", "sample" or "v_prediction".
        config: `in_channels`, `out_channels` and `sample_size`, as pipelines read them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: TableSchedule,
        scheduler: object = None,
        prediction: str = "epsilon",
    ) -> None:
        check_denoiser(denoiser)
        check_instance(schedule, "schedule", TableSchedule)
        check_choice(prediction, "prediction", tuple(_PREDICTIONS))
        super().__init__()
        self.denoiser, self.schedule, self.prediction = denoiser, schedule, prediction
        self._scheduler = scheduler
        channels, *size = denoiser.image_shape
        self.config = SimpleNamespace(
            in_channels=channels, out_channels=channels, sample_size=tuple(size)
        )

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that pipelines draw their starting noise in: float32."""
        return torch.float32

    def forward(
        self, sample: Tensor, timestep: float | Tensor, *, return_dict: bool = True
    ) -> DiffusersOutput | tuple[Tensor]:
        """What the scheduler's model predicts.

        Args:
            sample: Noisy images x, [B, C, H, W].
            timestep: Time of the schedule, a number or a tensor without dimensions or [B].
            return_dict: Whether the answer has an attribute `sample`, or is a tuple.

        Raises:
            TypeError: As for the denoiser.
            ValueError: As for the denoiser, or the time is none of the schedule's, or has no
                signal, of which the noise that is predicted tells nothing.
        """
        sample = check_batch(sample, self.denoiser.image_shape, self.denoiser.device, "sample")
        return_dict = check_flag(return_dict, "return_dict")
        last = float(len(self.schedule.values) - 1)
        # Times that schedulers keep on the CPU are moved with the images.
        times = check_times(timestep, 0.0, last, name="timestep").to(sample.device)
        if times.ndim > 1 or (times.ndim == 1 and len(times) != len(sample)):
            raise ValueError(
                f"`timestep` must be a number or a tensor [{len(sample)}], got {describe(timestep)}"
            )
        alpha, sigma = self.levels(times)
        silent = alpha == 0
        if silent.any() and self.prediction == "epsilon":
            raise ValueError(
                f"`timestep` {int(times.max())} of this {type(self._scheduler).__name__} has no "
                "signal (zero terminal SNR), so that its noise tells nothing of the image: its "
                "`prediction_type` must be 'v_prediction' or 'sample'"
            )
        # The limit: no denoiser has an answer at alpha 0 itself.
        x0 = self.denoiser(sample, sigma, torch.where(silent, NO_SIGNAL, alpha))
        answer = x0
        if self.prediction == "epsilon":
            answer = noise_from_x0(sample, x0, alpha, sigma)
        elif self.prediction == "v_prediction":
            answer = v_from_x0(sample, x0, torch.where(silent, NO_SIGNAL, alpha), sigma)
        return DiffusersOutput(answer) if return_dict else (answer,)

    def levels(self, times: Tensor) -> NoiseLevel[Tensor]:
        """The levels of the images that the scheduler shows at its times, float64 as `times`.

        Raises:
            TypeError: `times` are no numbers.
            ValueError: The time is none of the schedule's.
        """
        last = float(len(self.schedule.values) - 1)
        times = check_times(times, 0.0, last, name="times")
        ratios = [visited_ratio(self._scheduler, time) for time in times.reshape(-1)]
        if None in ratios:
            return self.schedule(times)
        ratio = torch.tensor(ratios, dtype=torch.float64, device=times.device).reshape(times.shape)
        alpha = (1.0 + ratio.square()).rsqrt()
        return NoiseLevel(alpha, ratio * alpha)


@dataclass(frozen=True, eq=False)
class AzulaPosterior:
    """What azula's samplers read of a denoiser's answer.

    Attributes:
        mean: Estimates of x0, [B, C, H, W].
    """

    mean: Tensor


class AzulaDenoiser(nn.Module):
    """A denoiser called with azula's times; see `as_azula`."""

    def __init__(
        self, denoiser: Denoiser, schedule: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        check_denoiser(denoiser)
        check_callable(schedule, "schedule", "a function t -> (alpha, sigma)")
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def forward(self, x_t: Tensor, t: Tensor) -> AzulaPosterior:
        """The posterior at time t, known by its mean.

        Args:
            x_t: Noisy images, [B, C, H, W].
            t: Time, without dimensions or [B].

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument has the wrong shape, device or range.
        """
        x_t = check_batch(x_t, self.denoiser.image_shape, self.denoiser.device, "x_t")
        check_level(t, len(x_t), x_t.device, "t", allow_zero=True)
        alpha, sigma = self.schedule(t)
        return AzulaPosterior(self.denoiser(x_t, sigma, alpha))


class _DiffusersOutput(nn.Module):
    """The tensor inside a diffusers model's answer."""

    def __init__(self, unet: nn.Module, class_labels: int | None) -> None:
        super().__init__()
        self.unet, self.class_labels = unet, class_labels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        labels = {}
        if self.class_labels is not None:
            labels["class_labels"] = torch.full_like(t, self.class_labels)
        return self.unet(x, t, **labels).sample[:, : x.shape[1]]


class _Conditioned(nn.Module):
    """A network of (x, sigma, class_labels) with one condition for all images."""

    def __init__(self, network: nn.Module, class_labels: Tensor) -> None:
        super().__init__()
        self.network = network
        self.class_labels: Tensor
        self.register_buffer("class_labels", class_labels, persistent=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.network(x, sigma, self.class_labels.expand(len(x), -1))
