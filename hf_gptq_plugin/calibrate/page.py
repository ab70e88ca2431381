"""The page that shows a calibration, drawn from the content of `calibration.json` alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from .numbers import amount, counted, duration, general, percent, round_percent, share, size, span
from .page_style import CSS, SCRIPT
from .places import place, type_names
from .plots import Bar, Cell, Line, Scale, bar_chart, heat_map, line_chart

Record = Mapping[str, Any]

_FEW_BLOCKS = 3  # fewer make no curve
_NAMED = 8  # modules that a notice lists
_WORST = 8  # bars of the highest errors


def render(content: Mapping[str, Any]) -> str:
    """A whole HTML page without references to anything outside of it.

    Args:
        content: of `calibration.json`.
    """
    records = content["modules"]
    types = type_names([record["name"] for record in records])
    title = f"Calibration of {content['model'] or 'a model'}"
    parts = [
        _head(content),
        _tiles(content),
        _notices(content),
        _errors(records, types),
        _time(content),
        _size(content),
        _types(content),
        _facts(content),
        _modules(records, content["settings"].get("damp_percent")),
        "<footer>The same numbers are in calibration.json and calibration.csv beside this page.</footer>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{CSS}</style></head>\n<body><main>\n" + "\n".join(parts) + f"\n</main><script>{SCRIPT}</script></body>"
        "</html>\n"
    )


def _spec(record: Record) -> str:
    group = "one group" if record["group_size"] == -1 else f"groups of {record['group_size']}"
    kind = "symmetric" if record["sym"] else "asymmetric"
    return f"{record['bits']} bit, {group}, {kind}{', act-order' if record['desc_act'] else ''}"


def _section(title: str, hint: str, body: str, class_: str = "") -> str:
    hint = f'<p class="hint">{hint}</p>' if hint else ""
    return f'<section class="{class_}"><h2>{escape(title)}</h2>{hint}{body}</section>'


def _head(content: Mapping[str, Any]) -> str:
    records = content["modules"]
    specs = list(dict.fromkeys(_spec(r) for r in sorted(records, key=lambda r: -_weights(r))))
    spec = specs[0] if len(specs) == 1 else f"mixed: {'; '.join(specs[:3])}{' …' if len(specs) > 3 else ''}"
    formats = ", ".join(sorted({r["format"] for r in records}))
    return (
        f'<header><p class="over-line">GPTQ calibration</p><h1>{escape(content["model"] or "Unnamed model")}</h1>'
        f'<p class="lead">{escape(spec)}; format {escape(formats)}</p></header>'
    )


def _weights(record: Record) -> int:
    return record["in_features"] * record["out_features"]


def _tiles(content: Mapping[str, Any]) -> str:
    totals, data, quality = content["totals"], content["data"], content["perplexity"]
    before, after = totals["bytes_16_bit"], totals["bytes_quantized"]
    worst = f"highest {percent(totals['relative_error_worst'])}"
    tiles = []
    if quality and quality["quantized"] is not None:
        dense = quality["dense"]
        change = f"from {dense:.4g}, {quality['quantized'] / dense - 1:+.1%}" if dense else "dense not measured"
        tiles.append(("Perplexity", f"{quality['quantized']:.4g}", f"{change}; {quality['text']}"))
    tiles += [
        ("Quantized weights", size(after), f"{before / after:.2f}× smaller than {size(before)} at 16 bits"),
        ("Bits per weight", f"{totals['bits_per_weight']:.2f}", "codes, scales, zeros and group index"),
        ("Median error", percent(totals["relative_error_median"]), worst),
        ("Modules", f"{totals['modules']:,}", f"{amount(totals['weights'])} weights"),
    ]
    if data.get("tokens"):
        windows = f"{data['windows']:,} windows of up to {data['seqlen']:,}" if data.get("windows") else ""
        tiles.append(("Calibration tokens", f"{data['tokens']:,}", windows))
    total, solving = content["seconds"], totals["solve_seconds"]
    if total is None:
        tiles.append(("Time solving", duration(solving), ""))
    else:
        tiles.append(("Time", duration(total), f"{duration(solving)} of it solving"))
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>'
        for name, value, more in tiles
    )
    thirds = " thirds" if len(tiles) in (5, 6) else ""
    return f'<section class="tiles{thirds}">{cells}</section>'


def notices(content: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What a reader should look at: a sentence, and the modules it is about."""
    records: list[Record] = content["modules"]
    found: list[tuple[str, list[Record]]] = []
    asked = content["settings"].get("damp_percent")
    raised = [r for r in records if _damping_raised(r, asked)]
    if raised:
        most = max(r["damp_percent"] for r in raised)
        found.append((
            f"Damping was raised above {round_percent(asked)} in {counted(len(raised), 'module')}, up to "
            f"{round_percent(most)}: the Hessian was not positive definite. More, or more varied, calibration text "
            "helps.",
            raised,
        ))  # fmt: skip
    dead = [r for r in records if r["dead_columns"]]
    if dead:
        total = sum(r["dead_columns"] for r in dead)
        found.append((
            f"{counted(total, 'input')} of {counted(len(dead), 'module')} were 0 on every calibration token; their "
            "weights were set to 0.",
            dead,
        ))  # fmt: skip
    few = [r for r in records if 0 < r["tokens"] < r["in_features"]]
    if few:
        least = min(r["tokens"] for r in few)
        found.append((
            f"{counted(len(few), 'module')} saw fewer tokens than they have inputs (the fewest: {least:,}); their "
            "Hessian rests on the damping. Use more calibration text.",
            sorted(few, key=lambda r: r["tokens"]),
        ))  # fmt: skip
    blind = [r for r in records if not r["tokens"]]
    if blind:
        found.append((f"{counted(len(blind), 'module')} saw no calibration token.", blind))
    broken = [r for r in records if r["relative_error"] is None]
    if broken:
        found.append((f"The error of {counted(len(broken), 'module')} is not a finite number.", broken))
    for note in dict.fromkeys(r["note"] for r in records if r["note"]):
        noted = [r for r in records if r["note"] == note]
        found.append((f"{counted(len(noted), 'module')}: {note}", noted))
    return [(text, [r["name"] for r in modules]) for text, modules in found]


