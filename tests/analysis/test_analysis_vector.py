from __future__ import annotations

import base64
import os
import re
import signal
import time
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
import pytest
from synthetic_records import Folder, hostile

from analysis import drawing, style, vector, vector_traces
from analysis.parts import parts
from analysis.report import Report
from raysparse.errors import UsageError


def drawn(figure: go.Figure) -> Any:
    """The matplotlib figure's only axes."""
    with mpl.rc_context(vector.STYLE):
        (panel,) = vector.draw(vector.describe(figure)).axes
    return panel


def lines(panel: Any) -> list[Any]:
    return [line for line in panel.lines if len(line.get_xdata())]


def test_marks_lines_and_bars_stand_where_plotly_has_them() -> None:
    figure = style.figure("S", "FID")
    figure.add_scatter(
        x=[0.5, 0.9], y=np.array([10.0, 20.0]), mode="lines+markers", name="rigl",
        marker={"color": "#3b82d6", "symbol": "diamond-open", "size": 10}, line={"color": "#3b82d6", "dash": "dot"},
        error_y={"type": "data", "array": [1.0, None], "arrayminus": [2.0, None], "color": "#d9730d"},
    )  # fmt: skip
    panel = drawn(figure)
    line = lines(panel)[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0.5, 0.9], [10.0, 20.0])
    assert (line.get_marker(), line.get_markerfacecolor(), line.get_color()) == ("D", "none", "#3b82d6")
    segment = panel.collections[0].get_segments()[0]
    assert segment.tolist() == [[0.5, 8.0], [0.5, 11.0]]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("S", "FID")


def test_gaps_steps_fills_and_ink() -> None:
    figure = style.figure("x", "y")
    figure.add_scatter(x=[0, 1, None, 2, 3], y=[1, 2, None, 3, 4], mode="lines", line={"shape": "hv"})
    figure.add_scatter(x=[0, 1, 1, 0], y=[0, 0, 1, 1], mode="lines", fill="toself", line={"width": 0},
                       fillcolor="rgba(255,0,0,0.5)")  # fmt: skip
    figure.add_scatter(x=[1], y=[1], mode="markers", meta="ink", marker={"symbol": "x"})
    panel = drawn(figure)
    assert np.isnan(lines(panel)[0].get_xdata()[2])
    assert lines(panel)[0].get_drawstyle() == "steps-post"
    assert panel.patches[0].get_facecolor() == (1.0, 0.0, 0.0, 0.5)
    assert lines(panel)[-1].get_markeredgecolor() == vector_traces.INK


@pytest.mark.parametrize("flat", [False, True])
def test_bars(flat: bool) -> None:
    names, values = ["b", "a"], [1.0, 2.0]
    figure = style.figure("", "")
    figure.add_bar(x=values if flat else names, y=names if flat else values, orientation="h" if flat else "v")
    panel = drawn(figure)
    assert [bar.get_width() if flat else bar.get_height() for bar in panel.patches] == values
    shown = panel.get_yticklabels() if flat else panel.get_xticklabels()
    assert [text.get_text() for text in shown] == names


def test_axes_as_plotly_has_them() -> None:
    figure = style.figure("x", "y").add_scatter(x=[1, 100], y=[1, 2], mode="lines")
    figure.update_xaxes(type="log", range=[0, 3], tickvals=[1, 10], ticktext=["one", "ten"])
    figure.update_yaxes(autorange="reversed")
    panel = drawn(figure)
    assert panel.get_xlim() == (1.0, 1000.0)
    assert panel.get_xscale() == "log"
    assert [text.get_text() for text in panel.get_xticklabels()] == ["one", "ten"]
    assert panel.yaxis_inverted()


