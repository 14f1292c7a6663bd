"""What ranks compare, and what they refuse, in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyflocality import TrainingSet
from pyflocality.backends import selection
from pyflocality.backends.selection import reason
from pyflocality.posterior.call import Call
from pyflocality.posterior.ranks import Ranks
from pyflocality.posterior.sharded import ShardedImages
from pyflocality.storage.mapped import mapped_file


def test_operations_that_cannot_join_are_refused(monkeypatch):
    call = Call(torch.device("cpu"), facts={"ranks": object()})
    assert reason("nearest", "reference", call) is None
    monkeypatch.setattr(selection, "machine_reason", lambda backend: None)
    monkeypatch.setattr(selection, "_device_reason", lambda backend, device: None)
    why_not = reason("patch_set", "cuda", call)
    assert why_not == "it cannot join the parts of a sharded set"


class _Alone(Ranks):
    def __init__(self) -> None:
        self.group, self.rank, self.count = None, 0, 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
def test_tensors_of_any_dtype_are_compared(dtype, monkeypatch):
    found = []
    monkeypatch.setattr(Ranks, "_reduce", lambda self, tensor, op: found.append(int(tensor[0])))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = x[0, 0].expand(5)
    for tensor in (x, x.clone(), x.T, x[1, 2], same, 1 - x.float()):
        _Alone().agree("samples", tensor)
    assert found[0] == found[1] and len(set(found)) == 5


def test_sharded_images_tell_their_shape_alone():
    images = ShardedImages.of(torch.zeros(4, 1, 2, 3, dtype=torch.uint8), _Alone())
    assert (tuple(images.shape), images.dtype, len(images)) == ((4, 1, 2, 3), torch.uint8, 4)
    assert images.to("cpu").ranks is images.ranks
    assert repr(images) == "ShardedImages((4, 1, 2, 3), torch.uint8, part 1 of 2)"
    for use in (
        lambda: images[0],
        lambda: images.float(),
        lambda: images + 1,
        lambda: torch.cat([images, images]),
        lambda: images.numpy(),
        lambda: list(images),
    ):
        with pytest.raises(NotImplementedError, match="split over ranks"):
            use()


def test_a_rank_moves_images_that_lie_in_a_file(tmp_path):
    np.save(tmp_path / "set.npy", np.zeros((4, 1, 6, 6), np.uint8))
    data = TrainingSet.load(tmp_path / "set.npy", progress=False)
    data.images = ShardedImages.of(data.images, _Alone())
    assert mapped_file(data.images) is not None
    assert isinstance(data.to("cpu").images, ShardedImages)