def _damping_raised(record: Record, asked: float | None) -> bool:
    used = record["damp_percent"]
    return asked is not None and used is not None and used > asked * (1 + 1e-6)


def _notices(content: Mapping[str, Any]) -> str:
    found = notices(content)
    if not found:
        return '<p class="fine">✓ No damping was raised, no input was dead, every module saw enough tokens.</p>'
    items = ""
    for text, names in found:
        shown = "".join(f"<br><code>{escape(name)}</code>" for name in names[:_NAMED])
        more = f"<br>and {len(names) - _NAMED:,} more; see the table below" if len(names) > _NAMED else ""
        items += f"<li>{escape(text)}<details><summary>Which</summary>{shown[4:]}{more}</details></li>"
    return f'<section class="notices"><h2>Worth a look</h2><ul>{items}</ul></section>'


def _hover(record: Record) -> str:
    return (
        f"{record['name']}\nrelative error {percent(record['relative_error'])}\n"
        f"loss {general(record['loss'])} per token\n{_spec(record)}\n{record['tokens']:,} tokens, damping "
        f"{round_percent(record['damp_percent'])}, {record['dead_columns']:,} dead inputs\nsolved in "
        f"{duration(record['seconds'])}"
    )


# Of one type in one block, e.g. all experts: from the lowest error to the highest.
Cells = dict[tuple[str, int], list[Record]]


def _cells(records: Iterable[Record], types: Mapping[str, str]) -> Cells:
    cells: Cells = {}
    for record in records:
        block = place(record["name"]).block
        if block is not None and record["relative_error"] is not None:
            cells.setdefault((types[record["name"]], block), []).append(record)
    return {key: sorted(group, key=lambda r: r["relative_error"]) for key, group in cells.items()}


def _median(group: list[Record]) -> float:
    return statistics.median(r["relative_error"] for r in group)


