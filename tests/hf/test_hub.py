"""push_to_hub to a Hub on loopback, and from_pretrained from it, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

PUSH = """
import sys, torch, hf_gptq_plugin
from transformers import AutoModelForCausalLM, GPTQConfig
dense, out, windows = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(
    dense, quantization_config=GPTQConfig(bits=4, group_size=32, dataset=windows.tolist()), dtype=torch.float32)
model.save_pretrained(out)
model.config.name_or_path = "maker/base-model"
print(model.push_to_hub("someone/tiny-4bit", private=True, commit_message="First", tags=["mine"]))
model.push_to_hub("someone/with-card")
torch.save(model(input_ids=torch.arange(3, 35)[None]).logits.detach(), sys.argv[4])
"""

LOAD = """
import sys, torch, hf_gptq_plugin
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("someone/tiny-4bit", dtype=torch.float32)
assert torch.equal(model(input_ids=torch.arange(3, 35)[None]).logits, torch.load(sys.argv[1]))
model.save_pretrained(sys.argv[2])
"""


def run(code: str, hub: LoopbackHub, home: Path, *arguments: object) -> str:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_loopback", "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=sys.prefix,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoopbackHub, Path]:
    import torch

    folder = tmp_path_factory.mktemp("hub")
    torch.save(torch.tensor(windows), folder / "windows.pt")
    with LoopbackHub() as hub:
        hub.repos["someone/with-card"] = {"README.md": b"---\nlicense: mit\ntags:\n- old\n---\n\nMy own words.\n"}
        out = run(
            PUSH, hub, folder / "home", tiny("llama"), folder / "out", folder / "windows.pt", folder / "logits.pt"
        )
        assert out.strip().startswith(hub.endpoint)
        run(LOAD, hub, folder / "other-home", folder / "logits.pt", folder / "again")
        yield hub, folder


def test_what_is_pushed_is_what_is_saved(pushed: tuple[LoopbackHub, Path]) -> None:
    hub, folder = pushed
    repo = hub.repos["someone/tiny-4bit"]
    saved = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}
    assert {"config.json", "quantize_config.json", "model.safetensors", "README.md"} <= set(repo)
    assert repo["model.safetensors"] == saved["model.safetensors"]
    assert repo["quantize_config.json"] == saved["quantize_config.json"]
    assert json.loads(repo["config.json"])["quantization_config"]["quant_method"] == "gptq"
    assert hub.commits[0]["summary"] == "First"


def test_what_is_loaded_is_what_was_pushed(pushed: tuple[LoopbackHub, Path]) -> None:
    hub, folder = pushed
    # LOAD itself compared the logits, bit for bit.
    assert (folder / "again" / "model.safetensors").read_bytes() == hub.repos["someone/tiny-4bit"]["model.safetensors"]


def test_card_says_how_it_was_made_and_how_to_load_it(pushed: tuple[LoopbackHub, Path]) -> None:
    hub, _ = pushed
    card = ModelCard(hub.repos["someone/tiny-4bit"]["README.md"].decode())
    assert card.data.base_model == "maker/base-model"
    assert card.data.base_model_relation == "quantized"
    assert card.data.tags == ["gptq", "hf-gptq-plugin", "4-bit", "mine"]
    for words in (
        "4-bit GPTQ: symmetric, groups of 32", "256 tokens", 'from_pretrained("someone/tiny-4bit")',
        "vllm serve someone/tiny-4bit --quantization hf_gptq", "import hf_gptq_plugin",
    ):  # fmt: skip
        assert words in card.text


def test_a_card_that_is_there_keeps_its_words(pushed: tuple[LoopbackHub, Path]) -> None:
    hub, _ = pushed
    card = ModelCard(hub.repos["someone/with-card"]["README.md"].decode())
    assert card.text.strip() == "My own words."
    assert card.data.license == "mit"
    assert card.data.tags == ["old", "gptq", "hf-gptq-plugin", "4-bit"]
