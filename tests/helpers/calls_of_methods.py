"""Methods of public classes."""

from __future__ import annotations

import functools

import numpy as np
import torch
from calls_common import (
    SHAPE,
    STORED,
    Call,
    basis,
    calibration,
    denoisers,
    files,
    fits,
    images,
    is_int,
    is_path,
    is_resolution,
    moments,
    noisy,
    table,
    training_set,
)
from torch import Tensor
from wrong_values import (
    Kind,
    anything_callable,
    choice,
    count,
    flag,
    instance,
    level,
    one_level,
    only,
    real,
    tensor,
)

import pyflocality as pf
from pyflocality.weights import QueryWeights


def methods() -> dict[str, Call]:
    found: dict[str, Call] = {}
    x, directions = noisy(2, *SHAPE), noisy(2, 2, *SHAPE)
    level_of = {"sigma": 0.5, "alpha": 0.9}
    for name, denoiser in denoisers().items():
        for method, further in (
            ("forward", {}), ("jvp", {"tangents": directions}), ("vjp", {"cotangents": directions})
        ):  # fmt: skip
            given = {"x": x, **further, **level_of}
            function = denoiser if method == "forward" else getattr(denoiser, method)
            found[f"{name}.{method}"] = Call(
                function, functools.partial(dict, given), signature=getattr(denoiser, method)
            )
        if hasattr(denoiser, "log_sum_exp"):
            found[f"{name}.log_sum_exp"] = Call(
                denoiser.log_sum_exp,
                functools.partial(dict, x=x, **level_of),
                {"sigma": level(zero=False), "temperature": real(0.0, optional=True)},
            )
        if hasattr(denoiser, "neighbourhood"):
            found[f"{name}.neighbourhood"] = Call(
                denoiser.neighbourhood,
                functools.partial(dict, pixel=(0, 1, 2), **level_of),
                {"sigma": one_level(zero=True), "alpha": one_level()},
            )
    ours = denoisers()
    one = {"sigma": one_level(zero=True), "alpha": one_level()}
    found |= {
        "CertifiedSubset.certify": Call(
            ours["CertifiedSubset"].certify, functools.partial(dict, x=x, **level_of)
        ),
        "CertifiedSubset.plan": Call(
            ours["CertifiedSubset"].plan, functools.partial(dict, level_of), one
        ),
        "GaussianMixtureDenoiser.gamma_at": Call(
            ours["GaussianMixtureDenoiser"].gamma_at, functools.partial(dict, level_of), one
        ),
        "GoldenSubset.select": Call(
            ours["GoldenSubset"].select, functools.partial(dict, x=x[0], **level_of), one
        ),
        "GoldenSubset.sizes": Call(
            ours["GoldenSubset"].sizes, functools.partial(dict, level_of), one
        ),
        "NoiseTrainedDenoiser.matrix": Call(
            ours["NoiseTrainedDenoiser"].matrix, functools.partial(dict, level_of), one
        ),
        "PCALocalityDenoiser.weights_at": Call(
            ours["PCALocalityDenoiser"].weights_at, functools.partial(dict, level_of), one
        ),
        "LocallyLinearDenoiser.slope_at": Call(
            ours["LocallyLinearDenoiser"].slope_at, functools.partial(dict, level_of), one
        ),
        "MixtureDenoiser.weights_at": Call(
            ours["MixtureDenoiser"].weights_at, functools.partial(dict, level_of), one
        ),
        "CalibratedDenoiser.weights_at": Call(
            ours["CalibratedDenoiser"].weights_at, functools.partial(dict, level_of), one
        ),
        "MultiscaleDenoiser.band_shape": Call(
            ours["MultiscaleDenoiser"].band_shape, lambda: {"level": 1}, {"level": count(1, 1)}
        ),
        "MultiscaleDenoiser.conditional": Call(
            ours["MultiscaleDenoiser"].conditional,
            lambda: {
                "level": 1, "details": noisy(2, 3, 4, 4), "low": noisy(2, 1, 4, 4), **level_of
            },
            {"level": count(1, 1), "details": tensor(), "low": tensor()},
        ),
    }  # fmt: skip
    data = training_set()
    found |= {
        "TrainingSet.augmented": Call(
            data.augmented, lambda: {"flip": True, "shifts": 1},
            {"flip": flag(), "shifts": count(0, 7)},
        ),
        "TrainingSet.load": Call(
            pf.TrainingSet.load,
            lambda: {"source": files("images.npy"), "progress": False},
            {
                "source": only(is_path),
                "resolution": only(is_resolution),
                "channels": only(lambda v: v is None or fits(v, 1, 3)),
                "split": only(lambda v: v is None),
                "cache_dir": only(lambda v: v is None or is_path(v)),
            },
        ),
        "TrainingSet.subset": Call(
            data.subset, lambda: {"indices": torch.tensor([1, 2])},
            {"indices": only(_is_selection)},
        ),
        "TrainingSet.to": Call(
            data.to, lambda: {"device": "cpu"}, {"device": only(lambda v: v == "cpu")}
        ),
        "TrainingSet.values": Call(
            data.values, lambda: {"start": 1, "stop": 3},
            {
                "start": only(is_int),
                "stop": only(lambda v: v is None or is_int(v)),
                "dtype": only(lambda v: v in (torch.float16, torch.float32, torch.float64)),
            },
        ),
        "TrainingSet.with_label": Call(
            data.with_label, lambda: {"label": 1}, {"label": only(lambda v: fits(v, 0, 1))}
        ),
        "Basis.from_data": Call(
            pf.Basis.from_data, lambda: {"data": images(), "method": "gram"},
            {
                "data": tensor(dtypes={**STORED, "longer": 0}),
                "method": choice(None, "gram", "covariance", "randomized"),
                "components": count(optional=True),
            },
        ),
        "Basis.leading": Call(
            basis().leading, lambda: {"components": 2}, {"components": count()}
        ),
        "Basis.load": Call(pf.Basis.load, lambda: {"path": files("basis.safetensors")}),
        "Basis.save": Call(basis().save, lambda: {"path": "saved.safetensors", "force": True}),
        "Basis.to": Call(
            basis().to, lambda: {"device": "cpu"}, {"device": only(lambda v: v == "cpu")}
        ),
        "Moments.basis": Call(moments().basis, dict),
        "Moments.eigh": Call(moments().eigh, dict),
        "Moments.blended": Call(
            moments().blended, lambda: {"other": moments(), "share": 0.5},
            {"other": instance(pf.Moments), "share": real(0, 1, low_open=False, high_open=False)},
        ),
        "Moments.from_data": Call(
            pf.Moments.from_data, lambda: {"data": images()},
            {"data": tensor(dtypes={**STORED, "longer": 0})},
        ),
        "Moments.load": Call(pf.Moments.load, lambda: {"path": files("moments.safetensors")}),
        "Moments.merge": Call(
            moments().merge, lambda: {"other": moments()}, {"other": instance(pf.Moments)}
        ),
        "Moments.without": Call(
            moments().without,
            lambda: {"other": pf.Moments.from_data(images(3))},
            {"other": instance(pf.Moments)},
        ),
        "Moments.save": Call(
            moments().save, lambda: {"path": "saved.safetensors", "force": True}
        ),
        "Moments.to": Call(
            moments().to, lambda: {"device": "cpu"}, {"device": only(lambda v: v == "cpu")}
        ),
        "Moments.update": Call(
            lambda **given: pf.Moments().update(**given), lambda: {"batch": images(3)},
            {"batch": tensor(dtypes={**STORED, "longer": 0})}, signature=moments().update,
        ),
        "Calibration.at": Call(calibration().at, functools.partial(dict, level_of), one),
        "Calibration.load": Call(
            pf.Calibration.load, lambda: {"path": files("calibration.json")}
        ),
        "Calibration.save": Call(
            calibration().save, lambda: {"path": "saved.json", "force": True}
        ),
        "Candidate.build": Call(
            pf.Candidate("local", window=3).build, lambda: {"data": training_set()}
        ),
        "WindowTable.__getitem__": Call(
            table().__getitem__, lambda: {"index": 1},
            {"index": only(lambda v: isinstance(v, slice) or (is_int(v) and -2 <= v < 2))},
        ),
        "WindowTable.load": Call(pf.WindowTable.load, lambda: {"path": files("table.json")}),
        "WindowTable.save": Call(table().save, lambda: {"path": "saved.json", "force": True}),
        "weights.QueryWeights.dense": Call(
            QueryWeights(torch.eye(3)).dense, lambda: {"dtype": torch.float32, "device": "cpu"},
            {
                "dtype": only(lambda v: isinstance(v, torch.dtype)),
                "device": only(lambda v: v == "cpu"),
            },
        ),
        "weights.QueryWeights.from_bits": Call(
            QueryWeights.from_bits, lambda: {"bits": np.array([[3], [7]], np.uint8), "inputs": 8},
            {"bits": only(lambda v: False), "inputs": count(1, 8)},
        ),
        "weights.QueryWeights.row": Call(
            QueryWeights(torch.eye(3)).row, lambda: {"query": 1},
            {"query": only(lambda v: is_int(v) and -3 <= v < 3)},
        ),
        "weights.QueryWeights.tile": Call(
            QueryWeights(torch.eye(3)).tile,
            lambda: {"outputs": torch.tensor([1, 0])},
            {"outputs": only(lambda v: False)},
        ),
        "weights.QueryWeights.with_row": Call(
            QueryWeights(torch.eye(3) > 0).with_row,
            lambda: {"row": torch.ones(3, dtype=torch.bool)},
            {"row": tensor(dtypes={"bool": 0})},
        ),
    }  # fmt: skip
    for name, schedule in {
        "CosineSchedule": pf.CosineSchedule(),
        "DDPMSchedule": pf.DDPMSchedule(10),
        "FlowSchedule": pf.FlowSchedule(),
        "KarrasSchedule": pf.KarrasSchedule(),
        "adapters.TableSchedule": pf.adapters.TableSchedule((0.9, 0.5, 0.1)),
    }.items():
        top = {"DDPMSchedule": 9, "KarrasSchedule": 1.7e308, "adapters.TableSchedule": 2}
        most = top.get(name, 1)
        whole = name == "DDPMSchedule"
        t: Kind = real(0, most, low_open=False, high_open=False, tensors=True, shapes=True)
        if whole:
            t = only(lambda v: _is_time(v))
        found[f"{name}.__call__"] = Call(
            schedule,
            functools.partial(dict, t=1 if whole else 0.5),
            {"t": t},
            signature=schedule.__call__,
        )
        limit = {"DDPMSchedule": 10, "adapters.TableSchedule": 3}.get(name, 10**6)
        found[f"{name}.timesteps"] = Call(
            schedule.timesteps, lambda: {"steps": 2}, {"steps": count(1, limit)}
        )
    for name, sampler in {"DDIM": pf.DDIM(), "Euler": pf.Euler(), "Heun": pf.Heun()}.items():
        found[f"{name}.step"] = Call(
            sampler.step,
            lambda: {
                "denoiser": pf.OptimalDenoiser(training_set()), "x": noisy(2, *SHAPE),
                "level": (0.9, 0.5), "next_level": (1.0, 0.2), "noise": noisy(2, *SHAPE),
            },
            {
                "denoiser": anything_callable(),
                "level": only(lambda v: v in ((1, 2), range(2))),
                "next_level": only(lambda v: v == (1, 2)),
                "clip": flag(),
                "noise": tensor(optional=True, finite=False),
            },
            infinite=True,
        )  # fmt: skip
    return found


def _is_time(value: object) -> bool:
    if isinstance(value, Tensor):
        kind = not value.dtype.is_floating_point and not value.dtype.is_complex
        return kind and value.dtype != torch.bool and value.layout == torch.strided
    return is_int(value) and 0 <= value <= 9


def _is_selection(value: object) -> bool:
    if isinstance(value, Tensor):
        whole = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        return whole and not value.dtype.is_floating_point and value.ndim == 1
    # A storage is a sequence of its bytes.
    if isinstance(value, (list, tuple, torch.UntypedStorage)):
        return len(value) > 0 and all(is_int(v) for v in value)
    return isinstance(value, (slice, range))
