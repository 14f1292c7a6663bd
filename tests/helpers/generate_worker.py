"""One rank of a job that runs `pyflocality`: `generate_worker.py JOB.json`.

The file holds `commands`, lists of arguments; `killed`: null, or a rank and the number of answers
of its denoiser after which that rank is killed; and `batch`: null, or samples a batch.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path

from torch import Tensor

import pyflocality as pf
from pyflocality.cli import main

_whole = pf.Denoiser.__call__


def _run(
    commands: list[list[str]], killed: tuple[int, int] | None, batch: int | None = None
) -> int:
    if batch is not None:
        samples = importlib.import_module("pyflocality.cli._samples")
        samples._LEAST, samples._STATE_BYTES = batch, 1
    answered = itertools.count()

    def call(denoiser: pf.Denoiser, *arguments: object) -> Tensor:
        if killed is not None and [int(os.environ["RANK"]), next(answered)] == list(killed):
            os.kill(os.getpid(), signal.SIGKILL)
        return _whole(denoiser, *arguments)

    pf.Denoiser.__call__ = call
    return max(main(command) for command in commands)


if __name__ == "__main__":
    sys.exit(_run(**json.loads(Path(sys.argv[1]).read_text())))
