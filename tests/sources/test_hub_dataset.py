"""Datasets of the library `datasets`: columns, parts, names of files and rows without values."""

from __future__ import annotations

import re

import numpy as np
import pytest
from source_files import COLOUR, assert_images, encoded, load

from pyflocality.cli import main
from pyflocality.packing import pack

datasets = pytest.importorskip("datasets", reason="needs the library datasets")

CELLS = [{"bytes": encoded(image), "path": None} for image in COLOUR]
CLASSES = datasets.ClassLabel(names=["a", "b", "c"])
IMAGE = datasets.Image()
# What other libraries write.
STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
# Lists of columns of other types, by releases of the library.
list_of = getattr(datasets, "List", datasets.Sequence)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()


def table(features, **columns):
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def labelled(rows=slice(None), **more):
    numbers = list(range(6))[rows]
    columns = {"image": CELLS[rows], "label": [number % 3 for number in numbers]}
    return table({"image": IMAGE, "label": CLASSES} | more, **columns)


def write(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(str(path))


def packed(path, tmp_path, **arguments):
    return load(pack(path, tmp_path / "out", progress=False, **arguments))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
@pytest.mark.parametrize("name", ["a[b]c", "[0-9]", "what?", "a*b", "{a,b}", "a b%20#!", "é"])
def test_characters_of_patterns_in_paths(tmp_path, kind, name):
    path = tmp_path / name
    if kind == "saved":
        labelled().save_to_disk(str(path))
    else:
        write(labelled(), path / "data[1].parquet")
        write(labelled(), tmp_path / "a" / "data1.parquet")
    data = packed(path, tmp_path)
    assert_images(data, COLOUR)
    assert (data.labels.tolist(), data.label_names) == ([0, 1, 2, 0, 1, 2], ("a", "b", "c"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["data/train-00000-of-00002", "data/train-00001-of-00002"], ["data/test-00000-of-00001"]),
        (["train-00000-of-00001-0123456789abcdef"], ["test-00000-of-00001-0123456789abcdef"]),
        (["default/train/0000", "default/train/0001"], ["default/test/0000"]),
        (["train/0000", "train/0001"], ["test/0000"]),
        (["train/part-0"], ["validation/part-0"]),
        (["train"], ["test"]),
        (["train_0", "train_1"], ["test_0"]),
        (["config/train-00000-of-00001"], ["config/val-00000-of-00001"]),
        (["digits_train"], ["digits_test"]),
        (["data/digits_train_0", "data/digits_train_1"], ["data/digits_test_0"]),
        (["train_64x64-00000-of-00001"], ["valid_64x64-00000-of-00001"]),
    ],
)
def test_parts_by_names_of_parquet_files(tmp_path, train, test):
    for number, name in enumerate(train):
        rows = slice(0, 2) if number == 0 else slice(2, 4)
        write(labelled(rows), tmp_path / "set" / f"{name}.parquet")
    for name in test:
        write(labelled(slice(4, 6)), tmp_path / "set" / f"{name}.parquet")
    for split, out, images in (
        (None, "a", COLOUR[: 2 * len(train)]),
        ("train", "b", COLOUR[: 2 * len(train)]),
        ("validation" if "val" in test[0] else "test", "c", COLOUR[4:]),
    ):
        assert_images(load(pack(tmp_path / "set", tmp_path / out, split=split)), images)
    with pytest.raises(ValueError, match=r"`split` must be one of .*train.*got 'extra'"):
        pack(tmp_path / "set", tmp_path / "d", split="extra")


@pytest.mark.parametrize("names", [["0000"], ["0000", "0001"], ["part-0", "part-1"], ["my set"]])
def test_files_that_are_no_parts(tmp_path, names):
    """`0000.parquet` was a part of that name, and `0001.parquet` another."""
    for number, name in enumerate(names):
        write(labelled(slice(2 * number, 2 * number + 2)), tmp_path / "set" / f"{name}.parquet")
    assert_images(packed(tmp_path / "set", tmp_path), COLOUR[: 2 * len(names)])
    with pytest.raises(ValueError, match="`split` must be left out: .*has no parts, got 'train'"):
        pack(tmp_path / "set", tmp_path / "other", split="train")


def test_files_of_which_it_cannot_be_told(tmp_path):
    write(labelled(), tmp_path / "set" / "train.parquet")
    write(labelled(), tmp_path / "set" / "0000.parquet")
    with pytest.raises(ValueError, match="cannot tell which part of the set '0000.parquet' is"):
        pack(tmp_path / "set", tmp_path / "out")


