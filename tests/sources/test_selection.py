"""Which files of folders and archives make up a set: parts, classes, suffixes, what is left out."""

from __future__ import annotations

import io
import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image
from source_files import COLOUR, GREY, assert_images, encoded, load, write_tree

from pyflocality.packing import pack
from pyflocality.sources.splits import choose_split, find_parts

PNG = [encoded(image) for image in GREY]
both_kinds = pytest.mark.parametrize("kind", ["folder", "zip"])


def grey(data):
    """Numbers of the images of GREY that a set holds."""
    return [
        next(i for i, image in enumerate(GREY) if np.array_equal(image, found))
        for found in data.images.numpy()[:, 0]
    ]


def quietly(source, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(source, **arguments)


# Parts

PARTS = {"train/cat/1.png": PNG[0], "train/dog/1.png": PNG[1], "test/cat/1.png": PNG[2]}
BESIDE = {
    "a third folder": ({"extra/1.png": PNG[3]}, "1 in 'extra', which split='extra' takes"),
    "a third folder of another name": ({"more/1.png": PNG[3]}, "1 beside the folders.*more/1.png'"),
    "a third folder of no images": ({"more/1.xml": b"<a/>"}, "1 without .* an image.*more/1.xml'"),
    "a stray image": ({"view.png": PNG[3]}, "1 beside the folders 'test', 'train' .*view.png'"),
    "a text": ({"README.txt": b"read me"}, "1 without the suffix of an image .*README.txt'"),
    "a table": ({"labels.csv": b"1,2"}, "1 without the suffix of an image .*labels.csv'"),
    "classes": ({"dataset.json": b'{"labels": null}'}, None),
    "a system's files": ({".DS_Store": b"", "Thumbs.db": b"", "__MACOSX/._a.png": b""}, None),
    "all of them": (
        {"extra/1.png": PNG[3], "m/1.png": PNG[4], "a.png": PNG[5], "b.txt": b"", "c/d.txt": b""},
        "5 left out: 2 beside.*a.png'.*; 1 in 'extra'.*; 2 without the suffix.*b.txt'",
    ),
}  # fmt: skip


@both_kinds
@pytest.mark.parametrize("enclosing", ["", "set/"])
@pytest.mark.parametrize("beside", BESIDE)
def test_parts_are_parts_whatever_lies_beside_them(tmp_path, kind, enclosing, beside):
    """A third folder or a stray file made classes of `train` and `test`."""
    others, message = BESIDE[beside]
    files = {f"{enclosing}{name}": content for name, content in (PARTS | others).items()}
    path = write_tree(tmp_path / "set", files, kind)
    for split, numbers in ((None, [0, 1]), ("train", [0, 1]), ("test", [2]), ("Testing", [2])):
        if message is None:
            data = quietly(path, split=split)
        else:
            with pytest.warns(UserWarning, match=message):
                data = load(path, split=split)
        assert grey(data) == numbers
        if beside != "classes":
            assert data.label_names == ("cat", "dog")[: len(numbers)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Train", "TEST"),
        ("training", "testing"),
        ("training_set", "test_set"),
        ("train_set", "validation_set"),
        ("trainset", "testset"),
        ("train", "validate"),
        ("train", "validation"),
        ("train", "eval"),
        ("train", "evaluation"),
        ("train", "dev"),
        ("train2017", "val2017"),
        ("train_images", "test_images"),
        ("trainA", "testA"),
        ("digits_train", "digits_test"),
        ("digits-train", "digits-val"),
        ("train_64x64", "valid_64x64"),
        ("trainval", "test"),
        ("Train+Val", "Test"),
        ("train_val2007", "test2007"),
        ("DIV2K_train_HR", "DIV2K_valid_HR"),
        ("train images original", "test images original"),
    ],
)
def test_names_of_parts(tmp_path, train, test):
    files = {f"{train}/a.png": PNG[0], f"{test}/a.png": PNG[1]}
    path = write_tree(tmp_path / "set", files, "zip")
    assert grey(quietly(path)) == [0]
    assert grey(quietly(path, split=train)) == [0]
    assert grey(quietly(path, split=train.upper())) == [0]
    assert grey(quietly(path, split="train")) == [0]
    assert grey(quietly(path, split=test)) == [1]


