"""A report's figures and tables as data inside the page, small and without a `<` that could end a script element.

Arrays stand once, whatever figures use them, in a list; a figure holds `{"$": place}` instead. An entry of the list is

    {"f4": base64}, {"f8": base64}      little-endian numbers (not finite: NaN, which plotly draws as a gap)
    {"runs": [value, count, ...]}       texts, a repeated one once: a trial repeats its hover text at each report
    {"facets": [place, count, ...]}     the rows `[method, S, p]` of a trace's customdata, as places in `facets`

so that 1,000 trials of 100 reports weigh about 1 MB a curve figure and are drawn from typed arrays.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go

SHORT = 16  # arrays up to this length stay in the figure
SINGLE = 2000  # longer arrays are sent as float32: seven digits are more than a screen shows
# The arrays of a trace that hold a value per point and are long where points are many.
WORDS = ("text", "hovertext", "ids")


class Payload:
    """Collects what a page holds. `figure()` and `facet()` add to it; `arrays` and `facets` are the shared lists."""

    def __init__(self) -> None:
        self.arrays: list[dict[str, Any]] = []
        self.facets: list[list[Any]] = []
        self._places: dict[bytes, int] = {}
        self._facet_places: dict[tuple[Any, ...], int] = {}

    def facet(self, method: Any, sparsity: Any, prune_ratio: Any) -> int:
        """The place of `[method, S, p]` in `facets`; a number that is missing becomes None."""
        key = (str(method), _number(sparsity), _number(prune_ratio))
        if key not in self._facet_places:
            self._facet_places[key] = len(self.facets)
            self.facets.append(list(key))
        return self._facet_places[key]

    def figure(self, chart: go.Figure) -> dict[str, Any]:
        """`{"data": [...], "layout": {...}}` for page's script; long arrays as references."""
        traces = [trace.to_plotly_json() for trace in chart.data]
        return {
            "data": [{key: self._value(key, value) for key, value in trace.items()} for trace in traces],
            "layout": {key: self._value(key, value) for key, value in chart.layout.to_plotly_json().items()},
        }

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._value(name, inner) for name, inner in value.items()}
        if key == "customdata" and value is not None and len(value):
            return self._share({"facets": _runs(self.facet(*row) for row in value)})
        if key in WORDS and isinstance(value, (list, tuple, np.ndarray)) and len(value) > SHORT:
            return self._share({"runs": _runs(value)})
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, (list, tuple)):
            return [self._value(key, item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def _array(self, values: np.ndarray) -> Any:
        if values.ndim != 1 or values.dtype.kind not in "fiu" or len(values) <= SHORT:
            return [self._value("", item) for item in values.tolist()]
        numbers = values.astype(np.float64)
        numbers[~np.isfinite(numbers)] = np.nan
        kind = "f4" if len(numbers) > SINGLE and np.nanmax(np.abs(numbers), initial=0.0) < 1e38 else "f8"
        return self._share({kind: base64.b64encode(numbers.astype(f"<{kind}").tobytes()).decode()})

    def _share(self, entry: dict[str, Any]) -> dict[str, int]:
        digest = hashlib.sha256(json.dumps(entry).encode()).digest()
        if digest not in self._places:
            self._places[digest] = len(self.arrays)
            self.arrays.append(entry)
        return {"$": self._places[digest]}


def inline(data: Any) -> str:
    """JSON that can stand in a <script> element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def _runs(values: Iterable[Any]) -> list[Any]:
    return [item for value, run in itertools.groupby(values) for item in (value, sum(1 for _ in run))]


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)
