"""Which files of a folder or archive make up a set of images, and what their classes are.

Files count as images by the suffix of their name; what is in them is up to Pillow. Layouts:

- images at any depth, without labels;
- one subfolder per class: its name is the class, in sorted order;
- `dataset.json` beside the images, or in a folder around them: see
  `pyflocality.sources.dataset_json`;
- parts (`train`, `test`, ..), each in one of the layouts above: `split` chooses;
- folders of classes, each with the same parts inside;
- any of these inside one enclosing folder.

Folders are parts of a set, and not classes, where

- their names are those of two kinds of parts at least, such as `train` and `test`, whatever lies
  beside them (`pyflocality.sources.splits` has the names);
- all of them have such names, and one is for training if images lie beside them, too;
- `split` asks for one of them by its name;
- `train` is divided into folders and the others are not.

So `train` among `car` and `ship` is a vehicle, unless `split="train"` is asked for. Where parts
lie deeper than these layouts, so that they would be taken together, the set is refused.

All that is not taken is told by one warning: files without the suffix of an image, hidden images,
images beside the parts. Only what systems leave in folders (`.DS_Store`, `Thumbs.db`,
`__MACOSX`, ..), hidden files of other kinds and the parts for training, test and validation that
are not asked for go without saying.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pyflocality._support.caller import caller_level
from pyflocality._support.text import printable
from pyflocality.sources import dataset_json
from pyflocality.sources.left_out import LeftOut
from pyflocality.sources.splits import (
    are_parts,
    choose_split,
    find_parts,
    is_main,
    is_train,
    requested,
)
from pyflocality.sources.trees import Tree

# Raster images of 8 bits by the suffixes that Pillow, or a plugin of it, has for them: what it
# cannot read after all is refused by name. Drawings, documents, films and camera's raw files,
# of which it would read a thumbnail, are no images.
SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .jif .jfi .pjpeg .pjp .mpo .bmp .dib .gif .webp .tif .tiff "
    ".avif .avifs .heic .heif .hif .jxl .jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pam "
    ".pfm .tga .icb .vda .vst .ico .cur .icns .pcx .dcx .dds .sgi .bw .rgb .rgba .ras .xbm .xpm "
    ".qoi .psd .msp .im".split()
)
COMPRESSED_TARS = tuple(".tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst .tar.lz4".split())
# What systems leave in folders, in lower case.
SYSTEM_FILES = frozenset([".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"])
_SYSTEM_FOLDERS = ("/__macosx/", "/@eadir/")


@dataclass(frozen=True)
class Selection:
    """The images of a tree that make up a set.

    Attributes:
        names: Their names in the tree, in order: those of one folder lie together.
        root: What all of the names have in front of the layout.
        description: Name of the `dataset.json` that counts, or None.
    """

    names: list[str]
    root: str
    description: str | None

    def below(self, name: str) -> str:
        """The name relative to the root of the selection."""
        return name[len(self.root) :]


@dataclass
class _Level:
    """What lies side by side in one folder of a tree.

    Attributes:
        root: The folder, "" or with a slash at the end.
        folders: Images below each folder in it.
        strays: Images in the folder itself.
    """

    root: str
    folders: dict[str, list[str]] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Iterable[str], root: str) -> _Level:
        """What lies in the folder `root`, of images that all lie below it."""
        level = cls(root)
        for name in names:
            top, slash, _ = name[len(root) :].partition("/")
            if slash:
                level.folders.setdefault(top, []).append(name)
            else:
                level.strays.append(name)
        return level

    def inside(self, folder: str) -> _Level:
        """What lies in one of its folders."""
        return _Level.of(self.folders[folder], f"{self.root}{folder}/")


def is_image(name: str) -> bool:
    """Whether a file of this name, with slashes between folders, is taken for an image."""
    return _has_suffix(name) and not is_hidden(name)


def is_wanted(name: str) -> bool:
    """Whether a file of this name is read."""
    return is_image(name) or name.rsplit("/", 1)[-1] == dataset_json.NAME


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file is out of sight, by its name or that of a folder around it."""
    return name.startswith(".") or "/." in name or is_of_system(name)


def is_of_system(name: str) -> bool:
    """Whether a file is one that systems leave in folders."""
    path = f"/{name.lower()}"
    base = path[path.rindex("/") + 1 :]
    left = base in SYSTEM_FILES or base.startswith("._")
    return left or any(folder in path for folder in _SYSTEM_FOLDERS)


