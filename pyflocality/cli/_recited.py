"""How many samples are training images, as it is told: in a line, in the record, in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import TrainingSet
    from pyflocality.ops.nearest import Neighbours

_NOBODY_LOOKED = "nobody looked for the nearest training images (--no-nearest)"


def recited_samples(neighbours: Neighbours, data: TrainingSet) -> Tensor:
    """Which samples are training images, bool [n] on the CPU."""
    from pyflocality.analysis.memorization import is_recited

    return is_recited(neighbours.distances[:, 0], data.num_values).cpu()


def recited_record(which: Tensor | None) -> dict[str, Any]:
    """What the record tells of them: how many and which, or why that is not known."""
    from pyflocality.analysis.memorization import RECITED_RMS

    if which is None:
        return {"number": None, "reason": _NOBODY_LOOKED}
    return {
        "number": int(which.sum()),
        "which": which.nonzero().flatten().tolist(),
        "within_rms": RECITED_RMS,
    }


def recited_line(record: dict[str, Any], count: int, instead: Sequence[str], place: str) -> str:
    """The same in a line.

    Args:
        record: What the record tells.
        count: Number of samples.
        instead: What to try where there are any.
        place: Where they are framed.
    """
    number = record["number"]
    if number is None:
        return f"whether samples are training images is not known: {record['reason']}"
    if number == 0:
        return f"none of {count} samples is a training image (within rms 1/255)"
    verb = "is a training image" if number == 1 else "are training images"
    return (
        f"{number} of {count} samples {verb} (within rms 1/255), framed in {place}: try "
        f"{', or '.join(['more images', *instead])}"
    )
