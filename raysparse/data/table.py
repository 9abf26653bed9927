"""Rows of fixed-size arrays in two files: Parquet to share, Arrow IPC to map into memory.

A column of arrays is fixed_size_binary (Parquet copies it as one block and takes lists of numbers apart value by
value); its dtype and shape stand in the schema's metadata under "raysparse". Opening maps the Arrow file and reads its
footer; rows are read when they are gathered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raysparse import files

METADATA = b"raysparse"
_TEXTS = ("id", "png")  # the columns that are no arrays of one size


def write_parquet(path: Path, columns: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Columns of equal length, atomically: arrays [N, ...] of fixed-size rows, int64 [N], lists of str or bytes.

    facts: kept in the file's metadata with a digest of all, read back by `read_facts`. zstd.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays, layout = {}, {}
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim > 1:
            arrays[name] = _packed(values)
            layout[name] = {"dtype": values.dtype.str, "shape": list(values.shape[1:])}
        else:
            kind = {"id": pa.string(), "png": pa.large_binary()}.get(name, pa.int64())
            arrays[name] = pa.array(values, kind)
    table = pa.table(arrays)
    facts = {"columns": layout, **facts}
    facts["digest"] = _digest(table.combine_chunks().to_batches(), facts)
    table = table.replace_schema_metadata({METADATA: json.dumps(facts)})
    with files.atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,  # the smallest and largest latent, as bytes, would be kept in full
            write_page_checksum=True,  # for who reads them without our digest
            row_group_size=max(1, len(table)),
        )


def _packed(values: NDArray[Any]) -> Any:
    import pyarrow as pa

    flat = np.ascontiguousarray(values)
    width = flat.dtype.itemsize * int(np.prod(flat.shape[1:]))
    return pa.Array.from_buffers(pa.binary(width), len(flat), [None, pa.py_buffer(flat)])


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a Parquet file that is what was written; else OSError, ValueError or KeyError. Reads all of it."""
    found = list(batches(path))
    facts: dict[str, Any] = json.loads((found[0].schema.metadata or {})[METADATA])
    written = facts.pop("digest")
    if _digest([batch for batch in found if len(batch)], facts) != written:
        raise ValueError("its digest differs")
    return facts


def glance(path: Path) -> dict[str, Any]:
    """The facts of a Parquet file from its footer alone, unchecked. Errors as `read_facts`."""
    import pyarrow.parquet as pq

    facts: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {})[METADATA])
    return facts


def _digest(batches: Iterable[Any], facts: Mapping[str, Any]) -> str:
    """Of columns and facts; the pages' checksums do not cover the headers."""
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            whole.update(f"{name} {len(column)}\n".encode())
            if name not in _TEXTS:
                whole.update(_view(column, np.dtype(np.uint8), (column.type.byte_width,)).tobytes())
            else:
                values = [value.encode() if isinstance(value, str) else value for value in column.to_pylist()]
                whole.update(b"".join(len(value).to_bytes(8, "little") + value for value in values))
    return whole.hexdigest()


def batches(path: Path) -> Iterator[Any]:
    """The record batches of a Parquet file, one per row group, checksums checked. An empty file gives an empty one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        for group in range(file.num_row_groups):
            table = file.read_row_group(group).combine_chunks()
            for batch in table.to_batches() or [pa.RecordBatch.from_pylist([], schema)]:
                yield batch.replace_schema_metadata(schema.metadata)
        if not file.num_row_groups:
            yield pa.RecordBatch.from_pylist([], schema)


def write_arrow(path: Path, shards: Iterable[Path]) -> None:
    """One Arrow IPC file of all shards in order, atomically and uncompressed, a batch per shard."""
    import pyarrow as pa

    writer = None
    with files.atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        for shard in shards:
            for batch in batches(shard):
                if writer is None:
                    layout = {"columns": json.loads(batch.schema.metadata[METADATA])["columns"]}
                    schema = batch.schema.with_metadata({METADATA: json.dumps(layout)})
                    writer = pa.ipc.new_file(sink, schema)
                if len(batch):
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        if writer is None:
            raise ValueError(f"no shards for {path}")
        writer.close()


class Table:
    """An Arrow IPC file mapped into memory. OSError or ValueError (pyarrow's) where it is not whole.

    It goes between processes as its path.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        metadata = reader.schema.metadata or {}
        self.layout: dict[str, Any] = json.loads(metadata[METADATA])["columns"] if METADATA in metadata else {}
        self.columns = tuple(reader.schema.names)
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.concatenate([[0], np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)])
        self._views: dict[str, list[NDArray[Any]]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.path,)

    def shape(self, column: str) -> tuple[int, ...]:
        """Of one row of a column of arrays."""
        return tuple(self.layout[column]["shape"])

    def gather(self, column: str, rows: ArrayLike) -> NDArray[Any]:
        """A copy of the chosen rows of a column of arrays: [B, *shape]. rows: int64 [B] in [0, N), else IndexError."""
        chosen = np.asarray(rows, np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"rows must be in [0, {len(self)}), got {chosen.min()} to {chosen.max()}")
        batch = np.searchsorted(self._starts, chosen, side="right") - 1
        within = chosen - self._starts[batch]
        views = self._view(column)
        gathered = np.empty((len(chosen), *self.shape(column)), self.layout[column]["dtype"])
        for place, (b, row) in enumerate(zip(batch.tolist(), within.tolist(), strict=True)):
            gathered[place] = views[b][row]
        return gathered

    def values(self, column: str) -> list[Any]:
        """All of a column of numbers or texts, as Python values."""
        return [value for batch in self._batches for value in batch.column(column).to_pylist()]

    def numbers(self, column: str) -> NDArray[np.int64]:
        """All of a column of numbers: int64 [N], in memory."""
        parts = [batch.column(column).to_numpy() for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def blob(self, column: str, row: int) -> bytes:
        """One value of a column of bytes."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        value: bytes = self._batches[batch].column(column)[row - int(self._starts[batch])].as_py()
        return value

    def blocks(self, column: str) -> Iterator[NDArray[Any]]:
        """A column of arrays batch by batch, [n, *shape] each, read-only and not copied."""
        yield from self._view(column)

    def _view(self, column: str) -> list[NDArray[Any]]:
        if column not in self._views:
            dtype, shape = np.dtype(self.layout[column]["dtype"]), self.shape(column)
            self._views[column] = [_view(batch.column(column), dtype, shape) for batch in self._batches]
        return self._views[column]


def _view(array: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    count = len(array) * int(np.prod(shape))
    offset = array.offset * array.type.byte_width
    return np.frombuffer(array.buffers()[1], dtype, count, offset).reshape(len(array), *shape)
