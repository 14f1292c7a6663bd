"""What commands that run models share: files claimed, time kept, a record told at the end."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyflocality._support.memory import peak_memory_bytes
from pyflocality._support.outputs import Outputs
from pyflocality._support.record import Stages, software
from pyflocality.cli._options import ResultOptions, SourceOptions

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import Basis, Moments, TrainingSet
    from pyflocality.cli._denoisers import DenoiserOptions
    from pyflocality.ops.nearest import Neighbours


class Work:
    """A command at work; see `working`.

    Attributes:
        stages: The stopwatch.
        backends: Operation and backend of each call so far.
    """

    def __init__(
        self, command: str, outputs: Outputs, stages: Stages, backends: Sequence[tuple[str, str]]
    ) -> None:
        self.stages, self.backends = stages, backends
        self._command, self._outputs = command, outputs
        self._start = time.perf_counter()

    def temporary(self, file: Path) -> Path:
        """Where a result is written until all are there."""
        return self._outputs.temporary[file]

    def leave_out(self, file: Path) -> None:
        """Claim a file no longer: there is nothing to write into it."""
        self._outputs.leave_out(file)

    def commit(self) -> None:
        """Give all results their names."""
        self._outputs.commit()

    def finish(self, source: SourceOptions, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record, the last of the files, and give all their names; what it tells.

        Source, time and software are added to what is told already.
        """
        total = round(time.perf_counter() - self._start, 4)
        *_, file = files = self._outputs.paths
        whole = {
            "command": self._command,
            "source": asdict(source),
            **record,
            "software": software(),
            "seconds": self.stages.seconds | {"total": total},
            "files": [path.name for path in files],
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self.temporary(file).write_text(text_of(whole) + "\n", encoding="utf-8")
        self.commit()
        return whole

    def backends_by_operation(self) -> dict[str, list[str]]:
        """Backends that ran, by operation."""
        operations = dict.fromkeys(operation for operation, _ in self.backends)
        return {
            name: sorted({backend for operation, backend in self.backends if operation == name})
            for name in operations
        }


def text_of(record: Mapping[str, Any]) -> str:
    """A record as JSON."""
    return json.dumps(record, indent=2, allow_nan=False)


@contextmanager
def working(
    command: str,
    files: Sequence[Path],
    results: ResultOptions,
    *asked: object,
    folder: Path | None = None,
) -> Iterator[Work]:
    """Claim the files of a command for a `with` block, which writes them.

    What is asked tells one run from another; a folder is given where it is the run's own.
    """
    from pyflocality import trace_backends

    with (
        Outputs(files, force=results.force, folder=folder, run=[command, *asked]) as outputs,
        trace_backends() as backends,
    ):
        yield Work(command, outputs, Stages(announce=results.progress), backends)


def foretell_few_images(
    source: TrainingSet | Moments | Basis, methods: Iterable[DenoiserOptions]
) -> None:
    """Say before any work where images are too few for a covariance; models then do not, again.

    Args:
        source: The training set, or its moments where these are given.
        methods: The models.
    """
    from pyflocality.moments.undetermined import warn_of_few_images

    # In their own words.
    made = [method.entry.estimate for method in methods if method.entry.estimate is not None]
    if made:
        warn_of_few_images(source, " and ".join(made))
        # Until the command ends.
        warnings.filterwarnings("ignore", r"\d+ images are too few for ")


def check_stored(data: TrainingSet, stored: Moments | Basis | None) -> None:
    """Refuse moments of a file that are of other images, and tell where they are of more or fewer.

    Raises:
        ValueError: Their images have another shape.
    """
    if stored is None:
        return
    if tuple(stored.image_shape) != data.image_shape:
        raise ValueError(
            f"`moments` must be of images of shape {data.image_shape}, got "
            f"{tuple(stored.image_shape)}"
        )
    count = len(data) * data.copies
    if stored.count != count:
        warnings.warn(
            f"the moments are of {stored.count:,} images, {data.name} has {count:,}",
            stacklevel=2,
        )


def moments_of(part: TrainingSet, stages: Stages) -> Moments:
    """Moments of a set, or of the whole of which this rank holds a part."""
    from pyflocality import Moments

    with stages("moments", f"covariance of {len(part) * part.copies:,} images"):
        return Moments.from_data(part, progress=stages.announce)


def components_of(source: TrainingSet | Moments | Basis, stages: Stages) -> Basis:
    """Principal components of a set, or of the whole of which this rank holds a part."""
    from pyflocality import Basis, Moments

    if isinstance(source, Basis):
        return source
    name, told = "components", "principal components of {:,} images"
    if isinstance(source, Moments):
        with stages(name, told.format(source.count)):
            return source.basis(progress=stages.announce)
    with stages(name, told.format(len(source) * source.copies)):
        return Basis.from_data(source, progress=stages.announce)


def neighbours_of(
    images: Tensor, data: TrainingSet, memory_budget: str | None, stages: Stages
) -> Neighbours:
    """The training image nearest to each image; `data` may be a part of a sharded set."""
    from pyflocality.ops import nearest_images

    with stages("nearest", "looking for the nearest training images"):
        # Whatever backend was chosen was chosen for the model; this is the caption of a picture.
        return nearest_images(
            images,
            data.images,
            backend="auto",
            memory_budget=memory_budget,
            augmentation=data.augmentation,
        )


def neighbour_values(neighbours: Neighbours, data: TrainingSet, count: int) -> Tensor:
    """The training images nearest to the first samples themselves, on the CPU: [n, C, H, W]."""
    import torch

    from pyflocality.storage.reader import Reader, training_values

    positions = neighbours.indices[:count, 0].to(data.device)
    return training_values(Reader.of(data).at(positions), torch.float32).cpu()


def neighbour_record(neighbours: Neighbours, data: TrainingSet) -> dict[str, list[float]]:
    """Positions in the set, and root mean square differences in units of the values."""
    from pyflocality.analysis.memorization import rms_differences

    positions = neighbours.indices[:, 0]
    return {
        "index": (positions % len(data)).tolist(),
        "mirrored": (positions >= len(data)).tolist(),
        "rms_difference": rms_differences(neighbours.distances[:, 0], data.num_values).tolist(),
    }


def data_record(data: TrainingSet, *, flip: bool) -> dict[str, Any]:
    """What the record of a run tells of the training set."""
    return {
        "name": data.name,
        "images": len(data),
        "flip": flip,
        "image_shape": list(data.image_shape),
        "dtype": str(data.dtype).removeprefix("torch."),
        "content_key": data.content_key(),
    }
