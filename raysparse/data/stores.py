"""Pictures kept many to a file: an lmdb, Parquet files, tar archives."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from raysparse.data import sources
from raysparse.data.listing import Entries
from raysparse.data.partial import building, publish
from raysparse.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Lmdb:
    """Encoded pictures in an lmdb, as LSUN is handed out; keys are its own."""

    path: Path  # the folder with data.mdb, or the file itself

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import lmdb
        except ModuleNotFoundError as error:
            raise UsageError("reading an lmdb needs the package lmdb: pip install 'raysparse[lsun]'") from error
        try:
            settings = {"readonly": True, "lock": False, "readahead": False, "subdir": self.path.is_dir()}
            with lmdb.open(str(self.path), **settings) as environment, environment.begin() as transaction:
                yield transaction
        except lmdb.Error as error:
            raise UsageError(f"{self.path}: not a readable lmdb ({error}); get it again") from error

    def total(self) -> int:
        with self._opened() as transaction:
            return int(transaction.stat()["entries"])

    def first(self, count: int) -> Entries:
        """The first so many pictures; lmdb sorts by key."""
        with self._opened() as transaction:
            keys: list[bytes] = []
            for key in transaction.cursor().iternext(keys=True, values=False):
                if len(keys) == count:
                    break
                keys.append(bytes(key))
        return Entries(keys, [key.decode("utf-8", "backslashreplace") for key in keys])

    def read(self, keys: Sequence[bytes]) -> Iterator[bytes]:
        with self._opened() as transaction:
            for key in keys:
                yield bytes(transaction.get(key) or b"")  # nothing: named as damaged

    def content_hash(self, keys: Sequence[bytes], root: Path) -> str:
        """Of these keys and their pictures; remembered by the file's size and time."""
        file = self.path / "data.mdb" if self.path.is_dir() else self.path
        status = os.stat(file)
        state = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {len(keys)}".encode())
        for key in keys:
            state.update(key)

        def compute() -> str:
            whole = hashlib.sha256()
            for key, picture in zip(keys, self.read(keys), strict=True):
                whole.update(key + b" " + hashlib.sha256(picture).digest())
            return whole.hexdigest()

        return sources.remembered(state.hexdigest(), root, compute)


@dataclasses.dataclass(frozen=True)
class Parquet:
    """Encoded pictures in Parquet files, as data sets on the Hub are kept: a column of bytes, or of structs with bytes.

    Keys are (number of the file, row). They are best asked for in their order: a row group is read at a time.
    """

    paths: tuple[Path, ...]

    def entries(self, count: int) -> Entries:
        """The first so many pictures in the order of files and rows."""
        keys: list[tuple[int, int]] = []
        for number, path in enumerate(self.paths):
            rows = min(_metadata(path).num_rows, count - len(keys))
            keys.extend((number, row) for row in range(rows))
        return Entries(keys, [f"{self.paths[number].name}, row {row}" for number, row in keys])

    def total(self) -> int:
        return sum(int(_metadata(path).num_rows) for path in self.paths)

    def read(self, keys: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        held: tuple[int, range, Any] = (-1, range(0), None)  # the row group at hand
        for number, row in keys:
            if number != held[0] or row not in held[1]:
                held = (number, *self._group(number, row))
            value = held[2][row - held[1].start].as_py()
            yield bytes(value.get("bytes") or b"") if isinstance(value, dict) else bytes(value or b"")

    def _group(self, number: int, row: int) -> tuple[range, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, start = self.paths[number], 0
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if row < start + rows:
                        table = file.read_row_group(group, columns=[_column(file.schema_arrow, path)])
                        return range(start, start + rows), table.column(0)
                    start += rows
        except (pa.ArrowInvalid, OSError) as error:
            raise UsageError(f"{path}: not readable Parquet ({error}); get it again") from error
        raise IndexError(f"{path} has no row {row}")


def _metadata(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path}: not readable Parquet ({error}); get it again") from error


def _column(schema: Any, path: Path) -> str:
    """The column of pictures: the first of bytes, or of structs with bytes."""
    import pyarrow.types as kinds

    for field in schema:
        inside = {child.name for child in field.type} if kinds.is_struct(field.type) else set()
        if kinds.is_binary(field.type) or kinds.is_large_binary(field.type) or "bytes" in inside:
            return str(field.name)
    raise UsageError(f"{path} has no column of encoded pictures, only {', '.join(schema.names)}")


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_UNPACKED_LIMIT = 2**40  # bytes; ImageNet has 150 GB


def is_tar(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(TAR_SUFFIXES)


def unpacked(archive: Path, root: Path) -> Path:
    """The folder root/sources/<name> of an archive's files, unpacked now unless it is there.

    Plain files only, inside that folder only: UsageError for a name that leads out of it, and for a damaged archive.
    """
    status = archive.stat()
    identity = f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
    stem = archive.name.partition(".")[0]
    folder = root / "sources" / f"{stem}-{hashlib.sha256(identity).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with building(folder) as partial:
        if folder.is_dir():  # by another process while this one waited
            return folder
        empty = True
        for name, data in members(archive):
            empty = False
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        if empty:
            raise UsageError(f"{archive} holds no files; get it again")
        publish(partial, folder)
    return folder


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive's plain files, one after the other. Errors as `unpacked`."""
    left = _UNPACKED_LIMIT
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                if not member.isfile():
                    continue  # folders are made as needed; links and devices are no pictures
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts:
                    raise UsageError(f"{archive}: its file {member.name!r} leads out of the folder; not unpacked")
                left -= member.size
                if left < 0:
                    raise UsageError(f"{archive}: unpacks to more than {_UNPACKED_LIMIT} bytes; not unpacked")
                stream = opened.extractfile(member)
                assert stream is not None
                yield str(place), stream.read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{archive}: damaged, not a readable archive ({error}); get it again") from error
