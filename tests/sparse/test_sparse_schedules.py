"""p and ΔTe that follow the training: by hand, and in the engine after a resume."""

from __future__ import annotations

import pytest
import torch
from sparse_training import net, train

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine
from raysparse.sparse.schedules import Clock, UpdateSchedule


def steps_of(schedule, until, fids=None):
    clock, found = Clock(schedule), []
    for step in range(1, until + 1):
        if clock.due(step):
            clock.updated(step)
            found.append(step)
        if fids and step in fids:
            clock.observe(fids[step])
    return found


def test_p_falls_as_asked():
    linear = UpdateSchedule(0.5, 10, "linear", 100, prune_ratio_end=0.1)
    assert [linear.ratio(step) for step in (0, 50, 100)] == [0.5, pytest.approx(0.3), pytest.approx(0.1)]
    cosine = UpdateSchedule(0.5, 10, "cosine", 100)
    assert [cosine.ratio(step) for step in (0, 50)] == [0.5, pytest.approx(0.25)]
    stall = UpdateSchedule(0.5, 10, "stall", prune_ratio_end=0.1)
    assert [stall.ratio(70, stalls) for stalls in (0, 1, 2)] == [0.5, pytest.approx(0.3), pytest.approx(0.2)]


def test_the_interval_grows_or_shrinks_to_its_end():
    assert steps_of(UpdateSchedule(0.5, 10), 45) == [10, 20, 30, 40]
    # 10 at first; 10 + (30 - 10) s / 100 later: 12 at 10, 14.4 at 22, 17.2 at 36
    growing = UpdateSchedule(0.5, 10, "constant", 100, interval_schedule="linear", interval_end=30)
    assert steps_of(growing, 100) == [10, 22, 36, 53, 74, 99]
    assert growing.updates(100) == 6
    assert growing.updates(53) == 4
    falling = UpdateSchedule(0.5, 20, "constant", 60, interval_schedule="cosine", interval_end=5)
    gaps = [b - a for a, b in zip([0, *steps_of(falling, 60)], steps_of(falling, 60), strict=False)]
    assert gaps[0] == 20
    assert gaps == sorted(gaps, reverse=True)


def test_a_stall_halves_p_and_the_interval():
    schedule = UpdateSchedule(0.4, 8, "stall", None, interval_schedule="stall", stall_reports=2)
    clock = Clock(schedule)
    for fid, stalls in [
        (100, 0),
        (90, 0),
        (89.5, 0),
        (91, 1),
        (80, 1),
        (85, 1),
        (79.5, 2),
        (79.9, 2),
        (70, 2),
        (70, 2),
    ]:
        clock.observe(fid)
        assert clock.stalls == stalls, fid
    assert clock.ratio(5) == pytest.approx(0.1)
    assert schedule.interval_at(5, 2) == 2
    assert schedule.interval_at(5, 9) == 1
    assert steps_of(schedule, 24, {8: 5.0, 9: 6.0, 10: 6.0}) == [8, 12, 16, 20, 24]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval_schedule": "linear", "update_end_step": 50}, "give update_interval_end"),
        ({"interval_schedule": "cosine", "update_interval_end": 5}, "give update_end_step"),
        ({"interval_schedule": "stal"}, "did you mean 'stall'"),
        ({"update_interval_end": 0}, "got 0"),
        ({"prune_ratio_end": 1.5}, "got 1.5"),
    ],
)
def test_bad_schedules_are_refused(settings, message):
    model = net()
    with pytest.raises(UsageError, match=message):
        SparseEngine(model, torch.optim.AdamW(model.parameters()), **settings)


def test_a_stall_is_the_same_after_a_resume():
    settings = {"sparsity": 0.5, "update_interval": 8, "interval_schedule": "stall", "prune_schedule": "stall"}

    def build():
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, SparseEngine(model, optimizer, stall_reports=1, **settings)

    def go(trio, fids):
        for fid in fids:
            train(*trio, 5)
            trio[2].observe(fid)

    straight, first, second = build(), build(), build()
    go(straight, [9.0, 9.0, 8.0, 8.5, 8.5])
    go(first, [9.0, 9.0])
    for ours, theirs in zip(second, first, strict=True):
        ours.load_state_dict(theirs.state_dict())
    go(second, [8.0, 8.5, 8.5])
    # 8; from a stall at 10 on every 4: 12, 16, 20; from one at 20 on every 2: 22, 24
    assert straight[2].updates == second[2].updates == 6
    assert straight[2].state_dict()["clock"] == second[2].state_dict()["clock"]
    assert all(torch.equal(mask, second[2].masks[name]) for name, mask in straight[2].masks.items())


def test_a_state_of_a_version_without_schedules_goes_on():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = SparseEngine(model, optimizer, sparsity=0.5, update_interval=4)
    train(model, optimizer, engine, 6)
    state = engine.state_dict()
    del state["clock"], state["gradients"]
    engine.load_state_dict(state)
    train(model, optimizer, engine, 2)
    assert engine.updates == 2
