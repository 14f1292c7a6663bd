"""Sources that hold arrays: NumPy files, MNIST, CIFAR; their values and their damage."""

from __future__ import annotations

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from source_files import (
    COLOUR,
    GREY,
    assert_images,
    encoded,
    load,
    luma,
    save_npy,
    truncate,
    write_tree,
)

RNG = np.random.default_rng(3)

# NumPy files


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (COLOUR, COLOUR),
        (GREY, GREY[:, None]),
        (np.ascontiguousarray(COLOUR.transpose(0, 2, 3, 1)), COLOUR),
        (np.asfortranarray(COLOUR), COLOUR),
        (COLOUR / np.float32(127.5) - np.float32(1), COLOUR / np.float32(127.5) - np.float32(1)),
    ],
    ids=["nchw", "nhw", "nhwc", "fortran", "float"],
)
def test_npy_is_mapped(tmp_path, stored, expected):
    path = save_npy(tmp_path, stored)
    data = load(path)
    np.testing.assert_array_equal(data.images.numpy(), expected)
    assert data.images.numpy().dtype == stored.dtype
    twin = pickle.loads(pickle.dumps(data))
    assert torch.equal(twin.images, data.images)
    # A change of the file shows through: nothing was copied.
    content = bytearray(path.read_bytes())
    content[-stored.nbytes :] = bytes(stored.nbytes)
    with open(path, "r+b") as file:
        file.write(content)
    assert not data.images.any()
    with pytest.raises(ValueError, match=r"set\.npy: .* was written to since the set was loaded"):
        pickle.loads(pickle.dumps(data))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy(tmp_path, version):
    with open(tmp_path / "set.npy", "wb") as file:
        np.lib.format.write_array(file, COLOUR, version)
    np.testing.assert_array_equal(load(tmp_path / "set.npy").images.numpy(), COLOUR)


def test_npy_of_foreign_byte_order_is_converted(tmp_path):
    floats = COLOUR / 127.5 - 1.0
    data = load(save_npy(tmp_path, floats.astype(">f8")))
    np.testing.assert_array_equal(data.images.numpy(), floats)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).images.numpy(), floats)


def change_header(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    "old, new, said",
    [
        (b"(16, ", b"(12, ", r"announces uint8 \[12, .*, but the file has"),
        (b"(16, ", b"(96, ", r"announces uint8 \[96, .*, but the file has"),
        (b"|u1", b"<u2", "but the file has"),
        (b", }", b", {", "not a readable .npy header"),
        (b"(16, ", b"(-6, ", "not a(n array of numbers| readable .npy header)"),
    ],
)
def test_a_damaged_header_is_named(tmp_path, old, new, said):
    """One byte, and 12 of 16 images would be the whole set."""
    path = save_npy(tmp_path, RNG.integers(0, 256, (16, 1, 4, 4), dtype=np.uint8))
    change_header(path, old, new)
    with pytest.raises(ValueError, match=rf"set\.npy: not a readable .npy file: .*{said}"):
        load(path)


def test_npy_is_converted(tmp_path):
    path = save_npy(tmp_path, COLOUR)
    grey = load(path, channels=1)
    assert np.abs(grey.images.numpy()[:, 0] - [luma(image) for image in COLOUR]).max() <= 0.51
    floats = COLOUR / 127.5 - 1.0
    path = save_npy(tmp_path, floats)
    grey = load(path, channels=1)
    truth = [luma(image) for image in floats]
    np.testing.assert_allclose(grey.images.numpy()[:, 0], truth, rtol=0, atol=1e-15)
    blocks = RNG.uniform(-1, 1, (2, 1, 6, 6))
    small = load(save_npy(tmp_path, blocks), resolution=3).images.numpy()
    means = blocks.reshape(2, 1, 3, 2, 3, 2).mean(axis=(3, 5))
    assert small.dtype == np.float64
    np.testing.assert_allclose(small, means, rtol=0, atol=2e-7)
    checks = np.sign(blocks)
    assert np.abs(load(save_npy(tmp_path, checks), resolution=8).images.numpy()).max() <= 1.0
    with pytest.raises(ValueError, match="`channels` must be left out.*have 4 channels"):
        load(save_npy(tmp_path, np.zeros((2, 4, 5, 5), np.uint8)), channels=3)


def overwrite(path):
    path.write_bytes(b"this is text")


@pytest.mark.parametrize("damage", [truncate, overwrite])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_damaged_numpy_files_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"set.{suffix}"
    {"npy": np.save, "npz": np.savez}[suffix](path, COLOUR)
    damage(path)
    with pytest.raises(ValueError, match=rf"{path}: not a readable \.{suffix} file"):
        load(path)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((0, 4, 4), np.uint8), ValueError, "at least one image"),
        (np.zeros((4, 4), np.uint8), ValueError, "shape"),
        (np.zeros((), np.uint8), ValueError, "shape"),
        (np.zeros((2, 4, 4), np.int32), TypeError, "uint8"),
        (np.full((2, 4, 4), np.nan), ValueError, "NaN"),
        (np.array([{}]), ValueError, "not a readable .npy file"),
    ],
)
def test_wrong_contents_of_npy_name_the_file(tmp_path, array, error, message):
    path = save_npy(tmp_path, array)
    with pytest.raises(error, match=rf"{path}: .*{message}"):
        load(path)


