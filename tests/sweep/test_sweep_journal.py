"""The journal survives a kill at any byte, and the board folds it."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from raysparse.errors import UsageError
from raysparse.sweep import journal, patience
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import Event, Journal, Reader, event, read


def events() -> list[Event]:
    planned = {
        "stage": "search",
        "method": "rigl",
        "seed": 0,
        "total_steps": 4,
        "config": {"sparse": {"sparsity": 0.5}},
    }
    return [
        event("stage", stage="search"),
        event("planned", trial_id="a", point={"method": "rigl"}, number=0, **planned),
        event("planned", trial_id="b", point={"method": "rigl"}, number=1, **planned),
        event("started", trial_id="a", step=0),
        event("report", trial_id="a", step=2, fid=3.0),
        event("repeated", trial_id="a", number=2, point={"method": "rigl"}),
        event("stopped", trial_id="b", step=2, fid=9.0, reason="place 2 of 2"),
        event("completed", trial_id="a", step=4, fid=2.5),
    ]


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for item in events():
        journal.append(item)
    journal.close()
    assert [item.kind for item in read(tmp_path / "journal.jsonl")] == [item.kind for item in events()]


def test_the_board_says_where_each_trial_is() -> None:
    board = Board()
    for item in events():
        board.apply(item)
    a, b = board.rows["a"], board.rows["b"]
    assert (a.state, a.step, a.fid, a.fids) == ("COMPLETED", 4, 2.5, {2: 3.0, 4: 2.5})
    assert (b.state, b.step, b.fid, b.reason) == ("STOPPED", 2, 9.0, "place 2 of 2")
    assert a.setting("sparsity") == 0.5
    assert [(repeat.number, repeat.trial_id) for repeat in board.repeats] == [(2, "a")]
    assert board.counts() == {"COMPLETED": 1, "STOPPED": 1}
    assert not board.finished


def test_a_line_cut_off_at_any_byte_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    journal = Journal(whole)
    for item in events()[:3]:
        journal.append(item)
    journal.close()
    data = whole.read_bytes()
    second = data.index(b"\n", data.index(b"\n") + 1) + 1
    for size in range(second, len(data)):
        path = tmp_path / f"cut{size}.jsonl"
        path.write_bytes(data[:size])
        assert len(list(read(path))) == 2
        journal = Journal(path)
        journal.append(events()[3])
        journal.close()
        assert [item.kind for item in read(path)] == ["stage", "planned", "started"]


class Filling(io.RawIOBase):
    """A file on a disk that is full after a few bytes, three times."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._times = file, 3

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data: Any) -> int:
        if not self._times:
            return self._file.write(data)
        if self._file.tell() < 7:
            return self._file.write(bytes(data)[:7])
        self._times -= 1
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    journal, said = Journal(tmp_path / "journal.jsonl"), events()
    with journal._stream as file:
        journal._stream = io.BufferedWriter(Filling(file.raw))
        for item in said:
            journal.append(item)
        journal.close()
    assert waited == list(patience.DELAYS_S[:3])
    assert list(read(journal.path)) == said


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind":"stage","time":1}\n{"kind":\n{"kind":"finished","time":2}\n')
    with pytest.raises(UsageError, match="line 2 is damaged"):
        list(read(path))


PLANNED = '"kind":"planned","time":1,"trial_id":"a","stage":"search","method":"rigl","config":{"sparse":{}}'