@pytest.mark.parametrize("extra", ["extra", "unlabeled", "Unlabelled", "extra_images"])
def test_parts_that_are_more_of_the_same_are_told(tmp_path, extra):
    path = write_tree(tmp_path / "set", {"train/a.png": PNG[0], f"{extra}/a.png": PNG[1]}, "zip")
    with pytest.warns(UserWarning, match=f"1 in '{extra}', which split='{extra}' takes"):
        assert grey(load(path)) == [0]
    assert grey(quietly(path, split=extra)) == [1]


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("val", "validation"),
        ("validate", "validation"),
        ("VAL", "validation"),
        ("validation", "validation"),
        ("training", "train"),
        ("testing", "test"),
        ("extra", "extra"),
    ],
)
def test_other_names_of_a_part(split, chosen):
    assert choose_split(split, ["extra", "test", "train", "validation"], "here") == chosen


@pytest.mark.parametrize(
    ("split", "available"),
    [
        ("dev", ["test", "train", "val"]),
        ("val", ["test", "train"]),
        ("train", ["trainA", "trainB"]),
        (None, ["trainA", "trainB"]),
        (None, ["extra", "test"]),
        ("train3", ["train1", "train2"]),
        ("train1", ["train2"]),
        ("other_train", ["digits_test", "digits_train"]),
        ("", ["test", "train"]),
    ],
)
def test_parts_that_are_not_there(split, available):
    listed = ", ".join(map(repr, available))
    with pytest.raises(ValueError, match=re.escape(f"`split` must be one of {listed} for here")):
        choose_split(split, available, "here")


@pytest.mark.parametrize(
    "names",
    [
        ["train", "car", "ship"],
        ["train", "training"],
        ["extra", "unlabeled"],
        ["bullet_train", "crash_test"],
        ["train_station", "test_tube"],
        ["dev_board", "eval_board"],
        ["latest", "trainer", "valley", "contest"],
        ["0", "1"],
    ],
)
def test_names_that_are_no_parts(names):
    assert find_parts(names) == []


@both_kinds
def test_a_train_among_vehicles_is_a_class(tmp_path, kind):
    files = {f"{name}/1.png": PNG[i] for i, name in enumerate(["car", "ship", "train"])}
    path = write_tree(tmp_path / "set", files, kind)
    data = quietly(path)
    assert data.label_names == ("car", "ship", "train")
    # Unless it is asked for.
    with pytest.warns(
        UserWarning, match=r"2 left out: 2 beside the folders 'train' \(first 'car/1"
    ):
        data = load(path, split="train")
    assert (grey(data), data.labels) == ([2], None)


@pytest.mark.parametrize("train", ["bullet_train", "train_station"])
def test_a_class_with_a_train_in_its_name_is_no_part(tmp_path, train):
    files = {f"{name}/1.png": PNG[i] for i, name in enumerate(["car", train])}
    path = write_tree(tmp_path / "set", files, "zip")
    assert quietly(path).label_names == tuple(sorted(["car", train]))
    with pytest.raises(ValueError, match="`split` asks for 'train', but the top"):
        load(path, split="train")
    with pytest.warns(UserWarning, match="1 beside the folders"):
        assert grey(load(path, split=train.upper())) == [1]


def test_a_train_that_is_divided_is_a_part(tmp_path):
    files = {"train/cat/1.png": PNG[0], "train/dog/1.png": PNG[1], "more/1.png": PNG[2]}
    with pytest.warns(UserWarning, match=r"1 beside the folders 'train' \('more/1.png'\)"):
        data = load(write_tree(tmp_path / "set", files, "folder"))
    assert (grey(data), data.label_names) == ([0, 1], ("cat", "dog"))


