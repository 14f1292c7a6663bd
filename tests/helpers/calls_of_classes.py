"""Constructors of public classes."""

from __future__ import annotations

import functools

import numpy as np
import torch
from calls_common import (
    BACKENDS,
    SHAPE,
    WHOLE,
    Affine,
    Call,
    basis,
    calibration,
    images,
    is_text,
    training_set,
)
from torch import Tensor, nn
from wrong_values import (
    FLOATS,
    INTEGERS,
    MAY,
    Kind,
    anything_callable,
    choice,
    count,
    flag,
    instance,
    only,
    real,
    tensor,
)

import pyflocality as pf
from pyflocality.weights import QueryWeights


def classes() -> dict[str, Call]:
    data = training_set()
    soft = torch.rand(3, 64, generator=torch.Generator().manual_seed(1))
    window = only(_is_odd_window_form)
    floats_or_masks = tensor(dtypes={**FLOATS, "bool": INTEGERS["bool"]})

    def call(cls: type, kinds: dict[str, Kind] | None = None, **given: object) -> Call:
        return Call(cls, functools.partial(dict, given), kinds or {})

    return {
        "OptimalDenoiser": call(pf.OptimalDenoiser, data=data),
        "NearestDenoiser": call(pf.NearestDenoiser, data=data),
        "WienerDenoiser": call(
            pf.WienerDenoiser,
            {
                "data": instance(pf.TrainingSet, pf.Moments, pf.Basis),
                "rank": count(1, 64, optional=True),
            },
            data=data,
            rank=3,
        ),
        "LedoitWolfDenoiser": call(pf.LedoitWolfDenoiser, data=data),
        "NoiseTrainedDenoiser": call(
            pf.NoiseTrainedDenoiser, {"copies": count(), "ratio": real(0.0)}, data=data, copies=1
        ),
        "PCALocalityDenoiser": call(
            pf.PCALocalityDenoiser,
            {
                "mask_threshold": real(0.0, 1.0, low_open=False),
                "softness": real(0.0, low_open=False),
                "aggregation": choice("exact", "batch_mean"),
                "batch_size": count(),
            },
            data=data,
        ),
        "LocalDenoiser": call(pf.LocalDenoiser, {"window": window}, data=data, window=3),
        "EquivariantDenoiser": call(
            pf.EquivariantDenoiser, {"window": window}, data=data, window=3
        ),
        "PatchSetDenoiser": call(
            pf.PatchSetDenoiser,
            {"window": only(_is_window_form), "masks": only(_is_none_or_function)},
            data=data,
            window=3,
        ),
        "FilteredPosteriorDenoiser": call(
            pf.FilteredPosteriorDenoiser,
            {
                "query_weights": floats_or_masks,
                "response_weights": tensor(
                    dtypes={**FLOATS, "bool": INTEGERS["bool"]}, optional=True
                ),
            },
            data=data,
            query_weights=soft,
            response_weights=soft,
        ),
        "FourierWienerDenoiser": call(
            pf.FourierWienerDenoiser,
            {"data": instance(pf.TrainingSet, pf.Moments, pf.Basis)},
            data=data,
        ),
        "WaveletShrinkageDenoiser": call(
            pf.WaveletShrinkageDenoiser,
            {
                "image_shape": only(lambda v: False),
                "levels": count(1, 3),
                "rule": choice("hard", "soft", "bayes"),
                "threshold": real(0.0, optional=True),
            },
            image_shape=SHAPE,
            levels=2,
        ),
        "LocallyLinearDenoiser": call(
            pf.LocallyLinearDenoiser,
            {
                "denoiser": only(lambda v: False),
                "slope": only(_is_slope),
                "moments": instance(pf.Moments, pf.Basis, optional=True),
                "progress": flag(),
            },
            denoiser=pf.LocalDenoiser(data, 3),
            slope=0.3,
            moments=basis(),
        ),
        "MixtureDenoiser": call(
            pf.MixtureDenoiser,
            {"denoisers": only(lambda v: False), "weights": only(_is_mixture)},
            denoisers=[pf.OptimalDenoiser(data), pf.LocalDenoiser(data, 3)],
            weights=(0.25, 0.75),
        ),
        "Candidate": call(
            pf.Candidate,
            {
                "model": choice("local", "patch-set"),
                "threshold": only(lambda v: v is None),
                "window": count(),
                "slope": real(0.0, 1.0, low_open=False, high_open=False),
                "parts": only(lambda v: v == ()),
            },
            model="local",
            window=3,
        ),
        "CalibratedDenoiser": call(
            pf.CalibratedDenoiser,
            {"calibration": instance(pf.Calibration)},
            data=data,
            calibration=calibration(),
        ),
        "MultiscaleDenoiser": call(
            pf.MultiscaleDenoiser,
            {
                "window": only(lambda v: _is_odd_window(v) or v == range(2)),
                "coarse": choice("optimal", "wiener", "pca_locality"),
                "mask_threshold": only(lambda v: v is None),
                "bandwidth": real(0.0),
                "shifts": count(1, 4),
            },
            data=data,
            levels=1,
            window=3,
        ),
        "GaussianMixtureDenoiser": call(
            pf.GaussianMixtureDenoiser,
            {
                "gamma": only(_is_slope),
                "moments": instance(pf.Moments, pf.Basis, optional=True),
            },
            data=data,
            gamma=0.5,
        ),
        "GoldenSubset": call(
            pf.GoldenSubset,
            {
                "denoiser": instance(),
                "k_min": count(1, 12, optional=True),
                "k_max": count(1, 12, optional=True),
                "pool_resolution": count(),
            },
            denoiser=pf.OptimalDenoiser(data),
            k_min=2,
            k_max=6,
        ),
        "CertifiedSubset": call(
            pf.CertifiedSubset,
            {"denoiser": instance(), "tol": real(0.0, 1.0, low_open=False)},
            denoiser=pf.OptimalDenoiser(data),
        ),
        "NetworkDenoiser": call(
            pf.NetworkDenoiser,
            {
                "module": instance(nn.Module),
                "predicts": choice("x0", "noise", "v", "residual"),
                "takes": choice("sigma", "nothing", "sigma_alpha"),
                "image_shape": only(lambda v: False),
                "value_range": only(
                    lambda v: v == (1, 2) or v == range(2) or v == torch.Size((1, 2))
                ),
            },
            module=Affine().eval(),
            takes="sigma",
            image_shape=SHAPE,
        ),
        "DDPMSchedule": call(
            pf.DDPMSchedule,
            {"num_timesteps": count(), "beta_start": real(0, 1), "beta_end": real(0, 1)},
            num_timesteps=10,
        ),
        "KarrasSchedule": call(
            pf.KarrasSchedule,
            {"sigma_min": real(0.0), "sigma_max": real(0.0), "rho": real(0.0)},
        ),
        "CosineSchedule": call(pf.CosineSchedule),
        "NoiseLevel": call(
            pf.NoiseLevel,
            dict.fromkeys(("alpha", "sigma"), real(0.0, low_open=False, tensors=True, shapes=True)),
            alpha=0.9,
            sigma=0.5,
        ),
        "FlowSchedule": call(pf.FlowSchedule, {"t_min": real(0.0, 1.0)}),
        "DDIM": call(pf.DDIM, {"eta": real(0.0, 1.0, low_open=False, high_open=False)}),
        "WindowTable": call(
            pf.WindowTable,
            {
                "ratios": only(lambda v: isinstance(v, (tuple, torch.Size)) and len(v) == 2),
                "windows": only(lambda v: isinstance(v, (tuple, torch.Size)) and len(v) == 2),
                "similarities": only(lambda v: False),
            },
            ratios=(1.0, 0.1),
            windows=(3, 5),
            similarities=((0.5, 0.2), (0.1, 0.9)),
        ),
        "TrainingSet": Call(
            pf.TrainingSet,
            lambda: {"images": images(), "labels": torch.arange(12), "name": "set"},
            {
                "images": tensor(
                    dtypes={
                        "uint8": 0,
                        "float32": 0,
                        "float64": 0,
                        "numpy": 0,
                        "a dimension less": 0,
                        "longer": 0,
                    },
                ),
                "labels": tensor(dtypes=WHOLE | {"numpy": 0, "list": 0}, optional=True),
                "name": only(is_text),
                "label_names": only(lambda v: v is None),
            },
        ),
        "adapters.TableSchedule": call(
            pf.adapters.TableSchedule,
            {"values": only(lambda v: v == [0.5] or v == [1.0])},
            values=(0.9, 0.5, 0.1),
        ),
        "adapters.DiffusersModel": call(
            pf.adapters.DiffusersModel,
            {
                "schedule": instance(pf.adapters.TableSchedule),
                "scheduler": None,
                "prediction": choice("epsilon", "sample", "v_prediction"),
            },  # fmt: skip
            denoiser=pf.OptimalDenoiser(data),
            schedule=pf.adapters.TableSchedule((0.9, 0.5)),
        ),
        "adapters.AzulaDenoiser": call(
            pf.adapters.AzulaDenoiser,
            {"schedule": anything_callable()},
            denoiser=pf.OptimalDenoiser(data),
            schedule=pf.CosineSchedule(),
        ),
        "use_backend": Call(
            _use_backend,
            lambda: {"backend": "auto"},
            {"backend": choice(*BACKENDS[1:])},
            signature=pf.use_backend,
        ),
        "weights.QueryWeights": call(
            QueryWeights,
            {"weights": _weights(), "signed": flag(), "name": only(is_text)},
            weights=soft,
        ),
    }


def _weights() -> Kind:
    """Matrices of any shape."""
    allowed = {**FLOATS, "bool": 0, "longer": 0}
    return tensor(dtypes=allowed, odd=lambda label, value: MAY if label == "tensor 2-D" else None)


def _use_backend(backend: object) -> None:
    with pf.use_backend(backend):
        pass


def _is_odd_window(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value in (1, 3)


def _is_odd_window_form(value: object) -> bool:
    return _is_odd_window(value) or (callable(value) and not isinstance(value, Tensor))


def _is_window_form(value: object) -> bool:
    fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 1 <= value <= 8
    return fits or (callable(value) and not isinstance(value, Tensor))


def _is_slope(value: object) -> bool:
    """A number in [0, 1], or a function that may answer one."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    if number and not isinstance(value, bool):
        return 0 <= value <= 1
    return callable(value) and not isinstance(value, Tensor)


def _is_mixture(value: object) -> bool:
    """Two numbers that sum to 1, or a function that may answer them."""
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
        return dense and value.dtype.itemsize > 1 and value.tolist() == [0.5, 0.5]
    return callable(value) or value == range(2)


def _is_none_or_function(value: object) -> bool:
    return value is None or (callable(value) and not isinstance(value, Tensor))
