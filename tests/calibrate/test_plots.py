"""Charts put values where their axes say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gptq_plugin.calibrate.plots import Bar, Cell, Line, Scale, bar_chart, heat_map, line_chart, nice, shorten

SVG = ElementTree.Element


def parse(svg: str) -> SVG:
    return ElementTree.fromstring(svg)


def of_class(svg: SVG, name: str) -> list[SVG]:
    return [e for e in svg.iter() if name in e.get("class", "").split()]


def test_a_wide_range_is_logarithmic() -> None:
    scale = Scale.of([0.001, 0.01, 0.1])
    assert scale == Scale(0.001, 0.1, True)
    assert [scale(v) for v in (0.001, 0.01, 0.1)] == pytest.approx([0, 0.5, 1])
    assert scale(0.0) == 0  # as low as the axis goes
    assert Scale.of([0.02, 0.1]) == Scale(0.0, 0.1, False)
    assert Scale.of([0.0]) == Scale(0.0, 1.0, False)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=20), st.integers(2, 8))
def test_ticks_lie_on_the_axis(values: Sequence[float], most: int) -> None:
    scale = Scale.of(values).padded()
    ticks = scale.ticks(most)
    assert len(ticks) <= most
    assert ticks == sorted(set(ticks))
    assert all(-1e-9 <= scale(tick) <= 1 + 1e-9 for tick in ticks)
    assert all(f"{tick:e}"[0] in "1235" or not scale.log for tick in ticks)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(2, 9))
def test_block_numbers_are_whole(low: int, span: int, most: int) -> None:
    ticks = nice(low, low + span, most, whole=True)
    assert 1 <= len(ticks) <= most
    assert all(tick == round(tick) and low <= tick <= low + span for tick in ticks)


def test_round_steps() -> None:
    assert nice(0, 1, 5) == pytest.approx([0, 0.5, 1])
    assert nice(0, 29, 6, whole=True) == [0, 5, 10, 15, 20, 25]
    assert Scale(0.02, 4.0, True).ticks(6) == pytest.approx([0.03, 0.1, 0.3, 1, 3])


@pytest.mark.parametrize("narrow", [False, True])
def test_heat_map(narrow: bool) -> None:
    values = {("a", 0): 0.01, ("a", 1): 0.1, ("b", 0): 0.02, ("b", 7): 1.0, ("b", 1): 1e-9}
    cells = {key: Cell(value, f"{key} <{value}>") for key, value in values.items()}
    svg = parse(heat_map(["a", "b"], [0, 1, 7], cells, "{:g}".format, "error", "block", narrow))
    found = {e[0].text: e for e in of_class(svg, "heat") if len(e)}
    assert set(found) == {cell.title for cell in cells.values()}
    at = {key: found[cell.title] for key, cell in cells.items()}
    assert at["a", 0].get("x") == at["b", 0].get("x") and at["a", 1].get("x") == at["b", 1].get("x")
    assert at["a", 0].get("y") == at["a", 1].get("y") != at["b", 0].get("y")
    shade = {key: float(e.get("fill-opacity")) for key, e in at.items()}
    assert shade["a", 0] < shade["b", 0] < shade["a", 1] < shade["b", 7]
    # Colours cover two decades; what lies below is as pale as can be.
    assert shade["b", 7] == 1.0 and shade["b", 1] == shade["a", 0] == 0.06
    texts = [e.text for e in svg.iter("text")]
    assert {"a", "b", "block →", "error, logarithmic", "≤ 0.01", "1"} <= set(texts)
    width, height = map(float, svg.get("viewBox").split()[2:])
    for e in at.values():
        assert 0 <= float(e.get("x")) and float(e.get("x")) + float(e.get("width")) <= width
        assert 0 <= float(e.get("y")) and float(e.get("y")) + float(e.get("height")) <= height


def test_line_chart() -> None:
    points = [(0.0, 0.01, "first"), (1.0, 0.1, "second"), (2.0, 1.0, "third & last")]
    svg = parse(line_chart([Line(points)], Scale(0.01, 1.0, True), "{:g}".format, "curve", "block", "error"))
    dots = of_class(svg, "dot")
    xs, ys = ([float(e.get(key)) for e in dots] for key in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.02) and xs[1] > xs[0]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.02) and ys[0] > ys[1]
    assert [e[0].text for e in of_class(svg, "touch")] == ["first", "second", "third & last"]
    # A grid line lies at the height of the value that it is labelled with.
    lines = sorted(float(e.get("y1")) for e in of_class(svg, "grid"))
    assert any(math.isclose(y, ys[1], abs_tol=0.02) for y in lines)
    assert {"block →", "error", "0.1"} <= {e.text for e in svg.iter("text")}


def test_a_line_for_comparison_has_no_marks() -> None:
    lines = [Line([(0.0, 1.0, ""), (1.0, 2.0, "")], "other"), Line([(0.0, 2.0, "x")])]
    svg = parse(line_chart(lines, Scale(0.0, 2.0, False), "{:g}".format, "curve", "block", "error"))
    assert len(of_class(svg, "other")) == 1 and len(of_class(svg, "touch")) == 1


def test_bars_begin_at_zero() -> None:
    svg = parse(bar_chart([Bar("<a>", 10.0, "ten", before=40.0), Bar("b", 20.0, "20", "hover")], "bars"))
    bars = [float(e.get("width")) for e in of_class(svg, "bar")]
    assert bars[1] == 2 * bars[0]
    (before,) = of_class(svg, "before")
    assert float(before.get("width")) == 4 * bars[0] == 400
    assert {"<a>", "ten", "b", "20"} <= {e.text for e in svg.iter("text")}


def test_long_names_keep_their_end() -> None:
    assert shorten("short", 5) == "short"
    short = shorten("model.layers.12.mlp.experts.63.down_proj", 20)
    assert len(short) == 20 and short.endswith("63.down_proj") and short.startswith("model")
