"""Folders and zip archives of image files.

`pyflocality.sources.trees` tells what files there are, `pyflocality.sources.selection` which of
them make up the set and what their classes are. Links to folders are followed; a folder that can
be reached in several ways counts once, under its own name if it lies inside. The images are
ordered by their paths, so those of one class lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyflocality.sources import cache
from pyflocality.sources.base import Loaded, Request
from pyflocality.sources.images import ColourFoundError, ImageFiles, LabelledFiles, decode_job
from pyflocality.sources.selection import Selection, is_wanted, labels_of, select
from pyflocality.sources.trees import Tree, folder_tree, zip_tree


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
        fingerprint = _fingerprint(tree, selection)
        files = _image_files(tree, selection)
        yield LabelledFiles(files, path.resolve().name, labels, label_names, fingerprint)


def _image_files(tree: Tree, selection: Selection) -> ImageFiles:
    total_bytes = sum(tree.files[name][0] for name in selection.names)
    return ImageFiles(selection.names, tree.read, tree.path, total_bytes)


def _fingerprint(tree: Tree, selection: Selection) -> dict[str, Any]:
    """What identifies the images and their classes."""
    read = [*selection.names, *([selection.description] if selection.description else [])]
    files = [(name, *tree.files[name]) for name in read]
    return {"tree": tree.fingerprint, "root": selection.root, "files": files}


def _load(tree: Tree, name: str, request: Request) -> Loaded:
    # Also where the images are in the cache: it tells what is not taken.
    selection = select(tree, request.split)
    files = _image_files(tree, selection)
    fingerprint = None
    if len(files.names) >= cache.MIN_IMAGES or files.total_bytes >= cache.MIN_SOURCE_BYTES:
        fingerprint = _fingerprint(tree, selection)
    source = Loaded(None, name, fingerprint=fingerprint)
    cached = cache.find(source, request)
    if cached is not None:
        return cached
    labels, label_names = labels_of(tree, selection)
    source = replace(source, labels=labels, label_names=label_names)
    try:
        return cache.run_job(decode_job(files, request), source, request)
    except ColourFoundError:
        return cache.run_job(decode_job(files, request, colour=True), source, request)
