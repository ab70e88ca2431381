"""`hf-gptq train` and `hf-gptq plan` from a dense model and a file of chats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hf_gptq_cli import main
from hf_gptq_cli.plan import size
from hf_gptq_plugin.convert.source import open_source


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    """A tiny llama with a tokenizer of single bytes and a chat template beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tiny("llama", initializer_range=0.06)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
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
    arguments = ("train", model, tmp_path / "two", "--data", chats, "--method", "affine", "--start", "rtn", *SETTINGS)
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 300),
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "hf_gptq_cli", *map(str, arguments)],
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = []
    for child in children:
        out, err = child.communicate(timeout=600)
        assert child.returncode == 0, err
        printed.append(out)
    assert printed[1] == ""  # the first tells
    two = json.loads(printed[0].splitlines()[-1])
    code, out, err = hf_gptq(*arguments[:2], tmp_path / "one", *arguments[3:])
    assert code == 0, err
    one = json.loads(out.splitlines()[-1])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and two["after"] < two["before"]
    assert not (tmp_path / "two.training").exists()


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


def test_sizes() -> None:
    assert [size(text) for text in ("24GB", "16 GiB", "0.5mb", "7B")] == [24 * 10**9, 16 * 2**30, 500_000, 7]
