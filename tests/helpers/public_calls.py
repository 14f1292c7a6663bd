"""Every public callable of the library, with sound arguments and the kind of each of them.

`discovered` looks for all public callables, `calls` has an entry for each: what is public and has
no entry fails a test, so that a new name must enter.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator

import calls_of_classes
import calls_of_functions
import calls_of_methods
import calls_of_operations
import calls_of_tools
from calls_common import KINDS, Call
from wrong_values import (
    Kind,
)

MODULES = (
    "pyflocality",
    "pyflocality.adapters",
    "pyflocality.analysis",
    "pyflocality.analysis.figures",
    "pyflocality.cuda.arrays",
    "pyflocality.denoisers",
    "pyflocality.distributed",
    "pyflocality.masks",
    "pyflocality.metrics",
    "pyflocality.noise",
    "pyflocality.ops",
    "pyflocality.packing",
    "pyflocality.pictures",
    "pyflocality.synthetic",
    "pyflocality.wavelets",
    "pyflocality.weights",
)


# What the library answers: records that it alone makes, errors and abstract classes.
RECORDS = {
    "AscentResult",
    "AscentStage",
    "AzulaPosterior",
    "BackendUnavailableError",
    "CertifiedResult",
    "Concentration",
    "Denoiser",
    "DenoiserOptions",
    "DiffusersOutput",
    "DiskParameters",
    "Filters",
    "Memorization",
    "MemorizationCurve",
    "NoiseSchedule",
    "PosteriorOptions",
    "Pyramid",
    "RankLostError",
    "SampleResult",
    "Sampler",
    "SensitivityRun",
    "SingularSpectrum",
    "Spectrum",
    "Trace",
}

# Of these, too, but for what makes and changes them.
MADE = {"Basis", "Calibration"}


def discovered() -> set[str]:
    """Names of all public callables: `module.function`, `module.Class`, `module.Class.method`."""
    names, seen = set(), set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or _own_names(module):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType) or not callable(value) or id(value) in seen:
                continue
            seen.add(id(value))
            if name in RECORDS:
                continue
            full = f"{module_name}.{name}".removeprefix("pyflocality.")
            if inspect.isclass(value):
                names |= {full} if _takes_arguments(value) and name not in MADE else set()
                names |= {f"{full}.{method}" for method in _methods(value)}
            elif _takes_arguments(value):
                names.add(full)
    return names


def _own_names(module: types.ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def _takes_arguments(function: Callable[..., object]) -> bool:
    return bool(inspect.signature(function).parameters)


def _methods(cls: type) -> Iterator[str]:
    for name in dir(cls):
        if name.startswith("_") and name not in ("__call__", "__getitem__"):
            continue
        owner = next((base for base in cls.__mro__ if name in base.__dict__), None)
        if owner is None or not owner.__module__.startswith("pyflocality"):
            continue
        found = inspect.getattr_static(cls, name)
        if isinstance(found, (classmethod, staticmethod)):
            found = found.__func__
            if len(inspect.signature(found).parameters) > 1:
                yield name
        elif inspect.isfunction(found) and len(inspect.signature(found).parameters) > 1:
            yield name


def calls() -> dict[str, Call]:
    """An entry for every public callable."""
    found: dict[str, Call] = {}
    for part in (
        calls_of_operations.operations,
        calls_of_classes.classes,
        calls_of_methods.methods,
        calls_of_functions.functions,
        calls_of_tools.pictures_and_sets,
        calls_of_tools.adapters_files_and_ranks,
    ):
        entries = part()
        assert not found.keys() & entries.keys()
        found |= entries
    return found


def kinds_of(call: Call) -> dict[str, Kind | None]:
    """The kind of every argument of a call; KeyError for one that has none."""
    own = call.kinds
    return {name: own[name] if name in own else KINDS[name] for name in call.parameters()}
