"""The commands on finished checkpoints: inspect, convert, verify, compare."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from command import Run
from safetensors.torch import load_file, save_file


def test_inspect(hf_gptq: Run, four_bit: Path, tmp_path: Path) -> None:
    result = hf_gptq("inspect", four_bit)
    assert result.code == 0
    assert "gptq_v2" in result.out and "LlamaForCausalLM" in result.out
    assert "14: bits 4, group_size 32, sym False, desc_act False" in result.out
    assert "no: asymmetric, v2 zeros" in result.out
    found = json.loads(hf_gptq("inspect", four_bit, "--json").out)
    assert found["layout"] == "gptq_v2" and found["problems"] == []
    result = hf_gptq("inspect", tmp_path / "no" / "where" / "at all")
    assert result.code == 1 and "neither a folder nor a Hub name" in result.err


def test_convert_and_verify(hf_gptq: Run, four_bit: Path, model: Path, text: Path, tmp_path: Path) -> None:
    result = hf_gptq("convert", four_bit, tmp_path / "awq", "--to", "awq")
    assert result.code == 0 and "All 14 modules are what they were" in result.out
    result = hf_gptq("convert", tmp_path / "awq", tmp_path / "dense", "--to", "dense", "--dtype", "bfloat16")
    assert "14 of 14 modules changed: weights rounded to bfloat16" in result.out
    given = json.loads(hf_gptq("convert", tmp_path / "awq", tmp_path / "back", "--to", "gptq_v2", "--json").out)
    assert given["from"] == "awq" and all(module["exact"] for module in given["modules"])

    settings = ("--text", text, "--windows", 2, "--seqlen", 64)
    same = json.loads(hf_gptq("verify", tmp_path / "back", four_bit, *settings, "--json").out)
    assert same["agreement"] == 1 and same["divergence"] == pytest.approx(0, abs=1e-9) and same["tokens"] == 126
    result = hf_gptq("verify", four_bit, model, *settings, "--max-divergence", 1e-12)
    assert result.code == 3 and "KL divergence" in result.out
    assert hf_gptq("verify", four_bit, model, *settings, "--max-divergence", 1e3).code == 0
    result = hf_gptq("convert", four_bit, tmp_path / "x", "--to", "exl2")
    assert result.code == 1 and "use one of gptq, gptq_v2" in result.err


def test_convert_tells_of_rounded_tensors(hf_gptq: Run, four_bit: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(four_bit, tmp_path / "q"))
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("scales"):
            tensors[name] = torch.full_like(value, 2**-5)  # exact in bfloat16
        elif name == "model.norm.weight":
            tensors[name] = torch.ones(value.shape) + 2**-10
        elif value.is_floating_point():
            tensors[name] = value.bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = hf_gptq("convert", source, tmp_path / "dense", "--to", "dense")
    assert "All 14 modules are what they were, bit for bit in float32." in result.out
    others = sum(not name.endswith(("qweight", "qzeros", "scales", "g_idx")) for name in tensors)
    told = f"1 of {others} tensors that were never quantized changed: rounded to bfloat16; at most 9.76e-04 relative to"
    assert f"{told} the tensor, in model.norm.weight." in " ".join(result.out.split())
    found = json.loads(hf_gptq("convert", source, tmp_path / "dense", "--to", "dense", "--json").out)
    assert [each["module"] for each in found["rounded"]] == ["model.norm.weight"] and len(found["modules"]) == 14


def test_codes_that_config_json_does_not_tell_of(
    hf_gptq: Run, four_bit: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    """As early AutoGPTQ wrote them. Transformers would leave the layers random, and training would quantize those."""
    source = Path(shutil.copytree(four_bit, tmp_path / "q"))
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    few = ("--text", text, "--windows", 1, "--seqlen", 32)
    for command in (
        ("eval", source, *few), ("bench", source), ("verify", source, model, *few),
        ("compare", model, source, *few, "--no-speed"),
        ("train", source, tmp_path / "t", "--data", text, "--samples", 12, "--seqlen", 48, "--steps", 1),
        ("plan", source, "--budget", "1GB"), ("quantize", source, tmp_path / "t", "--calibration", text),
    ):  # fmt: skip
        result = hf_gptq(*command)
        assert result.code == 1 and "config.json has no quantization_config, but the checkpoint holds" in result.err
        assert f"hf-gptq convert {source} OUT --to gptq" in result.err, command
    assert not (tmp_path / "t").exists()
    runs = json.loads(hf_gptq("inspect", source, "--json").out)["runs"]
    assert runs["hf_gptq_plugin"].startswith(f"after hf-gptq convert {source} OUT --to gptq_v2")
    assert runs["vLLM with this plugin"] == "yes, with --quantization hf_gptq"
    assert hf_gptq("convert", source, tmp_path / "told", "--to", "gptq_v2").code == 0
    assert json.loads(hf_gptq("inspect", tmp_path / "told", "--json").out)["runs"]["hf_gptq_plugin"] == "yes"
    assert hf_gptq("eval", tmp_path / "told", *few).code == 0
    (source / "quantize_config.json").unlink()
    assert "restore the config" in hf_gptq("eval", source, *few).err


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_tensors_that_are_missing(hf_gptq: Run, model: Path, text: Path, tmp_path: Path, lost: str) -> None:
    source = Path(shutil.copytree(model, tmp_path / "dense"))
    tensors = load_file(source / "model.safetensors")
    del tensors[lost]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    few = ("--text", text, "--windows", 1, "--seqlen", 32)
    text_windows = ("--calibration", text, "--samples", 4, "--seqlen", 32, "--group-size", 32)
    for command in (
        ("eval", source, *few), ("bench", source, "--prompt", 8, "--new", 2), ("verify", source, model, *few),
        ("compare", model, source, *few, "--no-speed"), ("quantize", source, tmp_path / "q", *text_windows),
        ("quantize", source, tmp_path / "q", *text_windows, "--low-memory"),
        ("quantize", source, tmp_path / "q", "--method", "rtn", "--group-size", 32),
        ("train", source, tmp_path / "t", "--data", text, "--samples", 12, "--seqlen", 48, "--steps", 1),
    ):  # fmt: skip
        result = hf_gptq(*command)
        assert result.code == 1 and f"{lost} is missing from the checkpoint; the checkpoint is incomplete" in result.err
    assert not (tmp_path / "q").exists() and not (tmp_path / "t").exists()


def test_names_that_no_encoding_has(four_bit: Path, tmp_path: Path) -> None:
    """Half a character of UTF-16, in a process of its own: its stdout is what is tested."""
    source = Path(shutil.copytree(four_bit, tmp_path / "q"))
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["\ud800"]}
    (source / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "hf_gptq_cli", "inspect", str(source)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "\\ud800" in done.stdout


def test_compare(hf_gptq: Run, four_bit: Path, model: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "c.html"
    common = ("--text", text, "--windows", 2, "--seqlen", 64)
    result = hf_gptq("compare", model, four_bit, *common, "--out", page, "--prompt", 32, "--new", 4, "--json")
    assert result.code == 0, result.err
    found = {row["name"]: row for row in json.loads(result.out)["models"]}
    assert set(found) == {model.name, four_bit.name}
    for folder in (model, four_bit):
        row = found[folder.name]
        alone = json.loads(hf_gptq("eval", folder, *common, "--json").out)
        assert row["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
        sizes = json.loads(hf_gptq("inspect", folder, "--json").out)
        assert row["size"] == sizes["quantized_bytes"] + sizes["dense_bytes"]
        assert row["bits"] == pytest.approx(8 * row["size"] / sizes["parameters"])
    assert found[model.name]["bits"] == 32 and found[four_bit.name]["bits"] < 16
    html = page.read_text()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == [] and html.count('class="dot main"') == 2 * 2  # for a wide and for a narrow window
    assert "http" not in html.replace("http-equiv", "")
    for row in found.values():
        assert f"{row['perplexity']:.4f}" in html and f"{row['bits']:.2f}" in html
    result = hf_gptq("compare", model, model, *common, "--out", page)
    assert result.code == 1 and "named twice" in result.err
    assert page.read_text() == html and [p.name for p in page.parent.iterdir()] == ["c.html"]
    before = text.read_text()
    result = hf_gptq("compare", model, four_bit, *common, "--out", text)
    assert result.code == 1 and "is the text itself" in result.err and text.read_text() == before


class Balanced(HTMLParser):
    """Elements that are still open; one closed out of turn is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "input", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_logits_that_are_no_numbers(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    run = ("verify", broken, model, "--text", text, "--windows", 1, "--seqlen", 32)
    assert json.loads(hf_gptq(*run, "--json").out)["largest"] is None
    assert "nan at most" in hf_gptq(*run).out


def test_exit_codes(hf_gptq: Run, four_bit: Path, tmp_path: Path) -> None:
    assert hf_gptq("inspect", four_bit).code == 0
    assert hf_gptq("inspect", tmp_path / "none" / "of" / "these").code == 1
    assert hf_gptq("inspect").code == 2
    damaged = shutil.copytree(four_bit, tmp_path / "damaged")
    header = json.loads((damaged / "config.json").read_text())
    header["num_hidden_layers"] = 3
    (damaged / "config.json").write_text(json.dumps(header))
    result = hf_gptq("inspect", damaged)
    assert result.code == 3 and "has no block 2" in result.out
    assert "Exit codes" in hf_gptq("--help").out