def test_several_datasets_are_refused(tmp_path):
    for name in ("small", "large"):
        write(labelled(), tmp_path / "set" / name / "train" / "0000.parquet")
    with pytest.raises(ValueError, match="holds several datasets .*large/train/0000.parquet"):
        pack(tmp_path / "set", tmp_path / "out")
    assert_images(packed(tmp_path / "set" / "small", tmp_path), COLOUR)


def test_a_table_beside_images_is_not_the_set(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(encoded(COLOUR[3]))
    write(labelled(), tmp_path / "set" / "data.parquet")
    with pytest.warns(UserWarning, match="1 left out: 1 without.*'data.parquet'"):
        assert_images(packed(tmp_path / "set", tmp_path), COLOUR[3:4])


# Columns

TWO = {"img": IMAGE, "fine_label": CLASSES, "coarse_label": CLASSES}
TWO_COLUMNS = {"img": CELLS, "fine_label": [0, 1, 2, 0, 1, 2], "coarse_label": [1, 1, 1, 0, 0, 0]}


def test_one_of_several_columns_of_classes(tmp_path, capsys):
    path = tmp_path / "set"
    write(table(TWO, **TWO_COLUMNS), path / "0000.parquet")
    several = "`label_column` must be given: .*several columns of classes, 'fine_label', 'coarse_l"
    with pytest.raises(ValueError, match=several):
        pack(path, tmp_path / "out")
    for name in ("fine_label", "coarse_label"):
        data = load(pack(path, tmp_path / name, label_column=name))
        assert data.labels.tolist() == TWO_COLUMNS[name]
        assert data.label_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="`label_column` must be one of 'img', .*got 'label'"):
        pack(path, tmp_path / "out", label_column="label")
    with pytest.raises(ValueError, match="column 'img' holds Image.*expected ClassLabel or whole"):
        pack(path, tmp_path / "out", label_column="img")
    with pytest.raises(FileExistsError, match="of another source or of other options"):
        pack(path, tmp_path / "fine_label", label_column="coarse_label")
    arguments = ["pack", str(path), str(tmp_path / "command")]
    assert main(arguments) == 2
    assert "has several columns of classes" in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert main([*arguments, "--label-column", "coarse_label", "--image-column", "img"]) == 0
    assert load(tmp_path / "command").labels.tolist() == TWO_COLUMNS["coarse_label"]


@pytest.mark.parametrize("name", ["label", "labels", "target", "class", "fine_label", "Label", "y"])
@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_usual_names_of_whole_numbers(tmp_path, name, dtype):
    columns = {"image": CELLS, name: [5, 4, 3, 2, 1, 0], "width": [4] * 6}
    features = {"image": IMAGE, name: datasets.Value(dtype), "width": datasets.Value("int32")}
    write(table(features, **columns), tmp_path / "set" / "0000.parquet")
    data = packed(tmp_path / "set", tmp_path)
    assert (data.labels.tolist(), data.label_names) == ([5, 4, 3, 2, 1, 0], None)


def test_other_whole_numbers_are_classes_if_they_are_asked_for(tmp_path):
    features = {"image": IMAGE, "width": datasets.Value("int32")}
    write(table(features, image=CELLS, width=[3, 4] * 3), tmp_path / "set" / "0000.parquet")
    assert packed(tmp_path / "set", tmp_path).labels is None
    data = load(pack(tmp_path / "set", tmp_path / "other", label_column="width"))
    assert data.labels.tolist() == [3, 4] * 3


def test_text_is_no_class_and_is_told(tmp_path):
    features = {"image": IMAGE, "label": datasets.Value("string")}
    write(table(features, image=CELLS, label=["x"] * 6), tmp_path / "set" / "0000.parquet")
    with pytest.warns(UserWarning, match="no labels: column 'label' holds neither.*string"):
        assert packed(tmp_path / "set", tmp_path).labels is None


def test_columns_of_images(tmp_path):
    path = tmp_path / "set"
    features = {"image": IMAGE, "mask": IMAGE}
    write(table(features, image=CELLS, mask=CELLS[::-1]), path / "0000.parquet")
    with pytest.raises(ValueError, match="`image_column` must be given: .*images, 'image', 'mask'"):
        pack(path, tmp_path / "out")
    assert_images(packed(path, tmp_path, image_column="mask"), COLOUR[::-1])
    with pytest.raises(TypeError, match="`image_column` must be the name of a column"):
        pack(path, tmp_path / "out", image_column=1)