def test_images_beside_a_part(tmp_path):
    path = write_tree(tmp_path / "a", {"train/1.png": PNG[0], "2.png": PNG[1]}, "folder")
    with pytest.warns(UserWarning, match="1 beside the folders 'train'"):
        assert grey(load(path)) == [0]
    # They are likely to be those for training, and a test among them would spoil them.
    path = write_tree(tmp_path / "b", {"test/1.png": PNG[0], "2.png": PNG[1]}, "folder")
    with pytest.raises(
        ValueError, match="image '2.png' lies beside the folder 'test'.*split='test'"
    ):
        load(path)
    with pytest.warns(UserWarning, match="1 beside the folders 'test'"):
        assert grey(load(path, split="test")) == [0]


@both_kinds
def test_parts_inside_of_classes(tmp_path, kind):
    files = {
        "cat/train/1.png": PNG[0],
        "cat/test/1.png": PNG[1],
        "dog/train/1.png": PNG[2],
        "dog/test/1.png": PNG[3],
        "dog/masks/1.png": PNG[4],
    }
    path = write_tree(tmp_path / "set", files, kind)
    for split, numbers in ((None, [0, 2]), ("test", [1, 3])):
        with pytest.warns(UserWarning, match=r"1 beside the folders 'test', 'train' \('dog/masks"):
            data = load(path, split=split)
        assert (grey(data), data.label_names) == (numbers, ("cat", "dog"))


@pytest.mark.parametrize(
    "names",
    [
        ["cat/train/1", "cat/test/1", "dog/1"],
        ["a/b/train/1", "a/b/test/1", "a/c/1"],
        ["train/cat/train/1", "train/cat/test/1", "train/dog/1", "val/1"],
    ],
)
def test_parts_that_lie_too_deep_are_not_taken_together(tmp_path, names):
    files = {f"{name}.png": PNG[i] for i, name in enumerate(names)}
    with pytest.raises(ValueError, match="holds the folders 'test', 'train', which would be taken"):
        load(write_tree(tmp_path / "set", files, "folder"))


def test_a_part_without_images_is_not_another_one(tmp_path):
    """`test` was the only part there was, where `train` holds files of other kinds."""
    files = {"train/1.svg": b"<svg/>", "test/1.png": PNG[0]}
    path = write_tree(tmp_path / "set", files, "folder")
    with pytest.raises(ValueError, match="the part 'train' holds no images"):
        load(path)
    assert grey(load(path, split="test")) == [0]


@both_kinds
def test_any_folder_that_is_asked_for_is_a_part(tmp_path, kind):
    files = {"fold1/1.png": PNG[0], "fold2/1.png": PNG[1]}
    path = write_tree(tmp_path / "set", files, kind)
    with pytest.warns(UserWarning, match="1 beside the folders 'fold2'"):
        assert grey(load(path, split="fold2")) == [1]
    with pytest.raises(ValueError, match="`split` asks for 'fold3'.*it holds fold1, fold2"):
        load(path, split="fold3")


def test_packing_takes_the_same_images(tmp_path):
    path = write_tree(tmp_path / "set", PARTS | {"extra/1.png": PNG[3], "a.txt": b""}, "folder")
    with pytest.warns(UserWarning, match="1 without the suffix of an image"):
        out = pack(path, tmp_path / "out", progress=False)
    assert grey(load(out)) == [0, 1]


# Suffixes

JPEG = encoded(GREY[0], "JPEG", quality=95)
JPEG_PIXELS = np.asarray(Image.open(io.BytesIO(JPEG)))


@both_kinds
@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jif", "JPE", "mpo"])
def test_suffixes_of_jpeg(tmp_path, kind, suffix):
    """A class of such files vanished."""
    files = {"cat/1.jpg": JPEG, f"dog/1.{suffix}": JPEG}
    data = quietly(write_tree(tmp_path / "set", files, kind))
    assert_images(data, [[JPEG_PIXELS]] * 2)
    assert data.label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("suffix", "form", "options"),
    [
        ("apng", "PNG", {}),
        ("dib", "DIB", {}),
        ("tga", "TGA", {}),
        ("ico", "PNG", {}),
        ("pgm", "PPM", {}),
        ("jp2", "JPEG2000", {"irreversible": False}),
        ("pcx", "PCX", {}),
        ("sgi", "SGI", {}),
        ("qoi", "QOI", {}),
        ("dds", "DDS", {}),
    ],
)
def test_suffixes_of_other_formats(tmp_path, suffix, form, options):
    pixels = GREY[0] if suffix == "pgm" else COLOUR[0]
    content = encoded(pixels, form, **options)
    data = quietly(write_tree(tmp_path / "set", {f"a.{suffix}": content}, "folder"))
    assert_images(data, [pixels[None] if pixels.ndim == 2 else pixels])


