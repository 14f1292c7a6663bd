"""What users see of the types, and what the library ignores of them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyflocality as pf

# Folders of packages, which an installation has side by side.
ROOMS = ("benchmarks", "csrc", "kernels")
# Modules that users import beside those of `pf.__all__`.
MODULES = ("data", "denoisers", "moments", "noise", "sampling", "pictures", "planner", "backends")

SCRIPT = """
import torch
import pyflocality as pf
from torch import Tensor

data = pf.TrainingSet(torch.zeros(4, 1, 8, 8))
denoiser = pf.LocalDenoiser(data, window=3)
level = pf.DDPMSchedule()(5)
alpha, sigma = level
x = torch.randn(2, 1, 8, 8)
reveal_type(denoiser(x, level))
reveal_type(denoiser(x, sigma, alpha))
reveal_type(alpha)
reveal_type(pf.DDPMSchedule()(torch.tensor([3, 5])).sigma)
reveal_type(pf.sample(denoiser, 2).images)
reveal_type(pf.noise.v_from_x0(x, x, level))
reveal_type(pf.ops.window_posterior_mean(x, data.images, 3, level))
reveal_type(pf.analysis.sensitivity(denoiser, x, level, pixel=(0, 1, 1)))


def noise_of(level: pf.NoiseLevel) -> float:
    return level.sigma


def restored(level: pf.NoiseLevel[Tensor]) -> Tensor:
    return denoiser(x, level)
"""
REVEALED = ["Tensor", "Tensor", "float", *["Tensor"] * 5]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_script_at_its_strictest_sees_tensors_and_floats(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    place = Path(pf.__file__).parents[1]
    # mypy does not look where an editable installation points.
    environment = dict(os.environ)
    if "site-packages" not in place.parts:
        environment["MYPYPATH"] = str(place)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(?:torch\._tensor\.)?(\w+)"', done.stdout)
    assert (revealed, done.returncode) == (REVEALED, 0), done.stdout + done.stderr


def sources() -> list[Path]:
    """All Python files of the installed package."""
    folder = Path(pf.__file__).parent
    beside = [importlib.import_module(f"pyflocality.{name}").__path__[0] for name in ROOMS]
    return sorted({path for part in (folder, *beside) for path in Path(part).rglob("*.py")})


def test_what_is_ignored_has_a_code_and_a_reason_and_is_rare():
    ignored = []
    for path in sources():
        with tokenize.open(path) as file:
            comments = [
                token.string
                for token in tokenize.generate_tokens(file.readline)
                if token.type == tokenize.COMMENT and "type: ignore" in token.string
            ]
        ignored += [(path.name, comment) for comment in comments]
    wrong = [
        one for one in ignored if not re.fullmatch(r"# type: ignore\[[a-z, -]+\]  # \S.*", one[1])
    ]
    assert wrong == []
    assert len(ignored) < 30


def public() -> Iterator[tuple[str, object]]:
    """Every public function, class and method with its name."""
    modules = [pf, *(importlib.import_module(f"pyflocality.{name}") for name in MODULES)]
    modules += [value for value in vars(pf).values() if inspect.ismodule(value)]
    for module in {module.__name__: module for module in modules}.values():
        defined = [name for name, one in vars(module).items() if _is_own(one, module.__name__)]
        for name in getattr(module, "__all__", defined):
            value = getattr(module, name)
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    if method == "__call__" or not method.startswith("_"):
                        plain = inspect.unwrap(getattr(function, "__func__", function))
                        plain = plain.fget if isinstance(plain, property) else plain
                        yield f"{module.__name__}.{name}.{method}", plain


def _is_own(value: object, module: str) -> bool:
    """Whether a module defines a value that has a public name."""
    own = getattr(value, "__module__", None) == module
    return own and not getattr(value, "__name__", "_").startswith("_")


def test_public_signatures_name_no_any():
    found = []
    for name, value in public():
        if not callable(value):
            continue
        annotations = inspect.get_annotations(value.__init__ if inspect.isclass(value) else value)
        found += [
            f"{name}: {argument}: {kind}"
            for argument, kind in annotations.items()
            if re.search(r"\bAny\b", kind if isinstance(kind, str) else repr(kind))
        ]
    assert not found, "\n".join(found)
