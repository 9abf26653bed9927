"""One axis: what a range draws, and what may not be an axis. Complaints about whole files: test_space.py."""

from __future__ import annotations

import dataclasses

import pytest

from raysparse.axis import PROTOCOL, Range, is_integer
from raysparse.config import EvaluateConfig
from raysparse.metrics.protocol import Protocol


def test_no_part_of_a_protocol_is_an_axis() -> None:
    fields = {field.name for field in dataclasses.fields(Protocol)} & EvaluateConfig.model_fields.keys()
    assert fields | {"references"} == set(PROTOCOL)


def test_what_a_range_may_draw() -> None:
    assert Range(low=32, high=127, step=32).drawn(9, True) == (32, 64, 96)
    assert Range(low=1, high=10**9).drawn(2, True) == (1, 2, 10**9)
    assert Range(low=0, high=0.1, step=0.05).drawn(9, False) == (0, 0.05, 0.1)
    assert Range(low=0.5, high=1).drawn(9, False) == (0.5, 0.75, 1)
    assert Range(low=2, high=3, step=2).drawn(9, True) == (2,)


@pytest.mark.parametrize(
    ("axis", "low", "high", "integer"),
    [
        ("update_interval", 50, 400, True),
        ("sparse.update_interval", 50, 400, True),
        ("prune_ratio", 0.05, 0.5, False),
        ("prune_ratio_end", 0, 1, False),
        ("optimizer.clip_norm", 1, 10, False),
        ("optimizer.warmup_steps", 0, 1, True),
        ("data.train_examples", 10, 99, True),  # int or null
        ("model.options.hidden", 8, 96, True),
        ("model.options.dropout", 0, 1, False),
    ],
)
def test_a_range_is_of_whole_numbers_where_the_setting_is(axis: str, low: float, high: float, integer: bool) -> None:
    assert is_integer("rigl", axis, Range(low=low, high=high)) == integer
