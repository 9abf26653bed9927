"""Pickles and archives from strangers: arrays come out, nothing runs, damage is named."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysparse.data import pickles
from raysparse.errors import UsageError


def object_array(items: list[Any]) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int16).reshape(3, 2),
        np.asfortranarray(np.random.default_rng(0).normal(size=(4, 3))),
        np.arange(5, dtype=">f4"),
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
        np.random.default_rng(0).integers(0, 256, 300).astype(np.uint8),
    ],
    ids=["int16", "fortran", "big-endian", "bool", "empty", "bytes"],
)
def test_arrays_of_every_protocol(array: np.ndarray, protocol: int) -> None:
    found = pickles.load(pickle.dumps({"drawing": [array, (1, 2.5)]}, protocol), "x")
    np.testing.assert_array_equal(found["drawing"][0], array)
    assert found["drawing"][0].dtype.kind == array.dtype.kind
    assert found["drawing"][1] == (1, 2.5)


def test_numpy_1_names_python_2_text_and_scalars() -> None:
    modern = pickle.dumps([np.arange(3.0), np.float32(2.5)], 2)
    old = modern.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != modern
    array, scalar = pickles.load(old, "x")
    assert array.tolist() == [0, 1, 2]
    assert scalar == 2.5


class _Runs:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, "touch {0}"), r"(posix|nt)\.system"),
        ((eval, "open({0!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        ((np.load, "{0}"), r"numpy\.load"),
        ((np.testing.assert_equal, 1, 2), r"numpy\.testing.*assert_equal"),
        ((np.fromfile, "{0}"), r"numpy.*fromfile"),
        ((getattr, "x", "upper"), r"(builtins|__builtin__)\.getattr"),
        ((OrderedDict,), r"collections\.OrderedDict"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_other_name_is_refused_and_named(call: tuple[Any, ...], name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    arguments = [a.format(str(mark)) if isinstance(a, str) else a for a in call[1:]]
    data = pickle.dumps({"drawing": [_Runs(call[0], *arguments)]}, protocol)
    with pytest.raises(UsageError, match=f"here.pkl: the pickle names {name}"):
        pickles.load(data, "here.pkl")
    assert not mark.exists()


def _calls(module: str, name: str, arguments: bytes) -> bytes:
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R."


@pytest.mark.parametrize(
    "data",
    [
        _calls("numpy.testing", "runstring", b"X\x01\x00\x00\x00a\x85"),
        _calls("numpy.testing._private.utils", "runstring", b"X\x01\x00\x00\x00a\x85"),
        _calls("numpy.f2py.capi_maps", "eval", b"X\x01\x00\x00\x00a\x85"),
        _calls("numpy", "os.system", b"X\x01\x00\x00\x00a\x85"),
        _calls("os", "system", b"X\x01\x00\x00\x00a\x85"),
    ],
)
def test_numpy_gadgets_are_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="the pickle names"):
        pickles.load(data, "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps(np.arange(100.0))[:-300],
        _calls("numpy", "ndarray", b"K\x05\x85"),  # an array of unset memory
        _calls("numpy", "dtype", b"X\x02\x00\x00\x00V8\x85"),
        _calls("_codecs", "encode", b"X\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86"),
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",  # deep nesting
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",  # claims an enormous string
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # a new object without a call
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    ],
    ids=["empty", "text", "cut", "unset memory", "void", "codec", "deep", "huge", "new", "cycle"],
)
def test_damage_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"x: damaged"):
        pickles.load(data, "x")


@pytest.mark.parametrize("state", [b"}X\x05\x00\x00\x00_callK\x01sb", b"N}X\x05\x00\x00\x00_callK\x01s\x86b"])
def test_a_pickle_cannot_change_what_the_next_one_gets(state: bytes) -> None:
    for name in (b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct"):
        with pytest.raises(UsageError, match="damaged"):
            pickles.load(b"\x80\x02c" + name + b"\n" + state + b".", "x")
    assert pickles.load(pickle.dumps(np.arange(3), 2), "x").tolist() == [0, 1, 2]


def test_lists_that_double_forty_times_take_no_time() -> None:
    doubled: list[Any] = []
    for _ in range(40):
        doubled = [doubled, doubled]
    found = pickles.load(pickle.dumps(doubled), "x")
    assert found[0] is found[1]


@pytest.mark.parametrize("put", [b"r\x00\x00\x00\x7f", b"p2130706432\n"], ids=["binary", "text"])
def test_a_memo_that_does_not_fit_its_file_is_refused(put: bytes) -> None:
    """The unpickler makes room for all places before it: 16 GB."""
    with pytest.raises(UsageError, match=r"place 2130706432 in the memo of .* bytes"):
        pickles.load(b"\x80\x02]" + put + b".", "a.npz")


def test_sizes_that_lie_are_refused() -> None:
    honest = pickle.dumps(np.arange(4, dtype=np.int64), 2)
    lying = honest.replace(b"K\x04\x85", b"K\x05\x85")
    assert lying != honest
    pickletools.dis(lying, out=io.StringIO())  # still a well-formed pickle
    with pytest.raises(UsageError, match="damaged"):
        pickles.load(lying, "x")


def test_npz_round_trip(tmp_path: Path) -> None:
    sketches = [np.random.default_rng(i).normal(size=(i + 2, 3)) for i in range(5)]
    np.savez_compressed(tmp_path / "a.npz", train=object_array(sketches), test=object_array(sketches[:1]))
    found = pickles.load_npz(tmp_path / "a.npz")
    assert set(found) == {"train", "test"}
    for mine, theirs in zip(found["train"], sketches, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_hostile_and_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, train=object_array([_Runs(os.system, f"touch {tmp_path / 'ran'}")]))
    with pytest.raises(UsageError, match=r"train.npy: the pickle names (posix|nt)\.system"):
        pickles.load_npz(path)
    assert not (tmp_path / "ran").exists()

    np.savez_compressed(path, train=object_array([np.arange(30.0).reshape(10, 3)]))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a.npz: damaged"):
        pickles.load_npz(path)
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :])
    with pytest.raises(UsageError, match=r"a.npz.*(damaged|not an .npy)"):
        pickles.load_npz(path)
    with pytest.raises(UsageError, match="does not exist"):
        pickles.load_npz(tmp_path / "b.npz")


def test_npz_of_the_wrong_kind_or_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, train=np.zeros((4, 5, 3)))
    with pytest.raises(UsageError, match="must hold an object array"):
        pickles.load_npz(path)
    np.savez(path, train=object_array([1, 2]))
    with pytest.raises(UsageError, match="object array of arrays"):
        pickles.load_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.npy", b"no magic")
    with pytest.raises(UsageError, match=r"not an .npy file"):
        pickles.load_npz(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", bytes(100_000))
    monkeypatch.setattr(pickles, "SIZE_LIMIT", 50_000)
    with pytest.raises(UsageError, match="unpacks to 100000 bytes"):
        pickles.load_npz(path)