def select(tree: Tree, split: str | None) -> Selection:
    """Which images make up the set.

    Raises:
        ValueError: There are no images, no such part, or it cannot be told what is a part.

    Warns:
        UserWarning: Something is not taken.
    """
    names = [name for name in tree.files if is_image(name)]
    if not names:
        others = [name for name in tree.others if not is_hidden(name)]
        told = f"; '{printable(others[0])}' has not the suffix of an image" if others else ""
        if any(name.lower().endswith(COMPRESSED_TARS) for name in others):
            told += "; compressed tar archives are not read: decompress them"
        if any(name.lower().endswith((".tar", ".parquet", ".arrow")) for name in others):
            told += "; tar archives and datasets are for `pyflocality pack`"
        raise ValueError(f"{tree.where}: holds no images{told}")
    left_out = LeftOut(tree.where)
    # Folders of parts that are not asked for.
    passed: list[str] = []
    level, divided = _Level.of(names, ""), False
    while True:
        parts = [] if divided else _parts(level, tree, split)
        if parts:
            divided = True
            chosen = choose_split(split, parts, tree.where)
            if chosen not in level.folders:
                raise ValueError(f"{tree.where}: the part '{printable(chosen)}' holds no images")
            passed += _leave_beside(level, parts, chosen, left_out)
        elif _encloses(level, tree):
            (chosen,) = level.folders
        else:
            break
        level = level.inside(chosen)
    parts = [] if divided else _parts_of_classes(level)
    if parts:
        divided, chosen = True, choose_split(split, parts, tree.where)
        level = _part_of_classes(level, chosen, left_out, passed)
    if split is not None and not divided:
        _refuse_request(split, level, tree.where)
    names = [*level.strays, *(name for images in level.folders.values() for name in images)]
    _refuse_mixture(names, level.root, tree.where)
    names.sort(key=lambda name: name.split("/"))
    selection = Selection(names, level.root, _description(tree, level.root))
    _leave_others(tree, selection, level, passed, left_out)
    left_out.warn()
    return selection


def _parts(level: _Level, tree: Tree, split: str | None) -> list[str]:
    """The folders of a level that are parts of the set; none if they are something else."""
    folders = sorted(level.folders)
    # One part may hold no images at all, and is still none of the classes.
    result = find_parts({*folders, *_empty_folders(level, tree)})
    result = result if any(part in level.folders for part in result) else []
    asked = None if split is None else requested(split, folders)
    trains = [folder for folder in folders if is_train(folder)]
    if not result and folders and are_parts(folders):
        if level.strays and not trains and asked is None:
            raise ValueError(
                f"{tree.where}: the image '{printable(level.strays[0])}' lies beside the folder "
                f"'{printable(folders[0])}': which images are to be used? Move those that are into "
                f"a folder train, or pass split={folders[0]!r}"
            )
        result = folders
    if result or asked is not None:
        return sorted({*result, *([] if asked is None else [asked])})
    divided = len(trains) == 1 and _is_divided(level.inside(trains[0]))
    others = (level.inside(folder) for folder in folders if folder not in trains)
    return trains if divided and all(not other.folders for other in others) else []


def _encloses(level: _Level, tree: Tree) -> bool:
    """Whether the only folder of a level encloses a set, rather than being its only class."""
    if level.strays or len(level.folders) > 1:
        return False
    (folder,) = level.folders
    inside = level.inside(folder)
    described = f"{inside.root}{dataset_json.NAME}" in tree.files
    return described or not inside.strays or bool(find_parts(inside.folders))


def _is_divided(level: _Level) -> bool:
    return len(level.folders) > 1 and not level.strays


def _empty_folders(level: _Level, tree: Tree) -> set[str]:
    """Folders of a level with other files than images."""
    start = len(level.root)
    below = (name[start:] for name in tree.others if name.startswith(level.root))
    return {name.split("/")[0] for name in below if "/" in name and not is_hidden(name)}


