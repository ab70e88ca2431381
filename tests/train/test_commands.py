"""`hf-gptq train` and `hf-gptq plan` from a dense model and a file of chats."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from children import launched
from transformers import AutoTokenizer

from hf_gptq_cli import main
from hf_gptq_cli.plan import size
from hf_gptq_plugin.convert.source import open_source
from hf_gptq_plugin.train.loop import STATE

# PEFT 0.21 uses names that Transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    """A tiny llama with a tokenizer of single bytes and a chat template beside it."""
    folder = tiny("llama", initializer_range=0.06)
    made = byte_tokenizer()
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": "a number"}]}
        for i in range(120)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def hf_gptq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command in this process; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-gptq", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


SETTINGS: tuple[Any, ...] = (
    "--samples", 24, "--seqlen", 48, "--steps", 8, "--batch", 2, "--group-size", 32, "--json",
)  # fmt: skip


def test_chats_from_a_dense_model_begun_with_hqq(hf_gptq: Any, model: Path, chats: Path, tmp_path: Path) -> None:
    code, out, err = hf_gptq(
        "train", model, tmp_path / "out", "--data", chats, "--method", "ste", "--start", "hqq", "--asym", "--rate", 0.1,
        "--optimizer", "q-galore", "--subspace", 16, "--checkpointing", *SETTINGS,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["after"] < found["before"] and found["difference"] < 1e-3
    source = open_source(tmp_path / "out")
    assert all(not spec.sym and spec.group_size == 32 for spec in source.specs.values()) and len(source.specs) == 14
    code, _, err = hf_gptq("train", model, tmp_path / "x", "--data", chats, "--optimizer", "sgd", *SETTINGS)
    assert code == 1 and "optimizer='sgd' is not known; use one of adamw, q-galore" in err


def test_processes_end_with_one_result(hf_gptq: Any, model: Path, chats: Path, tmp_path: Path) -> None:
    """By `torchrun`: the curve of one process, told once, written once."""
    arguments = (
        "train", model, tmp_path / "two", "--data", chats, "--method", "affine", "--quantize-by", "rtn", *SETTINGS,
    )  # fmt: skip
    two = json.loads(launched(arguments))  # one object: the first process alone tells
    code, out, err = hf_gptq(*arguments[:2], tmp_path / "one", *arguments[3:])
    assert code == 0, err
    one = json.loads(out.splitlines()[-1])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and two["after"] < two["before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    written = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert written[0] == written[1] and "model.safetensors" in written[0]


KILLED = """
import os, signal, sys
from hf_gptq_cli import main
from hf_gptq_plugin.train import loop
def written(*arguments, own=loop._State.write):
    own(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
loop._State.write = written
main(sys.argv[1:])
"""


def test_going_on_after_a_kill(hf_gptq: Any, model: Path, chats: Path, tmp_path: Path) -> None:
    """Killed without warning: the same command ends with the same curve and bytes."""
    arguments = ("--data", chats, "--method", "affine", "--start", "rtn", *SETTINGS, "--save-every", 2)

    def whole(name: str) -> list[float]:
        code, out, err = hf_gptq("train", model, tmp_path / name, *arguments)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])["losses"]

    wanted = whole("whole")
    state = tmp_path / "killed.training" / STATE
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "train", *map(str, (model, tmp_path / "killed", *arguments))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL and killed.stdout == "", killed.stderr
    assert not (tmp_path / "killed").exists() and state.exists()
    assert whole("killed") == wanted
    made, same = (tmp_path / name / "model.safetensors" for name in ("killed", "whole"))
    assert made.read_bytes() == same.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_what_would_lose_something(hf_gptq: Any, model: Path, chats: Path, tmp_path: Path) -> None:
    def train(*arguments: object) -> str:
        code, _, err = hf_gptq("train", *SETTINGS, "--data", chats, "--method", "affine", "--start", "rtn", *arguments)
        assert code == 1
        return err

    assert "is MODEL itself, which would be overwritten" in train(model, model)
    assert "gamma=nan must be finite" in train(model, tmp_path / "nan", "--method", "lora", "--gamma", "nan")
    assert "rate=inf must be finite" in train(model, tmp_path / "inf", "--rate", "inf")
    assert "seqlen=200 is more than the 128 tokens" in train(model, tmp_path / "long", "--seqlen", 200)
    larger = AutoTokenizer.from_pretrained(model)
    assert larger.add_tokens(["number"]) == 1
    larger.save_pretrained(shutil.copytree(model, tmp_path / "larger"))
    assert "the token id 256, and the model knows 0 to 255" in train(tmp_path / "larger", tmp_path / "none")
    base = tmp_path / "other.training" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "asked.json").write_text("[]")
    assert "has quantized from other arguments" in train(model, tmp_path / "other")
    # What is deleted at the end holds nothing but the training's own files.
    for kept in (model.with_name("run.training"), tmp_path / "notes.training"):
        shutil.copytree(model, kept) if kept.name == "run.training" else kept.mkdir()
        (kept / "mine.md").write_text("mine")
        before = sorted(path.name for path in kept.iterdir())
        assert "is where the state of this training goes, and holds" in train(model, kept.with_suffix(""))
        assert sorted(path.name for path in kept.iterdir()) == before


def test_a_damaged_state_is_named(hf_gptq: Any, model: Path, chats: Path, tmp_path: Path) -> None:
    arguments = ("--data", chats, "--method", "affine", "--start", "rtn", *SETTINGS)
    state = tmp_path / "out.training" / STATE
    state.parent.mkdir()
    for content in (b"", b"\x40\0\0\0\0\0\0\0{}"):
        state.write_bytes(content)
        code, _, err = hf_gptq("train", model, tmp_path / "out", *arguments)
        assert code == 1 and f"{STATE} is damaged" in err and "to begin anew" in err


def test_an_adapter_names_the_base_that_is_kept(
    hf_gptq: Any, model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dense model that is OUT, also where OUT has no name of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ("--data", chats, "--method", "lora", "--rank", 4, "--start", "rtn", *SETTINGS)
    code, _, err = hf_gptq("train", model, ".", *arguments)
    assert code == 0, err
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "." and Path("config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


def test_experts_are_left_out_of_adapters(
    hf_gptq: Any, model: Path, chats: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "mixtral"
    shutil.copytree(tiny("mixtral"), source)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, source)
    shutil.copy(model / "chat_template.jinja", source)
    arguments = ("--data", chats, "--method", "lora", "--rank", 4, "--start", "rtn", *SETTINGS)
    code, out, err = hf_gptq("train", source, tmp_path / "out", *(a for a in arguments if a != "--json"))
    assert code == 0 and "24 layers of experts are left out" in (out + err).replace("\n", " "), err
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert not config.get("target_parameters") and len(config["target_modules"]) == 8
    code, _, err = hf_gptq("train", source, tmp_path / "no", *arguments, "--target-modules", "w1")
    assert code == 1 and "is an expert of a mixture" in err


def test_plan(hf_gptq: Any, model: Path) -> None:
    code, out, _ = hf_gptq("plan", model, "--budget", "64MB", "--methods", "affine,lora", "--group-size", 32)
    assert code == 0
    assert "activations, MB" in out and "Choose lora with adamw: " in out
    code, out, _ = hf_gptq(
        "plan",
        model,
        "--budget",
        "1kB",
        "--methods",
        "affine",
        "--optimizers",
        "q-galore",
        "--group-size",
        32,
        "--json",
    )
    found = json.loads(out)
    assert code == 0 and found["chosen"] is None and found["budget"] == 1000
    assert [plan["checkpointing"] for plan in found["plans"]] == [False, True]
    code, _, err = hf_gptq("plan", model, "--budget", "12 apples")
    assert code == 1 and "--budget='12 apples' is not a size; write 24GB" in err


def test_plan_in_the_checkpoints_own_dtype(hf_gptq: Any, model: Path) -> None:
    arguments = ("plan", model, "--budget", "1GB", "--seqlen", 32, "--methods", "lora", "--json", "--dtype")
    plans = {dtype: json.loads(hf_gptq(*arguments, dtype)[1]) for dtype in ("auto", "float32", "bfloat16")}
    assert plans["auto"] == plans["float32"] != plans["bfloat16"]


def test_sizes() -> None:
    assert [size(text) for text in ("24GB", "16 GiB", "0.5mb", "7B")] == [24 * 10**9, 16 * 2**30, 500_000, 7]
