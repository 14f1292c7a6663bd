"""Batches of several noise levels: taken apart, and put together again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyflocality._support.levels import Levels, Rows
from pyflocality._support.transforms import outside_transforms

Choice = TypeVar("Choice")
Key = TypeVar("Key", bound=Hashable)


class Level(NamedTuple):
    """The images of a batch that share a noise level.

    Attributes:
        alpha: Signal coefficient.
        sigma: Noise level.
        rows: Which images.
    """

    alpha: float
    sigma: float
    rows: Rows


def split_levels(levels: Levels, batch: int) -> list[Level]:
    """The distinct noise levels of a batch, in the order of sigma, and the images of each."""
    if isinstance(levels.alpha, float) and isinstance(levels.sigma, float):
        return [Level(levels.alpha, levels.sigma, slice(None))]
    groups = _grouped(levels.pairs(batch))
    if len(groups) == 1:
        return [Level(*pair, slice(None)) for pair in groups]
    ordered = sorted(groups, key=lambda pair: (pair[1], pair[0]))
    with outside_transforms():
        return [Level(*pair, torch.tensor(groups[pair])) for pair in ordered]


def share_passes(
    levels: Sequence[Level], choices: Sequence[Choice], keys: Sequence[Hashable]
) -> tuple[list[Rows], list[Choice]]:
    """The images of all levels with the same choice, which one pass serves, and the choices.

    Args:
        levels: The noise levels of a batch.
        choices: What each of them takes, such as a window.
        keys: What is equal where the choices are the same.
    """
    groups = list(_grouped(keys).values())
    if len(groups) == 1:
        return [slice(None)], [choices[0]]
    with outside_transforms():
        rows: list[Rows] = [
            _positions(levels[number].rows for number in numbers) for numbers in groups
        ]
    return rows, [choices[numbers[0]] for numbers in groups]


def join_rows(results: Sequence[Tensor], rows: Sequence[Rows], axis: int = 0) -> Tensor:
    """What was computed for groups of images, as one batch in its order along an axis."""
    if len(results) == 1:
        return results[0]
    order = _positions(rows).argsort().to(results[0].device)
    return torch.cat(list(results), axis).index_select(axis, order)


def _positions(rows: Iterable[Rows]) -> Tensor:
    """Positions of groups, of which none is the whole batch, one group after the other."""
    return torch.cat([some for some in rows if isinstance(some, Tensor)])


def _grouped(keys: Sequence[Key]) -> dict[Key, list[int]]:
    """Where each of the keys is, in the order in which they come first."""
    groups: dict[Key, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups
