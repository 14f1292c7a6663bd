"""Pickles of CIFAR: genuine ones of every protocol, and hostile ones."""

from __future__ import annotations

import pickle
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from source_files import load

from pyflocality.sources.inert_pickle import RefusedPickleError, loads

ROWS = np.random.default_rng(5).integers(0, 256, (4, 3072), dtype=np.uint8)
BATCH = {
    b"batch_label": b"training batch 1 of 5",
    b"labels": [6, 9, 0, 3],
    b"data": ROWS,
    b"filenames": [b"a_s_1.png", b"caf\xe9.png", b"it's.png", b"a\nb\\.png"],
    b"more": [None, True, False, -1, 2**40, -(2**63), 0.5, "\u00e9\u4e00", (), (1,), (1, 2, 3, 4)],
}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value
            assert [*map(type, found[key])] == [*map(type, value)]


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("release", ["numpy 1", "numpy 2"])
def test_genuine_pickles(protocol, release):
    content = pickle.dumps(BATCH, protocol)
    for module in (b"numpy.core.", b"numpy._core."):
        content = content.replace(module, b"numpy#")
    if protocol < 4:
        name = {"numpy 1": b"numpy.core.", "numpy 2": b"numpy._core."}[release]
        content = content.replace(b"numpy#", name)
    else:
        # Names have their lengths in front of them.
        content = pickle.dumps(BATCH, protocol)
        old, new = (b"numpy._core.", b"numpy.core.")
        if release == "numpy 1" and old in content:
            start = content.index(old)
            length = content[start - 1] - 1
            content = content[: start - 1] + bytes([length]) + content[start:].replace(old, new, 1)
            # One byte less in the frame.
            frame = struct.unpack_from("<Q", content, 3)[0] - 1
            content = content[:3] + struct.pack("<Q", frame) + content[11:]
    same(pickle.loads(content), BATCH)
    same(loads(content), BATCH)


@pytest.mark.parametrize("dtype", ["u1", "i1", ">u2", "<i4", ">i8", "<u8", "f2", ">f4", "f8", "?"])
@pytest.mark.parametrize("order", "CF")
def test_numeric_arrays(dtype, order):
    array = np.asarray(ROWS[:2, :60].reshape(2, 5, 12) % 2, dtype, order=order)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        same(
            loads(pickle.dumps({"a": array, "b": array[:0]}, protocol)),
            {"a": array, "b": array[:0]},
        )


def test_strings_of_python_2():
    text = b"\x80\x02}(U\x01aT\x02\0\0\0\xff\0U\x01bS'\\xff\\n\\'x'\nu."
    assert loads(text) == {b"a": b"\xff\0", b"b": b"\xff\n'x"}
    assert loads(text) == pickle.loads(text, encoding="bytes")


def word(text):
    return b"\x8c" + bytes([len(text)]) + text


def name(module, function):
    return word(module) + word(function) + b"\x93"


def dtype(text, flags=b"\x89\x88"):
    return name(b"numpy", b"dtype") + word(text) + flags + b"\x87R"


RECONSTRUCT = name(b"numpy._core.multiarray", b"_reconstruct")
NDARRAY = name(b"numpy", b"ndarray")
EMPTY = RECONSTRUCT + NDARRAY + b"K\0\x85C\x01b\x87R"
FROMBUFFER = name(b"numpy._core.numeric", b"_frombuffer")


def array(content, kind, shape):
    return EMPTY + b"(K\x01" + shape + kind + b"\x89" + content + b"tb"


EIGHT = b"C\x08" + b"A" * 8
HOSTILE = {
    "code": b"cos\nsystem\n(S'true'\ntR",
    "code by stack": name(b"builtins", b"eval") + word(b"1") + b"\x85R",
    "an attribute of numpy": name(b"numpy", b"load") + word(b"x") + b"\x85R",
    "a submodule": name(b"numpy._core.multiarray", b"scalar") + b")R",
    "a builder of another module": name(b"numpy.os", b"_reconstruct") + b")R",
    "an instance": b"(ios\nsystem\n",
    "an object": b"(" + NDARRAY + b"o",
    "a new object": NDARRAY + b")\x81",
    "a new object with keywords": NDARRAY + b")}\x92",
    "a persistent name": b"Pname\n",
    "a binary persistent name": b"K\x01Q",
    "an extension": b"\x82\x01",
    "a buffer from outside": b"\x97",
    "ndarray called": NDARRAY + b"K\x01\x85R",
    "ndarray called over bytes": NDARRAY + b"K\x01\x85" + dtype(b"O8") + EIGHT + b"\x87R",
    "objects": array(EIGHT, dtype(b"O8"), b"K\x01\x85"),
    "objects from a buffer": FROMBUFFER
    + b"("
    + EIGHT
    + dtype(b"O")
    + b"K\x01\x85"
    + word(b"C")
    + b"tR",
    "a structure": dtype(b"V8")
    + b"(K\x03"
    + word(b"|")
    + b"N"
    + word(b"f")
    + b"\x85}K\x08K\x01K\0tb",
    "fields told later": dtype(b"u1")
    + b"(K\x03"
    + word(b"|")
    + b"N"
    + word(b"f")
    + b"\x85}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
    "a dtype of text": array(EIGHT, dtype(b"S8"), b"K\x01\x85"),
    "a dtype by list": dtype(b"u1,O"),
    "a dtype of times": dtype(b"M8[ns]"),
    "a dtype that is no name": name(b"numpy", b"dtype") + NDARRAY + b"\x85R",
    "too short": array(EIGHT, dtype(b"u1"), b"K\x09\x85"),
    "too long": array(EIGHT, dtype(b"u1"), b"K\x07\x85"),
    "negative": array(EIGHT, dtype(b"u1"), b"J\xff\xff\xff\xffJ\xf8\xff\xff\xff\x86"),
    "a huge shape": array(EIGHT, dtype(b"u1"), b"\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"\x85"),
    "a shape of no numbers": array(EIGHT, dtype(b"u1"), word(b"x") + b"\x85"),
    "a list as bytes": array(b"]", dtype(b"u1"), b"K\0\x85"),
    "state twice": array(EIGHT, dtype(b"u1"), b"K\x08\x85")
    + b"(K\x01K\x08\x85"
    + dtype(b"u1")
    + b"\x89"
    + EIGHT
    + b"tb",
    "state of a list": b"](K\x01tb",
    "state of a name": NDARRAY + b"}b",
    "state that is a dict": EMPTY + b"}b",
    "an array without its state": EMPTY,
    "a name as value": NDARRAY,
    "a call of a string": word(b"x") + b")R",
    "a call without a tuple": RECONSTRUCT + b"]R",
    "text in a codec": name(b"_codecs", b"encode") + word(b"x") + word(b"rot13") + b"\x86R",
    "an exec codec": name(b"_codecs", b"encode") + word(b"x") + word(b"zip") + b"\x86R",
    "a name that is bytes": b"C\x02osC\x06system\x93",
    "numbers as keys": b"}K\x01K\x02s",
    "a list as key": b"}]K\x02s",
    "items of a list": b"]K\x01K\x02s",
    "an odd dict": b"(K\x01d",
    "appended to a dict": b"}K\x01a",
    "no mark": b"K\x01t",
    "memo without a value": b"h\x07",
    "an empty stack": b"",
    "pops": b"000",
    "a number of many digits": b"\x8b\xe8\x03\0\0" + b"\x7f" * 1000,
    "a decimal number of many digits": b"I" + b"9" * 5000 + b"\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused(case):
    for content in (
        b"\x80\x04" + HOSTILE[case] + b".",
        b"\x80\x04}" + word(b"data") + HOSTILE[case] + b"s.",
    ):
        with pytest.raises(RefusedPickleError):
            loads(content)


@pytest.mark.parametrize(
    "content",
    [
        # A position of the memo for which Python's unpickler makes room up to there.
        b"K\x01r\xff\xff\xff\x7f.",
        b"K\x01p99999999999\n.",
        b"\x96" + b"\xff" * 7 + b"\x3f.",
        b"\x8e" + b"\xff" * 7 + b"\x3f.",
        b"\x8d" + b"\0\0\0\0\x01\0\0\0.",
        b"T\xff\xff\xff\x7f.",
        b"B\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x95" + b"\xff" * 8 + b"K\x01.",
        # As many empty lists as there are steps, in a file that is much smaller.
        b"(" + b"]" * 300_000 + b"t.",
        b"(" * 300_000,
        # The same text as bytes, over and over.
        b"X\x40\x42\x0f\0" + b"x" * 1_000_000 + b"q\0" + name(b"_codecs", b"encode") + b"q\1"
        + word(b"latin1") + b"q\2(" + b"h\1h\0h\2\x86R" * 50_000 + b"t.",
        # Tuples of tuples.
        b"K\x01" + b"\x85" * 90_000 + b".",
    ],
    ids=lambda content: repr(content[:8]),
)  # fmt: skip
def test_small_pickles_take_little_memory_and_time(content, monkeypatch):
    monkeypatch.setattr("pyflocality.sources.inert_pickle._MAX_STEPS", 100_000)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        # Some are harmless here: their value is one.
        found = loads(b"\x80\x04" + content)
        assert isinstance(found, (int, tuple))
    except RefusedPickleError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * len(content) + 15 * 2**20
    assert time.perf_counter() - start < 20


def test_labels_that_would_fill_the_memory(tmp_path):
    """A list of a list of a list, each a thousand times the same: 10^9 values in 10 kB."""
    thousand = b"](" + b"K\x01" * 1000 + b"eq\x00"
    for level in range(2):
        thousand += b"](" + bytes([ord("h"), level]) * 1000 + b"eq" + bytes([level + 1])
    content = pickle.dumps({"data": ROWS[:1].repeat(1000, axis=0)}, 2)[:-1]
    content += b"(" + b"X\x06\0\0\0labels" + b"(" + thousand[:0] + thousand + b"l0" + b"h\x02u."
    for part in range(1, 6):
        (tmp_path / f"data_batch_{part}").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_1: expected 1000 whole numbers as labels"):
        load(tmp_path)


def test_mutated_pickles_raise_the_named_error_or_answer():
    generator = random.Random(6)
    genuine = [pickle.dumps(BATCH | {b"data": ROWS[:1, :40]}, protocol) for protocol in range(6)]
    for number in range(6000):
        content = bytearray(genuine[number % 6])
        for _ in range(generator.choice((1, 1, 2, 5))):
            place = generator.randrange(len(content))
            kind = generator.randrange(3)
            if kind == 0:
                content[place] = generator.randrange(256)
            elif kind == 1:
                del content[place : place + generator.randrange(1, 9)]
            else:
                content[place:place] = generator.randbytes(generator.randrange(1, 9))
            if not content:
                break
        try:
            loads(bytes(content))
        except RefusedPickleError:
            pass
