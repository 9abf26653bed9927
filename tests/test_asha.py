"""Where the rungs of a sweep are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysparse.asha import Asha


def test_rungs_are_multiples_of_the_first_or_as_they_are_given() -> None:
    assert Asha(grace_steps=100, reduction_factor=3).rung_steps(1000) == [100, 300, 900]
    assert Asha(grace_steps=100, reduction_factor=1.5).rung_steps(300) == [100, 150, 225]
    assert Asha(rungs=(100, 400, 600)).rung_steps(1000) == [100, 400, 600]
    assert Asha(rungs=(100, 400, 600)).rung_steps(600) == [100, 400]


@given(st.integers(1, 500), st.floats(1.1, 9), st.integers(1, 5000))
def test_rungs_rise_from_the_first_and_end_before_the_last_step(first: int, factor: float, total: int) -> None:
    steps = Asha(grace_steps=first, reduction_factor=factor).rung_steps(total)
    assert steps == sorted(set(steps))
    assert steps[:1] == ([first] if first < total else [])
    assert not steps or steps[-1] < total <= steps[-1] * factor


def test_a_rung_that_nobody_may_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="give second_chances as well"):
        Asha(grace_steps=2, explore_first=True)
