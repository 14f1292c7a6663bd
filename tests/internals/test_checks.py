"""What is known of tensors that were checked, and how values are described."""

from __future__ import annotations

import pytest
import torch

from pyflocality._support import checks as _checks


def test_what_is_known_is_forgotten_with_its_memory():
    from pyflocality._support.checks import tensors

    for _ in range(3 * tensors._MOST_KNOWN):
        _checks.check_finite(torch.zeros(3), "zeros")
    assert len(tensors._known) <= tensors._MOST_KNOWN
    kept = [_checks.known_finite(torch.zeros(3)) for _ in range(2 * tensors._MOST_KNOWN)]
    assert len(tensors._known) <= tensors._MOST_KNOWN < len(kept)


class _Unfriendly:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (_Unfriendly(), "a _Unfriendly"),
        ("x" * 1000, "a str"),
        (torch.zeros(2, 3), "a torch.float32 tensor of shape (2, 3) on cpu"),
        (torch.zeros(2, device="meta"), "a torch.float32 tensor of shape (2,) on meta"),
        (torch.eye(2).to_sparse(), "a sparse_coo torch.float32 tensor of shape (2, 2) on cpu"),
        (torch.nn.parameter.UninitializedParameter(), "a torch.float32 tensor without a shape"),
    ],
)
def test_anything_can_be_described(value, expected):
    assert _checks.describe(value).startswith(expected)


def test_nested_tensors_can_be_described():
    nested = torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])
    assert _checks.describe(nested) == "a nested torch.float32 tensor without a shape on cpu"
