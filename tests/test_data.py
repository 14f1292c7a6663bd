"""The training set itself: what it accepts, refuses, shares and derives."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import warnings

import numpy as np
import pytest
import torch

import pyflocality as pf
from pyflocality.data import TrainingSet

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
FLOATS = (IMAGES / 127.5 - 1.0).astype(np.float64)


def shares_memory(tensor, array):
    return tensor.data_ptr() == array.__array_interface__["data"][0]


class OnlyDLPack:
    """A tensor of some other library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize(
    "images",
    [IMAGES, torch.from_numpy(IMAGES), OnlyDLPack(IMAGES)],
    ids=["numpy", "torch", "dlpack"],
)
def test_images_are_stored_as_they_come_without_a_copy(images):
    data = TrainingSet(images)
    assert data.dtype == torch.uint8
    assert shares_memory(data.images, IMAGES)
    assert (len(data), data.image_shape, data.num_values) == (6, (3, 4, 5), 60)
    assert data.device == torch.device("cpu")
    assert data.labels is None
    np.testing.assert_array_equal(data.images.numpy(), IMAGES)


def test_grey_images_get_a_channel_axis():
    data = TrainingSet(IMAGES[:, 0])
    assert data.image_shape == (1, 4, 5)
    np.testing.assert_array_equal(data.images.numpy(), IMAGES[:, :1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_images_keep_their_dtype_and_memory(dtype):
    floats = FLOATS.astype(dtype)
    data = TrainingSet(floats)
    assert shares_memory(data.images, floats)
    np.testing.assert_array_equal(data.images.numpy(), floats)


def test_unusual_memory_layouts_are_accepted():
    read_only = IMAGES.copy()
    read_only.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shares_memory(TrainingSet(read_only).images, read_only)
    np.testing.assert_array_equal(TrainingSet(IMAGES[::-1]).images.numpy(), IMAGES[::-1])
    np.testing.assert_array_equal(TrainingSet(FLOATS.astype(">f8")).images.numpy(), FLOATS)
    assert TrainingSet(torch.from_numpy(FLOATS).requires_grad_()).images.requires_grad is False


def test_values_of_8_bit_images():
    data = TrainingSet(IMAGES)
    truth = IMAGES.astype(np.float64) / 127.5 - 1.0
    np.testing.assert_allclose(data.values(dtype=torch.float64).numpy(), truth, rtol=0, atol=0)
    assert data.values().dtype == torch.float32
    # One rounding of the quotient and one of the difference, of numbers up to 2.
    np.testing.assert_allclose(data.values().numpy(), truth, rtol=0, atol=2.4e-7)
    np.testing.assert_array_equal(data.values(2, 5, dtype=torch.float64).numpy(), truth[2:5])
    assert data.values()[IMAGES == 255].eq(1.0).all()
    extremes = TrainingSet(np.array([[[0, 255]]], np.uint8)).values()
    assert extremes.flatten().tolist() == [-1.0, 1.0]


def test_values_of_float_images():
    data = TrainingSet(FLOATS)
    assert data.values(dtype=torch.float64).data_ptr() == data.images.data_ptr()
    np.testing.assert_array_equal(data.values(1, 3).numpy(), FLOATS[1:3].astype(np.float32))
    with pytest.raises(TypeError, match="`dtype` must be a floating-point"):
        data.values(dtype=torch.uint8)


def test_values_are_contiguous_whatever_the_images_are():
    data = TrainingSet(np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    assert not data.images.is_contiguous()
    assert data.values().is_contiguous()


@pytest.mark.parametrize(
    "labels",
    [[2, 0, 1, 0, 2, 2], np.array([2, 0, 1, 0, 2, 2], np.uint8), torch.tensor([2, 0, 1, 0, 2, 2])],
    ids=["list", "numpy", "torch"],
)
def test_labels(labels):
    data = TrainingSet(IMAGES, labels, label_names=["cat", "dog", "eel"])
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [2, 0, 1, 0, 2, 2]
    assert data.label_names == ("cat", "dog", "eel")


NAN = FLOATS.copy()
NAN[4, 1, 2, 3] = np.nan
INFINITE = FLOATS.copy()
INFINITE[0, 0, 0, 0] = -np.inf


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((0, 1, 4, 4), np.uint8), ValueError, "at least one image"),
        (np.zeros((3, 1, 0, 4), np.uint8), ValueError, "at least one image"),
        (np.zeros((4, 4), np.uint8), ValueError, r"shape \[N, C, H, W\] or \[N, H, W\]"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), ValueError, r"shape \[N, C, H, W\] or \[N, H, W\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), ValueError, r"\[N, H, W, C\]: give layout='NHWC'"),
        (torch.zeros(2, 8, 8, 1), ValueError, r"\[N, H, W, C\]: give layout='NHWC'"),
        (IMAGES.astype(np.int64), TypeError, "uint8, float32 or float64, got int64.*0..255"),
        (torch.from_numpy(IMAGES).int(), TypeError, "got int32.*0..255"),
        (IMAGES > 7, TypeError, "got bool"),
        (FLOATS.astype(np.float16), TypeError, "got float16: convert it to float32"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), TypeError, "got bfloat16: convert"),
        (FLOATS.astype(np.complex64), TypeError, "got complex64"),
        (NAN, ValueError, "NaN or infinite values, first in image 4"),
        (INFINITE, ValueError, "NaN or infinite values, first in image 0"),
        (IMAGES.astype(np.float32), ValueError, r"\[0, 255\], pass uint8 or images / 127.5 - 1"),
        (FLOATS * 1.5, ValueError, r"in \[-1, 1\], got values from -1.* to 1.*: rescale"),
        (FLOATS - 1.0, ValueError, r"in \[-1, 1\], got values from -2"),
        (torch.zeros(2, 1, 4, 4, device="meta"), ValueError, "must hold values, got .* on meta"),
        (IMAGES.tolist(), TypeError, "NumPy array, a torch tensor"),
        ("photos.zip", TypeError, r"TrainingSet.load\(...\) reads files"),
        (None, TypeError, "NumPy array, a torch tensor"),
    ],
)
def test_wrong_images_are_refused(images, error, message):
    with pytest.raises(error, match=f"`images`.*{message}"):
        TrainingSet(images)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": [0, 1]}, ValueError, r"`labels` must have shape \[6\].*got \[2\]"),
        ({"labels": []}, ValueError, r"`labels` must have shape \[6\]"),
        ({"labels": np.zeros((6, 2), int)}, ValueError, r"`labels`.*got \[6, 2\]"),
        ({"labels": np.zeros(6)}, TypeError, "`labels` must be whole numbers, got float64"),
        ({"labels": torch.zeros(6)}, TypeError, "`labels` must be whole numbers, got float32"),
        ({"labels": [True] * 6}, TypeError, "`labels` must be whole numbers, got bool"),
        ({"labels": ["a"] * 6}, TypeError, "`labels` must be whole numbers"),
        ({"label_names": ["a"]}, ValueError, "`label_names` needs `labels`"),
        (
            {"labels": [0, 1, 2, 0, 0, 0], "label_names": ["a", "b"]},
            ValueError,
            r"`labels` must be in 0..1.*from 0 to 2",
        ),
        ({"labels": [0] * 6, "label_names": "abcdef"}, TypeError, "`label_names` must be strings"),
        ({"labels": [0] * 6, "label_names": [7]}, TypeError, "`label_names` must be strings"),
    ],
)
def test_wrong_labels_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        TrainingSet(IMAGES, **arguments)


