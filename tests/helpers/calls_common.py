"""What the lists of public calls have in common: sound objects, and kinds of arguments by name."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from wrong_values import (
    FLOATS,
    INTEGERS,
    Kind,
    choice,
    count,
    flag,
    instance,
    level,
    only,
    real,
    tensor,
)

import pyflocality as pf

SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Call:
    """A public callable with sound arguments.

    Attributes:
        function: What is called.
        arguments: Makes the arguments by name, anew for every call.
        kinds: Kinds of the arguments, where they are others than of that name everywhere.
        infinite: Whether sound answers may hold infinities or NaN.
        signature: Where its arguments are told, if not by `function` itself.
        names: What errors may name beside the arguments.
    """

    function: Callable[..., object]
    arguments: Callable[[], dict[str, object]]
    kinds: dict[str, Kind | None] = field(default_factory=dict)
    infinite: bool = False
    signature: Callable[..., object] | None = None
    names: frozenset[str] = frozenset()

    def parameters(self) -> list[str]:
        """Names of all arguments, those behind `**options` included."""
        names = []
        for name, parameter in inspect.signature(
            self.signature or self.function
        ).parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named = str(parameter.annotation).removeprefix("Unpack[").removesuffix("]")
                names += typing.get_type_hints(OPTIONS[named])
            else:
                names.append(name)
        return names


# Sets of keywords by the name of their type.
OPTIONS = {
    "PosteriorOptions": pf.ops.PosteriorOptions,
    "DenoiserOptions": pf.denoisers.DenoiserOptions,
}


class Affine(nn.Module):
    """A small network, by the attributes of diffusers' and EDM's."""

    def __init__(self, told: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.config = types.SimpleNamespace(in_channels=1, sample_size=8)
        self.img_channels, self.img_resolution = 1, 8

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> object:
        answer = self.scale * x
        return types.SimpleNamespace(sample=answer) if t.dtype == torch.int64 else answer


def images(number: int = 12, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    stored = torch.randint(256, (number, *SHAPE), generator=generator, dtype=torch.uint8)
    return stored if dtype == torch.uint8 else stored.to(dtype) / 127.5 - 1


def noisy(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator)


@functools.cache
def training_set() -> pf.TrainingSet:
    return pf.TrainingSet(images(), torch.arange(12) % 2, label_names=("a", "b"))


@functools.cache
def moments() -> pf.Moments:
    return pf.Moments.from_data(training_set())


@functools.cache
def basis() -> pf.Basis:
    return pf.Basis.from_data(training_set())


@functools.cache
def denoisers() -> dict[str, pf.Denoiser]:
    data, values = training_set(), training_set().num_values
    soft = torch.rand(3, values, generator=torch.Generator().manual_seed(1))
    return {
        "OptimalDenoiser": pf.OptimalDenoiser(data),
        "NearestDenoiser": pf.NearestDenoiser(data),
        "WienerDenoiser": pf.WienerDenoiser(moments()),
        "LedoitWolfDenoiser": pf.LedoitWolfDenoiser(data),
        "NoiseTrainedDenoiser": pf.NoiseTrainedDenoiser(data),
        "PCALocalityDenoiser": pf.PCALocalityDenoiser(data, moments=moments()),
        "LocalDenoiser": pf.LocalDenoiser(data, 3),
        "EquivariantDenoiser": pf.EquivariantDenoiser(data, 3),
        "PatchSetDenoiser": pf.PatchSetDenoiser(data, 3),
        "FilteredPosteriorDenoiser": pf.FilteredPosteriorDenoiser(data, soft, soft),
        "FourierWienerDenoiser": pf.FourierWienerDenoiser(data),
        "WaveletShrinkageDenoiser": pf.WaveletShrinkageDenoiser(SHAPE, 2),
        "LocallyLinearDenoiser": pf.LocallyLinearDenoiser(
            pf.LocalDenoiser(data, 3), 0.3, moments=basis()
        ),
        "MixtureDenoiser": pf.MixtureDenoiser(
            [pf.OptimalDenoiser(data), pf.LocalDenoiser(data, 3)], (0.25, 0.75)
        ),
        "CalibratedDenoiser": pf.CalibratedDenoiser(data, calibration()),
        "MultiscaleDenoiser": pf.MultiscaleDenoiser(data, 1, 3),
        "GaussianMixtureDenoiser": pf.GaussianMixtureDenoiser(data, 0.3, moments=basis()),
        "GoldenSubset": pf.GoldenSubset(pf.OptimalDenoiser(data), 2, 6),
        "CertifiedSubset": pf.CertifiedSubset(pf.OptimalDenoiser(data)),
        "NetworkDenoiser": network(),
    }


@functools.cache
def network() -> pf.NetworkDenoiser:
    return pf.NetworkDenoiser(Affine().eval(), takes="sigma", image_shape=SHAPE)


def files(kind: str) -> Path:
    """A file or folder in the working directory, made at first use."""
    place = Path(kind)
    if kind == "images.npy" and not place.exists():
        np.save(place, images().numpy())
    elif kind == "moments.safetensors" and not place.exists():
        moments().save(place)
    elif kind == "basis.safetensors" and not place.exists():
        basis().save(place)
    elif kind == "table.json" and not place.exists():
        table().save(place)
    elif kind == "calibration.json" and not place.exists():
        calibration().save(place)
    elif kind == "folder" and not place.exists():
        from PIL import Image

        place.mkdir()
        for number, image in enumerate(images(3)):
            Image.fromarray(image[0].numpy()).save(place / f"{number}.png")
    elif kind == "packed" and not place.exists():
        pf.packing.pack(files("folder"), place, progress=False)
    return place


@functools.cache
def calibration() -> pf.Calibration:
    """One of the training set, of two levels."""
    return pf.calibrate(
        training_set(),
        schedule=pf.KarrasSchedule(0.2, 2.0),
        steps=2,
        candidates=[pf.Candidate("local", window=3), pf.Candidate("wiener")],
        progress=False,
    )


def table() -> pf.WindowTable:
    return pf.WindowTable((1.0, 0.1), (3, 5), ((0.5, 0.2), (0.1, 0.9)))


def is_generator(value: object) -> bool:
    return value is None or isinstance(value, torch.Generator)


def is_path(value: object) -> bool:
    return isinstance(value, (str, Path)) and value != "" and "\0" not in str(value)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_budget(value: object) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0
    return value is None or whole or (isinstance(value, str) and value.strip().isdigit())


def is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def fits(value: object, low: int, high: int) -> bool:
    return is_int(value) and low <= value <= high


def is_resolution(value: object) -> bool:
    return value is None or fits(value, 1, 64) or (isinstance(value, tuple) and value == (1, 2))


STORED = {**FLOATS, "uint8": INTEGERS["uint8"]}


WHOLE = {"int64": 0, "int32": 0, "uint8": 0, "int8": 0, "uint16": 0, "uint32": 0, "uint64": 0}


BACKENDS = (None, "auto", "reference", "cpu", "triton", "cuda")


DIRECTIONS = tensor(far=False)


# Kinds of arguments by their names, the same wherever the name is used.
KINDS: dict[str, Kind] = {
    "x": tensor(),
    "images": tensor(dtypes=STORED),
    "tangents": DIRECTIONS,
    "cotangents": DIRECTIONS,
    "samples": tensor(),
    "sigma": level(),
    "alpha": level(zero=False),
    "temperature": real(0.0),
    "dtype": only(lambda v: v in (None, torch.float32, torch.float64)),
    "memory_budget": only(is_budget),
    "chunk_size": count(optional=True),
    "augmentation": instance(type(None)),
    "precision": choice("exact", "auto"),
    "values": instance(type(None)),
    "with_image": only(lambda v: v is False),
    "backend": choice(*BACKENDS),
    "boundary": choice("circular", "broken"),
    "window": count(1, 15),
    "weights": tensor(dtypes={**FLOATS, "bool": INTEGERS["bool"]}),
    "responses": tensor(dtypes={**FLOATS, "bool": INTEGERS["bool"]}),
    "data": instance(pf.TrainingSet),
    "moments": instance(pf.Moments, optional=True),
    "denoiser": instance(pf.Denoiser),
    "schedule": instance(pf.NoiseSchedule, optional=True),
    "generator": only(is_generator),
    "progress": flag(),
    "force": flag(),
    "steps": count(),
    "n": count(),
    "k": count(),
    "wavelet": choice("haar"),
    "pixel": only(lambda v: False),
    "size": count(),
    "seed": count(0),
    "spacing": choice("leading", "trailing", "linspace"),
    "path": only(is_path),
    "image_column": choice(None),
    "label_column": choice(None),
    "layout": choice(None, "NCHW", "NHW"),
    "levels": count(0, 3),
    "batch_size": count(optional=True),
    "columns": count(),
    "pad": count(0),
    "scale": count(optional=True),
}
