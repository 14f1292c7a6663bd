"""Public functions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from calls_common import (
    SHAPE,
    Call,
    is_int,
    moments,
    network,
    noisy,
    training_set,
)
from wrong_values import (
    FINITE_ROWS,
    FLOATS,
    MAY,
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


def functions() -> dict[str, Call]:
    data, x = training_set(), noisy(2, *SHAPE)
    optimal = pf.OptimalDenoiser(data)
    positive = {"sigma": level(zero=False)}
    single = {"sigma": one_level(), "alpha": one_level()}
    one_image = tensor(dtypes={**FLOATS, "a dimension less": 0})
    start = noisy(2, *SHAPE)
    run = {"denoiser": optimal, "n": 2, "steps": 2, "progress": False, "x_T": start}
    functions: dict[str, tuple[Callable[..., object], dict[str, object], dict[str, Kind]]] = {
        "sample": (
            pf.sample, run,
            {
                "denoiser": anything_callable(), "n": count(optional=True),
                "sampler": choice("ddim", "euler", "heun"),
                "x_T": tensor(optional=True), "clip": flag(), "trajectory": flag(),
            },
        ),
        "ascend": (
            pf.ascend,
            {"denoiser": optimal, "n": 2, "max_steps": 2, "progress": False},
            {
                "start_sigma": real(0.0), "stop_sigma": real(0.0),
                "step": real(0, 1, high_open=False), "beta": real(0, 1, high_open=False),
                "max_steps": count(),
            },
        ),
        "calibrate": (
            pf.calibrate,
            {
                "data": data, "steps": 2, "candidates": [pf.Candidate("local", window=3)],
                "progress": False,
            },
            {"candidates": only(lambda v: v is None)},
        ),
        "calibrate_windows": (
            pf.calibrate_windows,
            {
                "data": data, "network": network(), "steps": 2, "samples": 2, "windows": (3, 5),
                "progress": False,
            },
            {
                "network": anything_callable(), "samples": count(),
                "windows": only(lambda v: v is None), "model": anything_callable(),
            },
        ),
        "masks_from_maps": (
            pf.masks_from_maps, {"maps": noisy(2, 2, 2, 2).abs(), "share": 0.5},
            {"maps": tensor(), "share": real(0, 1, high_open=False)},
        ),
        "denoisers.golden_sizes": (
            pf.denoisers.golden_sizes,
            {"count": 12, "k_min": 2, "k_max": 6, "sigma": 0.5, "alpha": 0.9},
            {
                "count": count(6), "k_min": count(1, 6), "k_max": count(2, 12),
                "sigma": one_level(zero=True), "alpha": one_level(),
            },
        ),
        "analysis.high_snr_projection": (
            pf.analysis.high_snr_projection,
            {"moments": moments(), "sigma": 0.5, "alpha": 0.9, "pixel": (0, 1, 2)},
            {**single, "ratio": real(0.0), "moments": instance(pf.Moments)},
        ),
        "analysis.jacobian_singular": (
            pf.analysis.jacobian_singular,
            {"denoiser": optimal, "x": x[:1], "sigma": 2.0, "alpha": 0.9, "k": 2},
            {**single, "x": one_image, "k": count(1, 62)},
        ),
        "analysis.jacobian_spectrum": (
            pf.analysis.jacobian_spectrum,
            {"denoiser": optimal, "x": x[:1], "sigma": 2.0, "alpha": 0.9, "k": 2},
            {**single, "x": one_image, "k": count(1, 62), "symmetrized": flag()},
        ),
        "analysis.jacobian_trace": (
            pf.analysis.jacobian_trace,
            {"denoiser": optimal, "x": x, "sigma": 0.5, "alpha": 0.9, "probes": 2},
            {**positive, "probes": count(2)},
        ),
        "analysis.local_linearity": (
            pf.analysis.local_linearity,
            {"denoiser": optimal, "x": x, "sigma": 0.5, "alpha": 0.9}, {},
        ),
        "analysis.memorization": (
            pf.analysis.memorization,
            {
                "samples": noisy(2, *SHAPE).clamp(-1, 1), "data": data,
                "mean": noisy(*SHAPE).clamp(-1, 1),
            },
            {"mean": tensor(optional=True)},
        ),
        "analysis.memorization_curve": (
            pf.analysis.memorization_curve,
            {
                "make_denoiser": pf.OptimalDenoiser, "data": data, "sizes": (2, 3), "n": 2,
                "steps": 2, "progress": False,
            },
            {"make_denoiser": anything_callable(), "sizes": only(_is_sizes)},
        ),
        "analysis.pattern_variance": (
            pf.analysis.pattern_variance, {"moments": moments(), "pattern": noisy(*SHAPE)},
            {"moments": instance(pf.Moments), "pattern": tensor()},
        ),
        "analysis.posterior_concentration": (
            pf.analysis.posterior_concentration,
            {"denoiser": optimal, "x": x, "sigma": 0.5, "alpha": 0.9}, positive,
        ),
        "analysis.sensitivity": (
            pf.analysis.sensitivity,
            {"denoiser": optimal, "x": x, "sigma": 0.5, "alpha": 0.9, "pixel": (0, 1, 2)}, positive,
        ),
        "analysis.sensitivity_along_run": (
            pf.analysis.sensitivity_along_run,
            {
                "denoiser": optimal, "pixels": (0, 1, 2), "n": 2, "steps": 2, "progress": False,
                "x_T": start,
            },
            {
                "pixels": only(lambda v: False), "n": count(optional=True), "every": count(),
                "x_T": tensor(optional=True),
            },
        ),
        "analysis.snr_ruler": (
            pf.analysis.snr_ruler,
            {"moments": moments(), "pattern": noisy(*SHAPE), "sigma": 0.5, "alpha": 0.9},
            {
                "moments": instance(pf.Moments), "pattern": tensor(),
                "sigma": real(0, tensors=True, shapes=True),
                "alpha": real(0, tensors=True, shapes=True),
            },
        ),
        "metrics.mse": (pf.metrics.mse, {"a": x, "b": x + 1}, {"a": tensor(), "b": tensor()}),
        "metrics.psnr": (
            pf.metrics.psnr, {"a": x, "b": x + 1},
            {"a": tensor(), "b": tensor(), "data_range": real(0.0)},
        ),
        "metrics.r2": (
            pf.metrics.r2, {"prediction": x, "target": x + noisy(2, *SHAPE)},
            {"prediction": tensor(), "target": tensor()},
        ),
        "metrics.gradient_energy": (pf.metrics.gradient_energy, {"images": x}, {}),
        "metrics.cosine_similarity": (
            pf.metrics.cosine_similarity, {"a": x, "b": x + 1, "mean": x[0] * 0.5},
            {"a": tensor(), "b": tensor(), "mean": tensor(optional=True)},
        ),
        "masks.wiener_gain": (
            pf.masks.wiener_gain,
            {"eigenvalues": torch.rand(4).double(), "sigma": 0.5, "alpha": 0.9},
            {
                "eigenvalues": tensor(dtypes={**FLOATS, "longer": 0}, odd=_row),
                "sigma": one_level(zero=True),
                "alpha": one_level(),
            },
        ),
        "masks.pca_locality_weights": (
            pf.masks.pca_locality_weights, {"moments": moments(), "sigma": 0.5, "alpha": 0.9},
            {
                "moments": instance(pf.Moments), "sigma": one_level(zero=True),
                "alpha": one_level(), "threshold": real(0, 1, low_open=False),
                "softness": real(0.0, low_open=False),
            },
        ),
        "masks.cached_pca_locality_weights": (
            pf.masks.cached_pca_locality_weights,
            {"moments": moments(), "sigma": 0.5, "alpha": 0.9},
            {
                "moments": instance(pf.Moments), "sigma": one_level(zero=True),
                "alpha": one_level(), "threshold": real(0, 1, low_open=False),
                "softness": real(0.0, low_open=False),
            },
        ),
        "masks.check_softness": (
            pf.masks.check_softness, {"softness": 0.5, "threshold": 0.5, "name": "threshold"},
            {"softness": real(0.0, low_open=False), "threshold": None, "name": None},
        ),
        "masks.check_threshold": (
            pf.masks.check_threshold, {"threshold": 0.5, "name": "threshold"},
            {"threshold": real(0, 1, low_open=False), "name": None},
        ),
    }  # fmt: skip
    found = {
        name: Call(function, functools.partial(dict, given), kinds, infinite=name in _INFINITE)
        for name, (function, given, kinds) in functions.items()
    }
    loose = tensor(finite=False)
    for name, second in (
        ("x0_from_noise", "noise"), ("x0_from_v", "v"), ("noise_from_x0", "x0"),
        ("v_from_x0", "x0"), ("score_from_x0", "x0"),
    ):  # fmt: skip
        given = {"x": x, second: x + 1, "alpha": 0.9, "sigma": 0.5}
        clean = name.startswith("x0")
        found[f"noise.{name}"] = Call(
            getattr(pf.noise, name),
            functools.partial(dict, given),
            {"x": loose, second: loose, "sigma": level(zero=clean)},
            infinite=True,
        )
    return found


_INFINITE = {
    "analysis.snr_ruler",
    "metrics.psnr",
    "metrics.r2",
    "metrics.mse",
    "analysis.local_linearity",
    "analysis.memorization",
}


def _is_sizes(value: object) -> bool:
    return (
        isinstance(value, (list, tuple, range))
        and len(value) > 0
        and all(is_int(v) and 1 <= v <= 6 for v in value)
    )


def _row(label: str, value: object) -> str | None:
    return MAY if label in FINITE_ROWS or label == "tensor empty" else None
