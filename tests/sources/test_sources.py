"""Folders and archives of images, and how a source is recognised."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_files import (
    COLOUR,
    GREY,
    assert_images,
    encoded,
    load,
    luma,
    write_tree,
)

RNG = np.random.default_rng(2)
both_kinds = pytest.mark.parametrize("kind", ["folder", "zip"])


@both_kinds
def test_flat_images_are_read_in_order_of_their_names(tmp_path, kind):
    files = {f"{name}.png": encoded(GREY[index]) for index, name in enumerate("badc")}
    files |= {
        "notes.txt": b"no image",
        "meta.json": b"{}",
        ".hidden.png": b"no image",
        ".thumbnails/a.png": b"no image",
        "__MACOSX/._a.png": b"no image",
    }
    data = load(write_tree(tmp_path / "flat", files, kind))
    assert_images(data, GREY[[1, 0, 3, 2]][:, None])
    assert data.labels is None
    assert data.label_names is None
    assert data.name == {"folder": "flat", "zip": "flat.zip"}[kind]


CLASSES = {
    "dog/2.PNG": encoded(COLOUR[0]),
    "dog/1.bmp": encoded(COLOUR[1], "BMP"),
    "cat/sub/9.ppm": encoded(COLOUR[2], "PPM"),
    "cat/3.webp": encoded(COLOUR[3], "WEBP", lossless=True),
    "a cat/1.tif": encoded(COLOUR[4], "TIFF"),
}
CLASS_ORDER, CLASS_LABELS = [4, 3, 2, 1, 0], [0, 1, 1, 2, 2]


@both_kinds
@pytest.mark.parametrize("enclosing", ["", "set/", "deep/er/"])
def test_subfolders_are_classes(tmp_path, kind, enclosing):
    files = {f"{enclosing}{name}": content for name, content in CLASSES.items()}
    data = load(write_tree(tmp_path / "set", files, kind))
    assert_images(data, COLOUR[CLASS_ORDER])
    assert data.labels.tolist() == CLASS_LABELS
    assert data.label_names == ("a cat", "cat", "dog")
    np.testing.assert_array_equal(data.with_label("dog").images.numpy(), COLOUR[[1, 0]])


def test_one_class_folder_is_a_class(tmp_path):
    data = load(write_tree(tmp_path / "set", {"cat/1.png": encoded(GREY[0])}, "folder"))
    assert (data.labels.tolist(), data.label_names) == ([0], ("cat",))


@both_kinds
def test_dataset_json_labels_the_edm_layout(tmp_path, kind):
    names = [f"{index // 3:05d}/img{index:08d}.png" for index in range(6)]
    labels = [3, 1, 4, 1, 5, 9]
    files = {name: encoded(COLOUR[index]) for index, name in enumerate(names)}
    entries = [[name, label] for name, label in zip(names, labels, strict=True)]
    files["dataset.json"] = json.dumps({"labels": entries[::-1]}).encode()
    data = load(write_tree(tmp_path / "edm", files, kind))
    assert_images(data, COLOUR)
    assert data.labels.tolist() == labels
    assert data.label_names is None


def test_dataset_json_may_say_that_there_are_no_labels(tmp_path):
    files = {"00000/a.png": encoded(GREY[0]), "dataset.json": b'{"labels": null}'}
    assert load(write_tree(tmp_path / "edm", files, "zip")).labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b'{"classes": []}', "cannot be read"),
        (b'{"labels": [["b.png", 1]]}', r"class of 'a\.png', got None"),
        (b'{"labels": [["a.png", 0.5]]}', r"class of 'a\.png', got 0\.5"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path, content, message):
    files = {"a.png": encoded(GREY[0]), "dataset.json": content}
    with pytest.raises(ValueError, match=rf"edm\.zip: dataset\.json: .*{message}"):
        load(write_tree(tmp_path / "edm", files, "zip"))


@both_kinds
@pytest.mark.parametrize("enclosing", ["", "set/"])
def test_split_folders(tmp_path, kind, enclosing):
    files = {
        f"{enclosing}train/cat/1.png": encoded(GREY[0]),
        f"{enclosing}train/dog/1.png": encoded(GREY[1]),
        f"{enclosing}test/dog/1.png": encoded(GREY[2]),
        f"{enclosing}val/1.png": encoded(GREY[3]),
    }
    path = write_tree(tmp_path / "set", files, kind)
    for split, rows, labels in (
        (None, [0, 1], [0, 1]),
        ("train", [0, 1], [0, 1]),
        ("test", [2], [0]),
        ("val", [3], None),
    ):
        data = load(path, split=split)
        assert_images(data, GREY[rows][:, None])
        assert (None if data.labels is None else data.labels.tolist()) == labels
    with pytest.raises(ValueError, match="`split` must be one of 'test', 'train', 'val'.*'dev'"):
        load(path, split="dev")


def test_split_of_a_source_without_parts_is_refused(tmp_path):
    folder = write_tree(tmp_path / "set", {"cat/1.png": encoded(GREY[0])}, "folder")
    with pytest.raises(ValueError, match="`split` asks for 'test'.*it holds cat"):
        load(folder, split="test")
    with pytest.raises(ValueError, match="`split` must be left out: the builtin set 'disks'"):
        load("disks", split="train")


def test_links_are_followed_but_not_in_circles(tmp_path):
    real = write_tree(tmp_path / "real", {"1.png": encoded(GREY[0])}, "folder")
    folder = write_tree(tmp_path / "set", {"a/1.png": encoded(GREY[1])}, "folder")
    (folder / "b").symlink_to(real, target_is_directory=True)
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    data = load(folder)
    assert_images(data, GREY[[1, 0]][:, None])
    assert data.labels.tolist() == [0, 1]


def test_a_folder_reached_in_several_ways_counts_once(tmp_path):
    files = {"x/a.png": encoded(GREY[0]), "y/b.png": encoded(GREY[1])}
    folder = write_tree(tmp_path / "set", files, "folder")
    (folder / "x" / "toy").symlink_to("../y", target_is_directory=True)
    (folder / "y" / "tox").symlink_to("../x", target_is_directory=True)
    real = write_tree(tmp_path / "real", {"1.png": encoded(GREY[2])}, "folder")
    for name in ("w", "z"):
        (folder / name).symlink_to(real, target_is_directory=True)
    data = load(folder)
    assert_images(data, GREY[[2, 0, 1]][:, None])
    assert data.label_names == ("w", "x", "y")


@both_kinds
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a/2.png": b"this is text"}, "a/2.png: not an image that Pillow can read"),
        ({"a/2.png": b""}, "a/2.png: not an image that Pillow can read"),
        ({"a/2.png": encoded(GREY[1])[:-30]}, "a/2.png: cannot be decoded"),
        (
            {"a/2.jpg": encoded(np.tile(GREY[1], (1, 1)), "JPEG")[:-20]},
            "a/2.jpg: cannot be decoded: OSError: .*truncated",
        ),
        (
            {"a/2.png": encoded(GREY[1, :3]), "b/3.png": encoded(GREY[1, :2])},
            r"a/2.png: is 3x4, but a/1.png is 5x4 \(height x width\): pass resolution=",
        ),
        ({"a/2.png": encoded(Image.new("I;16", (4, 5)))}, "a/2.png: mode 'I.*convert to 8 bits"),
        ({"a/2.tif": encoded(Image.new("F", (4, 5)), "TIFF")}, "a/2.tif: mode 'F'"),
        (
            {"a/2.png": encoded(Image.new("RGBA", (4, 5), (9, 9, 9, 128)))},
            "a/2.png: has transparent pixels: pass channels=1 or 3 to put it on white",
        ),
    ],
)
def test_a_bad_image_is_named(tmp_path, kind, bad, message):
    files = {"a/1.png": encoded(GREY[0])} | bad
    path = write_tree(tmp_path / "set", files, kind)
    separator = {"folder": os.sep, "zip": ": "}[kind]
    with pytest.raises(ValueError, match=rf"{path}{separator}{message}"):
        load(path)


def test_an_image_too_large_to_be_honest_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    path = write_tree(tmp_path / "set", {"a.png": encoded(GREY[0])}, "folder")
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded: DecompressionBombError"):
        load(path)


@both_kinds
def test_a_source_without_images_is_refused(tmp_path, kind):
    path = write_tree(tmp_path / "none", {"readme.txt": b"nothing"}, kind)
    with pytest.raises(ValueError, match=rf"{path}: holds no images"):
        load(path)


def test_a_corrupt_zip_member_is_named(tmp_path):
    path = write_tree(tmp_path / "set", {"a.png": encoded(GREY[0])}, "zip")
    content = bytearray(path.read_bytes())
    start = content.index(b"a.png") + len("a.png")
    content[start + 20 : start + 40] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.zip: a\.png: cannot be decoded"):
        load(path)


def test_a_truncated_zip_is_named(tmp_path):
    path = write_tree(tmp_path / "set", {"a.png": encoded(GREY[0])}, "zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"set\.zip: not a readable zip archive"):
        load(path)


# Modes, channels and sizes of images


def convert_one(tmp_path, image, name="a.png", form="PNG", options=None, **arguments):
    folder = tmp_path / "one"
    shutil.rmtree(folder, ignore_errors=True)
    write_tree(folder, {name: encoded(image, form, **(options or {}))}, "folder")
    return load(folder, **arguments).images.numpy()[0]


def test_channels(tmp_path):
    np.testing.assert_array_equal(convert_one(tmp_path, COLOUR[0], channels=3), COLOUR[0])
    grey = convert_one(tmp_path, COLOUR[0], channels=1)
    assert np.abs(grey[0] - luma(COLOUR[0])).max() <= 0.51
    np.testing.assert_array_equal(convert_one(tmp_path, GREY[0], channels=3), [GREY[0]] * 3)
    bilevel = Image.fromarray(GREY[0]).point(lambda value: 255 * (value > 99), "1")
    np.testing.assert_array_equal(convert_one(tmp_path, bilevel), [255 * (GREY[0] > 99)])
    palette = Image.fromarray(GREY[0]).convert("P")
    np.testing.assert_array_equal(convert_one(tmp_path, palette), [GREY[0]] * 3)
    np.testing.assert_array_equal(convert_one(tmp_path, palette, channels=1), [GREY[0]])


@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_set_is_colour_if_one_image_is(tmp_path, position):
    files = {f"{index}.png": encoded(GREY[index]) for index in range(5)}
    files[f"{position}.png"] = encoded(COLOUR[0])
    expected = np.repeat(GREY[:5, None], 3, axis=1)
    expected[position] = COLOUR[0]
    assert_images(load(write_tree(tmp_path / "set", files, "folder")), expected)


def test_alpha_channels(tmp_path):
    opaque = Image.fromarray(COLOUR[0].transpose(1, 2, 0).copy())
    opaque.putalpha(255)
    np.testing.assert_array_equal(convert_one(tmp_path, opaque), COLOUR[0])
    grey = Image.fromarray(GREY[0])
    grey.putalpha(255)
    np.testing.assert_array_equal(convert_one(tmp_path, grey), [GREY[0]])
    black = Image.new("RGBA", (4, 5), (0, 0, 0, 51))
    assert (convert_one(tmp_path, black, channels=3) == 204).all()
    assert (convert_one(tmp_path, black, channels=1) == 204).all()


def test_the_orientation_of_a_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = convert_one(tmp_path, GREY[0], options={"exif": exif})
    np.testing.assert_array_equal(turned, [np.rot90(GREY[0], -1)])


def test_shrinking_by_a_whole_factor_averages_blocks(tmp_path):
    pixels = RNG.integers(0, 256, (3, 12, 8), dtype=np.uint8)
    # The centred 8x8 of 12x8, in blocks of 2x2; sums of four are rounded exactly.
    means = pixels[:, 2:10].reshape(3, 4, 2, 4, 2).mean(axis=(2, 4))
    small = convert_one(tmp_path, pixels, resolution=4)
    np.testing.assert_array_equal(small, np.floor(means + 0.5))
    # The centred 12x6 of 12x8, in blocks of 3x3; Pillow rounds ninths by up to 5/9.
    means = pixels[:, :, 1:7].reshape(3, 4, 3, 2, 3).mean(axis=(2, 4))
    small = convert_one(tmp_path, pixels, resolution=(4, 2))
    assert small.shape == means.shape
    assert np.abs(small - means).max() <= 5 / 9 + 1e-9


def test_other_factors_resample_without_aliasing(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (45, 15))
    small = convert_one(tmp_path, stripes, resolution=(18, 12))[0]
    assert small.shape == (18, 12)
    # Stripes finer than the new pixels leave their mean; picking pixels would leave stripes.
    assert np.abs(small[2:-2, 2:-2].astype(float) - 127.5).max() < 25
    large = convert_one(tmp_path, np.full((5, 4), 77, np.uint8), resolution=(10, 8))
    np.testing.assert_array_equal(large, np.full((1, 10, 8), 77))


def test_resolution_brings_mixed_sizes_together(tmp_path):
    files = {
        "a.png": encoded(np.full((5, 9), 10, np.uint8)),
        "b.png": encoded(np.full((8, 8), 20, np.uint8)),
    }
    data = load(write_tree(tmp_path / "set", files, "folder"), resolution=(4, 4))
    np.testing.assert_array_equal(data.images.numpy(), np.full((2, 1, 4, 4), [[[[10]]], [[[20]]]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resolution": 0}, ValueError, "`resolution` must be at least 1"),
        ({"resolution": 2**31}, ValueError, "`resolution` must be at most"),
        ({"resolution": (4, -1)}, ValueError, "`resolution` must be at least 1"),
        ({"resolution": 4.0}, TypeError, "`resolution` must be a whole number"),
        ({"resolution": (4, 4, 3)}, ValueError, r"`resolution` must be .* \(height, width\)"),
        ({"resolution": "32"}, ValueError, r"`resolution` must be .* \(height, width\)"),
        ({"channels": 2}, ValueError, r"`channels` must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"channels": "L"}, TypeError, "`channels` must be a whole number"),
        ({"split": 1}, TypeError, "`split` must be a name"),
        ({"cache_dir": 1}, TypeError, "`cache_dir` must be a path"),
        ({"cache_dir": "~no such user/x"}, ValueError, "`cache_dir` must be a path"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, error, message):
    with pytest.raises(error, match=message):
        load("no such place", **arguments)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("digit", ValueError, "'digits', 'photos', 'disks', 'c_alpha'.*idx.*CIFAR.*'digit'"),
        (Path("digits"), ValueError, "nothing is there: 'digits'"),
        ("no/such/set.zip", ValueError, r"nothing is there: 'no/such/set\.zip'"),
        ("", ValueError, "`source` must be a path, got an empty one"),
        ("a\0b", ValueError, "`source` must be a path without NUL"),
        ("~no such user/x", ValueError, "`source` must be a path, and the ~ of '~no such user/x'"),
        (COLOUR, TypeError, r"`source` must be .*arrays and tensors go to TrainingSet\(...\)"),
        (None, TypeError, "`source` must be the name of a builtin set or a path"),
    ],
)
def test_unknown_sources_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        load(source)


def test_an_unknown_format_is_refused(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path}: not a format that is read"):
        load(path)