def test_float_images_without_negative_values_are_warned_about():
    with pytest.warns(UserWarning, match=r"float images of mine.*\[-1, 1\] is expected.*2 \* ima"):
        TrainingSet(IMAGES / 255.0, name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingSet(IMAGES / 127.5 - 1.0)


def test_the_range_of_a_large_set_is_checked_in_pieces(monkeypatch):
    monkeypatch.setattr("pyflocality.sources.validation._BLOCK_BYTES", 2 * FLOATS[0].nbytes)
    with pytest.raises(ValueError, match="first in image 4"):
        TrainingSet(NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The only negative value lies in the last piece.
        floats = np.abs(FLOATS)
        floats[5] *= -1
        TrainingSet(floats)


LABELLED = TrainingSet(
    IMAGES, [2, 0, 1, 0, 2, 2], name="pets", label_names=["cat", "dog", "eel", "fox"]
)


@pytest.mark.parametrize(
    "indices",
    [
        [4, 1, 1],
        [-2, 1, -5],
        slice(None, None, -2),
        range(0, 6, 3),
        np.array([5, 0], np.int32),
        torch.tensor([3]),
        np.array([True, False, False, True, True, False]),
        torch.tensor([True, False, False, True, True, False]),
    ],
)
def test_subset_selects_images_and_labels(indices):
    data = LABELLED.subset(indices)
    plain = list(indices) if isinstance(indices, range) else np.asarray(indices)
    plain = indices if isinstance(indices, slice) else plain
    np.testing.assert_array_equal(data.images.numpy(), IMAGES[plain])
    np.testing.assert_array_equal(data.labels.numpy(), LABELLED.labels.numpy()[plain])
    assert (data.name, data.label_names) == (LABELLED.name, LABELLED.label_names)


@pytest.mark.parametrize("indices", [slice(2, 5), range(2, 5), [2, 3, 4], [-4, -3, -2]])
def test_subset_of_images_in_a_row_is_a_view(indices):
    data = LABELLED.subset(indices)
    assert shares_memory(data.images, IMAGES[2:])
    np.testing.assert_array_equal(data.images.numpy(), IMAGES[2:5])


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([], ValueError, "must select at least one image"),
        (slice(3, 3), ValueError, "must select at least one image"),
        (np.zeros(6, bool), ValueError, "the mask selects none"),
        (np.ones(5, bool), ValueError, "a mask of 6 booleans, got 5"),
        ([0, 6], ValueError, r"in 0..5, got 6"),
        ([-7], ValueError, r"in 0..5, got -7"),
        ([0.5], TypeError, "whole numbers"),
        ([[0, 1]], TypeError, "whole numbers"),
        ("01", TypeError, "whole numbers"),
    ],
)
def test_wrong_indices_are_refused(indices, error, message):
    with pytest.raises(error, match=f"`indices`.*{message}"):
        LABELLED.subset(indices)


