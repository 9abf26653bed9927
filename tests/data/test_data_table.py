"""Rows in Parquet and in a mapped Arrow file are the rows that were written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysparse.data import table
from raysparse.data.table import Table


def write(folder: Path, sizes: list[int]) -> tuple[Path, dict[str, Any]]:
    """An Arrow file of shards of these sizes, and what was written."""
    generator = np.random.default_rng(0)
    total, shards = sum(sizes), []
    columns: dict[str, Any] = {
        "id": [f"größe {i}" for i in range(total)],
        "label": np.arange(total) % 3,
        "latent": generator.normal(size=(total, 3, 4, 5)).astype(np.float16),
        "png": [bytes([i % 256]) * (i % 7) for i in range(total)],
    }
    start = 0
    for number, size in enumerate(sizes):
        path = folder / f"{number}.parquet"
        part = {name: values[start : start + size] for name, values in columns.items()}
        table.write_parquet(path, part, {"identity": "x", "number": number})
        shards.append(path)
        start += size
    table.write_arrow(folder / "all.arrow", shards)
    return folder / "all.arrow", columns


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, dict[str, Any]]:
    path, columns = write(tmp_path_factory.mktemp("table"), [5, 0, 1, 17, 8])
    return Table(path), columns


@given(rows=st.lists(st.integers(0, 30), max_size=40))
def test_gather_equals_indexing(written: tuple[Table, dict[str, Any]], rows: list[int]) -> None:
    opened, columns = written
    got = opened.gather("latent", rows)
    assert got.dtype == np.float16
    assert np.array_equal(got, columns["latent"][np.array(rows, np.int64)])
    got += 1  # a copy
    assert [opened.blob("png", row) for row in rows] == [columns["png"][row] for row in rows]


def test_whole_columns(written: tuple[Table, dict[str, Any]]) -> None:
    opened, columns = written
    assert len(opened) == 31
    assert opened.values("id") == columns["id"]
    assert opened.numbers("label").tolist() == columns["label"].tolist()
    assert np.array_equal(np.concatenate(list(opened.blocks("latent"))), columns["latent"])
    assert all(not block.flags.writeable and not block.flags.owndata for block in opened.blocks("latent"))


@pytest.mark.parametrize("rows", [[31], [-1], [0, 100]])
def test_rows_that_are_not_there(written: tuple[Table, dict[str, Any]], rows: list[int]) -> None:
    with pytest.raises(IndexError, match=r"rows must be in \[0, 31\)"):
        written[0].gather("latent", rows)


def test_it_goes_to_other_processes_as_a_path(written: tuple[Table, dict[str, Any]]) -> None:
    packed = pickle.dumps(written[0])
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).gather("latent", [3]), written[0].gather("latent", [3]))


def test_parquet_facts_and_a_flipped_byte(tmp_path: Path) -> None:
    write(tmp_path, [6])
    path = tmp_path / "0.parquet"
    facts = table.read_facts(path)
    assert (facts["identity"], facts["number"]) == ("x", 0)
    whole = bytearray(path.read_bytes())
    for place in (200, len(whole) // 2, len(whole) - 3):
        changed = whole.copy()
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        with pytest.raises((OSError, ValueError)):
            table.read_facts(path)
    path.write_bytes(whole[:-10])
    with pytest.raises((OSError, ValueError)):
        table.read_facts(path)


def test_shards_without_rows(tmp_path: Path) -> None:
    path, _ = write(tmp_path, [0, 0])
    assert len(Table(path)) == 0
    assert Table(path).gather("latent", []).shape == (0, 3, 4, 5)
    assert table.read_facts(tmp_path / "1.parquet")["number"] == 1


def test_a_cut_arrow_file_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path, [6])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((OSError, ValueError)):
        Table(path)
