"""What a report says is what the records say, as CSV, as JSON and on the page."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_gptq_plugin.calibrate.numbers import duration, percent, size
from hf_gptq_plugin.calibrate.page import notices, render
from hf_gptq_plugin.calibrate.places import Place, place, type_names
from hf_gptq_plugin.calibrate.report import (
    FILES,
    Header,
    LayerReport,
    Perplexity,
    assemble,
    from_record,
    to_record,
    write_report,
)
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.solve.gptq import SolveReport

HOSTILE = "x\"><script>alert(1)</script>&amp;'.1.y"
HEADER = Header(
    model="org/model",
    versions={"torch": "2.13.0"},
    settings={"preset": "balanced", "damp_percent": 0.01, "dynamic": {"-:.*v": {}}},
    data={"dataset": "c4", "windows": 2, "seqlen": 512, "tokens": 1024, "seed": 0},
    perplexity=Perplexity("held-out.txt", 8, 2048, 16384, 19.1312, 20.6402),
    seconds=3725.0,
    other_parameters=1000,
)


def layer(name: str, error: float = 0.01, tokens: int = 1024, note: str = "", **solve: Any) -> LayerReport:
    fields = {"relative_error": error, "loss": 100 * error, "damp_percent": 0.01, "dead_columns": 0, "seconds": 0.5}
    return LayerReport(name, QuantSpec(4, 32), tokens, SolveReport(**{**fields, **solve}), 64, 48, note)


def llama(blocks: int = 3) -> list[LayerReport]:
    leaves = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    return [layer(f"model.layers.{b}.{leaf}", 0.001 * (1 + b + 10 * i)) for b in range(blocks)
            for i, leaf in enumerate(leaves)]  # fmt: skip


def mixture(blocks: int = 3, experts: int = 5) -> list[LayerReport]:
    return [layer(f"model.layers.{b}.mlp.experts.{e}.down_proj", 0.01 * (b + 1) * (1 + e * e), 100 + e)
            for b in range(blocks) for e in range(experts)]  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes and text; complains about tags that do not match."""

    VOID = frozenset({"meta", "input", "br", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [e["tag"] for e in self.open]}
        self.found.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        wanted = {key.rstrip("_"): value for key, value in attrs.items()}
        return [
            e for e in self.found if e["tag"] == tag and all(v in (e["attrs"].get(k) or "") for k, v in wanted.items())
        ]


def page(reports: Sequence[LayerReport], header: Header = HEADER) -> Page:
    return Page(render(assemble(reports, header)))


def test_records_come_back() -> None:
    report = LayerReport(
        "model.layers.3.mlp.down_proj",
        QuantSpec(3, -1, sym=False, desc_act=True, checkpoint_format="gptq_v2"),
        77,
        SolveReport(relative_error=0.1 + 0.2, loss=1e-300, damp_percent=0.1, dead_columns=5, seconds=1 / 3),
        64,
        48,
        "a note",
    )
    record = json.loads(json.dumps(to_record(report), allow_nan=False))
    assert from_record(record) == report
    assert record["format"] == "gptq_v2" and record["loss"] == 1e-300
    assert all(value is None or isinstance(value, (str, int, float)) for value in record.values())


def test_what_is_not_finite_becomes_none() -> None:
    report = layer("a", math.inf, loss=math.nan)
    record = to_record(report)
    assert record["relative_error"] is None and record["loss"] is None
    back = from_record(record)
    assert math.isnan(back.solve.relative_error) and math.isnan(back.solve.loss)
    assert replace(back, solve=report.solve) == report


def test_a_record_of_another_version() -> None:
    record = to_record(layer("a.0.b"))
    del record["loss"]
    with pytest.raises(ValueError, match=r"'a\.0\.b' has no field 'loss'.*another version"):
        from_record(record)
    with pytest.raises(ValueError, match="bits=5"):
        from_record({**to_record(layer("a")), "bits": 5})


def test_files(tmp_path: Path) -> None:
    reports = [*llama(), layer("lm_head", 0.02, note='quotes ", commas and\nlines')]
    assert write_report(tmp_path / "out", reports, HEADER) == tmp_path / "out" / "calibration.html"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with (tmp_path / "out" / "calibration.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{k: str(v) for k, v in to_record(r).items()} for r in reports]
    content = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert [from_record(r) for r in content["modules"]] == reports
    assert (content["model"], content["perplexity"]["dense"], content["seconds"]) == ("org/model", 19.1312, 3725.0)
    assert (tmp_path / "out" / "calibration.html").read_text(encoding="utf-8") == render(content)


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reports=\[\] is empty"):
        write_report(tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []


def test_totals() -> None:
    reports = [layer("m.0.a", 0.01, 10), layer("m.0.b", 0.03, 30, dead_columns=2), layer("m.1.a", 0.05, 20)]
    content = assemble(reports, HEADER)
    # 4 bit, 64 inputs in 2 groups of 32, 48 outputs: codes, zeros, 16-bit scales, and an int32 for every input.
    packed = 64 * 48 // 2 + 2 * 48 // 2 + 2 * 48 * 2 + 64 * 4
    assert content["totals"] == {
        "modules": 3, "bits": [4], "weights": 3 * 64 * 48, "bytes_16_bit": 3 * 64 * 48 * 2,
        "bytes_quantized": 3 * packed, "bits_per_weight": 8 * packed / (64 * 48), "relative_error_median": 0.03,
        "relative_error_worst": 0.05, "worst_module": "m.1.a", "loss": pytest.approx(9.0), "tokens_least": 10,
        "tokens_most": 30, "dead_columns": 2, "solve_seconds": 1.5,
    }  # fmt: skip
    types = {t["type"]: t for t in content["types"]}
    assert list(types) == ["a", "b"]
    assert (types["a"]["modules"], types["a"]["worst_module"]) == (2, "m.1.a")
    assert types["a"]["relative_error_median"] == pytest.approx(0.03)


@pytest.mark.parametrize(("name", "expected"), [
    ("model.layers.12.mlp.down_proj", Place("model.layers", 12, "mlp.down_proj")),
    ("model.layers.0.mlp.experts.63.w1", Place("model.layers", 0, "mlp.experts.*.w1")),
    ("lm_head", Place("", None, "lm_head")),
    ("h.4", Place("h", 4, "block")),
    ("model.layer1.conv", Place("", None, "model.layer1.conv")),
    ("a.².b", Place("", None, "a.².b")),
])  # fmt: skip
def test_places(name: str, expected: Place) -> None:
    assert place(name) == expected


def test_types_name_the_list_where_there_are_several() -> None:
    names = ["encoder.block.0.q", "decoder.block.0.q", "decoder.block.1.q", "head"]
    assert list(type_names(names).values()) == ["encoder.block.*.q", "decoder.block.*.q", "decoder.block.*.q", "head"]
    assert type_names(names[1:]) == {"decoder.block.0.q": "q", "decoder.block.1.q": "q", "head": "head"}


@pytest.mark.parametrize("reports", [llama(), mixture(), [*llama(), layer("lm_head", note="a note")]])
def test_the_table_shows_the_records(reports: list[LayerReport]) -> None:
    rows: list[dict[str, Any]] = []
    inside = False
    for element in page(reports).found:
        inside = element["attrs"].get("id") == "modules" or (inside and element["tag"] != "table")
        if inside and element["tag"] == "tr":
            rows.append({"cells": []})
        elif inside and element["tag"] == "td":
            rows[-1]["cells"].append(element)
    rows = rows[1:]  # the head
    assert len(rows) == len(reports)
    for row, report in zip(rows, reports, strict=True):
        exact = [cell["attrs"]["data-v"] for cell in row["cells"]]
        s = report.solve
        expected: list[Any] = [
            report.name, s.relative_error, s.loss, 4, 32, report.tokens, s.damp_percent, s.dead_columns, s.seconds, 64,
            48, *([report.note] if reports[-1].note else []),
        ]  # fmt: skip
        assert exact == [str(value) for value in expected]
        assert row["cells"][0]["text"] == report.name
        shown = row["cells"][1]["text"]
        assert float(shown.removesuffix("%")) / 100 == pytest.approx(s.relative_error, rel=5e-3)


def test_the_heat_map_has_a_cell_for_every_module() -> None:
    reports = llama(4)
    titles = [e["text"] for e in page(reports).all("title") if e["inside"][-1] == "rect"]
    for report in reports:
        mine = [t for t in titles if t.split("\n")[0] == report.name]
        assert len(mine) == 2  # wide and narrow
        assert f"relative error {percent(report.solve.relative_error)}" in mine[0]


def test_experts_are_shown_by_their_median_and_their_worst() -> None:
    reports = mixture(blocks=3, experts=5)
    titles = [e["text"] for e in page(reports).all("title")]
    for block in range(3):
        errors = [r.solve.relative_error for r in reports if f".{block}." in r.name[:15]]
        assert len(errors) == 5
        middle = f"median {percent(statistics.median(errors))}"
        assert sum(middle in t for t in titles) == 3  # both heat maps and the curve
        worst = f"model.layers.{block}.mlp.experts.4.down_proj\nrelative error {percent(max(errors))}"
        assert sum(t.startswith(worst) for t in titles) >= 3
    labels = {e["text"] for e in page(reports).all("text", class_="label")}
    assert {"mlp.experts.*.down_proj median of 5", "mlp.experts.*.down_proj worst"} <= labels


def test_the_head_shows_the_totals() -> None:
    shown = page(llama())
    tiles = {e["text"] for e in shown.all("div", class_="tile")}
    for expected in ("Perplexity20.64from 19.13, +7.9%; held-out.txt", "Modules9", "Calibration tokens1,024",
                     "Time1 h 02 min4.5 s of it solving"):  # fmt: skip
        assert any(tile.startswith(expected) for tile in tiles), expected
    facts = [e["text"] for e in shown.all("dd")]
    assert {"balanced", "0.01", "-:.*v: none", "2.13.0", "19.1312"} <= set(facts)
    assert shown.all("h1")[0]["text"] == "org/model"


def test_names_are_only_text() -> None:
    header = replace(
        HEADER, model=HOSTILE, versions={HOSTILE: HOSTILE}, settings={HOSTILE: HOSTILE}, data={HOSTILE: HOSTILE},
        perplexity=Perplexity(HOSTILE, 1, 2, 2, 3.0, 4.0),
    )  # fmt: skip
    bad = [replace(r, name=f"m.{i}.{HOSTILE}", note=HOSTILE) for i, r in enumerate(llama())]
    hostile, plain = page(bad, header), page(llama())
    assert {e["tag"] for e in hostile.found} <= {e["tag"] for e in plain.found} | {"ul", "li", "details", "summary",
                                                                                   "code", "br"}  # fmt: skip
    assert len(hostile.all("script")) == 1 and "alert" not in hostile.all("script")[0]["text"]
    assert hostile.all("h1")[0]["text"] == HOSTILE
    assert any(e["attrs"].get("data-v") == bad[0].name and e["text"] == bad[0].name for e in hostile.all("td"))
    assert {key for e in hostile.found for key in e["attrs"]} <= {key for e in plain.found for key in e["attrs"]}


@pytest.mark.parametrize("reports", [llama(), mixture()])
def test_the_page_loads_nothing(reports: list[LayerReport]) -> None:
    html = render(assemble(reports, HEADER)).lower()
    for token in ("http:", "https:", "//", "src=", "href", "url(", "@import", "fetch(", "<link", "<img", "<iframe"):
        assert token not in html, token
    assert "default-src 'none'" in html


def test_notices() -> None:
    reports = [
        layer("m.0.a"), layer("m.0.damped", damp_percent=0.1), layer("m.0.dead", dead_columns=3),
        layer("m.0.few", tokens=63), layer("m.0.blind", tokens=0), layer("m.0.nan", math.nan),
        layer("m.0.noted", note="rounded to nearest"), layer("m.1.noted", note="rounded to nearest"),
    ]  # fmt: skip
    found = {names[0]: (text, names) for text, names in notices(assemble(reports, HEADER))}
    assert {name: len(names) for name, (_, names) in found.items()} == {
        "m.0.damped": 1, "m.0.dead": 1, "m.0.few": 1, "m.0.blind": 1, "m.0.nan": 1, "m.0.noted": 2,
    }  # fmt: skip
    for name, part in (("m.0.damped", "raised above 1% in 1 module, up to 10%"), ("m.0.dead", "3 inputs of 1 module"),
                       ("m.0.few", "the fewest: 63"), ("m.0.noted", "2 modules: rounded to nearest")):  # fmt: skip
        assert part in found[name][0]
    assert notices(assemble(llama(), HEADER)) == []
    assert page(reports).all("section", class_="notices") and not page(llama()).all("section", class_="notices")
    flags = [e["text"] for e in page(reports).all("td", class_="flag")]
    assert flags == ["10%", "3", "63"]


@pytest.mark.parametrize("reports", [
    [layer("lm_head")],
    [layer("m.0.a", 0.0, seconds=0.0, loss=0.0)],
    [layer("m.0.a", math.nan), layer("m.1.a", math.nan)],
    [*llama(2), layer("encoder.0.x", 1e-12), layer("encoder.7.y", 3.0)],
    llama(170),
], ids=["outside of blocks", "exact", "not finite", "two lists", "many"])  # fmt: skip
def test_unusual_calibrations(reports: list[LayerReport]) -> None:
    shown = page(reports, Header())
    cells = [e for e in shown.all("td") if e["attrs"]["data-v"] == reports[-1].name]
    assert len(cells) >= 1
    assert "nan" not in {e["text"].lower() for e in shown.all("text")}
    for element in shown.found:
        for key in ("x", "y", "width", "height", "cx", "cy", "fill-opacity"):
            if key in element["attrs"] and element["tag"] != "svg":
                assert math.isfinite(float(element["attrs"][key]))


@pytest.mark.parametrize(("shown", "expected"), [
    (percent(0.0123456), "1.23%"), (percent(1.0), "100%"), (percent(None), "–"), (percent(12.0), "1,200%"),
    (duration(0.1234), "0.123 s"), (duration(61.0), "1 min 01 s"), (duration(3600.0), "1 h 00 min"),
    (size(999), "999 B"), (size(1500), "1.50 kB"), (size(57_800_000), "57.8 MB"), (size(2.5e9), "2.50 GB"),
])  # fmt: skip
def test_how_numbers_are_written(shown: str, expected: str) -> None:
    assert shown == expected


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
# Run by the page itself: where things are, and which of them are not to be seen or in the way of others.
PROBE = """<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().width > 0);
  const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1
    || a.bottom <= b.top + 3 || b.bottom <= a.top + 3;
  const faults = [];
  for (const svg of shown) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
    texts.forEach(([text, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1) faults.push(`${text} leaves its chart`);
      for (const [other, place] of texts.slice(i + 1)) if (!apart(box, place)) faults.push(`${text} over ${other}`);
    });
  }
  const cells = shown.flatMap(svg => [...svg.querySelectorAll("rect.heat:not(.legend)")]).map(e => {
    const box = e.getBoundingClientRect();
    return [box.left + 3, box.top + 3, +getComputedStyle(e).fillOpacity, getComputedStyle(e).fill];
  });
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.probe = JSON.stringify({charts: shown.length, faults, cells, wide});
})</script>"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium on PATH")
@pytest.mark.parametrize("reports", [llama(30), mixture(12, 8)], ids=["llama", "mixture"])
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(reports: list[LayerReport], width: int, tmp_path: Path) -> None:
    """Nothing is wider than the window, no label leaves its chart or lies on another one, nothing is complained about;
    and a screenshot has the colour of every error at its place."""
    image = pytest.importorskip("PIL.Image")
    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(render(assemble(reports, HEADER)).replace("</body>", f"{PROBE}</body>"), encoding="utf-8")

    def browse(*what: str) -> subprocess.CompletedProcess[str]:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width},1600", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
        command += [*what, file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    told = browse("--dump-dom")
    assert "CONSOLE" not in told.stderr, told.stderr
    found = re.search('data-probe="([^"]*)"', told.stdout)
    assert found, told.stdout[-500:]
    probe = json.loads(html.unescape(found[1]))
    assert probe["wide"] <= 0 and not probe["faults"]
    assert probe["charts"] >= 8
    assert len(probe["cells"]) == (90 if reports[0].name.endswith("q_proj") else 24)
    browse(f"--screenshot={shot}")
    with image.open(shot) as opened:
        pixels = opened.convert("RGB")
    shades = set()
    for x, y, opacity, fill in probe["cells"]:
        colour = [int(part) for part in re.findall(r"\d+", fill)]
        expected = [255 + (part - 255) * opacity for part in colour]  # over a white card
        assert pixels.getpixel((int(x), int(y))) == pytest.approx(expected, abs=3)
        shades.add(round(opacity, 2))
    assert len(shades) > 10