def _median_hover(group: list[Record]) -> str:
    if len(group) == 1:
        return _hover(group[0])
    errors = [r["relative_error"] for r in group]
    tokens = [r["tokens"] for r in group]
    parts = group[0]["name"].split(".")
    return (
        f"{len(group)} modules like {'.'.join(parts)}\nrelative error {percent(errors[0])} to {percent(errors[-1])}, "
        f"median {percent(_median(group))}\n{span(min(tokens), max(tokens))} tokens\nsolved in "
        f"{duration(sum(r['seconds'] for r in group))}"
    )


def _errors(records: list[Record], types: Mapping[str, str]) -> str:
    cells = _cells(records, types)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    body = ""
    if cells:
        body += _map(cells, kinds, blocks)
        outside = [r for r in records if place(r["name"]).block is None]
        if outside:
            listed = ", ".join(f"{r['name']} {percent(r['relative_error'])}" for r in outside)
            body += f'<p class="keys outside">Outside of blocks: {escape(listed)}</p>'
    if len(blocks) >= _FEW_BLOCKS:
        body += _panels(cells, kinds)
    worst = sorted((r for r in records if r["relative_error"] is not None), key=lambda r: -r["relative_error"])[:_WORST]
    bars = [Bar(r["name"], r["relative_error"], percent(r["relative_error"]), _hover(r)) for r in worst]
    losses = _losses(records, types)
    if bars:
        chart = bar_chart(bars, "Modules with the highest relative error")
        body += f'<div class="pair apart"><div><h3>Highest errors</h3>{chart}</div>{losses}</div>'
    hint = (
        "Relative error of a module's output on the calibration text: tr(ΔHΔᵀ) / tr(WHWᵀ), 0% is exact and 100% as bad "
        "as a weight of zeros. Hover for the module."
    )
    return _section("Error by block and module type", hint, body)


def _losses(records: list[Record], types: Mapping[str, str]) -> str:
    """Where the absolute error comes from."""
    sums: dict[str, float] = {}
    for r in records:
        if r["loss"] is not None:
            sums[types[r["name"]]] = sums.get(types[r["name"]], 0.0) + r["loss"]
    total = sum(sums.values())
    if not total:
        return ""
    ranked = sorted(sums.items(), key=lambda item: -item[1])[:_WORST]
    bars = [Bar(kind, loss, f"{general(loss)} · {share(loss, total)}") for kind, loss in ranked]
    chart = bar_chart(bars, "Absolute loss by module type")
    return f"<div><h3>Squared output error per token, tr(ΔHΔᵀ), summed by type</h3>{chart}</div>"


def _map(cells: Cells, kinds: list[str], blocks: list[int]) -> str:
    rows: list[str] = []
    shown: dict[tuple[str, int], Cell] = {}
    for kind in kinds:
        groups = {block: cells[kind, block] for block in blocks if (kind, block) in cells}
        most = max(map(len, groups.values()))
        if most == 1:
            rows.append(kind)
            shown |= {(kind, b): Cell(g[0]["relative_error"], _hover(g[0])) for b, g in groups.items()}
            continue
        middle, worst = f"{kind} median of {most}", f"{kind} worst"
        rows += [middle, worst]
        shown |= {(middle, b): Cell(_median(g), _median_hover(g)) for b, g in groups.items()}
        shown |= {(worst, b): Cell(g[-1]["relative_error"], _hover(g[-1])) for b, g in groups.items()}
    return "".join(
        heat_map(rows, blocks, shown, percent, "Relative error", "block", narrow) for narrow in (False, True)
    )


def _panels(cells: Cells, kinds: list[str]) -> str:
    scale = Scale.of([r["relative_error"] for group in cells.values() for r in group]).padded()
    by_kind = {kind: {b: group for (k, b), group in sorted(cells.items()) if k == kind} for kind in kinds}
    curves = {
        kind: [(float(b), _median(g), _median_hover(g)) for b, g in groups.items()] for kind, groups in by_kind.items()
    }
    panels = []
    for kind, groups in by_kind.items():
        if len(groups) == 1:
            continue
        lines = [Line(curve, "other") for other, curve in curves.items() if other != kind]
        key = ""
        if max(map(len, groups.values())) > 1:
            lines.append(Line([(b, g[-1]["relative_error"], _hover(g[-1])) for b, g in groups.items()], "second"))
            key = '<p class="keys"><span class="key main"></span>median<span class="key second"></span>worst</p>'
        chart = line_chart(
            [*lines, Line(curves[kind])], scale, round_percent, f"Relative error of {kind} by block", "block",
            "relative error", (300.0, 165.0),
        )  # fmt: skip
        panels.append(f"<div><h3>{escape(kind)}</h3>{key}{chart}</div>")
    return f'<div class="panels">{"".join(panels)}</div>'


