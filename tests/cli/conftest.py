"""Fixtures of the room's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyflocality import cli


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 256, (20, 1, 6, 6), generator=generator).to(torch.uint8)


@pytest.fixture
def source(tmp_path, images):
    """A set of 20 images 6x6 of two classes."""
    path = tmp_path / "tiny.npz"
    np.savez(path, images=images.numpy(), labels=np.arange(20) % 2)
    return str(path)


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, standard output, standard error."""

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call
