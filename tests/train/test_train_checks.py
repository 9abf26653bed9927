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


@pytest.mark.parametrize(("option", "most"), [("hidden", 4096), ("layers", 64)])
def test_a_sketch_model_that_no_memory_holds_is_refused(tiny, option: str, most: int) -> None:
    with pytest.raises(UsageError, match=f"{option}.*{most}"):
        check_settings(tiny({f"model.options.{option}": 10**30}))
