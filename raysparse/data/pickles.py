"""Arrays out of pickles without running what a pickle asks for.

Nothing named in the file is ever called: the few names that an array's pickle needs stand for small classes here,
which check what they get; any other name is refused, numpy's own others too (numpy.load or numpy.testing's runstring
are as good as os.system). Pickles of Python 2 and 3, protocols 0 to 5, numpy 1 and 2 are read.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysparse.errors import UsageError

SIZE_LIMIT = 2**31  # bytes of one unpacked member; KanjiVG's largest has 11 MB
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError,
    MemoryError, RecursionError, ImportError,
)  # fmt: skip  # what the unpickler raises on bytes that are not a pickle
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def load(data: bytes, where: str) -> Any:
    """The object in a pickle, made of plain Python values and numpy arrays.

    UsageError naming `where` (a file) and the name, if the pickle names anything but numpy's arrays; and where the
    bytes are not a whole pickle.
    """
    try:
        _check_memo(data)
        return _revive(_Unpickler(io.BytesIO(data), where).load(), {})
    except _DAMAGE as error:
        raise UsageError(f"{where}: damaged, not a whole pickle of arrays ({error}); get the file again") from error


def load_npz(path: Path) -> dict[str, list[NDArray[Any]]]:
    """The object arrays of an .npz, each as a list of its elements' arrays. UsageError where the file is damaged,
    names anything but numpy, or unpacks to more than SIZE_LIMIT."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {info.filename.removesuffix(".npy"): _member(archive, info, path) for info in members}
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; give the path of an .npz file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"{path}: damaged, not a readable .npz ({error}); get the file again") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> list[NDArray[Any]]:
    where = f"{path}, {info.filename}"
    if info.file_size > SIZE_LIMIT:
        raise UsageError(f"{where}: unpacks to {info.file_size} bytes, more than the limit of {SIZE_LIMIT}; not read")
    with archive.open(info) as stream:
        data = stream.read(info.file_size + 1)  # reading to the end checks the CRC
    try:
        buffer = io.BytesIO(data)
        version = np.lib.format.read_magic(buffer)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(buffer)
    except (ValueError, KeyError, EOFError) as error:
        raise UsageError(f"{where}: not an .npy file ({error}); get the file again") from error
    if not dtype.hasobject:
        raise UsageError(f"{where}: holds {dtype} {shape}, but must hold an object array of arrays, one per sketch")
    value = load(data[buffer.tell() :], where)
    if not isinstance(value, list) or shape != (len(value),) or not all(isinstance(v, np.ndarray) for v in value):
        raise UsageError(f"{where}: must hold a one-dimensional object array of arrays, one per sketch")
    return value


def _check_memo(data: bytes) -> None:
    """UnpicklingError for a place in the memo beyond what so many bytes can fill: the unpickler would make room for all
    before it, 64 GB for one wrong byte."""
    for opcode, place, _ in pickletools.genops(data):
        if opcode.name in _PUTS and not 0 <= int(place or 0) <= len(data):
            raise pickle.UnpicklingError(f"place {place} in the memo of {len(data)} bytes")


class _Dtype:
    """Stands for numpy.dtype: numbers and objects only."""

    def __init__(self, code: Any, *_: Any) -> None:
        dtype = np.dtype("O") if code in ("O", "O8", "O4") else np.dtype(str(code))
        if dtype.kind not in "biufO" or dtype.shape or dtype.names:
            raise pickle.UnpicklingError(f"arrays of {code!r} are not read")
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):  # the byte order comes apart from the code
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array in the making; `array` is an ndarray, or a list of what an object array holds."""

    def __init__(self, array: Any = None) -> None:
        self.array = array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.dtype.hasobject:
            if len(content) != math.prod(shape):
                raise pickle.UnpicklingError(f"{len(content)} objects for an array of shape {shape}")
            self.array = list(content)
        else:
            self.array = _from_bytes(content, dtype, shape, "F" if fortran else "C")


def _from_bytes(content: Any, dtype: _Dtype, shape: Any, order: str) -> NDArray[Any]:
    raw = content.encode("latin1") if isinstance(content, str) else content  # Python 2 wrote bytes as text
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("only plain arrays are read")
    return _Array()


def _frombuffer(content: Any, dtype: _Dtype, shape: Any, order: str) -> _Array:
    return _Array(_from_bytes(content, dtype, shape, order))


def _scalar(dtype: _Dtype, content: Any) -> Any:
    return _from_bytes(content, dtype, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r} are not read")
    return text.encode("latin1")


def _never(*_: Any) -> Any:
    raise pickle.UnpicklingError("arrays without content are not read")


class _Name:
    """What a name in a pickle stands for. It cannot be changed: a pickle may set attributes of what it names."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"sets {name}")

    def __call__(self, *arguments: Any) -> Any:
        return object.__getattribute__(self, "_call")(*arguments)


_NDARRAY = _Name(_never)  # only ever an argument of _reconstruct
_NAMES = {("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _Name(_Dtype)}
_NAMES |= {("_codecs", "encode"): _Name(_encode)}  # how protocol 2 writes bytes; stands in for the codec, latin1 only
_NAMES |= {("__builtin__", "bytes"): _Name(lambda: b"")}  # and how it writes no bytes
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    _NAMES |= {
        (f"{_core}.multiarray", "_reconstruct"): _Name(_reconstruct),
        (f"{_core}.multiarray", "scalar"): _Name(_scalar),
        (f"{_core}.numeric", "_frombuffer"): _Name(_frombuffer),
    }


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, where: str) -> None:
        super().__init__(stream, encoding="latin1")
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise UsageError(
                f"{self.where}: the pickle names {module}.{name}. Only numpy arrays are read; nothing in it was run. "
                "Do not open this file with pickle or numpy.load(allow_pickle=True)"
            )
        return found


def _revive(value: Any, done: dict[int, Any]) -> Any:
    """Arrays in the making to arrays, at any depth of lists, tuples and dicts.

    done: what was revived, by id: a list that holds another twice, 40 levels deep, must not be walked 2^40 times.
    """
    if id(value) not in done:
        if isinstance(value, _Array):
            revived = [_revive(item, done) for item in value.array] if isinstance(value.array, list) else value.array
        elif isinstance(value, (list, tuple)):
            revived = type(value)(_revive(item, done) for item in value)
        elif isinstance(value, dict):
            revived = {key: _revive(item, done) for key, item in value.items()}
        else:
            return value
        done[id(value)] = revived
    return done[id(value)]