@pytest.mark.parametrize("label", [2, "eel", np.int64(2)])
def test_with_label(label):
    data = LABELLED.with_label(label)
    np.testing.assert_array_equal(data.images.numpy(), IMAGES[[0, 4, 5]])
    assert data.labels.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("data", "label", "error", "message"),
    [
        (LABELLED, 3, ValueError, r"one of 0 \('cat'\), 1 \('dog'\), 2 \('eel'\).*pets, got 3"),
        (LABELLED, "fox", ValueError, r"one of 0 \('cat'\).*got 'fox'"),
        (LABELLED, "gnu", ValueError, r"one of 0 \('cat'\).*got 'gnu'"),
        (LABELLED, -1, ValueError, "got -1"),
        (LABELLED, 1.0, TypeError, "whole number or a name"),
        (LABELLED, True, TypeError, "whole number or a name"),
        (TrainingSet(IMAGES, [7] * 6), "7", ValueError, "one of 7, the labels of array, got '7'"),
        (TrainingSet(IMAGES, [-1] * 6), "x", ValueError, "one of -1"),
        (TrainingSet(IMAGES), 0, ValueError, "array has no labels"),
    ],
)
def test_absent_labels_are_refused(data, label, error, message):
    with pytest.raises(error, match=f"`label`.*{message}"):
        data.with_label(label)


def test_content_key_is_the_hash_of_shape_dtype_and_bytes(monkeypatch):
    monkeypatch.setattr("pyflocality.sources.validation._BLOCK_BYTES", 2 * IMAGES[0].nbytes)
    key = TrainingSet(IMAGES, [0] * 6, name="other").content_key()
    expected = hashlib.sha256(b"(6, 3, 4, 5) torch.uint8" + IMAGES.tobytes()).hexdigest()
    assert key == expected
    strided = np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert TrainingSet(strided).content_key() == key
    changed = IMAGES.copy()
    changed[5, 2, 3, 4] ^= 1
    different = [changed, IMAGES[:5], IMAGES.reshape(6, 3, 5, 4), FLOATS]
    keys = {TrainingSet(images).content_key() for images in different}
    assert len(keys | {key}) == 5
    assert TrainingSet(IMAGES).subset(slice(0, 5)).content_key() in keys


def test_deepcopy_shares_the_images():
    twin = copy.deepcopy({"data": LABELLED})["data"]
    assert twin is not LABELLED
    assert twin.images is LABELLED.images
    assert (twin.name, twin.label_names) == (LABELLED.name, LABELLED.label_names)


def test_pickling_of_a_set_in_memory():
    twin = pickle.loads(pickle.dumps(LABELLED))
    np.testing.assert_array_equal(twin.images.numpy(), IMAGES)
    assert twin.labels.tolist() == LABELLED.labels.tolist()
    assert (twin.name, twin.label_names) == (LABELLED.name, LABELLED.label_names)
    assert twin.content_key() == LABELLED.content_key()