def test_avif(tmp_path):
    features = pytest.importorskip("PIL.features")
    if not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    flat = np.full((3, 16, 16), 200, np.uint8)
    path = write_tree(tmp_path / "set", {"a.avif": encoded(flat, "AVIF")}, "folder")
    assert np.abs(quietly(path).images.numpy().astype(int) - 200).max() <= 2


def test_images_that_pillow_cannot_read_are_refused_and_not_passed_over(tmp_path):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    path = write_tree(tmp_path / "set", {"cat/1.png": PNG[0], "dog/1.heic": heic}, "folder")
    with pytest.raises(ValueError, match=r"dog/1\.heic: not an image that Pillow can read"):
        load(path)


@both_kinds
@pytest.mark.parametrize(
    "name", ["1.svg", "1.cr2", "1.jpg_large", "1.png.bak", "1", "1.npy", "1.pdf"]
)
def test_a_class_of_other_files_is_told(tmp_path, kind, name):
    files = {"cat/1.png": PNG[0], f"dog/{name}": PNG[1], "eel/1.png": PNG[2]}
    path = write_tree(tmp_path / "set", files, kind)
    told = rf"1 left out: 1 in folders without any image that is read \('dog/{name}'\)"
    with pytest.warns(UserWarning, match=told) as caught:
        data = load(path)
    assert len(caught) == 1
    assert data.label_names == ("cat", "eel")
    with pytest.warns(UserWarning, match=told):
        pack(path, tmp_path / "out", progress=False)


def test_a_source_of_other_files_names_one(tmp_path):
    path = write_tree(tmp_path / "set", {"a/1.svg": b"<svg/>"}, "zip")
    with pytest.raises(
        ValueError, match="holds no images; 'a/1.svg' has not the suffix of an image"
    ):
        load(path)


@pytest.mark.parametrize("name", ["a/0000.parquet", "shard-0.tar", "data.arrow"])
def test_what_is_to_be_packed_first(tmp_path, name):
    path = write_tree(tmp_path / "set", {name: b""}, "folder")
    with pytest.raises(ValueError, match="holds no images; .* are for `pyflocality pack`"):
        load(path)


def test_what_is_left_out_is_told_for_cached_sets_too(tmp_path):
    files = {f"{number}.png": PNG[number % 6] for number in range(1000)} | {
        "a.txt": b"",
        ".b.png": b"",
    }
    path = write_tree(tmp_path / "set", files, "folder")
    for _ in range(2):
        with pytest.warns(
            UserWarning, match="2 left out: 1 hidden .*'.b.png'.*; 1 without.*'a.txt'"
        ):
            assert len(load(path)) == 1000
    # What does not belong to the set does not change it.
    (path / "a.txt").write_text("other")
    assert len(load(path)) == 1000


def test_an_image_beside_classes_is_told(tmp_path):
    files = {"cat/1.png": PNG[0], "dog/1.png": PNG[1], "preview.png": PNG[2]}
    path = write_tree(tmp_path / "set", files, "folder")
    with pytest.warns(
        UserWarning, match="no labels: an image, 'preview.png', lies beside the folders"
    ):
        assert load(path).labels is None


def test_a_second_dataset_json_is_told(tmp_path):
    table = json.dumps({"labels": [["cat/1.png", 3], ["dog/1.png", 4]]}).encode()
    files = {"cat/1.png": PNG[0], "dog/1.png": PNG[1], "dataset.json": table}
    files["cat/dataset.json"] = table
    with pytest.warns(UserWarning, match=r"1 besides the dataset.json that counts"):
        assert load(write_tree(tmp_path / "set", files, "zip")).labels.tolist() == [3, 4]