@pytest.mark.parametrize(("image_key", "label_key"), [("images", "labels"), ("x", "y")])
def test_npz(tmp_path, image_key, label_key):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **{image_key: COLOUR.transpose(0, 2, 3, 1), label_key: range(6)})
    data = load(path)
    assert_images(data, COLOUR)
    assert data.images.is_contiguous()
    assert data.labels.tolist() == list(range(6))
    np.savez(path, GREY)
    assert_images(load(path), GREY[:, None])


def test_npz_errors_name_the_file(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, pictures=COLOUR)
    with pytest.raises(ValueError, match=rf"{path}: holds no `images`.*only pictures"):
        load(path)
    np.savez(path, images=COLOUR, labels=[1, 2])
    with pytest.raises(ValueError, match=rf"{path}: `labels` must have shape \[6\]"):
        load(path)
    np.savez(path, images=np.array([print], object))
    with pytest.raises(ValueError, match=rf"{path}: not a readable \.npz file"):
        load(path)


# MNIST


def idx_bytes(values):
    values = np.asarray(values, np.uint8)
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def mnist_folder(tmp_path, zipped):
    for prefix, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        for kind, values in (("images-idx3", GREY[part]), ("labels-idx1", np.arange(6)[part])):
            path = tmp_path / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
            content = idx_bytes(values)
            path.write_bytes(gzip.compress(content) if zipped else content)
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, zipped):
    folder = mnist_folder(tmp_path, zipped)
    suffix = ".gz" if zipped else ""
    for split, prefix, rows in (
        (None, "train", [0, 1, 2, 3]),
        ("train", "train", [0, 1, 2, 3]),
        ("test", "t10k", [4, 5]),
    ):
        for data in (
            load(folder, split=split),
            load(folder / f"{prefix}-images-idx3-ubyte{suffix}"),
        ):
            assert_images(data, GREY[rows][:, None])
            assert data.labels.tolist() == rows
            # Plain files are mapped, also in another process.
            assert ("memory-mapped" in repr(data)) is not zipped
            twin = pickle.loads(pickle.dumps(data.subset(slice(1, 2))))
            assert_images(twin, GREY[rows][1:2, None])
    with pytest.raises(ValueError, match="`split` must be one of 'test', 'train'.*got 'val'"):
        load(folder, split="val")


def test_mnist_without_labels(tmp_path):
    folder = mnist_folder(tmp_path, False)
    (folder / "train-labels-idx1-ubyte").unlink()
    assert load(folder).labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(GREY)[:-1], "announces 6x5x4 values, 136 bytes in all, but it has 135"),
        (idx_bytes(GREY) + b"x", "136 bytes in all, but it has 137"),
        (idx_bytes(GREY[0]), "not an idx file of unsigned bytes in 3 dimensions.*00 00 08 02"),
        (b"", "not an idx file.*starts with nothing"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "announces 4294967295x4294967295x4294967295"),
        (idx_bytes(GREY[:0]), "at least one image"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    for name, stored in (
        ("a-images-idx3-ubyte", content),
        ("b-images-idx3-ubyte.gz", gzip.compress(content)),
    ):
        path = tmp_path / name
        path.write_bytes(stored)
        with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
            load(path)


def test_a_truncated_gz_file_is_named(tmp_path):
    path = tmp_path / "a-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(GREY))[:-20])
    with pytest.raises(ValueError, match=rf"{path}: cannot be read"):
        load(path)
    path.write_bytes(idx_bytes(GREY))
    with pytest.raises(ValueError, match=rf"{path}: cannot be read"):
        load(path)


def test_labels_that_do_not_match_are_named(tmp_path):
    folder = mnist_folder(tmp_path, False)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes([1, 2, 3]))
    with pytest.raises(ValueError, match=rf"{labels}: expected 4 labels.*got 3"):
        load(folder)


# CIFAR

CIFAR = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
CIFAR_LABELS = RNG.integers(0, 10, 12)


def python2_pickle(values, labels):
    """The pickle that Python 2 wrote of {"data": values, "labels": labels}: bytes for strings."""

    def text(word):
        return b"U" + bytes([len(word)]) + word

    count, length = values.shape
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01K" + bytes([count]) + b"M" + struct.pack("<H", length) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", values.size) + values.tobytes() + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def parts_10(write, suffix=""):
    names = [f"data_batch_{number}{suffix}" for number in range(1, 6)] + [f"test_batch{suffix}"]
    return {
        name: write(CIFAR[2 * index : 2 * index + 2].reshape(2, -1), CIFAR_LABELS[2 * index :][:2])
        for index, name in enumerate(names)
    }


