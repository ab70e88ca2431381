"""Several checkpoints of one model side by side: perplexity, size and speed, as numbers and as a page."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..calibrate.numbers import amount, counted, size
from ..calibrate.page_style import CSS
from ..calibrate.plots import Bar, Scale, bar_chart, nice, shorten, tag
from ..convert.inspect import Findings, inspect
from .bench import Speed, speed
from .evaluate import perplexity, text_windows
from .loading import load_model, require_weights

_WIDTH, _NARROW, _HEIGHT = 960.0, 360.0, 340.0


@dataclass(frozen=True)
class Row:
    """One checkpoint.

    Args:
        name: as it was given; of a folder its last part.
        layout: see `convert.inspect`.
        bits: of all weights that are in files, scales and embeddings included.
        size: bytes of all weights in files.
        parameters: weights of the model.
        perplexity: on the text.
        speed: None where it was not measured.
    """

    name: str
    layout: str
    bits: float
    size: int
    parameters: int
    perplexity: float
    speed: Speed | None


def measure(
    models: Sequence[str], folders: Sequence[Path], text: str, windows: int | None, seqlen: int, dtype: Any,
    device_map: str = "cpu", timed: bool = True, prompt: int = 128, new: int = 32,
) -> list[Row]:  # fmt: skip
    """Measure checkpoints one after the other; one is in memory at a time.

    Args:
        models: how they were named, for `Row.name`.
        folders: where they lie.
        text: what perplexity is measured on, with each model's own tokenizer.
        windows, seqlen: see `text_windows`; None for all windows.
        dtype: of the arithmetic.
        device_map: where models are loaded.
        timed: measure speed too.
        prompt, new: see `bench.speed`.

    Raises:
        ValueError: two that have the same name, a checkpoint with problems.
    """
    from transformers import AutoTokenizer

    if len(set(map(str, folders))) < len(folders):
        raise ValueError("a checkpoint is named twice; name each once")
    looked: list[Findings] = [inspect(folder, values=False) for folder in folders]
    for found in looked:
        if found.problems:
            raise ValueError(f"{found.folder}: {found.problems[0]}")
    require_weights(*folders)
    rows = []
    for model, folder, found in zip(models, folders, looked, strict=True):
        pieces = text_windows(AutoTokenizer.from_pretrained(folder), text, seqlen, windows)
        loaded: Any = load_model(folder, dtype=dtype, device_map=device_map)
        value = perplexity(loaded, pieces)
        timing = speed(loaded, prompt, new, progress=False) if timed else None
        del loaded
        gc.collect()
        total = found.quantized_bytes + found.dense_bytes
        name = Path(model).resolve().name if Path(model).exists() else model
        bits = 8 * total / max(found.parameters, 1)
        rows.append(Row(name, found.layout, bits, total, found.parameters, value, timing))
    return rows


def to_dict(rows: Sequence[Row], protocol: dict[str, Any]) -> dict[str, Any]:
    """As JSON: the rows, and how they were measured."""
    return {**protocol, "models": [asdict(row) for row in rows]}


def page(rows: Sequence[Row], protocol: dict[str, Any]) -> str:
    """A whole HTML page without references to anything outside of it.

    Args:
        rows: at least one.
        protocol: text, windows, seqlen.
    """
    windows = counted(protocol["windows"], "window") if protocol["windows"] else "all windows"
    how = f"{windows} of {protocol['seqlen']} tokens of {protocol['text']}"
    timings = [row.speed for row in rows if row.speed is not None]
    speeds = ""
    if timings:
        where = ", ".join(f"{name} {value}" for name, value in timings[0].machine.items() if name != "kernel")
        charts = [
            ("Writing, tokens per second", [(row, row.speed.decode) for row in rows if row.speed]),
            ("Reading a prompt, tokens per second", [(row, row.speed.prefill) for row in rows if row.speed]),
        ]
        pair = "".join(
            f"<div><h3>{title}</h3>{bar_chart([Bar(r.name, v, f'{v:,.1f}') for r, v in values], title)}</div>"
            for title, values in charts
        )
        speeds = (
            f'<section><h2>Speed</h2><p class="hint">{escape(where)}; batch 1, prompts of {timings[0].prompt} tokens, '
            f'{timings[0].new} written</p><div class="pair">{pair}</div></section>'
        )
    sizes = bar_chart([Bar(row.name, row.size, size(row.size)) for row in rows], "Size of all weights")
    bits = bar_chart([Bar(row.name, row.bits, f"{row.bits:.2f}") for row in rows], "Bits per weight")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{CSS}</style></head>\n<body><main>\n'
        f'<header><p class="over-line">Comparison</p><h1>{len(rows)} checkpoints</h1>'
        f'<p class="lead">Perplexity on {escape(how)}</p></header>\n'
        f'<section><h2>Perplexity against bits per weight</h2><p class="hint">Lower left is better. Bits count all '
        f"that is in the files: codes, scales, zeros, embeddings.</p>{scatter(rows)}{scatter(rows, True)}</section>\n"
        f'<section><h2>Size</h2><div class="pair"><div><h3>Files</h3>{sizes}</div>'
        f"<div><h3>Bits per weight</h3>{bits}</div></div></section>\n{speeds}\n{_table(rows)}\n</main></body></html>\n"
    )


def scatter(rows: Sequence[Row], narrow: bool = False) -> str:
    """Perplexity over bits per weight, one named mark for each checkpoint.

    Args:
        rows: at least one.
        narrow: for a phone.
    """
    finite = [row for row in rows if row.perplexity < float("inf")]
    if not finite:
        return '<p class="hint">No perplexity is finite.</p>'
    low, high = min(row.perplexity for row in finite), max(row.perplexity for row in finite)
    scale = Scale(low, high, True).padded() if high / low >= 8 else _linear(low, high)
    widest = max(row.bits for row in finite) * 1.08
    width = _NARROW if narrow else _WIDTH
    left, right, top, bottom = 56.0, width - 24, 26.0, _HEIGHT - 36

    def at(row: Row) -> tuple[float, float]:
        return left + row.bits / widest * (right - left), bottom - scale(row.perplexity) * (bottom - top)

    def text(x: float, y: float, content: str, anchor: str, class_: str) -> str:
        return tag("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_)

    out = [text(0, 12, "perplexity", "start", "axis"), text(right, _HEIGHT - 4, "bits per weight →", "end", "axis")]
    for value in _ticks(scale):
        y = bottom - scale(value) * (bottom - top)
        out.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        out.append(text(left - 8, y + 4, f"{value:.4g}", "end", "tick"))
    for bits in range(0, int(widest) + 1, (1 if widest < 9 else 2 if widest < 18 else 4) * (2 if narrow else 1)):
        out.append(text(left + bits / widest * (right - left), bottom + 16, str(bits), "middle", "tick"))
    taken: list[tuple[float, float]] = []
    for row in sorted(finite, key=lambda r: at(r)[0]):
        x, y = at(row)
        title = f"{row.name}\nperplexity {row.perplexity:.4f}\n{row.bits:.2f} bits per weight, {size(row.size)}"
        mark = tag("circle", tag("title", escape(title)), cx=x, cy=y, r=5, class_="dot main")
        label = shorten(row.name, 16 if narrow else 30)
        end = x > (left + right) / 2
        place = y + 4
        while any(abs(place - other_y) < 14 and abs(x - other_x) < 200 for other_x, other_y in taken):
            place += 14
        taken.append((x, place))
        out += [mark, text(x - 10 if end else x + 10, place, label, "end" if end else "start", "label")]
    box, class_ = f"0 0 {width:.0f} {_HEIGHT:.0f}", f"chart {'narrow' if narrow else 'wide'}"
    return tag(
        "svg", "".join(out), viewBox=box, role="img", aria_label="Perplexity over bits per weight", class_=class_
    )


def _linear(low: float, high: float) -> Scale:
    """From a little below the lowest value: perplexities that differ by little must not look the same."""
    room = max(high - low, high * 0.02) * 0.25
    return Scale(max(low - room, 0.0), high + room, False)


def _ticks(scale: Scale) -> list[float]:
    if scale.log:
        return scale.ticks()
    return nice(scale.low, scale.high, 6)


def _table(rows: Sequence[Row]) -> str:
    timed = any(row.speed for row in rows)
    heads = ["checkpoint", "format", "perplexity", "bits per weight", "weights", "size"]
    heads += ["tokens/s writing", "tokens/s reading"] if timed else []
    body = ""
    for row in rows:
        cells = [row.name, row.layout, f"{row.perplexity:.4f}", f"{row.bits:.2f}"]
        cells += [amount(row.parameters), size(row.size)]
        if timed:
            cells += [f"{row.speed.decode:,.1f}", f"{row.speed.prefill:,.1f}"] if row.speed else ["", ""]
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<section><h2>Numbers</h2><div class="scroll">{table}</div></section>'
