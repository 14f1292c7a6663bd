"""How the axes, the values and the labels of arrays are read, and what is refused about them."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from source_files import assert_images, load, save_npy

from pyflocality.cli import main
from pyflocality.data import TrainingSet
from pyflocality.moments import Moments

RNG = np.random.default_rng(7)


def pixels(*shape):
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    array.flat[0] = 255
    return array


SHAPES = {
    # Shape: what it is taken for without a layout, or the message.
    (6, 3, 8, 9): "NCHW",
    (6, 1, 8, 9): "NCHW",
    (6, 4, 8, 8): "NCHW",
    (6, 16, 4, 4): "NCHW",
    (6, 2, 7, 4): "NCHW",
    (6, 3, 5, 4): "NCHW",
    (6, 1, 4, 4): "NCHW",
    (6, 3, 3, 3): "NCHW",
    (6, 1, 1, 1): "NCHW",
    (6, 8, 9): "NHW",
    (6, 3, 3): "NHW",
    (6, 5, 4): "NHW",
    (1, 8, 9): "NHW",
    (6, 4, 4, 2): "NCHW",
    (6, 4, 4, 9): "NCHW",
    (6, 8, 12, 9): "NCHW",
    (6, 8, 8, 8): "NCHW",
    (6, 8, 9, 3): "NHWC",
    (6, 8, 9, 1): "NHWC",
    (6, 7, 5, 3): "NHWC",
    (6, 8, 8, 4): "8 channels of 8x4, or 8x8 pixels of red, green, blue and alpha",
    (6, 8, 9, 4): "8 channels of 9x4, or 8x9 pixels of red, green, blue and alpha",
    (6, 4, 4, 4): "4 channels of 4x4, or 4x4 pixels of red",
    (6, 8, 9, 2): "8 channels of 9x2, or 2 channels of 8x9",
    (6, 8, 8, 2): "8 channels of 8x2, or 2 channels of 8x8",
    (6, 8, 8, 13): "8 channels of 8x13, or 13 channels of 8x8",
    (6, 3, 8, 3): "3 channels of 8x3, or 3 channels of 3x8",
    (6, 1, 8, 1): "1 channels of 8x1, or 1 channels of 1x8",
    (16, 16, 3): "16 grey images of 16x3, or one image of 16x16 with 3 channels",
    (16, 12, 1): "16 grey images of 12x1, or one image of 16x12 with 1 channels",
    (16, 12, 4): "16 grey images of 12x4, or one image of 16x12 with 4 channels",
    (16, 12): r"must have shape \[N, C, H, W\]",
    (2, 2, 16, 12, 3): r"must have shape \[N, C, H, W\]",
}  # fmt: skip


def as_nchw(array, layout):
    if layout == "NHWC":
        return array.transpose(0, 3, 1, 2)
    return array[:, None] if layout == "NHW" else array


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_without_a_layout(tmp_path, shape):
    array, expected = pixels(*shape), SHAPES[shape]
    np.savez(tmp_path / "set.npz", images=array)
    sources = [save_npy(tmp_path, array), tmp_path / "set.npz"]
    if expected in ("NCHW", "NHW", "NHWC"):
        for source in sources:
            assert_images(load(source), as_nchw(array, expected))
        if expected != "NHWC":
            assert_images(TrainingSet(array), as_nchw(array, expected))
        else:
            with pytest.raises(ValueError, match="`images` must .* give layout='NHWC'"):
                TrainingSet(torch.from_numpy(array))
        return
    with pytest.raises(ValueError, match=f"`images` .*{expected}"):
        TrainingSet(array)
    for source in sources:
        with pytest.raises(ValueError, match=f"{source}: `images` .*{expected}"):
            load(source)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
def test_a_layout_that_is_asked_for_is_taken(tmp_path, shape, layout):
    array = pixels(*shape)
    if len(layout) != len(shape):
        with pytest.raises(ValueError, match="`(layout|images)` (is|must)"):
            TrainingSet(array, layout=layout)
        with pytest.raises(ValueError, match="set.npy: `(layout|images)` (is|must)"):
            load(save_npy(tmp_path, array), layout=layout)
        return
    for given in (array, torch.from_numpy(array)):
        data = TrainingSet(given, layout=layout)
        assert_images(data, as_nchw(array, layout))
        # Nothing was copied.
        assert data.images.data_ptr() == torch.as_tensor(given).data_ptr()
    mapped = load(save_npy(tmp_path, array), layout=layout)
    assert "memory-mapped" in repr(mapped)
    assert_images(mapped, as_nchw(array, layout))
    np.savez(tmp_path / "set.npz", x=array)
    assert_images(load(tmp_path / "set.npz", layout=layout), as_nchw(array, layout))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_mapped_sets_of_a_layout_are_pickled_and_converted(tmp_path, layout):
    buffer = io.BytesIO()
    array = pixels(1200, 3, 6, 3)
    path = save_npy(tmp_path, array)
    torch.save(load(path, layout=layout), buffer)
    buffer.seek(0)
    assert_images(torch.load(buffer, weights_only=False), as_nchw(array, layout))
    # Both are cached, under keys of their own.
    for _ in range(2):
        grey = load(path, layout=layout, channels=1)
        assert grey.image_shape == ((1, 6, 3) if layout == "NCHW" else (1, 3, 6))


@pytest.mark.parametrize(
    ("layout", "error"),
    [("nchw", ValueError), ("HWC", ValueError), (3, TypeError), (b"NHW", TypeError)],
)
def test_layouts_that_are_none(tmp_path, layout, error):
    with pytest.raises(error, match="`layout` must be one of 'NCHW', 'NHWC', 'NHW', got"):
        TrainingSet(pixels(2, 8, 8), layout=layout)
    with pytest.raises(error, match="`layout` must be one of"):
        load("nowhere", layout=layout)


def test_layouts_are_for_arrays(tmp_path):
    with pytest.raises(ValueError, match="`layout` must be left out.*the builtin set 'disks'"):
        load("disks", layout="NCHW")
    with pytest.raises(ValueError, match=f"`layout` must be left out.*{tmp_path}"):
        load(tmp_path, layout="NCHW")


def test_three_grey_images_may_be_the_channels_of_one():
    with pytest.warns(UserWarning, match=r"taken for 3 grey ones.*pass images\[None\]"):
        assert len(TrainingSet(pixels(3, 16, 12))) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingSet(pixels(3, 16, 12), layout="NHW")
        TrainingSet(pixels(4, 16, 12))


# Values


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_images_of_0_and_1_are_refused(tmp_path, kind):
    bits = RNG.integers(0, 2, (5, 8, 9), dtype=np.uint8)
    with pytest.raises(
        ValueError, match=r"`images` are uint8 with values of 0 and 1.*images \* 255"
    ):
        TrainingSet(kind(bits))
    with pytest.raises(TypeError, match=r"got bool: pass images.astype\(np.uint8\) \* 255"):
        TrainingSet(kind(bits > 0))
    late = np.zeros((5, 8, 9), np.uint8)
    late[4, 7, 8] = 1
    with pytest.raises(ValueError, match="values of 0 and 1 alone"):
        TrainingSet(kind(late))
    for stored in (bits, bits > 0):
        with pytest.raises((TypeError, ValueError), match=r"set.npy: `images` .*\* 255"):
            load(save_npy(tmp_path, stored))
    cured = TrainingSet(kind((bits > 0).astype(np.uint8) * 255)).values()
    np.testing.assert_array_equal(cured[:, 0].numpy(), 2.0 * bits - 1.0)


def test_other_dark_images_are_taken():
    black = np.zeros((1, 8, 9), np.uint8)
    assert_images(TrainingSet(black), black[:, None])
    dark = np.zeros((5, 8, 9), np.uint8)
    dark[4, 7, 8] = 2
    assert_images(TrainingSet(dark), dark[:, None])
    # Parts of a set are sets.
    dark[0, 0, 0] = 1
    assert_images(TrainingSet(dark).subset([0]), dark[:1, None])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_masked_values_are_refused(dtype):
    images = np.ma.masked_array(pixels(5, 8, 9).astype(dtype) / dtype(1), dtype=dtype)
    if dtype is np.float32:
        images = images / np.float32(127.5) - np.float32(1)
    assert len(TrainingSet(images, np.ma.masked_array(range(5)))) == 5
    labels = np.ma.masked_array(range(5), mask=[0, 0, 1, 0, 0])
    with pytest.raises(ValueError, match="`labels` is a masked array with 1 masked values"):
        TrainingSet(images, labels)
    images[2, 3, 4] = np.ma.masked
    images[2, 3, 5] = np.ma.masked
    with pytest.raises(ValueError, match=r"`images` is a masked array with 2 masked values: fill"):
        TrainingSet(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((5, 8, 9), [("r", "u1"), ("g", "u1")]), r"got \[\('r'.*a field of it"),
        (np.array([pixels(8, 9), None], object), "got object: images of one size make an array"),
        (np.array(["a", "b"]), "got <U1"),
        (np.zeros((5, 8, 9), "datetime64[s]"), "got datetime64"),
        (np.zeros((5, 8, 9), np.int8), "got int8: whole numbers 0..255 must be uint8"),
        (np.zeros((5, 8, 9), np.uint64), "got uint64: whole numbers 0..255 must be uint8"),
    ],
)
def test_arrays_of_other_kinds(images, message):
    with pytest.raises(TypeError, match=f"`images` must be uint8, float32 or float64, {message}"):
        TrainingSet(images)


class Broken:
    """An array of a library that cannot hand it over."""

    def __dlpack__(self, **options):
        raise BufferError("not on this machine")

    def __dlpack_device__(self):
        return (1, 0)


def test_arrays_that_cannot_be_taken_over():
    with pytest.raises(TypeError, match="`images` cannot be taken over by DLPack from .*Broken"):
        TrainingSet(Broken())


@pytest.mark.parametrize("labels", [RNG.integers(0, 9, 5), np.arange(5, dtype=np.uint64), range(5)])
def test_whole_numbers_are_labels(labels):
    assert TrainingSet(pixels(5, 8, 9), labels).labels.tolist() == list(labels)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.array([0, 1, 2, 3, 2**63], np.uint64), ValueError, r"below 2\*\*63, got 9223372036854"),
        ([0, 1, 2, 3, 2**64], ValueError, r"below 2\*\*63, got 18446744073709551616"),
        ([0, 1, 2, 3, -(2**64)], ValueError, r"below 2\*\*63"),
        (np.arange(5.0), TypeError, r"whole numbers, got float64: labels.astype\(np.int64\)"),
        (torch.arange(5.0, dtype=torch.bfloat16), TypeError, "whole numbers, got bfloat16"),
        ([0.0, 1, 2, 3, 4], TypeError, "whole numbers, got float64"),
        ([[0], [1, 2], 3, 4, 5], ValueError, "list of whole numbers"),
        ([0, 1, 2, 3, None], TypeError, "whole numbers, got object"),
        (np.zeros(5, [("a", "i8")]), TypeError, "whole numbers, got"),
        (np.zeros((5, 1), int), ValueError, r"shape \[5\].*got \[5, 1\]"),
        ({0: 1}, ValueError, r"shape \[5\]"),
    ],
)
def test_other_labels_are_refused(labels, error, message):
    with pytest.raises(error, match=f"`labels` must .*{message}"):
        TrainingSet(pixels(5, 8, 9), labels)


# Files


@pytest.mark.parametrize("label", ["arr_1", "labels", "y", "label", "target", "targets"])
@pytest.mark.parametrize("image", ["arr_0", "images", "x", "X", "data", "samples"])
def test_names_in_npz_files(tmp_path, image, label):
    array, path = pixels(5, 8, 9), tmp_path / "set.npz"
    np.savez(path, **{image: array, label: np.arange(5)[::-1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(path)
    assert_images(data, array[:, None])
    assert data.labels.tolist() == [4, 3, 2, 1, 0]


def test_labels_by_position_in_an_npz_file(tmp_path):
    array, path = pixels(5, 8, 9), tmp_path / "set.npz"
    np.savez(path, array, range(5))
    assert load(path).labels.tolist() == [0, 1, 2, 3, 4]
    for second in (array, np.arange(5.0), np.arange(4)):
        np.savez(path, array, second)
        with pytest.warns(UserWarning, match=r"set.npz: 1 left out: 1 neither.*'arr_1'"):
            data = load(path)
        assert_images(data, array[:, None])
        assert data.labels is None


def test_what_an_npz_file_holds_beside_images_is_told(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels(5, 8, 9), file_names=list("abcde"), masks=pixels(5, 8, 9))
    with pytest.warns(UserWarning, match=r"2 left out: 2 neither.*\(first 'file_names'\)"):
        load(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("images", "x"), "holds `images` and `x`, each"),
        (("images", "labels", "y"), "`labels` and `y`"),
    ],
)
def test_two_arrays_that_may_be_meant_are_refused(tmp_path, names, message):
    path = tmp_path / "set.npz"
    np.savez(path, **{name: pixels(5, 8, 9) for name in names})
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        load(path)


def test_values_are_checked_before_they_are_resampled(tmp_path):
    """Floats of 0..255 were clipped to 1 by the resampling, and passed."""
    floats = pixels(5, 8, 8).astype(np.float32)
    with pytest.raises(ValueError, match=r"set.npy: `images` must be in \[-1, 1\]"):
        load(save_npy(tmp_path, floats), resolution=4)
    with pytest.raises(ValueError, match="set.npy: `images` holds NaN"):
        load(save_npy(tmp_path, np.full((2, 8, 8), np.nan)), resolution=4)
    with pytest.raises(TypeError, match="set.npy: `images` must be uint8"):
        load(save_npy(tmp_path, pixels(5, 8, 8).astype(np.int32)), resolution=4)
    with pytest.raises(ValueError, match="set.npy: `images` are uint8 with values of 0 and 1"):
        load(save_npy(tmp_path, np.eye(8, dtype=np.uint8)[None]), resolution=4)


@pytest.mark.parametrize("command", ["moments", "generate", "spectrum", "sensitivity", "compare"])
def test_the_option_of_the_command_line(tmp_path, command, capsys):
    source = save_npy(tmp_path, pixels(12, 7, 5, 3))
    out = {"moments": "m.safetensors"}.get(command, "out")
    arguments = [command, str(source), "--out", str(tmp_path / out), "--no-progress"]
    assert main([*arguments, "--layout", "HWC"]) == 2
    assert "`--layout` must be one of 'NCHW', 'NHWC', 'NHW'" in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_the_option_reaches_the_set(tmp_path, capsys):
    source = save_npy(tmp_path, pixels(12, 7, 5, 3))
    for layout, shape in (("NCHW", [7, 5, 3]), ("NHWC", [3, 7, 5])):
        out = tmp_path / f"{layout}.safetensors"
        arguments = ["moments", str(source), "--out", str(out), "--no-progress", "--json"]
        assert main([*arguments, "--layout", layout]) == 0
        assert list(Moments.load(out).mean.shape) == shape
