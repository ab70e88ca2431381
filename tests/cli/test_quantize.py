"""The command that quantizes: what it writes, spares and tells; threads, kills, launchers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import TORCHRUN, launched
from command import Run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


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
        (damaged / "quantize_config.json").unlink()
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
