"""What commands say: help, completion, doctor; one line for a mistake."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command import Run

from hf_gptq_cli import app, choices
from hf_gptq_plugin import GPTQConfig, config, diagnose
from hf_gptq_plugin.calibrate import sources
from hf_gptq_plugin.convert import gguf_blocks, layouts
from hf_gptq_plugin.solve import gptq, scales
from hf_gptq_plugin.train.loop import TrainSettings


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


def test_windows_longer_than_the_model_was_made_for(hf_gptq: Run, model: Path, text: Path) -> None:
    result = hf_gptq("eval", model, "--text", text, "--windows", 1, "--seqlen", 160)
    assert result.code == 0 and "windows of 160 tokens are longer than the 128 that the model was made" in result.err
    assert "warning" not in hf_gptq("eval", model, "--text", text, "--windows", 1, "--seqlen", 128).err


def test_devices_that_are_not_there(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    few = ("--windows", 1, "--seqlen", 32, "--text", text)
    for command in (
        ("quantize", model, tmp_path / "out"), ("eval", model, *few), ("verify", model, model, *few), ("bench", model),
        ("compare", model, *few),
    ):  # fmt: skip
        result = hf_gptq(*command, "--device-map", "cuda:99")
        assert result.code == 1 and "ValueError: --device-map='cuda:99' cannot be used (" in result.err
        assert "unexpected" not in result.err and result.err.count("\n") == 1


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