def _time(content: Mapping[str, Any]) -> str:
    records, totals = content["modules"], content["totals"]
    solving = totals["solve_seconds"]
    kinds = sorted(content["types"], key=lambda t: -t["solve_seconds"])
    bars = [
        Bar(t["type"], t["solve_seconds"], f"{duration(t['solve_seconds'])} · {share(t['solve_seconds'], solving)}")
        for t in kinds
    ]
    unit, factor = ("s", 1) if solving < 300 else ("min", 60) if solving < 18_000 else ("h", 3600)
    points, sofar = [], 0.0
    for i, record in enumerate(records, 1):
        sofar += record["seconds"] or 0.0
        points.append((float(i), sofar / factor, f"{record['name']}\n{duration(sofar)} after {counted(i, 'module')}"))
    chart = line_chart(
        [Line(points, filled=True)],
        Scale(0.0, max(points[-1][1], 1e-9), False).padded(),
        lambda v: f"{v:.3g}",
        "Time spent solving, cumulative",
        "modules solved",
        unit,
    )
    rest = ""
    if content["seconds"] is not None:
        rest = (
            f" The whole calibration took {duration(content['seconds'])}; what is not solving goes into forward "
            "passes and Hessians."
        )
    body = (
        f'<div class="pair"><div><h3>By module type</h3>{bar_chart(bars, "Time solving by module type")}</div>'
        f"<div><h3>Cumulative</h3>{chart}</div></div>"
    )
    return _section("Time", f"Wall time of the solver: {duration(solving)} in all.{rest}", body)


def _size(content: Mapping[str, Any]) -> str:
    totals = content["totals"]
    kinds = sorted(content["types"], key=lambda t: -t["bytes_quantized"])
    bars = [_size_bar(t["type"], t) for t in kinds]
    hint = (
        '<span class="key before"></span>at 16 bits<span class="key main"></span>quantized, with scales, zeros and '
        "group index. Sizes are of the weights as stored, whatever dtype the model was loaded in."
    )
    whole = ""
    other = content["other_parameters"]
    if other is not None:
        before, after = totals["bytes_16_bit"] + 2 * other, totals["bytes_quantized"] + 2 * other
        per = 8 * after / (totals["weights"] + other)
        bar = Bar("whole model", after, f"{size(before)} → {size(after)} · {per:.2f} bits", "", before)
        whole = (
            f"<div><h3>Whole model, the other {amount(other)} parameters at 16 bits</h3>"
            f"{bar_chart([_size_bar('quantized modules', totals), bar], 'Size of the whole model')}</div>"
        )
    chart = bar_chart(bars, "Size before and after by module type")
    body = f'<div class="pair"><div><h3>By module type</h3>{chart}</div>{whole}</div>'
    return _section("Size", hint, body)


def _size_bar(name: str, sums: Mapping[str, Any]) -> Bar:
    before, after = sums["bytes_16_bit"], sums["bytes_quantized"]
    text = f"{size(before)} → {size(after)} · {sums['bits_per_weight']:.2f} bits"
    return Bar(name, after, text, f"{name}: {counted(sums['modules'], 'module')}, {sums['weights']:,} weights", before)


Column = tuple[str, str, Callable[[Record], Any], Callable[[Any], str]]


