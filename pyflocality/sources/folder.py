"""Folders and zip archives of image files.

Layouts that are understood, in a folder as in an archive:

- images at any depth, without labels;
- one subfolder per class: its name is the class, in sorted order;
- `dataset.json` with `{"labels": [[file name, class], ...]}` beside the images (the EDM and
  StyleGAN layout); `"labels": null` means none;
- `train`, `test`, `val`, .. at the top, each in one of the layouts above: `split` chooses;
- any of these inside one enclosing folder.

Hidden files and files without an image suffix are passed over. Links to folders are followed; a
folder that can be reached in several ways counts once, under its own name if it lies inside. The
images are ordered by their paths, so those of one class lie together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pyflocality.sources import cache, dataset_json
from pyflocality.sources.base import Loaded, Request, choose_split
from pyflocality.sources.images import ColourFoundError, ImageFiles, LabelledFiles, decode_job
from pyflocality.sources.trees import Tree, folder_tree, zip_tree

SUFFIXES = frozenset(
    ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga".split()
)
SPLITS = frozenset("train training test testing val valid validation dev".split())


@dataclass(frozen=True)
class Selection:
    """The images of a tree that make up a set, in order, and where `dataset.json` would lie."""

    names: list[str]
    root: str

    def below(self, name: str) -> str:
        """The name relative to the root of the selection."""
        return name[len(self.root) :]


def load_folder(path: Path, request: Request) -> Loaded:
    """Load the images below a folder."""
    with folder_tree(path, is_wanted) as tree:
        return _load(tree, path.resolve().name, request)


def load_zip(path: Path, request: Request) -> Loaded:
    """Load the images inside a zip archive."""
    with zip_tree(path, is_wanted) as tree:
        return _load(tree, path.name, request)


@contextmanager
def open_files(path: Path, request: Request) -> Iterator[LabelledFiles]:
    """The images of a folder or a zip archive, still encoded."""
    tree_of = zip_tree if path.is_file() else folder_tree
    with tree_of(path, is_wanted) as tree:
        selection = select(tree, request.split)
        labels, label_names = labels_of(tree, selection)
        fingerprint = {"tree": tree.fingerprint, "files": sorted(tree.files.items())}
        files = _image_files(tree, selection)
        yield LabelledFiles(files, path.resolve().name, labels, label_names, fingerprint)


def _image_files(tree: Tree, selection: Selection) -> ImageFiles:
    total_bytes = sum(tree.files[name][0] for name in selection.names)
    return ImageFiles(selection.names, tree.read, tree.path, total_bytes)


def _load(tree: Tree, name: str, request: Request) -> Loaded:
    total_bytes = sum(size for size, _ in tree.files.values())
    fingerprint = None
    if len(tree.files) >= cache.MIN_IMAGES or total_bytes >= cache.MIN_SOURCE_BYTES:
        fingerprint = {"tree": tree.fingerprint, "files": sorted(tree.files.items())}
    source = Loaded(None, name, fingerprint=fingerprint)
    cached = cache.find(source, request)
    if cached is not None:
        return cached
    selection = select(tree, request.split)
    labels, label_names = labels_of(tree, selection)
    source = replace(source, labels=labels, label_names=label_names)
    files = _image_files(tree, selection)
    try:
        return cache.run_job(decode_job(files, request), source, request)
    except ColourFoundError:
        return cache.run_job(decode_job(files, request, colour=True), source, request)


def is_image(name: str) -> bool:
    """Whether a file of this name, with slashes between folders, is taken for an image."""
    hidden = name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name
    return not hidden and os.path.splitext(name)[1].lower() in SUFFIXES


def is_wanted(name: str) -> bool:
    """Whether a file of this name is read."""
    return is_image(name) or name.rsplit("/", 1)[-1] == dataset_json.NAME


def select(tree: Tree, split: str | None) -> Selection:
    """Which images make up the set: those of one split, without enclosing folders."""
    names = [name for name in tree.files if is_image(name)]
    if not names:
        raise ValueError(f"{tree.where}: holds no images ({', '.join(sorted(SUFFIXES))})")
    root, split_found = "", False
    while True:
        parts = [name[len(root) :].split("/") for name in names]
        tops = sorted({part[0] for part in parts})
        nested = all(len(part) > 1 for part in parts)
        if nested and not split_found and all(top.lower() in SPLITS for top in tops):
            chosen = choose_split(split, tops, tree.where)
            names = [name for name in names if name.startswith(f"{root}{chosen}/")]
            split_found = True
        elif len(tops) == 1 and nested and _encloses(tree, f"{root}{tops[0]}/", parts):
            chosen = tops[0]
        else:
            break
        root = f"{root}{chosen}/"
    if split is not None and not split_found:
        found = ", ".join(tops[:8]) if nested else "images"
        raise ValueError(
            f"`split` asks for {split!r}, but the top of {tree.where} holds no folders named "
            f"train, test or val; it holds {found}"
        )
    return Selection(sorted(names, key=lambda name: name.split("/")), root)


def _encloses(tree: Tree, folder: str, parts: list[list[str]]) -> bool:
    """Whether the only folder encloses a set, rather than being its only class."""
    return all(len(part) > 2 for part in parts) or f"{folder}{dataset_json.NAME}" in tree.files


def labels_of(tree: Tree, selection: Selection) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Class of each selected image and names of the classes, as far as they are known."""
    # The nearest one counts, in the folder of the images or in one around it.
    root = selection.root
    while f"{root}{dataset_json.NAME}" not in tree.files and root:
        root = root[: root.rfind("/", 0, -1) + 1]
    description = f"{root}{dataset_json.NAME}"
    if description in tree.files:
        return dataset_json.described_labels(tree, description, selection.names), None
    parts = [selection.below(name).split("/") for name in selection.names]
    if not all(len(part) > 1 for part in parts):
        return None, None
    classes = sorted({part[0] for part in parts})
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[part[0]] for part in parts], np.int64), tuple(classes)
