"""What a call costs beside its scan: frames of Python, and looks of Python at tensors.

Counted, not timed. Each look at a tensor on a GPU waits for it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from native_cpu import needs_cpu
from truth import random_images

import pyflocality as pf
import pyflocality.kernels

SHAPE = (3, 8, 8)
ROOMS = tuple(os.path.dirname(str(m.__file__)) + os.sep for m in (pf, pyflocality.kernels))
LOOKS = ("__bool__", "item", "tolist", "__float__", "__int__", "__index__")
X = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
U = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(3))


def makers() -> dict[str, Callable[[pf.TrainingSet], pf.Denoiser]]:
    mask = torch.rand(192, 192, generator=torch.Generator().manual_seed(4)) > 0.5
    pixels = mask[:64, :64].reshape(8, 8, 8, 8)
    return {
        "optimal": pf.OptimalDenoiser,
        "local": lambda data: pf.LocalDenoiser(data, 3),
        "pca": lambda data: pf.PCALocalityDenoiser(data, 0.1),
        "patch_set": lambda data: pf.PatchSetDenoiser(data, 3),
        "patch_set_masks": lambda data: pf.PatchSetDenoiser(data, masks=pixels),
        "wiener": pf.WienerDenoiser,
        "equivariant": lambda data: pf.EquivariantDenoiser(data, 3),
        "filtered": lambda data: pf.FilteredPosteriorDenoiser(data, mask, mask),
    }


# Own frames of a warm call, and of its derivatives where a kernel has them.
FRAMES = {
    "optimal": (100, 150),
    "local": (120, 160),
    "pca": (100, 160),
    "patch_set": (140, 200),
    "patch_set_masks": (170, 220),
    "wiener": (60, 80),
    "equivariant": (120, None),
    "filtered": (150, 200),
}


@pytest.fixture(scope="module")
def denoisers() -> dict[str, pf.Denoiser]:
    images = random_images(torch.Generator().manual_seed(1), 300, SHAPE, torch.uint8)
    return {name: make(pf.TrainingSet(images)) for name, make in makers().items()}


@contextmanager
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often Python looks at a tensor inside the block, by the function that does."""
    seen: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., object]:
        look = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *arguments: object) -> object:
            code = sys._getframe(1).f_code
            seen[f"{os.path.basename(code.co_filename)}: {code.co_name}"] += 1
            return look(tensor, *arguments)

        return counted

    with monkeypatch.context() as patched:
        for name in LOOKS:
            patched.setattr(torch.Tensor, name, counting(name))
        yield seen


def own_frames(run: Callable[[], object]) -> Counter[str]:
    """How often functions of the library's own files are entered."""
    entered: Counter[str] = Counter()

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(ROOMS):
            entered[f"{os.path.basename(frame.f_code.co_filename)}: {frame.f_code.co_name}"] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def calls(denoiser: pf.Denoiser, *level: object) -> dict[str, Callable[[], object]]:
    return {
        "call": lambda: denoiser(X, *level),
        "jvp": lambda: denoiser.jvp(X, U, *level),
        "vjp": lambda: denoiser.vjp(X, U, *level),
    }


@needs_cpu
@pytest.mark.parametrize("kind", ["call", "jvp", "vjp"])
@pytest.mark.parametrize("name", FRAMES)
def test_few_frames(name, kind, denoisers):
    allowed = FRAMES[name][0 if kind == "call" else 1]
    if allowed is None:
        pytest.skip("the reference scans image by image")
    run = calls(denoisers[name], 0.4, 0.9)[kind]
    run()
    entered = own_frames(run)
    assert 10 < entered.total() < allowed, entered.most_common()


@needs_cpu
@pytest.mark.parametrize("kind", ["call", "jvp", "vjp"])
@pytest.mark.parametrize("name", FRAMES)
def test_one_look_at_what_lies_on_the_device(name, kind, denoisers, monkeypatch):
    """All values of a call are looked at together; levels that are numbers stay numbers."""
    run = calls(denoisers[name], 0.4, 0.9)[kind]
    run()
    with looks(monkeypatch) as seen:
        run()
    behind = seen.total() - seen["levels.py: check_noisy"]
    assert seen["levels.py: check_noisy"] == 1
    # Masks of patches are turned into weights at each call: they lie on the CPU.
    assert behind <= (2 if name == "patch_set_masks" else 0) or (name, kind) in BY_REFERENCE, seen


# The reference joins the patches of all places, whose number it reads.
BY_REFERENCE = {("equivariant", "jvp"), ("equivariant", "vjp")}


@needs_cpu
@pytest.mark.parametrize("name", ["optimal", "local", "pca", "wiener"])
def test_levels_of_tensors_are_looked_at_on_the_cpu(name, denoisers, monkeypatch):
    levels = torch.tensor([0.4, 0.6]), torch.tensor([0.9, 0.8])
    run = calls(denoisers[name], *levels)["call"]
    run()
    with looks(monkeypatch) as seen:
        run()
    assert seen["levels.py: check_noisy"] == 1
    # As they are checked, compared with the images, and split.
    assert seen.total() <= 6, seen