def modern_pickle(protocol):
    def write(values, labels):
        return pickle.dumps({b"data": values, b"labels": labels.tolist()}, protocol)

    return write


def binary_batch(values, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), values], axis=1).tobytes()


CLASS_NAMES = [f"class{number}" for number in range(10)]
CIFAR_VERSIONS = {
    "python 2": parts_10(python2_pickle)
    | {"batches.meta": pickle.dumps({"label_names": CLASS_NAMES}, 2)},
    "protocol 2": parts_10(modern_pickle(2))
    | {"batches.meta": pickle.dumps({b"label_names": [b"%d" % n for n in range(10)]}, 2)},
    "protocol 5": parts_10(modern_pickle(5)),
    "binary": parts_10(binary_batch, ".bin")
    | {"batches.meta.txt": "\n".join([*CLASS_NAMES, ""]).encode()},
}


@pytest.mark.parametrize("version", CIFAR_VERSIONS)
def test_cifar_10(tmp_path, version):
    folder = write_tree(tmp_path / "cifar", CIFAR_VERSIONS[version], "folder")
    for split, part in ((None, slice(0, 10)), ("train", slice(0, 10)), ("test", slice(10, 12))):
        data = load(folder, split=split)
        assert_images(data, CIFAR[part])
        assert data.labels.tolist() == CIFAR_LABELS[part].tolist()
        names = {"protocol 2": tuple("0123456789"), "protocol 5": None}
        assert data.label_names == names.get(version, tuple(CLASS_NAMES))


def test_cifar_100(tmp_path):
    content = {
        name: pickle.dumps(
            {
                b"data": CIFAR[part].reshape(-1, 3072),
                b"fine_labels": CIFAR_LABELS[part].tolist(),
                b"coarse_labels": [0] * 12,
            }
        )
        for name, part in (("train", slice(0, 9)), ("test", slice(9, 12)))
    }
    content["meta"] = pickle.dumps({"fine_label_names": CLASS_NAMES})
    folder = write_tree(tmp_path / "cifar-100-python", content, "folder")
    data = load(folder, split="test")
    assert_images(data, CIFAR[9:])
    assert data.labels.tolist() == CIFAR_LABELS[9:].tolist()
    assert data.label_names == tuple(CLASS_NAMES)


@pytest.mark.parametrize("stray", ["train", "test"])
def test_a_file_named_like_a_split_does_not_make_cifar_100(tmp_path, stray):
    images = {f"{number}.png": encoded(CIFAR[number]) for number in range(2)}
    folder = write_tree(tmp_path / "set", images | {stray: b"notes"}, "folder")
    assert_images(load(folder), CIFAR[:2])


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function", [os.mkdir, eval, np.load, np.lib.format.open_memmap, pickle.loads, getattr]
)
def test_a_malicious_pickle_is_refused(tmp_path, function):
    witness = tmp_path / "witness"
    folder = write_tree(tmp_path / "cifar", CIFAR_VERSIONS["protocol 2"], "folder")
    bad = pickle.dumps({b"data": Malicious(function, str(witness)), b"labels": [0]})
    (folder / "data_batch_3").write_bytes(bad)
    with pytest.raises(ValueError, match=r"data_batch_3: .*which is not allowed"):
        load(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "this batch of CIFAR is missing"),
        (b"", "not a readable CIFAR batch"),
        (b"this is text", "not a readable CIFAR batch"),
        (CIFAR_VERSIONS["python 2"]["data_batch_2"][:-500], "not a readable CIFAR batch"),
        (pickle.dumps([1, 2]), "not a readable CIFAR batch"),
        (pickle.dumps({b"labels": []}), "not a readable CIFAR batch.*data"),
        (pickle.dumps({b"data": [1], b"labels": [1]}), "`data` must be a uint8 array"),
        (
            pickle.dumps({b"data": np.zeros((1, 9), np.uint8), b"labels": [1]}),
            r"`data` must have shape \[n, 3072\], got \(1, 9\)",
        ),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}),
            "expected 1 whole numbers as labels",
        ),
    ],
)
def test_damaged_cifar_batches_are_named(tmp_path, content, message):
    folder = write_tree(tmp_path / "cifar", CIFAR_VERSIONS["protocol 2"], "folder")
    path = folder / "data_batch_2"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: {message}"):
        load(folder)


def test_a_damaged_binary_batch_is_named(tmp_path):
    folder = write_tree(tmp_path / "cifar", CIFAR_VERSIONS["binary"], "folder")
    truncate(folder / "test_batch.bin")
    with pytest.raises(ValueError, match=r"test_batch\.bin: expected records of 3073 bytes"):
        load(folder, split="test")
    assert len(load(folder)) == 10