@pytest.mark.parametrize(
    "kind",
    [datasets.Value("binary"), STRUCT],
    ids=["bytes", "struct"],
)
def test_images_without_the_type(tmp_path, kind):
    """As other libraries write parquet files."""
    cells = CELLS if isinstance(kind, dict) else [cell["bytes"] for cell in CELLS]
    features = {"picture": kind, "label": datasets.Value("int64")}
    write(table(features, picture=cells, label=range(6)), tmp_path / "set" / "0000.parquet")
    data = packed(tmp_path / "set", tmp_path)
    assert_images(data, COLOUR)
    assert data.labels.tolist() == list(range(6))


def test_lists_of_images_are_refused_by_name(tmp_path):
    path = tmp_path / "set"
    columns = {"images": [[cell, cell] for cell in CELLS], "image": CELLS, "label": [[1, 2]] * 6}
    features = {"images": list_of(IMAGE), "label": list_of(datasets.Value("int64"))}
    write(table(features, images=columns["images"], label=columns["label"]), path / "0000.parquet")
    with pytest.raises(ValueError, match="column 'images' holds lists, expected one image a row"):
        pack(path, tmp_path / "out")
    write(table(features | {"image": IMAGE}, **columns), path / "0000.parquet")
    with pytest.raises(ValueError, match="column 'images' holds lists, expected one encoded image"):
        pack(path, tmp_path / "out", image_column="images")
    with pytest.raises(ValueError, match="column 'label' holds lists, expected ClassLabel"):
        pack(path, tmp_path / "out", label_column="label")
    with pytest.raises(ValueError, match="got none among caption"):
        write(table({"caption": datasets.Value("string")}, caption=["x"]), path / "0000.parquet")
        pack(path, tmp_path / "out")


# Rows


@pytest.mark.parametrize("kind", ["saved", "parquet"])
@pytest.mark.parametrize("missing", ["none", "empty"])
def test_rows_without_a_value_are_named(tmp_path, kind, missing):
    def saved(name, dataset):
        if kind == "saved":
            dataset.save_to_disk(str(tmp_path / name))
        else:
            write(dataset, tmp_path / name / "0000.parquet")
        return tmp_path / name

    cells = list(CELLS)
    cells[4] = None if missing == "none" else {"bytes": None, "path": None}
    features = {"image": IMAGE if missing == "none" else STRUCT, "label": CLASSES}
    path = saved("a", table(features, image=cells, label=[0] * 6))
    with pytest.raises(ValueError, match="1 rows have no image in column 'image', first row 4"):
        pack(path, tmp_path / "out")
    path = saved("b", table(features, image=CELLS, label=[0, 1, None, 1, 1, None]))
    with pytest.raises(ValueError, match="2 rows have no class in column 'label', first row 2"):
        pack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_without_a_name(tmp_path):
    path = tmp_path / "set" / "0000.parquet"
    write(table({"image": IMAGE, "label": CLASSES}, image=CELLS, label=[0, 1, -1, 0, 0, 0]), path)
    with pytest.raises(ValueError, match=r"row 2 has class -1 in column 'label', expected 0\.\.2"):
        pack(path.parent, tmp_path / "out")
    write(table({"image": IMAGE, "label": CLASSES}, image=CELLS, label=[-1] * 6), path)
    with pytest.warns(UserWarning, match="no labels: column 'label' has -1 in every row"):
        assert packed(path.parent, tmp_path).labels is None


def test_images_by_their_paths(tmp_path):
    for number, image in enumerate(COLOUR):
        (tmp_path / f"{number}.png").write_bytes(encoded(image))
    cells = [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in range(6)]
    write(table({"image": STRUCT}, image=cells), tmp_path / "set" / "0000.parquet")
    assert_images(packed(tmp_path / "set", tmp_path), COLOUR)
    (tmp_path / "3.png").unlink()
    with pytest.raises(ValueError, match=r"3\.png: cannot be read"):
        pack(tmp_path / "set", tmp_path / "other")


def test_columns_are_for_datasets(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(encoded(COLOUR[0]))
    for name in ("image_column", "label_column"):
        with pytest.raises(ValueError, match=f"`{name}` must be left out: .*is no dataset"):
            pack(tmp_path / "set", tmp_path / "out", **{name: "label"})


def test_rows_in_another_order(tmp_path):
    chosen = labelled().select([5, 3, 0])
    chosen.save_to_disk(str(tmp_path / "set"))
    data = packed(tmp_path / "set", tmp_path)
    assert_images(data, COLOUR[[5, 3, 0]])
    assert data.labels.tolist() == [2, 0, 0]
    assert np.array_equal(data.labels, [2, 0, 0])
