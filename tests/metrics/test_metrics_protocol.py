"""FIDs of different protocols never meet."""

from __future__ import annotations

import dataclasses
import json

import pytest

from raysparse.errors import UsageError
from raysparse.metrics.protocol import Protocol, Score, same_protocol

BASE = Protocol(
    "inception", "ab12", "2048", 1000, 5000, "cd34", "bilinear 299", 50, 0.0, True, None, "leading", 100, 1000
)
CHANGES = {
    "extractor": "glyph_cnn",
    "weights_hash": "ee",
    "layer": "768",
    "generated": 999,
    "reference_examples": 4999,
    "reference_hash": "ff",
    "resize": "none",
    "ddim_steps": 100,
    "eta": 1.0,
    "ema": False,
    "guidance": 3.0,
    "timestep_spacing": "original",
    "kid_subsets": 10,
    "kid_subset_size": 100,
}


def test_json_is_canonical_and_comes_back():
    text = BASE.json()
    assert Protocol.from_json(text) == BASE
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert dataclasses.replace(BASE).json() == text


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Protocol)])
def test_any_field_makes_another_protocol(field):
    other = dataclasses.replace(BASE, **{field: CHANGES[field]})
    assert other.json() != BASE.json()
    with pytest.raises(UsageError, match=f"not comparable: {field} "):
        same_protocol([BASE, BASE, other])
    mine, theirs = Score(1.0, BASE), Score(2.0, other)
    for comparison in (lambda: mine < theirs, lambda: mine >= theirs, lambda: mine - theirs):
        with pytest.raises(UsageError, match=field):
            comparison()


def test_scores_of_one_protocol_compare():
    worse, better = Score(21.5, BASE), Score(20.0, BASE)
    assert better < worse
    assert min(worse, better) == better
    assert worse - better == 1.5
    assert str(better) == "FID (inception) 20"
    assert same_protocol([BASE, BASE]) == BASE


def test_what_is_no_protocol_is_refused():
    with pytest.raises(UsageError, match="at least one"):
        same_protocol([])
    for text in ("", "[1]", '{"extractor": "x"}', BASE.json().replace("eta", "beta")):
        with pytest.raises(UsageError, match="not a FID's protocol"):
            Protocol.from_json(text)
