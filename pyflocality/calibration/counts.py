"""How much work a calibration is: counts alone, so that every machine does the same."""

from __future__ import annotations

from dataclasses import dataclass

# Images that are held out, over all folds, where there are twice as many; a fold leaves out at most
# a part of the set of this many, but for small sets of which that would take too many folds.
HELD_OUT, PARTS, MOST_FOLDS = 64, 20, 5
# Of a set of fewer images none can be held out.
FEWEST = 4
# Held-out images that all candidates see, and how many candidates of a level go on from there to
# all images, and then to restore them.
SCREENED, COMPARED, RESTORED = 16, 8, 4


@dataclass(frozen=True)
class Counts:
    """How many noisy images are denoised at most.

    Attributes:
        screened: By every candidate.
        compared: By the candidates that go on, together.
        restored: On the ways down to the data, by what was chosen.
    """

    screened: int
    compared: int
    restored: int


def screened_of_fold(folds: int) -> int:
    """Images of a fold that all candidates see."""
    return -(-SCREENED // folds)


def counts_of(levels: int, held_out: int, candidates: int, folds: int) -> Counts:
    """The counts of a calibration."""
    screened = min(screened_of_fold(folds) * folds, held_out)
    on = min(COMPARED, candidates)
    ways = levels * (levels - 1) // 2
    return Counts(
        levels * screened,
        levels * on * (held_out - screened),
        ways * min(RESTORED, candidates) * held_out,
    )
