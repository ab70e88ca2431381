"""The command line: what it writes, what it prints, how it fails."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from byte_tokenizer import byte_tokenizer
from children import TORCHRUN, launched
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_gptq_cli import app, choices, main
from hf_gptq_plugin import GPTQConfig, config, diagnose
from hf_gptq_plugin.calibrate import sources
from hf_gptq_plugin.convert import gguf_blocks, layouts
from hf_gptq_plugin.demo import texts
from hf_gptq_plugin.solve import gptq, scales
from hf_gptq_plugin.train.loop import TrainSettings

# PEFT 0.21 uses names that Transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    """A tiny llama with a tokenizer of single bytes beside it."""
    folder = tiny("llama", initializer_range=0.05)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(texts()[0][:20_000], encoding="utf-8")
    return path


Run = Callable[..., "Result"]


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def hf_gptq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command's entry point in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hf-gptq", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def test_every_part_of_the_solver_can_be_set(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    done = hf_gptq(
        "quantize", model, tmp_path / "out", "--group-size", 32, "--calibration", text, "--samples", 4, "--seqlen", 64,
        "--preset", "best", "--order", "natural", "--scale-search", "minmax", "--damp-percent", 0.02,
        "--generated", 0.75, "--token-weights", "uniform", "--output-hessian", "identity", "--propagation", 0.25,
        "--alternations", 2, "--descent", 1, "--no-refit", "--block-epochs", 0, "--model-epochs", 1, "--no-report",
    )  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["damp_percent"] == 0.02
    expected = {
        "order": "natural", "scale_search": "minmax", "generated": 0.75, "token_weights": "uniform",
        "output_hessian": "identity", "propagation": 0.25, "alternations": 2, "descent": 1, "refit": False,
        "block_epochs": 0, "model_epochs": 1,
    }  # fmt: skip
    assert written["meta"]["solver"].items() >= expected.items()


def test_quantize_then_eval(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    done = hf_gptq(
        "quantize", model, tmp_path / "out", "--bits", 3, "--group-size", 32, "--asym", "--desc-act",
        "--calibration", text, "--samples", 4, "--seqlen", 64, "--seed", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "Quantized 14 layers to 3 bit" in done.out
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["bits"], written["sym"], written["desc_act"]) == (3, False, True)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    done = hf_gptq("eval", tmp_path / "out", "--text", text, "--windows", 3, "--seqlen", 64, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    # The same, by hand.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][: 3 * 64]).view(3, 64)
    with torch.no_grad():
        logprobs = loaded(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    nll = -logprobs.gather(2, ids[:, 1:, None]).mean()
    assert report["tokens"] == 192
    assert report["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)

    done = hf_gptq("convert", tmp_path / "out", tmp_path / "natural", "--to", "gptq_v2", "--natural-order")
    assert done.code == 0, done.err
    assert "2 modules leave act-order: model.layers.*.mlp.down_proj." in done.out
    assert "2 modules stay in act-order, model.layers.*.self_attn.o_proj: groups take channels of several" in done.out
    assert "bit for bit in float32, but for the order of channels" in done.out
    told = json.loads(
        hf_gptq("convert", tmp_path / "natural", tmp_path / "n", "--to", "gptq_v2", "--natural-order", "--json").out
    )
    assert told["natural"] == [] and len(told["act_order"]) == 12


def test_what_is_not_the_commands_own_stays(
    hf_gptq: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, journal = tmp_path / "m", tmp_path / "out", tmp_path / "out.journal"
    shutil.copytree(model, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    options = ("--method", "rtn", "--group-size", 32)
    monkeypatch.chdir(source)
    for place in (source, "."):
        result = hf_gptq("quantize", source, place, *options)
        assert result.code == 1 and "is MODEL, whose dense weights would be lost; name another folder" in result.err
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    journal.mkdir()
    (journal / "mine.txt").write_text("mine")
    assert hf_gptq("quantize", model, out, *options).code == 0
    assert (journal / "mine.txt").read_text() == "mine"
    # A run with a journal of its own takes that with it, and the folder only where nothing else is in it.
    shutil.rmtree(journal)
    few = ("--group-size", 32, "--calibration", text, "--samples", 2, "--seqlen", 32, "--preset", "fast")
    assert hf_gptq("quantize", model, out, *few).code == 0 and not journal.exists()


def test_low_memory(hf_gptq: Run, model: Path, text: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Fused experts, too, whose weights are written in another form before they are worked on."""
    source = tmp_path / "mixtral"
    shutil.copytree(tiny("mixtral"), source)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, source)
    few = ("--group-size", 32, "--calibration", text, "--samples", 2, "--seqlen", 32, "--preset", "fast")
    states = []
    for option in ((), ("--low-memory",)):
        out = tmp_path / f"out{len(states)}"
        result = hf_gptq("quantize", source, out, *few, *option)
        assert result.code == 0, result.err
        states.append({n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral", "out0", "out1"]
    assert states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    result = hf_gptq("quantize", source, tmp_path / "out2", *few, "--low-memory", "--device-map", "auto")
    assert result.code == 1 and "--low-memory works on one; name it" in result.err
    result = hf_gptq("quantize", source, tmp_path / "out2", *few, "--low-memory", "--eval-text", text)
    assert result.code == 1 and "run hf-gptq eval on MODEL and on OUT afterwards" in result.err


@pytest.mark.parametrize("mine", ["notes.txt", "model.safetensors", "model-00001-of-00002.safetensors", "v0.1.dat"])
def test_offloading_spares_what_is_not_its_own(
    hf_gptq: Run, model: Path, text: Path, tmp_path: Path, mine: str
) -> None:
    few = ("--group-size", 32, "--calibration", text, "--samples", 2, "--seqlen", 32, "--preset", "fast")
    run = ("quantize", model, tmp_path / "out", *few, "--low-memory")
    offload = tmp_path / "out.offload"
    offload.mkdir()
    left = (
        ".tmpAbC123",
        "index.json",
        "lm_head.weight.dat",
        "model.layers.0.mlp.gate_up_proj.safetensors",
    )  # by a killed run
    for name in (*left, mine):
        (offload / name).write_text("")
    result = hf_gptq(*run)
    assert result.code == 1 and f"{offload} is where" in result.err and f"holds '{mine}'; move that" in result.err
    assert sorted(path.name for path in offload.iterdir()) == sorted((*left, mine)) and not (tmp_path / "out").exists()
    (offload / mine).unlink()
    assert hf_gptq(*run).code == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]
    offload.write_text("mine")
    assert hf_gptq(*run).code == 1 and offload.read_text() == "mine"


def test_what_is_quantized_already_is_not_quantized(
    hf_gptq: Run, four_bit: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    assert hf_gptq("convert", four_bit, tmp_path / "awq", "--to", "awq").code == 0
    for source, method in ((four_bit, "gptq"), (tmp_path / "awq", "awq")):
        result = hf_gptq("quantize", source, tmp_path / "out", "--calibration", text)
        assert result.code == 1 and f"is quantized already (quant_method={method}), not dense" in result.err
        assert f"hf-gptq convert {source} DENSE --to dense" in result.err
    other = shutil.copytree(model, tmp_path / "nested")
    header = json.loads((other / "config.json").read_text())
    header["text_config"] = {"quantization_config": {"quant_method": "fp8"}}
    (other / "config.json").write_text(json.dumps(header))
    result = hf_gptq("quantize", other, tmp_path / "out", "--calibration", text)
    assert result.code == 1 and "(quant_method=fp8), not dense; name the dense model" in result.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.journal").exists()


def test_codes_without_their_config_are_refused(hf_gptq: Run, four_bit: Path, text: Path, tmp_path: Path) -> None:
    """Transformers would give the layers random weights."""
    header = json.loads((four_bit / "config.json").read_text())
    quantization = header.pop("quantization_config")
    unknown = {**header, "quantization_config": {**quantization, "quant_method": "gptq_v2"}}
    for broken, reason in ((header, "has no quantization_config"), (unknown, "says quant_method='gptq_v2'")):
        damaged = shutil.copytree(four_bit, tmp_path / "damaged", dirs_exist_ok=True)
        (damaged / "config.json").write_text(json.dumps(broken))
        for command in (("eval", damaged), ("verify", four_bit, damaged)):
            result = hf_gptq(*command, "--text", text, "--seqlen", 64)
            assert result.code == 1 and f"config.json {reason}" in result.err and ".qweight; restore" in result.err
    (damaged / "config.json").write_text(json.dumps(header))
    result = hf_gptq("quantize", damaged, tmp_path / "out", "--method", "rtn", "--group-size", 32)
    assert result.code == 1 and "has no quantization_config" in result.err


def test_out_that_cannot_be_written_is_told_first(
    hf_gptq: Run, four_bit: Path, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritable(folder: Path) -> Callable[..., Any]:
        def create(*_: Any, dir: Path, **options: Any) -> Any:
            if dir == folder:  # as root, nothing is read-only
                raise PermissionError(13, "Permission denied")
            return real(*_, dir=dir, **options)

        return create

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_: pytest.fail("has begun to work"))
    real = tempfile.NamedTemporaryFile
    (tmp_path / "a" / "out").mkdir(parents=True)
    cases = [(tmp_path / "a" / "out", tmp_path / "a" / "out"), (tmp_path / "a" / "out", tmp_path / "a")]
    cases += [(tmp_path / "a" / "b" / "c", tmp_path / "a")]
    for out, folder in cases:
        monkeypatch.setattr("tempfile.NamedTemporaryFile", unwritable(folder))
        for command in (("quantize", model, out), ("train", four_bit, out, "--data", text)):
            result = hf_gptq(*command)
            expected = f"OUT={str(out)!r} cannot be written: {folder}: Permission denied; make it writable"
            assert result.code == 1 and expected in result.err
        assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "out"]
    result = hf_gptq("quantize", model, text / "out")
    assert result.code == 1 and f"cannot be written: {text}: Not a directory" in result.err


def test_paths_are_not_markup(
    hf_gptq: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copy = tmp_path / "o[/b] [red]x", tmp_path / "z[int4] :smile:"
    result = hf_gptq("quantize", model, out, "--method", "rtn", "--group-size", 32)
    assert result.code == 0 and out.name in result.out, result.err
    result = hf_gptq("convert", out, copy, "--to", "gptq_v2")
    assert result.code == 0 and copy.name in result.out, result.err
    page = tmp_path / "[/]c.html"
    common = ("--text", text, "--windows", 1, "--seqlen", 32, "--no-speed")
    result = hf_gptq("compare", out, copy, *common, "--out", page)
    assert result.code == 0 and all(path.name in result.out for path in (out, copy, page)), result.err
    told = hf_gptq("inspect", tmp_path / "a" / "b[/] :smile:").err
    assert "b[/] :smile:" in told
    rows = [diagnose.Finding("note", "native library", "/opt/[gpu]/x[/]")]
    monkeypatch.setattr(diagnose, "findings", lambda: rows)
    assert "/opt/[gpu]/x[/]" in hf_gptq("doctor").out


def test_windows_longer_than_the_model_was_made_for(hf_gptq: Run, model: Path, text: Path) -> None:
    result = hf_gptq("eval", model, "--text", text, "--windows", 1, "--seqlen", 160)
    assert result.code == 0 and "windows of 160 tokens are longer than the 128 that the model was made" in result.err
    assert "warning" not in hf_gptq("eval", model, "--text", text, "--windows", 1, "--seqlen", 128).err


def test_logits_that_are_no_numbers(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    run = ("verify", broken, model, "--text", text, "--windows", 1, "--seqlen", 32)
    assert json.loads(hf_gptq(*run, "--json").out)["largest"] is None
    assert "nan at most" in hf_gptq(*run).out


def test_devices_that_are_not_there(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    few = ("--windows", 1, "--seqlen", 32, "--text", text)
    for command in (
        ("quantize", model, tmp_path / "out"), ("eval", model, *few), ("verify", model, model, *few), ("bench", model),
        ("compare", model, *few),
    ):  # fmt: skip
        result = hf_gptq(*command, "--device-map", "cuda:99")
        assert result.code == 1 and "ValueError: --device-map='cuda:99' cannot be used (" in result.err
        assert "unexpected" not in result.err and result.err.count("\n") == 1


def test_files_of_rows_and_methods_without_data(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": line}) for line in text.read_text().split("\n\n")))
    done = hf_gptq(
        "quantize", model, tmp_path / "a", "--group-size", 32, "--calibration", rows, "--samples", 4, "--seqlen", 64
    )
    assert done.code == 0, done.err
    meta = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["meta"]
    assert {k: v for k, v in meta["calibration"].items() if k != "sha256"} == {
        "dataset": "rows.jsonl", "windows": 4, "seqlen": 64, "tokens": 256, "seed": 0, "packing": "concat",
    }  # fmt: skip
    assert len(meta["calibration"]["sha256"]) == 64
    done = hf_gptq("quantize", model, tmp_path / "b", "--group-size", 32, "--method", "hqq")
    assert done.code == 0, done.err
    meta = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["meta"]
    assert meta["solver"]["method"] == "hqq" and "calibration" not in meta


def test_quantize_reports(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    base = ("--bits", 3, "--group-size", 32, "--calibration", text, "--samples", 4, "--seqlen", 64)
    base += ("--dtype", "float32")  # that of `eval`
    windows = ("--eval-text", text, "--eval-windows", 2, "--eval-seqlen", 32)
    done = hf_gptq("quantize", model, tmp_path / "out", *base, *windows)
    assert done.code == 0, done.err
    assert "calibration.html" in done.out.replace("\n", "")
    quality = json.loads((tmp_path / "out" / "calibration.json").read_text())["perplexity"]
    assert {k: quality[k] for k in ("text", "windows", "seqlen", "tokens")} == {
        "text": text.name, "windows": 2, "seqlen": 32, "tokens": 64
    }  # fmt: skip
    for folder, key in ((model, "dense"), (tmp_path / "out", "quantized")):
        by_itself = hf_gptq("eval", folder, "--text", text, "--windows", 2, "--seqlen", 32, "--json")
        assert quality[key] == pytest.approx(json.loads(by_itself.out)["perplexity"], rel=1e-5)
    assert quality["dense"] != quality["quantized"]
    assert hf_gptq("quantize", model, tmp_path / "bare", *base, "--no-report").code == 0
    assert not list((tmp_path / "bare").glob("calibration.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "awq"), "method='awq' is not supported; use one of gptq, rtn, hqq"),
        (("--bits", 5), "bits=5 is not supported"),
        (("--group-size", 0), "group_size=0 is not supported"),
        (("--calibration", "missing.txt"), "dataset='missing.txt' is neither a file nor the name of a data set"),
        (("--samples", 0), "samples=0 must be an integer of at least 1"),
        (("--eval-text", "missing.txt"), "missing.txt: there is no such file"),
        (("--dtype", "int8"), "--dtype='int8' is not supported"),
        (("--format", "marlin"), "checkpoint_format='marlin' is not supported"),
        (("--dynamic", "rules.json"), "--dynamic='rules.json' is neither a JSON object nor a file"),
        (("--dynamic", '{"a": '), "--dynamic is no JSON: "),
        (("--dynamic", '{"a": {"bits": 5}}'), "dynamic['a']: bits=5 is not supported"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[object, ...], message: str, hf_gptq: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    base = () if "--calibration" in arguments else ("--calibration", text)
    done = hf_gptq("quantize", model, tmp_path / "out", *base, *arguments)
    assert done.code == 1
    assert message in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_rules_for_single_layers(hf_gptq: Run, model: Path, tmp_path: Path) -> None:
    rules = {".*down_proj": {"bits": 8}, "-:.*layers\\.0\\.": {}}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    for name, given in (("text", json.dumps(rules)), ("file", tmp_path / "rules.json")):
        done = hf_gptq("quantize", model, tmp_path / name, "--method", "rtn", "--group-size", 32, "--dynamic", given)
        assert done.code == 0, done.err
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert written["bits"] == 4 and list(written["dynamic"].items()) == list(rules.items())
        assert json.loads((tmp_path / name / "quantize_config.json").read_text()) == written
        tensors = load_file(tmp_path / name / "model.safetensors")
        words = {leaf: tensors[f"model.layers.1.mlp.{leaf}.qweight"].shape[0] for leaf in ("down_proj", "up_proj")}
        assert words == {"down_proj": 160 * 8 // 32, "up_proj": 96 * 4 // 32}
        # The first rule that matches counts.
        assert "model.layers.0.mlp.up_proj.weight" in tensors and "model.layers.0.mlp.down_proj.qweight" in tensors
    assert hf_gptq("convert", tmp_path / "file", tmp_path / "v2", "--to", "gptq_v2").code == 0
    assert hf_gptq("convert", tmp_path / "v2", tmp_path / "v1", "--to", "gptq").code == 0
    again = load_file(tmp_path / "v1" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], value) for key, value in tensors.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "file").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_bytes() == (tmp_path / "file" / "config.json").read_bytes()


def test_where_an_error_arose(hf_gptq: Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_GPTQ_TRACEBACK", "1")
    done = hf_gptq("quantize", "nowhere", "out", "--bits", 5, "--calibration", text)
    assert done.code == 1 and "Traceback" in done.err and done.err.rstrip().endswith("use one of 2, 3, 4, 8")


def test_an_error_nobody_foresaw_is_one_line_too(
    hf_gptq: Run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_gptq_plugin.hf.evaluate.sliding_windows", lambda *_: {}["[bold] gone"])
    done = hf_gptq("eval", model, "--text", text)
    assert done.code == 1 and "KeyError: '[bold] gone' (unexpected: " in done.err and "Traceback" not in done.err
    monkeypatch.setenv("HF_GPTQ_TRACEBACK", "1")
    assert "Traceback" in hf_gptq("eval", model, "--text", text).err


def test_a_model_that_is_not_there(hf_gptq: Run, text: Path, tmp_path: Path) -> None:
    done = hf_gptq("quantize", tmp_path / "nowhere", tmp_path / "out", "--calibration", text)
    assert done.code == 1 and f"{str(tmp_path / 'nowhere')!r}: there is no such folder" in done.err
    for command in (
        ("eval", "./nowhere", "--text", text),
        ("bench", "../nowhere"),
        ("verify", ".", "~/x", "--text", text),
    ):
        result = hf_gptq(*command)
        assert result.code == 1 and "there is no such folder" in result.err and "huggingface.co" not in result.err


def test_errors_of_several_lines_are_one(
    hf_gptq: Run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("one\n\n  two\nthree\n")

    monkeypatch.setattr("hf_gptq_plugin.hf.evaluate.sliding_windows", fail)
    done = hf_gptq("eval", model, "--text", text)
    assert done.code == 1 and done.err == "error: ValueError: one two three\n"


def test_text_that_is_not_text(hf_gptq: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff\xfe")
    done = hf_gptq("eval", model, "--text", tmp_path / "bad.txt")
    assert done.code == 1 and "is not UTF-8 text" in done.err


def test_doctor(hf_gptq: Run) -> None:
    parts = {row["part"]: row for row in json.loads(hf_gptq("doctor", "--json").out)["checks"]}
    assert parts["transformers"]["state"] == "ok"
    assert {"native library", "threads", "torch", "vllm", "peft"} <= set(parts)
    assert "native library" in hf_gptq("doctor").out


def test_help_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_gptq_cli", "quantize", "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=sys.prefix,
    )
    assert done.returncode == 0 and "--group-size" in done.stdout


@pytest.fixture(scope="module")
def four_bit(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four") / "bit"
    command = [sys.executable, "-c", "from hf_gptq_cli import main; main()", "quantize", model, out]
    subprocess.run(
        [*map(str, command), "--method", "rtn", "--group-size", "32", "--asym", "--format", "gptq_v2"], check=True
    )
    return out


def test_help_shows_the_defaults_and_choices_of_the_library() -> None:
    fields = inspect.signature(GPTQConfig).parameters
    assert {name: fields[name].default for name in choices.DEFAULT} == choices.DEFAULT
    assert {name: getattr(TrainSettings, name) for name in choices.TRAINING} == choices.TRAINING
    assert choices.METHODS == config.METHODS
    assert choices.PRESETS == tuple(config.PRESETS)
    assert choices.TOKEN_WEIGHTS == config.TOKEN_WEIGHTS
    assert choices.OUTPUT_HESSIANS == config.OUTPUT_HESSIANS
    assert choices.ORDERS == gptq.ORDERS
    assert choices.SEARCHES == scales.METHODS
    assert choices.DATASETS == tuple(sources.NAMED)
    assert choices.LAYOUTS == layouts.TARGETS
    assert choices.GGUF_TYPES == gguf_blocks.TYPES


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


def test_every_command_has_an_example() -> None:
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        assert f"hf-gptq {name}" in command.help, name
        assert all(parameter.help for parameter in command.params), name


def test_completion(hf_gptq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # there may be no shell above this process
    script = hf_gptq("--show-completion", "bash")
    assert script.code == 0 and "_HF_GPTQ_COMPLETE" in script.out
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'hf-gptq'; from hf_gptq_cli import main; main()"],
        env={**os.environ, "_HF_GPTQ_COMPLETE": "complete_bash", "COMP_WORDS": "hf-gptq co", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["convert", "compare"]


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


@pytest.mark.parametrize("method", ["lora", "qa-lora", "eetq"])
def test_train(hf_gptq: Run, four_bit: Path, text: Path, tmp_path: Path, method: str) -> None:
    settings = ("--data", text, "--samples", 20, "--seqlen", 48, "--steps", 6, "--rate", 1e-2, "--json")
    rank = () if method == "eetq" else ("--rank", 4)
    result = hf_gptq("train", four_bit, tmp_path / "out", "--method", method, *rank, *settings)
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert found["after"] < found["before"] and found["layers"] == 14 and found["difference"] < 1e-4
    assert len(found["losses"]) == 6
    assert not (tmp_path / "out.training").exists()
    if method == "eetq":
        assert hf_gptq("inspect", tmp_path / "out").code == 0
    else:
        assert found["folder"] == str(four_bit)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter"]
        assert (tmp_path / "out/adapter/adapter_config.json").exists()


def test_training_a_dense_model_quantizes_it_first(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    command = ("train", model, tmp_path / "out", "--data", text, "--samples", 12, "--seqlen", 48, "--steps", 2)
    result = hf_gptq(*command, "--method", "ste", "--group-size", 32, "--preset", "fast")
    assert result.code == 0, result.err
    assert "Held-out loss" in result.out and "vllm serve" in result.out
    assert hf_gptq("inspect", tmp_path / "out").code == 0
    # On the windows it trains on: the twelfth is held out, and the text would give more.
    read = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["meta"]["calibration"]
    assert (read["windows"], read["tokens"]) == (11, 11 * 48)
    result = hf_gptq(*command, "--method", "lisa")
    assert result.code == 1 and "use one of lora, affine" in result.err
    result = hf_gptq("train", tmp_path / "out", tmp_path / "x", "--data", text, "--seqlen", 48, "--rank", 4000)
    assert result.code == 1 and "rank=4000 must be an integer from 1 to" in result.err


# The command, killed in front of one of its renames, which is where something becomes finished.
KILLED = """
import atexit, os, signal, sys
place, renames = int(sys.argv[1]), [0]
def watch(event, arguments):
    if event == "os.rename":
        renames[0] += 1
        if renames[0] == place:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
atexit.register(lambda: print("renames", renames[0], file=sys.stderr))
from hf_gptq_cli import main
main(sys.argv[2:])
"""


def test_same_bytes_for_any_number_of_threads_and_after_any_kill(model: Path, text: Path, tmp_path: Path) -> None:
    """`best`, with every step that a preset has."""
    arguments = (
        "--bits", 3, "--group-size", 32, "--preset", "best", "--block-epochs", 1, "--model-epochs", 1,
        "--calibration", text, "--samples", 4, "--seqlen", 32,
    )  # fmt: skip

    def run(name: str, place: int = 0, threads: int = 1) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(place), "quantize", *map(str, (model, tmp_path / name, *arguments))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode, int(done.stderr.split("renames ")[-1]) if done.returncode == 0 else 0

    code, renames = run("whole")
    assert code == 0 and renames > 8
    assert run("threads", threads=2)[0] == 0
    # Each attempt comes some renames further than the one before, or ends: the last ones move OUT's own files.
    kills = 0
    for place in (renames // 3, renames // 3, renames // 4, 3):
        if run("killed", place)[0] == 0:
            break
        kills += 1
    assert kills >= 3
    assert run("killed")[0] == 0
    files = ("model.safetensors", "config.json", "quantize_config.json")
    wanted = [(tmp_path / "whole" / name).read_bytes() for name in files]
    for other in ("threads", "killed"):
        assert [(tmp_path / other / name).read_bytes() for name in files] == wanted, other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "threads", "whole"]


def test_launchers_share_the_text(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--preset", "fast", "--group-size", 32, "--calibration", text, "--samples", 7, "--seqlen", 32)
    launchers = {
        "torchrun": TORCHRUN,
        "accelerate": (
            "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--multi_gpu", "--main_process_ip", "127.0.0.1", "--main_process_port",
        ),
    }  # fmt: skip
    for name, launcher in launchers.items():
        told = launched(("quantize", model, tmp_path / name, *arguments), launcher)
        assert told.count("Quantized 14 layers") == 1  # the first process alone tells
        lines = (tmp_path / name / "calibration.csv").read_text().splitlines()
        column = lines[0].split(",").index("tokens")
        assert {int(line.split(",")[column]) for line in lines[1:]} == {2 * 3 * 32}  # every Hessian, of both
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in launchers]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accelerate", "torchrun"]
