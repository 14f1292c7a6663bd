"""Pictures, synthetic sets, wavelets, adapters, files and ranks."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable

import torch
import torch.distributed as dist
from calls_common import (
    SHAPE,
    WHOLE,
    Affine,
    Call,
    files,
    fits,
    images,
    is_int,
    is_path,
    is_resolution,
    noisy,
    training_set,
)
from torch import nn
from wrong_values import (
    FLOATS,
    MAY,
    STRANGE_TENSORS,
    Kind,
    anything_callable,
    count,
    flag,
    instance,
    only,
    real,
    tensor,
)

import pyflocality as pf
from pyflocality import pictures

# Odd tensors that are two finite numbers all the same.
_TWO_NUMBERS = ("tensor2", "tensor 0", "tensor half", "tensor grad")


def pictures_and_sets() -> dict[str, Call]:
    shown = noisy(3, *SHAPE).clamp(-1, 1)
    synthetic, wavelets = pf.synthetic, pf.wavelets
    disks = pf.synthetic.draw_disks(2, 8, torch.Generator().manual_seed(0))
    low, details = wavelets.analyse(noisy(2, *SHAPE))
    pyramid = wavelets.decompose(noisy(2, *SHAPE), 2)
    loose = {"images": tensor(dtypes={**FLOATS, "longer": 0, "no values": 0}, finite=False)}
    side = {"n": 2, "size": 8}
    frames = only(lambda v: v is None or (v.dtype == torch.bool and v.shape == (3,)))
    functions: dict[str, tuple[Callable[..., object], dict[str, object], dict[str, Kind]]] = {
        "pictures.to_bytes": (pictures.to_bytes, {"images": shown}, {"images": _any_shape()}),
        "pictures.default_scale": (
            pictures.default_scale, {"height": 8, "width": 8},
            {"height": count(), "width": count()},
        ),
        "pictures.image_grid": (
            pictures.image_grid, {"images": shown},
            {
                "images": tensor(dtypes={**FLOATS, "longer": 0}), "columns": count(optional=True),
                "marked": frames,
            },
        ),
        "pictures.captioned_rows": (
            pictures.captioned_rows, {"rows": [("a", shown), ("b", shown)]},
            {"rows": only(lambda v: False), "marked": only(lambda v: v is None)},
        ),
        "pictures.sample_sheet": (
            pictures.sample_sheet, {"samples": shown, "nearest": shown},
            {"nearest": tensor(optional=True), "marked": frames},
        ),
        "pictures.trajectory_strip": (
            pictures.trajectory_strip,
            {"x_t": noisy(2, 2, *SHAPE), "x0": noisy(2, 2, *SHAPE), "timesteps": torch.arange(2)},
            {
                "x_t": tensor(), "x0": tensor(), "samples": count(),
                "timesteps": tensor(
                    dtypes={**FLOATS, **WHOLE},
                    odd=lambda label, value: MAY if label in _TWO_NUMBERS else None,
                ),
            },
        ),
        "synthetic.render_disks": (
            synthetic.render_disks, {"parameters": disks, "size": 8}, {"parameters": instance()}
        ),
        "synthetic.disk_tangents": (
            synthetic.disk_tangents, {"parameters": disks, "size": 8}, {"parameters": instance()}
        ),
        "synthetic.disks": (synthetic.disks, side, {"centred": flag()}),
        "synthetic.c_alpha": (synthetic.c_alpha, side, {"alpha": real(0.0)}),
        "synthetic.inject_pattern": (
            synthetic.inject_pattern,
            {"data": training_set(), "pattern": noisy(8, 8).clamp(-1, 1), "gamma": 0.5},
            {"pattern": tensor(), "gamma": real(0, 1, high_open=False)},
        ),
        "wavelets.filters": (wavelets.filters, {"wavelet": "haar"}, {}),
        "wavelets.analyse": (wavelets.analyse, {"images": noisy(2, *SHAPE)}, loose),
        "wavelets.synthesise": (
            wavelets.synthesise, {"low": low, "details": details},
            {"low": tensor(finite=False), "details": tensor(finite=False)},
        ),
        "wavelets.decompose": (
            wavelets.decompose, {"images": noisy(2, *SHAPE), "levels": 2}, loose
        ),
        "wavelets.reconstruct": (
            wavelets.reconstruct, {"low": pyramid.low, "details": pyramid.details},
            {"low": tensor(finite=False), "details": only(lambda v: v in ([], ()))},
        ),
        "wavelets.check_sides": (
            wavelets.check_sides, {"shape": (8, 8), "levels": 2, "name": "shape"},
            {"shape": only(lambda v: False), "name": None},
        ),
    }  # fmt: skip
    return {
        name: Call(
            function, functools.partial(dict, given), kinds, infinite=name.startswith("wavelets")
        )
        for name, (function, given, kinds) in functions.items()
    } | {
        # A generator answers otherwise when it is asked again.
        "synthetic.draw_disks": Call(
            synthetic.draw_disks,
            lambda: {**side, "generator": torch.Generator().manual_seed(0)},
            {"generator": instance(torch.Generator)},
        )
    }


def _any_shape() -> Kind:
    loose = dict(FLOATS)
    for label in ("0-dim", "flat", "a dimension less", "a dimension more", "no values", "longer"):
        loose[label] = STRANGE_TENSORS[label]
    one = {"tensor0", "tensor1", "tensor2", "tensor3", "tensor empty", "tensor 2-D", "tensor grad",
           "tensor half", "tensor -1", "tensor 0", "tensor 1e308", "tensor 5e-324"}  # fmt: skip
    return tensor(dtypes=loose, odd=lambda label, value: MAY if label in one else None)


def adapters_files_and_ranks() -> dict[str, Call]:
    data = training_set()
    optimal = pf.OptimalDenoiser(data)
    scheduler = types.SimpleNamespace(
        alphas_cumprod=torch.tensor([0.9, 0.5, 0.1]),
        config=types.SimpleNamespace(prediction_type="epsilon"),
    )
    adapters, arrays = pf.adapters, importlib.import_module("pyflocality.cuda.arrays")
    run = pf.SampleResult  # noqa: F841
    entries = {
        "adapters.TableSchedule.of": Call(
            adapters.TableSchedule.of, lambda: {"scheduler": scheduler},
            {"scheduler": instance(), "name": None},
        ),
        "adapters.from_diffusers": Call(
            adapters.from_diffusers,
            lambda: {"unet": Affine().eval(), "scheduler": scheduler},
            {
                "unet": instance(), "scheduler": instance(),
                "class_labels": only(lambda v: v is None or (is_int(v) and v >= 0)),
            },
        ),
        "adapters.from_edm": Call(
            adapters.from_edm,
            lambda: {"network": Affine().eval(), "image_shape": SHAPE},
            {
                "network": instance(nn.Linear), "image_shape": only(lambda v: v is None),
                "class_labels": only(_is_class_row),
            },
        ),
        "adapters.as_diffusers": Call(
            adapters.as_diffusers, lambda: {"denoiser": optimal, "schedule": scheduler},
            {"schedule": instance()},
        ),
        "adapters.as_azula": Call(
            adapters.as_azula, lambda: {"denoiser": optimal, "schedule": pf.CosineSchedule()},
            {"schedule": anything_callable()},
        ),
        "adapters.DiffusersModel.forward": Call(
            adapters.as_diffusers(optimal, scheduler),
            lambda: {"sample": noisy(2, *SHAPE), "timestep": 1},
            {
                "sample": tensor(),
                "timestep": real(0, 2, low_open=False, high_open=False, tensors=True),
                "return_dict": flag(),
            },
            signature=adapters.DiffusersModel(optimal, adapters.TableSchedule((0.5,))).forward,
            names=frozenset({"x"}),
        ),
        "adapters.DiffusersModel.levels": Call(
            adapters.as_diffusers(optimal, scheduler).levels,
            lambda: {"times": torch.tensor([0, 1])},
            {"times": real(0, 2, low_open=False, high_open=False, tensors=True, shapes=True)},
        ),
        "adapters.AzulaDenoiser.forward": Call(
            adapters.as_azula(optimal, pf.CosineSchedule()),
            lambda: {"x_t": noisy(2, *SHAPE), "t": torch.tensor(0.5)},
            {
                "x_t": tensor(),
                "t": real(0, 1, low_open=False, high_open=False, tensors=True),
            },
            signature=adapters.AzulaDenoiser(optimal, pf.CosineSchedule()).forward,
            names=frozenset({"x"}),
        ),
        "distributed.ranks": Call(
            _ranks, lambda: {"timeout": 1.0}, {"timeout": real(0.0)},
            signature=pf.distributed.ranks,
        ),
        "distributed.shard": Call(
            pf.distributed.shard, lambda: _in_group(data=data), {"group": only(lambda v: v is None)}
        ),
        "distributed.split_samples": Call(
            pf.distributed.split_samples, lambda: _in_group(denoiser=optimal),
            {"denoiser": anything_callable(), "group": only(lambda v: v is None)},
        ),
        "packing.pack": Call(
            pf.packing.pack,
            lambda: {"source": files("folder"), "out": "packed once", "progress": False},
            {
                "source": only(lambda v: False), "out": only(is_path),
                "resolution": only(is_resolution),
                "channels": only(lambda v: v is None or fits(v, 1, 3)),
                "split": only(lambda v: v is None), "sort_by_label": only(lambda v: v is False),
            },
        ),
        "packing.verify": Call(
            pf.packing.verify, lambda: {"out": files("packed"), "progress": False},
            # Other tries may have packed a set there.
            {"out": only(is_path)},
        ),
        "analysis.figures.sensitivity_figure": Call(
            importlib.import_module("pyflocality.analysis.figures").sensitivity_figure,
            lambda: {"runs": {"a": _sensitivity_run()}}, {"runs": only(lambda v: False)},
        ),
        "analysis.figures.spectrum_figure": Call(
            importlib.import_module("pyflocality.analysis.figures").spectrum_figure,
            lambda: {"spectra": {"a": _spectrum()}}, {"spectra": only(lambda v: False)},
        ),
        "analysis.figures.memorization_figure": Call(
            importlib.import_module("pyflocality.analysis.figures").memorization_figure,
            lambda: {"curves": {"a": _curve()}}, {"curves": only(lambda v: False)},
        ),
        "cuda.arrays.as_tensor": Call(
            arrays.as_tensor, lambda: {"array": noisy(2, 3), "name": "array"},
            {"array": _arrays(), "name": None}, infinite=True,
        ),
    }  # fmt: skip
    batch = {"x": noisy(2, *SHAPE), "images": images(), "sigma": 0.5, "alpha": 0.9, "window": 3}
    for name in ("window_posterior_mean", "window_posterior_jvp", "window_posterior_vjp",
                 "window_posterior_rows", "patch_set_mean"):  # fmt: skip
        given = dict(batch)
        if name.endswith("jvp"):
            given["tangents"] = noisy(3, 2, *SHAPE)
        if name.endswith("vjp"):
            given["cotangents"] = noisy(3, 2, *SHAPE)
        if name.endswith("rows"):
            given["outputs"] = [(0, 1, 2)]
        # Without a GPU every sound call ends in BackendUnavailableError.
        entries[f"cuda.arrays.{name}"] = Call(
            getattr(arrays, name),
            functools.partial(dict, given),
            {"outputs": only(lambda v: False)},
        )
    return entries


def _arrays() -> Kind:
    return only(lambda value: hasattr(value, "__dlpack__"))


def _ranks(timeout: object) -> None:
    with pf.distributed.ranks(timeout=timeout):
        pass


def _in_group(**arguments: object) -> dict[str, object]:
    """Arguments of a call that takes a process group, here of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return arguments


def _is_class_row(value: object) -> bool:
    return value is None


@functools.cache
def _sensitivity_run() -> object:
    optimal = pf.OptimalDenoiser(training_set())
    return pf.analysis.sensitivity_along_run(optimal, (0, 1, 2), n=2, steps=2, progress=False)


@functools.cache
def _spectrum() -> object:
    optimal = pf.OptimalDenoiser(training_set())
    return pf.analysis.jacobian_spectrum(optimal, noisy(1, *SHAPE), 0.5, k=2)


@functools.cache
def _curve() -> object:
    return pf.analysis.memorization_curve(
        pf.OptimalDenoiser, training_set(), (2,), n=2, steps=2, progress=False
    )
