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
        "nearest": pf.NearestDenoiser,
        "local": lambda data: pf.LocalDenoiser(data, 3),
        "local_table": lambda data: pf.LocalDenoiser(data, [(0.1, 3), (1.0, 5)]),
        "pca": lambda data: pf.PCALocalityDenoiser(data, 0.1),
        "patch_set": lambda data: pf.PatchSetDenoiser(data, 3),
        "patch_set_masks": lambda data: pf.PatchSetDenoiser(data, masks=pixels),
        "wiener": pf.WienerDenoiser,
        "equivariant": lambda data: pf.EquivariantDenoiser(data, 3),
        "filtered": lambda data: pf.FilteredPosteriorDenoiser(data, mask, mask),
    }


# Own frames of a warm call are fewer than this, and tensors are looked at this often at most.
FRAMES, LOOKED_AT = 130, 2
# Own frames of derivatives, at most; the reference counts those of the equivariant model, all
# displacements one by one.
OF_DERIVATIVES = {
    "optimal": 120,
    "nearest": 110,
    "local": 125,
    "local_table": 130,
    "pca": 145,
    "patch_set": 175,
    "patch_set_masks": 175,
    "wiener": 65,
    "equivariant": 4500,
    "filtered": 170,
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


each = pytest.mark.parametrize("name", OF_DERIVATIVES)
each_kind = pytest.mark.parametrize("kind", ["call", "jvp", "vjp"])


@needs_cpu
@each_kind
@each
def test_few_frames(name, kind, denoisers):
    run = calls(denoisers[name], 0.4, 0.9)[kind]
    run()
    entered = own_frames(run)
    allowed = FRAMES if kind == "call" else OF_DERIVATIVES[name]
    assert 10 < entered.total() < allowed, entered.most_common()


@needs_cpu
@each_kind
@each
def test_one_look_at_what_lies_on_the_device(name, kind, denoisers, monkeypatch):
    """All values of a call are looked at together; levels that are numbers stay numbers."""
    run = calls(denoisers[name], 0.4, 0.9)[kind]
    run()
    with looks(monkeypatch) as seen:
        run()
    assert seen["levels.py: check_noisy"] == 1
    assert seen.total() <= LOOKED_AT, seen
    # The search for the nearest images looks at all coefficients at once.
    assert seen.total() == 1 or name == "nearest", seen


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


def test_masks_that_are_written_to_are_read_again(denoisers):
    """Their weights are made once for as long as they stay as they are."""
    masks = torch.rand(8, 8, 8, 8, generator=torch.Generator().manual_seed(5)) > 0.5
    denoiser = pf.PatchSetDenoiser(denoisers["optimal"].data, masks=masks)
    before = denoiser(X, 0.4)
    for write in (masks.logical_not_, lambda: masks.numpy().fill(True)):
        write()
        expected = pf.PatchSetDenoiser(denoiser.data, masks=masks.clone())(X, 0.4)
        assert torch.equal(denoiser(X, 0.4), expected)
        assert not torch.equal(expected, before)