def test_a_view_is_pickled_without_the_memory_around_it():
    data = TrainingSet(np.zeros((1000, 1, 32, 32), np.uint8)).subset(slice(10, 12))
    assert len(pickle.dumps(data)) < 10_000


def mapped_set(tmp_path):
    path = tmp_path / "set.npy"
    np.save(path, IMAGES)
    return TrainingSet.load(path), path


def test_a_mapped_set_is_pickled_as_its_path(tmp_path):
    data, path = mapped_set(tmp_path)
    for part, expected in ((data, IMAGES), (data.subset(slice(1, 4)).subset([1, 2]), IMAGES[2:4])):
        content = pickle.dumps(part)
        assert bytes(expected.tobytes()) not in content
        twin = pickle.loads(content)
        np.testing.assert_array_equal(twin.images.numpy(), expected)
        assert twin.content_key() == part.content_key()


def test_a_copied_part_of_a_mapped_set_is_pickled_whole(tmp_path):
    data, path = mapped_set(tmp_path)
    content = pickle.dumps(data.subset([4, 0]))
    path.unlink()
    np.testing.assert_array_equal(pickle.loads(content).images.numpy(), IMAGES[[4, 0]])


def test_unpickling_refuses_another_file(tmp_path):
    data, path = mapped_set(tmp_path)
    content = pickle.dumps(data)
    os.replace(path, tmp_path / "elsewhere.npy")
    with pytest.raises(ValueError, match=r"set\.npy: the file .* is missing"):
        pickle.loads(content)
    np.save(path, IMAGES[:2])
    with pytest.raises(ValueError, match=rf"set\.npy: .*has {path.stat().st_size} bytes, expected"):
        pickle.loads(content)


def test_mapped_images_are_not_written_back(tmp_path):
    data, path = mapped_set(tmp_path)
    data.images[0] = 0
    np.testing.assert_array_equal(np.load(path), IMAGES)


def test_torch_save_takes_a_set(tmp_path):
    buffer = io.BytesIO()
    torch.save(LABELLED, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    np.testing.assert_array_equal(twin.images.numpy(), IMAGES)


def test_to_the_same_device_is_the_set_itself():
    assert LABELLED.to("cpu") is LABELLED
    assert LABELLED.to(torch.device("cpu")) is LABELLED


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ("meta", ValueError),
        ("nowhere", ValueError),
        ("cuda:4711", ValueError),
        (2**40, ValueError),
        (torch.float32, TypeError),
        (0.5, TypeError),
        (True, TypeError),
        (None, TypeError),
        (torch.zeros(1), TypeError),
    ],
)
def test_only_devices_that_hold_values(device, error):
    """A dtype would turn bytes into numbers of 0 to 255, which are not in [-1, 1]."""
    with pytest.raises(error, match="`device` must be a device"):
        LABELLED.to(device)
    moments = pf.Moments.from_data(LABELLED)
    with pytest.raises(error, match="`device` must be a device"):
        moments.to(device)


def test_repr_says_what_the_set_is(tmp_path):
    assert repr(LABELLED) == "TrainingSet('pets': 6 images 3x4x5, uint8, 3 labels, cpu)"
    data, _ = mapped_set(tmp_path)
    assert repr(data) == "TrainingSet('set.npy': 6 images 3x4x5, uint8, memory-mapped)"


def test_copies_of_mapped_sets_are_bounded(tmp_path, monkeypatch):
    images = np.random.default_rng(2).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    labels = np.repeat([0, 1, 2], [20, 4, 16])
    labels[[3, 30]] = 1
    np.save(tmp_path / "images.npy", images)
    mapped = TrainingSet(np.load(tmp_path / "images.npy", mmap_mode="r"), labels)
    resident = TrainingSet(images, labels)
    # Six scattered images.
    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", str(6 * 64))
    for data in (mapped, resident):
        assert torch.equal(data.with_label(1).images, torch.from_numpy(images[labels == 1]))
        assert len(data.subset(slice(2, 40))) == 38
    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", str(6 * 64 - 1))
    assert len(resident.with_label(1)) == 6 and len(mapped.subset(range(20, 24))) == 4
    for copied in (lambda: mapped.with_label(1), lambda: mapped.subset(labels == 1)):
        with pytest.raises(ValueError, match="6 images scattered over .* --sort-by-label"):
            copied()
