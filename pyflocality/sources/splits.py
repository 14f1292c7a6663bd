"""Parts of a set: what their folders and files are called, and which of them is asked for.

A name means a part by one of the words below, whatever its case, alone or with a number, a letter
or a word such as `set` or `images` behind it: `train`, `Testing`, `val_set`, `train2017`,
`testA`. A word may also stand in a longer name, where others are alike: `digits_train` beside
`digits_test`, `train_64x64` beside `valid_64x64`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from pyflocality._support.text import printable

_WORDS = {
    "train": "train(?:ing)?|trn|trainval",
    "test": "test(?:ing)?|tst",
    "validation": "val|valid|validate|validation",
    "development": "dev|development",
    "evaluation": "eval|evaluation",
    "unlabeled": "unlabell?ed",
    "extra": "extra",
}
# Parts that tell by themselves that a set has parts.
_MAIN = ("train", "test", "validation", "development", "evaluation")
_NAME = re.compile(
    r"(?:(?P<set>.+)[-_. ])?(?:"
    + "|".join(f"(?P<{kind}>{words})" for kind, words in _WORDS.items())
    + r")(?:[-_. ]?(?:set|split|part|data|dataset|images?|imgs?)|(?P<which>[-_. ]?(?:[abs]|\d+))"
    r"|[-_. ](?P<more>.+))?",
    re.IGNORECASE,
)
# What holds the images for training and those for validation is to train with.
_BOTH = re.compile(r"(?<![a-z])train(?:ing)?[-_+ ]?val(?:id|idation)?(?![a-z])", re.IGNORECASE)


class _Part(NamedTuple):
    """What a name says.

    Attributes:
        of: What else the name says, of the set that has the part as a rule, or "".
        kind: Kind of the part.
        which: The one of several of its kind, or "".
        goes_on: Whether something else comes behind the kind.
    """

    of: str
    kind: str
    which: str
    goes_on: bool


def _part(name: str) -> _Part | None:
    match = _NAME.fullmatch(_BOTH.sub("trainval", name))
    if match is None:
        return None
    kind = next(kind for kind in _WORDS if match[kind])
    of = " ".join(text.lower() for text in (match["set"], match["more"]) if text)
    return _Part(of, kind, match["which"] or "", match["more"] is not None)


def find_parts(names: Iterable[str]) -> list[str]:
    """The names, of several that lie side by side, that tell that a set has parts.

    They do if two of them, at least, are of different kinds (`train` and `test`, say), whatever
    else lies there. Else nothing of it is a part: `train` beside `car` is a vehicle. Where names
    go on behind the kind one must be for training: `dev_board` and `eval_board` are things.
    """
    parts = {name: part for name in names if (part := _part(name)) is not None}
    kinds: dict[str, set[str]] = {}
    for part in parts.values():
        if part.kind in _MAIN:
            kinds.setdefault(part.of, set()).add(part.kind)

    def counts(part: _Part) -> bool:
        beside = kinds.get(part.of, set())
        return len(beside) > 1 and ("train" in beside or not part.goes_on)

    return sorted(name for name, part in parts.items() if counts(part))


def are_parts(names: Sequence[str]) -> bool:
    """Whether names that have nothing beside them are parts, one of a main kind at least."""
    parts = [part for name in names if (part := _part(name)) is not None and not part.of]
    return len(parts) == len(names) and any(part.kind in _MAIN for part in parts)


def is_main(name: str) -> bool:
    """Whether a part is one of those that sets have as a rule, and not "extra", say."""
    part = _part(name)
    return part is not None and part.kind in _MAIN


def part_words(name: str) -> set[str]:
    """The words in a name that mean parts which tell by themselves that a set has parts."""
    pattern = "|".join(_WORDS[kind] for kind in _MAIN)
    words = re.findall("[a-z]+", _BOTH.sub("trainval", name).lower())
    return {word for word in words if re.fullmatch(pattern, word)}


def parts_of_files(files: Sequence[tuple[str, Sequence[str]]]) -> list[str | None]:
    """The parts of a set that files of a table belong to, by their names or those of their folders.

    Args:
        files: For each file its name without the suffix, such as "train-00000-of-00002" or "0000",
            and the names of the folders around it, the nearest last.

    Returns:
        The name of each file's part, or None where nothing tells it.
    """
    # As folders do, "digits_train" and "digits_test" tell it together.
    together = frozenset(find_parts({_piece_of(stem)[0] for stem, _ in files}))
    return [_part_of_file(stem, folders, together) for stem, folders in files]


def _piece_of(stem: str) -> tuple[str, bool]:
    """What a file's name says it is a piece of, and whether it says that there are several."""
    sharded = re.fullmatch(r"(.+?)-\d+-of-\d+(?:-\w+)?", stem)
    return (sharded[1], True) if sharded else (re.sub(r"[-_.]\d+$", "", stem), False)


def _part_of_file(stem: str, folders: Sequence[str], together: Collection[str]) -> str | None:
    name, sharded = _piece_of(stem)
    part = _part(name)
    if name in together or (part is not None and not part.of):
        return name
    nearest = [folder for folder in folders if folder != "data"][-1:]
    if nearest and ((part := _part(nearest[0])) is not None or re.fullmatch(r"\d+", stem)):
        return nearest[0]
    # Other names count where the file says that it is a piece of something.
    return name if sharded and name not in ("data", "part", "shard", "chunk") else None


def is_train(name: str) -> bool:
    """Whether a name alone is that of the part to train with."""
    part = _part(name)
    return part is not None and (part.of, part.kind) == ("", "train")


def choose_split(split: str | None, available: Sequence[str], where: str) -> str:
    """The part that is asked for; without a request that for training, or the only one.

    Args:
        split: A name that is there, in any case, or another name of its kind: "val" is
            "validation" where there is no other.
        available: Names of the parts.
        where: The source, for messages.

    Raises:
        ValueError: There is no such part, or there are several.
    """
    result = _matching(split, available)
    if len(result) == 1:
        return result[0]
    listed = printable(", ".join(repr(name) for name in available))
    raise ValueError(f"`split` must be one of {listed} for {where}, got {split!r}")


def _matching(split: str | None, available: Sequence[str]) -> list[str]:
    if split is None and len(available) == 1:
        return [available[0]]
    wanted = "train" if split is None else split
    if wanted in available:
        return [wanted]
    alike = [name for name in available if name.lower() == wanted.lower()]
    part = _part(wanted)
    if alike or part is None or part.which:
        return alike
    parts = [(name, of) for name in available if (of := _part(name)) is not None]
    same = [(name, of) for name, of in parts if of.kind == part.kind]
    return [name for name, of in same if not part.of or of.of == part.of]


def requested(split: str, names: Sequence[str]) -> str | None:
    """The one of some names that a request means, or None.

    "train" means no "train station", nor a "bullet train", where nothing like it says "test".
    """
    parts = find_parts(names)

    def may_be_meant(name: str) -> bool:
        part = _part(name)
        return name in parts or name.lower() == split.lower() or part is None or not part.of

    result = _matching(split, [name for name in names if may_be_meant(name)])
    return result[0] if len(result) == 1 else None
