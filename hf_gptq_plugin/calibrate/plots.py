"""Three small charts as inline SVG: a heat map, a line and bars. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_SPAN = 100  # ratio that a heat map's colours cover at most, so that one outlier does not take all of them
LOG_FROM = 8  # an axis is logarithmic where the largest value is so many times the smallest
_CHARACTER = 6.6  # pixels of an average character at the size that charts write in
Format = Callable[[float], str]


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element. `content` is markup; attributes are escaped, `_` in their names stands for `-`."""
    fields = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{fields}>{content}</{name}>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _text(x: float, y: float, content: str, anchor: str = "start", class_: str = "label") -> str:
    return tag("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_)


def _title(text: str) -> str:
    return tag("title", escape(text)) if text else ""


def _svg(width: float, height: float, label: str, content: list[str], class_: str = "chart") -> str:
    box = f"0 0 {_number(float(width))} {_number(float(height))}"
    return tag("svg", "".join(content), viewBox=box, role="img", aria_label=label, class_=class_)


def shorten(text: str, characters: int) -> str:
    """The text, or its beginning and its end around an ellipsis."""
    if len(text) <= characters:
        return text
    tail = max(2 * characters // 3, 1)
    return f"{text[: max(characters - tail - 1, 0)]}…{text[-tail:]}"


@dataclass(frozen=True)
class Scale:
    """Values to places between 0 and 1.

    Args:
        low, high: the ends.
        log: equal ratios, not equal differences, lie equally far apart.
    """

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """From the smallest value to the largest; logarithmic where they are far apart, else from 0."""
        positive = [v for v in values if v > 0]
        if not positive:
            return cls(0.0, 1.0, False)
        low, high = min(positive), max(positive)
        if high / low >= LOG_FROM:
            return cls(low, high, True)
        return cls(0.0, high, False)

    def __call__(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)  # a zero lies at the low end
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def padded(self) -> Scale:
        """The same with some room above, and below where that is not zero."""
        if self.log:
            room = (self.high / self.low) ** 0.08
            return Scale(self.low / room, self.high * room, True)
        return Scale(self.low, self.high * 1.08, False)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between the ends, at most so many."""
        if not self.log:
            return [v for v in nice(self.low, self.high, most) if v <= self.high * (1 + 1e-9)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high]
            if len(found) <= most:
                return found
        return found[:: -(-len(found) // most)]


def nice(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at most so many."""
    span = (high - low) or 1.0
    power = math.floor(math.log10(span / most))
    steps = [m * 10.0**p for p in (power, power + 1) for m in (1, 2, 5)]
    for step in (s for s in steps if not whole or s >= 1):
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if last - first < most:
            return [i * step for i in range(first, last + 1)]
    return [low]


@dataclass(frozen=True)
class Cell:
    """A value of a heat map, and what hovering shows."""

    value: float
    title: str


def heat_map(
    rows: Sequence[str], columns: Sequence[int], cells: Mapping[tuple[str, int], Cell], show: Format, label: str,
    axis: str, narrow: bool = False,
) -> str:  # fmt: skip
    """Rows of coloured cells over a numbered axis, with the scale of colours on top.

    Args:
        rows: names, top to bottom.
        columns: numbers, left to right.
        cells: by row and column; those that are missing stay empty.
        show: how values are written.
        label: what the colour means.
        axis: what columns are.
        narrow: for a phone: row names stand above their cells.
    """
    scale = full = Scale.of([cell.value for cell in cells.values()])
    if full.log:
        scale = Scale(max(full.low, full.high / _SPAN), full.high, True)
    width = 360.0 if narrow else 960.0
    left = 0.0 if narrow else min(max(map(len, rows)) * _CHARACTER + 14, 250.0)
    pitch = min((width - left) / len(columns), 110.0)
    gap = 2.0 if pitch > 9 else 1.0 if pitch > 4 else 0.0
    height, head, above = (20.0, 52.0, 18.0) if narrow else (26.0, 46.0, 0.0)
    row_pitch = height + above + 2
    out = _legend(scale, scale != full, show, label, width if narrow else 300.0)
    for r, row in enumerate(rows):
        y = head + r * row_pitch + above
        name = shorten(row, int((width if narrow else left - 12) / _CHARACTER))
        out.append(_text(0, y - 5, name) if narrow else _text(left - 10, y + height / 2 + 4, name, "end"))
        for c, column in enumerate(columns):
            cell = cells.get((row, column))
            if cell is None:
                continue
            x, place = left + c * pitch, scale(cell.value)
            # Opacity, so that one ramp serves a light and a dark page.
            shape: dict[str, Any] = dict(x=x, y=y, width=pitch - gap, height=height, rx=2.0 if gap == 2 else 0.0)
            out.append(tag("rect", _title(cell.title), **shape, class_="heat", fill_opacity=_opacity(place)))
            if pitch >= 52:
                class_ = "value over" if _opacity(place) > 0.65 else "value"
                out.append(_text(x + (pitch - gap) / 2, y + height / 2 + 4, show(cell.value), "middle", class_))
    bottom = head + len(rows) * row_pitch
    every = max(1, math.ceil(30 / pitch))
    every = next(step for p in range(9) for m in (1, 2, 5) if (step := m * 10**p) >= every)
    for c, column in enumerate(columns):
        if column % every == 0:
            out.append(_text(left + c * pitch + (pitch - gap) / 2, bottom + 14, str(column), "middle", "tick"))
    out.append(_text(left, bottom + 32, f"{axis} →", "start", "axis"))
    return _svg(width, bottom + 38, label, out, "chart narrow" if narrow else "chart wide")


def _opacity(place: float) -> float:
    return 0.06 + 0.94 * min(max(place, 0.0), 1.0) ** 1.5


def _legend(scale: Scale, cut: bool, show: Format, label: str, width: float) -> list[str]:
    steps = 48
    out = [_text(0, 11, label + (", logarithmic" if scale.log else ""), "start", "axis")]
    for i in range(steps):
        x = i * width / steps
        shape: dict[str, Any] = dict(x=x, y=18, width=width / steps, height=7)
        out.append(tag("rect", **shape, class_="heat legend", fill_opacity=_opacity(i / (steps - 1))))
    for place, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = scale.low * (scale.high / scale.low) ** place if scale.log else scale.high * place
        out.append(_text(width * place, 38, ("≤ " if cut and not place else "") + show(value), anchor, "tick"))
    return out


@dataclass(frozen=True)
class Line:
    """Points from left to right, each with what hovering shows; the class chooses the colour.

    Args:
        points: x, y, title.
        class_: "main" or "second"; "other" for a line without marks, for comparison.
        filled: fill the area below.
    """

    points: Sequence[tuple[float, float, str]]
    class_: str = "main"
    filled: bool = False


def line_chart(
    lines: Sequence[Line], scale: Scale, show: Format, label: str, x_axis: str, y_axis: str,
    size: tuple[float, float] = (400.0, 220.0),
) -> str:  # fmt: skip
    """Lines over a numbered axis.

    Args:
        lines: drawn in this order, points of one line from left to right.
        scale: of the vertical axis, so that charts side by side can share it.
        show: how values of the vertical axis are written.
        label: what is shown, for those who do not see it.
        x_axis, y_axis: what the axes are.
        size: width and height.
    """
    width, height = size
    ticks = scale.ticks()
    left = max([len(show(t)) for t in ticks] or [1]) * _CHARACTER + 14
    top, bottom, right = 24.0, height - 34.0, width - 12.0
    xs = [x for line in lines for x, _, _ in line.points]
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        along = (x - first) / (last - first) if last > first else 0.5
        return left + along * (right - left), bottom - min(max(scale(y), 0.0), 1.0) * (bottom - top)

    out = [_text(0, 11, y_axis, "start", "axis")]
    for tick in ticks:
        y = at(first, tick)[1]
        out.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        out.append(_text(left - 6, y + 4, show(tick), "end", "tick"))
    for x_tick in nice(first, last, 6, whole=True):
        out.append(_text(at(x_tick, 1)[0], bottom + 15, f"{x_tick:.0f}", "middle", "tick"))
    out.append(_text(right, height - 4, f"{x_axis} →", "end", "axis"))
    for line in lines:
        places = [at(x, y) for x, y, _ in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        if line.filled:
            area = f"{path}L{places[-1][0]:.1f} {bottom:.1f}L{places[0][0]:.1f} {bottom:.1f}Z"
            out.append(tag("path", d=area, class_=f"area {line.class_}"))
        out.append(tag("path", d=path, class_=f"line {line.class_}"))
        if line.class_ == "other":
            continue
        seen = 2.2 if (right - left) / len(places) > 7 else 0.0
        for (x, y), (_, _, title) in zip(places, line.points, strict=True):
            if seen:
                out.append(tag("circle", cx=x, cy=y, r=seen, class_=f"dot {line.class_}"))
            out.append(tag("circle", _title(title), cx=x, cy=y, r=7, class_="touch"))
    return _svg(width, height, label, out)


@dataclass(frozen=True)
class Bar:
    """A bar with its name, its number as text and what hovering shows; `before` is a paler bar behind it."""

    name: str
    value: float
    text: str
    title: str = ""
    before: float | None = None


def bar_chart(bars: Sequence[Bar], label: str, width: float = 400.0) -> str:
    """Horizontal bars from zero, names and numbers above them."""
    longest = max([bar.value for bar in bars] + [bar.before or 0.0 for bar in bars]) or 1.0
    pitch = 38.0
    out = []
    for i, bar in enumerate(bars):
        y = i * pitch
        room = int(width / _CHARACTER) - len(bar.text) - 3
        parts = [_text(0, y + 14, shorten(bar.name, max(room, 8))), _text(width, y + 14, bar.text, "end", "value")]
        lengths = [("track", longest), ("before", bar.before or 0.0), ("bar", bar.value)]
        parts += [
            tag("rect", x=0, y=y + 21, width=max(width * length / longest, 1.0), height=8, rx=2, class_=class_)
            for class_, length in lengths
            if length or class_ == "bar"
        ]
        out.append(tag("g", _title(bar.title) + "".join(parts)))
    return _svg(width, len(bars) * pitch, label, out)