def _table(rows: Iterable[Record], columns: list[Column], sortable: bool, flag: Callable[[Record, str], bool]) -> str:
    head = ""
    for name, unit, _, _ in columns:
        text = f"<button>{escape(name)}</button>" if sortable else escape(name)
        small = f"<small>{escape(unit)}</small>" if unit else ""
        head += f'<th scope="col">{text}{small}</th>'
    body = []
    for row in rows:
        cells = ""
        for name, _, get, show in columns:
            value = get(row)
            exact = "" if value is None else str(value)
            classes = "flag" if flag(row, name) else "words" if name == "note" else ""
            class_ = f' class="{classes}"' if classes else ""
            text = escape("–" if value is None else show(value))
            text = text if cells else text.replace(".", ".<wbr>")  # names
            cells += f'<td{class_} data-v="{escape(exact)}">{text}</td>'
        body.append(f"<tr>{cells}</tr>")
    table = "<table id='modules'>" if sortable else "<table>"
    return f"{table}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _types(content: Mapping[str, Any]) -> str:
    columns: list[Column] = [
        ("type", "", lambda t: t["type"], str),
        ("modules", "", lambda t: t["modules"], "{:,}".format),
        ("bits", "per code", lambda t: ", ".join(map(str, t["bits"])), str),
        ("error", "median", lambda t: t["relative_error_median"], percent),
        ("error", "highest", lambda t: t["relative_error_worst"], percent),
        ("loss", "per token", lambda t: t["loss"], general),
        ("tokens seen", "fewest–most", lambda t: span(t["tokens_least"], t["tokens_most"]), str),
        ("solving", "", lambda t: t["solve_seconds"], duration),
        ("size", "quantized", lambda t: t["bytes_quantized"], size),
        ("bits", "per weight", lambda t: t["bits_per_weight"], "{:.2f}".format),
    ]
    total = {**content["totals"], "type": "all"}
    table = _table([*content["types"], total], columns, False, lambda row, name: False)
    return _section("By module type", "", f'<div class="scroll">{table}</div>')


def _facts(content: Mapping[str, Any]) -> str:
    quality = content["perplexity"]
    groups = [("Settings", content["settings"]), ("Calibration text", content["data"])]
    if quality:
        groups.append(("Perplexity", {k: v for k, v in quality.items() if v is not None}))
    groups.append(("Versions", content["versions"]))
    body = ""
    for name, facts in groups:
        if facts:
            rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_fact(v))}</dd>" for k, v in facts.items())
            body += f'<div><h3>{escape(name)}</h3><dl class="facts">{rows}</dl></div>'
    return _section("How it was made", "", f'<div class="columns">{body}</div>') if body else ""


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_fact(v)}" for k, v in value.items()) or "none"
    return str(value)


def _modules(records: list[Record], asked: float | None) -> str:
    columns: list[Column] = [
        ("module", "", lambda r: r["name"], str),
        ("error", "", lambda r: r["relative_error"], percent),
        ("loss", "per token", lambda r: r["loss"], general),
        ("bits", "", lambda r: r["bits"], str),
        ("group", "inputs", lambda r: r["group_size"], lambda v: "all" if v == -1 else str(v)),
        ("tokens", "", lambda r: r["tokens"], "{:,}".format),
        ("damping", "", lambda r: r["damp_percent"], round_percent),
        ("dead inputs", "", lambda r: r["dead_columns"], "{:,}".format),
        ("solving", "s", lambda r: r["seconds"], "{:.3g}".format),
        ("inputs", "", lambda r: r["in_features"], "{:,}".format),
        ("outputs", "", lambda r: r["out_features"], "{:,}".format),
    ]
    if any(r["note"] for r in records):
        columns.append(("note", "", lambda r: r["note"], str))

    def flag(row: Record, name: str) -> bool:
        return {
            "damping": _damping_raised(row, asked),
            "dead inputs": row["dead_columns"] > 0,
            "tokens": 0 < row["tokens"] < row["in_features"],
        }.get(name, False)

    table = _table(records, columns, True, flag)
    body = (
        '<input id="filter" type="search" placeholder="Filter by name" aria-label="Filter modules" hidden>'
        f'<div class="scroll tall" tabindex="0">{table}</div>'
    )
    hint = f'<span id="count">{len(records):,}</span> in the order of solving. Click a column to sort by it.'
    return _section("All modules", hint, body)
