"""How much work a calibration is: counts alone, so that every machine does the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pyflocality.calibration.candidates import Candidate

# Images that are held out, over all folds, where there are twice as many; a fold leaves out at most
# a part of the set of this many, but for small sets of which that would take too many folds.
HELD_OUT, PARTS, MOST_FOLDS = 64, 20, 5
# Of a set of fewer images none can be held out.
FEWEST = 4
# Held-out images that all candidates see, and how many families of candidates go on from there to
# all images, and then to restore them; of means half as many more. Those of a family differ in
# temperature and slope alone.
SCREENED, COMPARED, RESTORED = 16, 4, 2

# How often each image gets noise to be restored by whole runs.
DRAWS = 2


@dataclass(frozen=True)
class Counts:
    """How many noisy images are denoised at most.

    Attributes:
        screened: For each temperature of a family.
        compared: By the families that go on, together.
        restored: On the ways down to the data, by what was chosen.
    """

    screened: int
    compared: int
    restored: int


def folds_of_set(count: int) -> tuple[int, int]:
    """How many of so many images are held out, and in how many folds."""
    total = min(HELD_OUT, count // 2)
    return total, min(MOST_FOLDS, total, -(-total // max(1, count // PARTS)))


def screened_of_fold(folds: int) -> int:
    """Images of a fold that all candidates see."""
    return -(-SCREENED // folds)


def temperatures_of(candidates: Sequence[Candidate]) -> dict[Candidate, int]:
    """How many temperatures each family has, those that are parts of means included."""
    leaves = [leaf for one in candidates for leaf in one.leaves]
    warm = dict.fromkeys((leaf.family, leaf.temperature) for leaf in leaves)
    return dict(Counter(family for family, _ in warm))


def rows_of(counts: Counts, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
    """Noisy images that each family denoises: any of those with a posterior may go on alike."""
    heats = temperatures_of(candidates)
    going = [one for one in heats if one.model != "wiener"] or [*heats]
    share = (counts.compared + counts.restored) / len(going)
    return {
        one: heat * counts.screened + (share if one in going else 0) for one, heat in heats.items()
    }


def counts_of(
    levels: int,
    held_out: int,
    candidates: Sequence[Candidate],
    folds: int,
    telling: int | None = None,
) -> Counts:
    """The counts of a calibration, where so many levels restore images; None for all."""
    telling = levels if telling is None else telling
    screened = min(screened_of_fold(folds) * folds, held_out)
    heats = sorted(temperatures_of(candidates).values(), reverse=True)
    ways = telling * (telling - 1) // 2
    parts = max(len(one.leaves) for one in candidates)
    compared = sum(heats[: COMPARED + parts * (COMPARED // 2)])
    # Each kind's first run goes on from what its families have led to, at every level; then all
    # start at the noisiest. A mean is of as many models.
    runs = Counter(of_means for of_means, _ in {one.posterior for one in candidates})
    restored = sum(
        (parts * RESTORED // 2 if of_means else RESTORED) * ways
        + (parts if of_means else 1) * DRAWS * telling * count
        for of_means, count in runs.items()
    )
    return Counts(levels * screened, levels * compared * (held_out - screened), restored * held_out)