def _leave_beside(level: _Level, parts: list[str], chosen: str, left_out: LeftOut) -> list[str]:
    """Note the images beside the parts; returns the folders of the parts that are not chosen."""
    reason = f"beside the folders {', '.join(map(repr, parts))}"
    beside = [images for folder, images in level.folders.items() if folder not in parts]
    for images in [level.strays, *beside]:
        if images:
            left_out.add(min(images), reason, len(images))
    for part in parts:
        if part != chosen and part in level.folders and not is_main(part):
            images = level.folders[part]
            left_out.add(min(images), f"in {part!r}, which split={part!r} takes", len(images))
    return [f"{level.root}{part}/" for part in parts if part != chosen]


def _parts_of_classes(level: _Level) -> list[str]:
    """The parts into which every folder of a level is divided, or none."""
    if level.strays or len(level.folders) < 2:
        return []
    parts = [find_parts(level.inside(folder).folders) for folder in level.folders]
    return sorted({name for names in parts for name in names}) if all(parts) else []


def _part_of_classes(level: _Level, chosen: str, left_out: LeftOut, passed: list[str]) -> _Level:
    """The same part of every class."""
    taken = _Level(level.root)
    for folder in level.folders:
        inside = level.inside(folder)
        passed += _leave_beside(inside, find_parts(inside.folders), chosen, left_out)
        if chosen in inside.folders:
            taken.folders[folder] = inside.folders[chosen]
        else:
            left_out.add(folder, f"without a part {chosen!r}")
    return taken


def _refuse_request(split: str, level: _Level, where: str) -> None:
    holds = ", ".join(sorted(level.folders)[:8]) if not level.strays else "images"
    raise ValueError(
        f"`split` asks for {split!r}, but the top of {where} holds no folder of that name, nor "
        f"folders named train, test or val; it holds {printable(holds)}"
    )


def _refuse_mixture(names: list[str], root: str, where: str) -> None:
    """Raise if images of several parts would be taken together."""
    children: dict[str, set[str]] = {}
    for folder in {name.rpartition("/")[0] for name in names}:
        while len(folder) > len(root):
            parent, _, child = folder.rpartition("/")
            if child in children.setdefault(parent, set()):
                break
            children[parent].add(child)
            folder = parent
    for parent in sorted(children):
        parts = find_parts(children[parent])
        if parts:
            raise ValueError(
                f"{where}: '{printable(parent)}' holds the folders {', '.join(map(repr, parts))}, "
                "which would be taken together: load that folder, or move its parts to the top"
            )


def _description(tree: Tree, root: str) -> str | None:
    """The `dataset.json` that counts: the nearest, in the folder of the images or around it."""
    while f"{root}{dataset_json.NAME}" not in tree.files and root:
        root = root[: root.rfind("/", 0, -1) + 1]
    description = f"{root}{dataset_json.NAME}"
    return description if description in tree.files else None


def _leave_others(
    tree: Tree, selection: Selection, level: _Level, passed: list[str], left_out: LeftOut
) -> None:
    """Note the files that are no images, or hidden."""
    elsewhere = tuple(passed)
    for name in sorted(tree.others):
        if name.startswith(elsewhere) or is_of_system(name):
            continue
        if is_hidden(name):
            if _has_suffix(name):
                left_out.add(name, "hidden")
            continue
        top, slash, _ = selection.below(name).partition("/")
        inside = name.startswith(level.root) and slash and level.folders
        if inside and top not in level.folders:
            left_out.add(name, "in folders without any image that is read")
        else:
            left_out.add(name, "without the suffix of an image")
    for name in tree.files:
        if is_image(name) or name == selection.description or name.startswith(elsewhere):
            continue
        left_out.add(name, f"besides the {dataset_json.NAME} that counts")


def labels_of(tree: Tree, selection: Selection) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Class of each selected image and names of the classes, as far as they are known."""
    if selection.description is not None:
        labels = dataset_json.described_labels(tree, selection.description, selection.names)
        return labels, None
    parts = [selection.below(name).split("/") for name in selection.names]
    strays = [part[0] for part in parts if len(part) == 1]
    if strays:
        folders = sorted({part[0] for part in parts if len(part) > 1})
        if folders:
            shown = printable(", ".join(map(repr, folders[:3])))
            warnings.warn(
                f"{tree.where}: no labels: an image, '{printable(strays[0])}', lies beside the "
                f"folders {shown}, which are therefore not taken for classes",
                stacklevel=caller_level(),
            )
        return None, None
    classes = sorted({part[0] for part in parts})
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[part[0]] for part in parts], np.int64), tuple(classes)
