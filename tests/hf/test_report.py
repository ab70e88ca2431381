"""The report of a model that from_pretrained has quantized."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate.report import Perplexity, from_record
from hf_gptq_plugin.hf.report import write_report

PACKED = ("qweight", "qzeros", "scales", "g_idx")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_report_is_of_this_calibration(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    config = GPTQConfig(
        bits=4, group_size=40, dataset=windows, samples=6, seqlen=32, preset="fast", damp_percent=0.02,
        dynamic={r"+:.*\.0\..*proj.*": {"bits": 3, "group_size": -1}},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny(kind), quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert write_report(tmp_path, model) == tmp_path / "calibration.html"
    content = json.loads((tmp_path / "calibration.json").read_text())
    reports = model.hf_quantizer.reports
    assert [from_record(record) for record in content["modules"]] == reports
    with (tmp_path / "calibration.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [report.name for report in reports]
    assert [float(row["relative_error"]) for row in rows] == [report.solve.relative_error for report in reports]
    for report in reports:
        layer = model.get_submodule(report.name)
        assert (report.in_features, report.out_features) == (layer.in_features, layer.out_features)
        assert report.spec == layer.spec
        assert report.solve.loss > 0
    # Sizes are those on disk.
    state = load_file(tmp_path / "model.safetensors")
    packed = sum(t.nbytes for name, t in state.items() if name.endswith(PACKED))
    other = sum(t.numel() for name, t in state.items() if not name.endswith(PACKED))
    assert (content["totals"]["bytes_quantized"], content["other_parameters"]) == (packed, other)
    # What was asked for, and nothing of this machine.
    assert content["model"] == tiny(kind).name
    assert (content["settings"]["preset"], content["settings"]["damp_percent"]) == ("fast", 0.02)
    assert (content["settings"]["descent"], content["settings"]["scales_dtype"]) == (0, "float16")
    assert content["data"]["tokens"] == sum(len(w) for w in windows[:6]) == content["totals"]["tokens_most"]
    assert content["seconds"] > content["totals"]["solve_seconds"] > 0
    for name in ("calibration.html", "calibration.json", "calibration.csv"):
        assert str(tiny(kind).parent) not in (tmp_path / name).read_text(encoding="utf-8")


def test_nothing_tells_of_an_earlier_quantization(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    """Card and report are of the weights that they lie beside; a card of one's own stays."""

    def quantized(bits: int) -> Any:
        config = GPTQConfig(bits=bits, group_size=32, dataset=windows, samples=4, preset="fast")
        return AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype=torch.float32)

    first, files = quantized(4), [tmp_path / f"calibration.{kind}" for kind in ("csv", "html", "json")]
    first.save_pretrained(tmp_path)
    write_report(tmp_path, first, Perplexity("held-out.txt", 1, 64, 64, 256.5, 258.25))
    card = (tmp_path / "README.md").read_text()
    assert "4-bit" in card and "258.25" in card and all(file.exists() for file in files)
    # Of the same weights they stay, saved again or loaded and saved.
    first.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card and all(file.exists() for file in files)
    quantized(2).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "2-bit" in card and "4-bit" not in card and "258.25" not in card
    assert not any(file.exists() for file in files)
    (tmp_path / "README.md").write_bytes(b"m\xeene")  # not UTF-8
    quantized(3).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"m\xeene"


def test_a_model_that_was_only_loaded(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with pytest.raises(ValueError, match="LlamaForCausalLM was not calibrated in this process"):
        write_report(tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []
