"""Folders and zip archives of image files.

`pyflocality.sources.trees` tells what files there are, `pyflocality.sources.selection` which of
them make up the set and what their classes are. Links to folders are followed; a folder that can
be reached in several ways counts once, under its own name if it lies inside. The images are
ordered by their paths, so those of one class lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyflocality.sources import cache
from pyflocality.sources.base import Loaded, Request
from pyflocality.sources.images import ColourFoundError, ImageFiles, decode_job
from pyflocality.sources.selection import is_wanted, labels_of, select
from pyflocality.sources.trees import folder_tree, zip_tree


@contextmanager
def open_files(path: Path, request: Request) -> Iterator[ImageFiles]:
    """The images of a folder or a zip archive, still encoded."""
    tree_of, name = (folder_tree, path.resolve().name) if path.is_dir() else (zip_tree, path.name)
    with tree_of(path, is_wanted) as tree:
        selection = select(tree, request.split)
        read = [*selection.names, *([selection.description] if selection.description else [])]
        files = [(file, *tree.files[file]) for file in read]
        yield ImageFiles(
            selection.names,
            tree.read,
            tree.path,
            sum(tree.files[file][0] for file in selection.names),
            name,
            *labels_of(tree, selection),
            {"tree": tree.fingerprint, "root": selection.root, "files": files},
        )


def load_files(path: Path, request: Request) -> Loaded:
    """Load the images below a folder or inside a zip archive."""
    with open_files(path, request) as files:
        large = len(files.names) >= cache.MIN_IMAGES or files.total_bytes >= cache.MIN_SOURCE_BYTES
        fingerprint = files.fingerprint if large else None
        source = Loaded(None, files.name, files.labels, files.label_names, fingerprint)
        cached = cache.find(source, request)
        if cached is not None:
            return cached
        try:
            return cache.run_job(decode_job(files, request), source, request)
        except ColourFoundError:
            return cache.run_job(decode_job(files, request, colour=True), source, request)
