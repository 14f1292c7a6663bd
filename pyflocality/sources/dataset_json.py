"""Classes of images by a file beside them, `dataset.json`: the EDM and StyleGAN layout.

It holds `{"labels": [[file name, class], ...]}`, or `{"labels": null}` where there are none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from pyflocality.sources.archive_names import tidy_name
from pyflocality.sources.left_out import LeftOut
from pyflocality.sources.trees import Tree

NAME = "dataset.json"
# What the file may take: for each file of the tree a path of any length, its class and more.
_BYTES, _BYTES_PER_FILE = 2**20, 2**13


def described_labels(tree: Tree, description: str, images: Sequence[str]) -> np.ndarray | None:
    """The classes [N] of images, or None where the file says that there are none.

    The names in a description are relative to its folder.

    Raises:
        ValueError: The file cannot be read, is not of the form above, or gives an image no
            class or two.

    Warns:
        UserWarning: It names files that are not there.
    """
    where, root = tree.path(description), description[: -len(NAME)]
    try:
        content = tree.read(description, _BYTES + _BYTES_PER_FILE * len(tree.files))
        entries = json.loads(content)["labels"]
        pairs = None if entries is None else [(name, label) for name, label in entries]
        if not all(isinstance(name, str) for name, _ in pairs or ()):
            raise TypeError("a file name is no text")
    # Whatever the file holds instead, lists in lists without end among it.
    except Exception as error:
        raise ValueError(
            f'{where}: cannot be read as {{"labels": [[file name, class], ...]}}: {error!r}'
        ) from error
    if pairs is None:
        return None
    table = _table(tree, where, root, pairs)
    labels = np.array([_class_of(where, name, table.get(name)) for name in images], np.int64)
    left_out = LeftOut(where)
    for name in table:
        if name not in tree.files:
            left_out.add(name, "that it names and that are not there")
    left_out.warn()
    return labels


def _table(tree: Tree, where: str, root: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The class of each file by its name in the tree."""
    table: dict[str, object] = {}
    for name, label in pairs:
        tidied = root + tidy_name(where, name, backslash=False)
        # Tools on Windows write backslashes here, too.
        if tidied not in tree.files and "\\" in name:
            tidied = root + tidy_name(where, name, backslash=True)
        if table.setdefault(tidied, label) != label:
            raise ValueError(
                f"{where}: gives {tidied!r} two classes, {table[tidied]!r} and {label!r}"
            )
    return table


def _class_of(where: str, name: str, label: object) -> int:
    if isinstance(label, bool) or not isinstance(label, int) or abs(label) >= 2**63:
        shown = repr(label)
        raise ValueError(
            f"{where}: expected a whole number as the class of {name!r}, got {shown[:80]}"
        )
    return label