@pytest.mark.parametrize(
    "line",
    [
        '{"kind":"report","time":1,"trial_id":"a","step":"2","fid":1.0}',
        '{"kind":"report","time":1,"trial_id":"a","step":true,"fid":1.0}',
        '{"kind":"report","time":1,"trial_id":"a","step":2,"fid":"1.0"}',
        '{"kind":"report","time":1,"trial_id":"a","step":2,"fid":[1.0]}',
        '{"kind":"report","time":1,"trial_id":"a","step":2,"fid":1' + 400 * "0" + "}",
        '{"kind":"report","time":1,"trial_id":7}',
        '{"kind":"note","time":NaN}',
        '{"kind":"note","time":1e300}',
        '{"kind":"note","time":-1e300}',
        '{"kind":"note","time":"now"}',
        '{"kind":"note","time":null}',
        '{"kind":null,"time":1}',
        '{"kind":["note"],"time":1}',
        '{"kind":"note","time":1,"reason":{}}',
        '{"kind":"planned","time":1}',
        '{"kind":"repeated","time":1,"trial_id":"a"}',
        '{"kind":"refused","time":1}',
        "{" + PLANNED.replace('{"sparse":{}}', "[]") + "}",
        "{" + PLANNED.replace('{"sparse":{}}', '{"sparse":[]}') + "}",
        "{" + PLANNED + ',"costs":{"params_active":"many"}}',
        "{" + PLANNED + ',"point":[]}',
        '{"kind":"chosen","time":1,"trial_id":"a","point":{"sparsity":0.5}}',
        "[" * 100_000,
    ],
)
def test_a_field_that_is_not_what_it_should_be_is_a_damaged_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind":"stage","time":1}\n' + line + "\n")
    with pytest.raises(UsageError, match="line 2 is damaged"):
        Board.load(tmp_path)


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    report = '{"kind":"report","time":2,"trial_id":"a","step":2,"fid":NaN,"mood":["well"]}'
    lines = ["{" + PLANNED + ',"colour":7}', report, '{"kind":"later","time":3,"what":{}}']
    (tmp_path / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    board = Board.load(tmp_path)
    assert board.rows["a"].step == 2
    assert board.last is not None
    assert board.last.kind == "later"


def test_every_field_has_its_type() -> None:
    assert sorted(name for names in journal._TYPES.values() for name in names) == sorted(journal._FIELDS)


def test_an_event_is_on_disk_before_anyone_hears_of_it(tmp_path: Path) -> None:
    heard = []
    ledger = Ledger(tmp_path, lambda item: heard.append((item.kind, len(list(read(tmp_path / "journal.jsonl"))))))
    for item in events()[:3]:
        ledger.add(item)
    ledger.close()
    assert heard == [("stage", 1), ("planned", 2), ("planned", 3)]
    assert list(Board.load(tmp_path).rows) == ["a", "b"]


def test_time_with_resources_is_counted_over_drivers_and_not_between_them() -> None:
    board = Board()
    planned = {"stage": "search", "method": "rigl", "config": {"sparse": {}}, "total_steps": 9}
    for item in (
        Event("planned", 0.0, trial_id="a", **planned),
        Event("planned", 0.0, trial_id="b", **planned),
        Event("started", 10.0, trial_id="a"),
        Event("report", 15.0, trial_id="a", step=2, fid=1.0),
        Event("interrupted", 16.0),
        Event("started", 100.0, trial_id="b"),
        Event("report", 101.0, trial_id="b", step=2, fid=1.0),  # then the driver is killed
        Event("started", 1000.0, trial_id="a"),
    ):
        board.apply(item)
        if item.time == 101.0:
            assert board.busy_s(now=103.0) == 6 + 3
            board.settle()
    assert board.busy_s() == 6 + 1
    assert board.busy_s(now=1005.0) == 6 + 1 + 5


def test_the_pause_after_a_kill_is_no_time_of_trials_while_the_next_driver_runs(tmp_path: Path) -> None:
    ledger, hour = Ledger(tmp_path), 3600.0
    for name in ("a", "b"):
        planned = {"stage": "search", "method": "rigl", "config": {"sparse": {}}, "total_steps": 9}
        ledger.add(Event("planned", 0.0, trial_id=name, **planned))
        ledger.add(Event("started", 0.0, trial_id=name))
    for name in ("a", "b"):
        ledger.add(Event("report", hour, trial_id=name, step=2, fid=1.0))
    ledger.close()  # killed

    heard: list[str] = []
    ledger = Ledger(tmp_path, lambda item: heard.append(f"{item.kind} {item.reason}"))
    assert heard == ["gone the driver before ended without a word; 2 trials ran"]
    ledger.add(Event("started", 25 * hour, trial_id="a"))  # there is room for one
    ledger.add(Event("report", 26 * hour, trial_id="a", step=4, fid=1.0))
    assert ledger.board.busy_s() == Board.load(tmp_path).busy_s() == 3 * hour
    ledger.add(Event("interrupted", 26 * hour))
    ledger.close()

    Ledger(tmp_path, lambda item: heard.append(item.kind)).close()
    assert len(heard) == 4  # who ended in order is not said to be gone


def test_a_reader_goes_on_where_it_was_and_never_sees_half_a_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    journal = Journal(whole)
    for item in events():
        journal.append(item)
    journal.close()
    data, path = whole.read_bytes(), tmp_path / "grows.jsonl"
    reader, kinds = Reader(path), []
    assert list(reader.fresh()) == []
    for size in range(0, len(data) + 1, 37):
        path.write_bytes(data[:size])
        kinds += [item.kind for item in reader.fresh()]
    path.write_bytes(data)
    kinds += [item.kind for item in reader.fresh()]
    assert kinds == [item.kind for item in events()]


@pytest.mark.parametrize("trial_id", ["../../outside", "/tmp/outside", "..", "a/b", "", ["a"], 7])
def test_a_trials_id_leads_to_no_folder_outside(tmp_path: Path, trial_id: Any) -> None:
    line = {"kind": "started", "time": 1.0, "trial_id": trial_id}
    (tmp_path / "journal.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UsageError, match=r"journal\.jsonl, line 1 is damaged"):
        list(read(tmp_path / "journal.jsonl"))
