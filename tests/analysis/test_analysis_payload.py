from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from hypothesis import given
from hypothesis import strategies as st

from analysis.payload import Payload, inline


def unpacked(payload: Payload, value: Any) -> list[Any]:
    """What the page's script makes of a reference."""
    ((kind, content),) = payload.arrays[value["$"]].items()
    if kind in ("f4", "f8"):
        return list(np.frombuffer(base64.b64decode(content), f"<{kind}").tolist())
    runs = [item for item, count in zip(content[0::2], content[1::2], strict=True) for _ in range(count)]
    return [payload.facets[item] for item in runs] if kind == "facets" else runs


@given(st.lists(st.one_of(st.none(), st.floats(-1e30, 1e30)), min_size=17, max_size=60))
def test_numbers_come_back(values: list[float | None]) -> None:
    payload = Payload()
    (trace,) = payload.figure(go.Figure(go.Scatter(y=np.array(values, dtype=np.float64))))["data"]
    for got, put in zip(unpacked(payload, trace["y"]), values, strict=True):
        assert (math.isnan(got) and put is None) or got == put


@given(st.lists(st.sampled_from([["rigl", 0.5, 0.05], ["dense", 0.0, None]]), min_size=1, max_size=40))
def test_facets_and_texts_come_back(rows: list[list[Any]]) -> None:
    payload = Payload()
    texts = [str(row) for row in rows] * 20
    figure = go.Figure(go.Scatter(y=list(range(len(texts))), customdata=rows * 20, text=texts))
    (trace,) = payload.figure(figure)["data"]
    assert unpacked(payload, trace["customdata"]) == rows * 20
    assert unpacked(payload, trace["text"]) == texts


def test_what_figures_share_stands_once() -> None:
    payload = Payload()
    for _ in range(3):
        payload.figure(go.Figure(go.Scatter(x=np.arange(5000), y=np.arange(5000.0))))
    assert len(payload.arrays) == 1
    assert list(payload.arrays[0]) == ["f4"]  # more digits than a screen has would be twice the page


def test_short_and_missing_values_stay_in_the_figure() -> None:
    payload = Payload()
    (trace,) = payload.figure(go.Figure(go.Scatter(y=np.array([1.0, np.inf, np.nan]))))["data"]
    assert trace["y"] == [1.0, None, None]
    assert payload.facet("static", 0.5, float("nan")) == payload.facet("static", 0.5, None)


def test_no_text_ends_the_script_element() -> None:
    text = inline({"name": "</script><!--<script>"})
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><!--<script>"}
