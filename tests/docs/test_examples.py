"""Every program in examples/ runs, as a user would start it, on a small model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import free_port
from loopback_hub import LoopbackHub
from pages import ROOT
from safetensors.torch import load_file

EXAMPLES = ROOT / "examples"
SMALL = ("--samples", "8", "--seqlen", "128", "--preset", "fast")


def run(*command: object, **environment: str) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
        cwd=sys.prefix,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[:40]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def base(text_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint, as the program for several processes writes it."""
    out = tmp_path_factory.mktemp("base") / "gptq"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    printed = run(
        *launcher, EXAMPLES / "multi_process_calibration.py", text_model, out, "--calibration", corpus, *SMALL,

    )  # fmt: skip
    assert "2 processes, 1024 calibration tokens" in printed
    return out


def test_multi_process_calibration(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (4, 64)
    assert "model.layers.1.mlp.down_proj.qweight" in load_file(base / "model.safetensors")


def test_quantize_and_push(text_model: Path, corpus: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        printed = run(
            EXAMPLES / "quantize_and_push.py", text_model, "someone/small-3bit", "--calibration", corpus, "--bits", "3",
            *SMALL, HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_loopback", HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="0",
        )  # fmt: skip
        files = hub.repos["someone/small-3bit"]
    assert "Published as someone/small-3bit" in printed
    assert {"config.json", "model.safetensors", "quantize_config.json", "README.md", "tokenizer.json"} <= set(files)
    assert json.loads(files["config.json"])["quantization_config"]["bits"] == 3


def test_train_scales(base: Path, corpus: Path, tmp_path: Path) -> None:
    printed = run(
        EXAMPLES / "train_scales.py", base, tmp_path / "tuned", "--data", corpus, "--steps", 12, "--batch", 2,
        "--seqlen", 64, "--rate", 3e-3,
    )  # fmt: skip
    losses = [float(line.split()[2]) for line in printed.splitlines() if line.startswith("held-out loss")]
    assert losses[1] < losses[0]
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])} == {"scales"}


def test_lora_and_serve(base: Path, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the program trains with PEFT")
    printed = run(
        EXAMPLES / "lora_and_serve.py", base, tmp_path / "adapter", "--data", corpus, "--rank", 8, "--steps", 3,
        "--batch", 2, "--seqlen", 64, "--prompt", "In Python, a list is", VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    if importlib.util.find_spec("vllm") is None:
        assert "vLLM is not installed" in printed
    else:
        answers = [line for line in printed.splitlines() if line.startswith(("base: ", "adapter: "))]
        assert len(answers) == 2 and all("In Python, a list is" in line for line in answers)
