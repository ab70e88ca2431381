"""What a calibration did to every module: as records, as CSV and JSON, and as a page to look at."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..format.checkpoint import written_whole
from ..format.spec import QuantSpec
from ..solve.gptq import SolveReport
from .page import render
from .places import type_names

FILES = ("calibration.csv", "calibration.json", "calibration.html")
VERSION = 1  # of calibration.json

_SPEC = {name: name for name in ("bits", "group_size", "sym", "desc_act")} | {"format": "checkpoint_format"}
_SOLVE = ("relative_error", "loss", "damp_percent", "dead_columns", "seconds")


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Args:
        name: in the model.
        spec: how it is quantized.
        tokens: calibration tokens that its Hessian saw; 0 where it was quantized without any.
        solve: what the solver reported.
        in_features, out_features: `K` and `N`.
        note: what a reader should know about this layer beyond the numbers, e.g. that it was rounded to nearest.
    """

    name: str
    spec: QuantSpec
    tokens: int
    solve: SolveReport
    in_features: int
    out_features: int
    note: str = ""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on held-out text, measured before and after on the same windows.

    Args:
        text: name of the text.
        windows, seqlen, tokens: how much of it was read.
        dense, quantized: perplexity before and after; None where not measured.
    """

    text: str
    windows: int
    seqlen: int
    tokens: int
    dense: float | None
    quantized: float | None


@dataclass(frozen=True)
class Header:
    """What holds for a calibration as a whole. Every field may stay empty. It names no machine, path or date.

    Args:
        model: name of the dense model.
        versions: of the libraries.
        settings: preset, solver and format, as JSON.
        data: the calibration text: data set, windows, seqlen, tokens, seed.
        perplexity: where it was measured.
        seconds: wall time of the whole calibration, forward passes included.
        other_parameters: parameters of the model that are not quantized.
    """

    model: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    perplexity: Perplexity | None = None
    seconds: float | None = None
    other_parameters: int | None = None


def to_record(report: LayerReport) -> dict[str, Any]:
    """A report as flat JSON; `from_record` gives it back. Numbers that are not finite become None."""
    return {
        "name": report.name,
        **{key: getattr(report.spec, name) for key, name in _SPEC.items()},
        "in_features": report.in_features,
        "out_features": report.out_features,
        "tokens": report.tokens,
        **{key: _finite(getattr(report.solve, key)) for key in _SOLVE},
        "note": report.note,
    }


def from_record(record: Mapping[str, Any]) -> LayerReport:
    """The report that `to_record` made this of; numbers that were not finite come back as NaN.

    Raises:
        ValueError: a field that is missing, or a spec that cannot be.
    """
    try:
        spec = QuantSpec(**{name: record[key] for key, name in _SPEC.items()})
        numbers: dict[str, Any] = {key: math.nan if record[key] is None else record[key] for key in _SOLVE}
        rest = {name: record[name] for name in ("name", "tokens", "in_features", "out_features", "note")}
    except KeyError as error:
        raise ValueError(
            f"the record of {record.get('name', 'a layer')!r} has no field {error}; it was written by another version: "
            "calibrate again"
        ) from None
    return LayerReport(spec=spec, solve=SolveReport(**numbers), **rest)


def write_report(folder: str | Path, reports: Sequence[LayerReport], header: Header | None = None) -> Path:
    """Write `calibration.csv`, `calibration.json` and `calibration.html`, or nothing.

    The CSV has a line for every module. The JSON has the header, totals, sums by module type and the same records. The
    page is drawn from the JSON alone and loads nothing from elsewhere.

    Args:
        folder: made where it is missing; older reports in it are replaced.
        reports: as `quantize_model` returns them, in the order in which they were solved.
        header: what holds for all of them.

    Returns:
        The page's path.

    Raises:
        ValueError: no reports.
    """
    if not reports:
        raise ValueError("reports=[] is empty; a report is written of a model that was calibrated in this process")
    content = assemble(reports, header or Header())
    with written_whole(folder) as staging:
        with (staging / FILES[0]).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(content["modules"][0]))
            writer.writeheader()
            writer.writerows(content["modules"])
        (staging / FILES[1]).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (staging / FILES[2]).write_text(render(content), encoding="utf-8")
    return Path(folder) / FILES[2]


def assemble(reports: Sequence[LayerReport], header: Header) -> dict[str, Any]:
    """The content of `calibration.json`."""
    content = {
        "version": VERSION,
        **asdict(header),
        "totals": _summary(reports),
        "types": [{"type": name, **_summary(group)} for name, group in by_type(reports).items()],
        "modules": [to_record(report) for report in reports],
    }
    # As a reader will get it. JSON knows no NaN and no infinity.
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def by_type(reports: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """Reports by the type of their module, in order of first appearance; see `type_names`."""
    reports = list(reports)
    names = type_names([report.name for report in reports])
    groups: dict[str, list[LayerReport]] = {}
    for report in reports:
        groups.setdefault(names[report.name], []).append(report)
    return groups


def packed_bytes(report: LayerReport) -> int:
    """Bytes of a layer's canonical tensors, scales in 16 bits."""
    shapes = report.spec.shapes(report.in_features, report.out_features)
    return sum(math.prod(shape) * (2 if leaf == "scales" else 4) for leaf, shape in shapes.items())


def _summary(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """Sums over modules; sizes are those of their weights, before at 16 bits each whatever dtype they came in."""
    weights = sum(r.in_features * r.out_features for r in reports)
    packed = sum(map(packed_bytes, reports))
    errors = [r for r in reports if math.isfinite(r.solve.relative_error)]
    worst = max(errors, key=lambda r: r.solve.relative_error, default=None)
    return {
        "modules": len(reports),
        "bits": sorted({r.spec.bits for r in reports}),
        "weights": weights,
        "bytes_16_bit": 2 * weights,
        "bytes_quantized": packed,
        "bits_per_weight": 8 * packed / weights,
        "relative_error_median": statistics.median(r.solve.relative_error for r in errors) if errors else None,
        "relative_error_worst": worst.solve.relative_error if worst else None,
        "worst_module": worst.name if worst else None,
        "loss": _finite(sum(r.solve.loss for r in reports)),
        "tokens_least": min(r.tokens for r in reports),
        "tokens_most": max(r.tokens for r in reports),
        "dead_columns": sum(r.solve.dead_columns for r in reports),
        "solve_seconds": sum(r.solve.seconds for r in reports),
    }


def _finite(value: Any) -> Any:
    return value if math.isfinite(value) else None