def test_a_long_curve_is_as_sharp_in_either_format() -> None:
    figure = style.figure("x", "y")
    x = np.linspace(0, 1, vector_traces.MANY + 1)
    figure.add_scatter(x=x, y=np.sin(20 * x), mode="lines")
    found = vector.files(vector.describe(figure))
    (picture,) = re.findall(rb"data:image/png;base64,\s*([^\"]+)", found["svg"])
    in_svg = int.from_bytes(base64.b64decode(picture)[16:20], "big")  # a PNG's width
    in_pdf = max(int(width) for width in re.findall(rb"/Width (\d+)", found["pdf"]))
    assert in_svg == in_pdf > 0.7 * vector.WIDTH_IN * vector.CURVES_DPI


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="no trace 'pie'"):
        vector.files(vector.describe(go.Figure(go.Pie(values=[1]))))
    for unknown, message in (
        ({"fill": "tonextx"}, "no fill 'tonextx'"),
        ({"stackgroup": "one"}, "do not know stackgroup"),
        ({"marker": {"colorscale": "Viridis"}}, "do not know colorscale"),
        ({"mode": "lines+text"}, "no mode 'lines"),
    ):
        figure = style.figure("", "").add_scatter(**({"x": [0, 1], "y": [0, 1], "mode": "lines"} | unknown))
        with pytest.raises(ValueError, match=message):
            vector.files(vector.describe(figure))
    for layout in ({"shapes": [{"type": "line"}]}, {"xaxis": {"categoryorder": "trace"}}, {"yaxis2": {}}):
        with pytest.raises(ValueError, match="do not know"):
            vector.files(vector.describe(style.figure("", "").update_layout(layout)))


def test_a_legend_has_as_many_columns_as_fit() -> None:
    assert vector._columns(["dense", "rigl", "static"]) == 3
    assert vector._columns(["rigl, S = 0.5, p = 0.5, ΔTe = 100, optimizer.lr=0.004"] * 3) == 1
    configuration = "rigl, S = 0.75, p = 0.05, ΔTe = 40"
    assert vector._columns(["dense", "static, S = 0.5", configuration, configuration]) == 2  # not three: 103 signs
    assert vector._shortened("a" * 100, 10) == "aaaaaaaaa…"


def test_every_figure_of_a_hostile_sweep_is_drawn_as_text_and_repeats_bit_for_bit(folder: Folder) -> None:
    sections = Report.of(hostile(folder).path).sections
    figures = [part.figure for section in sections for part in parts(section) if part.figure is not None]
    assert len(figures) >= 10
    for figure in figures[::3]:
        files = vector.files(vector.describe(figure))
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(files["svg"]).iter()}
        assert not tags & {"script", "foreignObject", "a"}
        assert files["pdf"].startswith(b"%PDF")
        assert b"/Type3" not in files["pdf"]  # publishers refuse it
        assert not re.search(rb"/(URI|JavaScript)\b", files["pdf"])
    assert vector.files(vector.describe(figures[0])) == vector.files(vector.describe(figures[0]))


def test_the_helper_draws_the_same_and_is_not_needed() -> None:
    figures = {
        name: vector.describe(style.figure(name, "y").add_scatter(x=np.arange(3), y=np.arange(3.0), mode="lines"))
        for name in ("a", "b", "c")
    }
    alone = {name: vector.files(figure) for name, figure in figures.items()}
    with drawing.Helper() as helper:
        for name, figure in figures.items():
            helper.add(name, figure)
        found = helper.finish()
    assert found == alone
    assert list(found) == list(figures)
    with drawing.Helper() as helper:
        helper.add("a", figures["a"])
        os.kill(helper._process.pid, signal.SIGKILL)
        helper._process.wait()
        for name in ("b", "c"):
            helper.add(name, figures[name])
        assert helper.finish() == alone
    with drawing.Helper() as helper:
        assert helper.finish() == {}


def test_the_helper_draws_while_this_process_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = vector.describe(style.figure("a", "y").add_scatter(x=np.arange(3), y=np.arange(3.0), mode="lines"))
    alone = vector.files(figure)
    monkeypatch.setattr(vector, "files", None)
    with drawing.Helper() as helper:
        for name in ("a", "b"):
            helper.add(name, figure)
        deadline = time.monotonic() + 60
        while len(helper._found) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert helper.finish() == {"a": alone, "b": alone}


def test_a_mistake_that_is_found_before_anything_is_drawn_waits_for_nothing() -> None:
    with pytest.raises(UsageError), drawing.helper() as helper:
        raise UsageError("no such folder")
    assert helper is not None
    assert helper._process.returncode == -signal.SIGKILL


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector.importlib.util, "find_spec", lambda name: None)
    with drawing.helper() as helper:
        assert helper is None
    with pytest.raises(UsageError, match="pip install 'matplotlib"):
        vector.files(vector.describe(style.figure("", "")))


def test_colours_survive_colour_blindness_by_their_marks() -> None:
    looks = style.looks([*style.KNOWN, "a", "b", "c", "d", "e"])
    assert len(set(looks.values())) == len(looks)
    assert len({symbol for _, symbol in looks.values()}) == len(looks)
    assert {symbol for _, symbol in looks.values()} <= set(vector_traces.SYMBOLS)
