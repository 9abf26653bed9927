"""What is refused before a trial starts; more of it stands beside the tests of what would go wrong."""

from __future__ import annotations

import pytest

from raysparse.errors import UsageError
from raysparse.train.checks import check_settings


@pytest.mark.parametrize("representation", ["abs", "del"])
def test_a_models_inputs_are_of_the_representation_it_is_given(tiny, representation: str) -> None:
    data = {"data.options": {"representation": representation}}
    other = {"abs": "del", "del": "abs"}[representation]
    for inputs in ("plain", representation):
        check_settings(tiny(data, {"model.options.inputs": inputs}))
    with pytest.raises(UsageError, match=f"inputs is {other}, data.options.representation {representation}: set both"):
        check_settings(tiny(data, {"model.options.inputs": other}))
