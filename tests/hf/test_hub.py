"""push_to_hub and `hf-gptq push` to a Hub on loopback, and from_pretrained from it, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

from hf_gptq_plugin.convert.source import open_source
from hf_gptq_plugin.convert.stream import convert

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


# Several commands in one process: importing Transformers takes longer than they do. Waiting times are left out.
COMMANDS = """
import json, sys, time
from pathlib import Path
sys.setswitchinterval(0.005)
import huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: None
from hf_gptq_cli import main
codes = []
for command in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv = ["hf-gptq", *command]
    try:
        main()
    except SystemExit as error:
        codes.append(error.code or 0)
    print("\\0", flush=True)
    print("\\0", flush=True, file=sys.stderr)
print(json.dumps(codes))
"""


def started(code: str, hub: LoopbackHub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_loopback", "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "COLUMNS": "200",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=sys.prefix,
    )


def run(code: str, hub: LoopbackHub, home: Path, *arguments: object) -> str:
    done = started(code, hub, home, *arguments)
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
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"
    assert "someone/tiny-4bit" in hub.private
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


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def commands(tmp_path: Path) -> Callable[..., list[Done]]:
    """Run commands of `hf-gptq` one after the other in one process."""

    def run_all(hub: LoopbackHub, *given: list[object]) -> list[Done]:
        (tmp_path / "commands.json").write_text(json.dumps([list(map(str, command)) for command in given]))
        done = started(COMMANDS, hub, tmp_path / "home", tmp_path / "commands.json")
        assert done.returncode == 0, done.stderr[-3000:]
        outs, errs = done.stdout.split("\0\n"), done.stderr.split("\0\n")
        codes = json.loads(outs[-1])
        return [Done(code, out, err) for code, out, err in zip(codes, outs, errs, strict=False)]

    return run_all


@pytest.fixture
def checkpoint(pushed: tuple[LoopbackHub, Path], tmp_path: Path) -> Path:
    """A checkpoint in several shards, with files that must not leave the machine."""
    folder = tmp_path / "q4"
    convert(open_source(pushed[1] / "out"), folder, "gptq", shard=40_000)
    (folder / "training.pt").write_bytes(b"pickle")
    (folder / ".secret").write_text("x")
    (folder / "calibration.json").write_text(
        json.dumps({"perplexity": {"text": "t.txt", "windows": 2, "seqlen": 32, "dense": 19.125, "quantized": 20.5}})
    )
    return folder


def test_push_by_command(
    pushed: tuple[LoopbackHub, Path], commands: Callable[..., list[Done]], checkpoint: Path
) -> None:
    hub, _ = pushed
    hub.repos["maker/base"] = {"README.md": b"---\nlicense: apache-2.0\nlanguage:\n- en\n---\nThe base.\n"}
    hub.repos["me/old"] = {"model-00001-of-00009.safetensors": b"old", "notes.txt": b"kept"}
    hub.repos["me/public"] = {"notes.txt": b"public"}
    preview, first, pull, branch, public, hidden, both, nowhere, damaged = commands(
        hub,
        ["push", checkpoint, "me/q4", "--dry-run", "--base-model", "maker/base"],
        ["push", checkpoint, "me/old", "--base-model", "maker/base", "--tag", "a", "--tag", "b", "--json"],
        ["push", checkpoint, "me/public", "--create-pr", "--message", "Please"],
        ["push", checkpoint, "me/new", "--private", "--revision", "4bit"],
        ["push", checkpoint, "me/public", "--private"],
        ["push", checkpoint, "me/public", "--private", "--create-pr"],
        ["push", checkpoint, "me/new", "--create-pr", "--revision", "4bit"],
        ["push", checkpoint, "not a name!"],
        ["push", checkpoint.parent, "me/new"],
    )
    assert preview.code == 0 and "base_model: maker/base" in preview.out and "me/q4" not in hub.repos
    assert ".secret" not in preview.out and "training.pt" not in preview.out

    answer = json.loads(first.out)
    repo = hub.repos["me/old"]
    sent = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.suffix == ".safetensors"}
    assert {n: c for n, c in repo.items() if n.endswith(".safetensors")} == sent
    assert repo["notes.txt"] == b"kept" and not {"training.pt", ".secret"} & set(repo)
    assert answer["repo_id"] == "me/old" and set(answer["files"]) == set(repo) - {"notes.txt"}
    card = ModelCard(repo["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("maker/base", "quantized")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert card.data.tags == ["gptq", "hf-gptq-plugin", "4-bit", "a", "b"]
    assert card.data.eval_results[0].metric_value == 20.5
    assert "| perplexity, 2 windows of 32 tokens of t.txt | 19.125 | 20.500 |" in card.text
    weights = sum(len(c) - 8 - int.from_bytes(c[:8], "little") for c in sent.values())
    assert f"{weights / 1e6:,.1f} MB |" in card.text

    assert pull.code == 0 and "/discussions/1" in pull.out
    assert hub.repos["me/public"] == {"notes.txt": b"public"}
    assert set(sent) < set(hub.branches["me/public"]["refs/pr/1"])
    assert hub.commits[-2]["summary"] == "Please"

    assert branch.code == 0 and "me/new" in hub.private
    assert hub.repos["me/new"] == {} and set(sent) < set(hub.branches["me/new"]["4bit"])

    for refused in (public, hidden):
        assert refused.code == 1 and "me/public exists and is public" in refused.err
    assert set(hub.branches["me/public"]) == {"refs/pr/1"}  # that of the first
    assert both.code == 1 and "exclude each other" in both.err
    assert nowhere.code == 1 and "no name of a repository" in nowhere.err
    assert damaged.code == 1 and "config.json" in damaged.err
    assert not any("Traceback" in each.err for each in (public, both, nowhere, damaged))


def test_a_card_of_ones_own(
    pushed: tuple[LoopbackHub, Path], commands: Callable[..., list[Done]], checkpoint: Path
) -> None:
    hub, _ = pushed
    readme, words = checkpoint / "README.md", "# Mine\n\nWords,  as they are.\n"
    options = ["--license", "apache-2.0", "--base-model", "owner/base", "--tag", "t1"]
    heads = ("", "---\ntags: old\nlicense: mit\nlibrary_name: other\n---\n")
    for number, (head, line_end) in enumerate(product(heads, ("\n", "\r\n"))):
        readme.write_bytes((head + words).replace("\n", line_end).encode())
        (done,) = commands(hub, ["push", checkpoint, f"me/own-{number}", *options])
        assert done.code == 0, done.err
        content = hub.repos[f"me/own-{number}"]["README.md"].decode()
        assert content.endswith(f"---{line_end}" + words.replace("\n", line_end))
        card = ModelCard(content)
        assert (card.data.license, card.data.base_model) == ("apache-2.0", "owner/base")
        assert card.data.library_name == ("other" if head else "transformers")
        assert card.data.tags == [*(["old"] if head else []), "gptq", "hf-gptq-plugin", "4-bit", "t1"]
    for content, message in (
        (b"---\nlicense: [mit\n---\nwords\n", "README.md cannot be read"),
        (b"# caf\xe9\n", "README.md is no UTF-8 text"),
    ):
        readme.write_bytes(content)
        for refused in commands(hub, ["push", checkpoint, "me/unread"], ["push", checkpoint, "me/unread", "--dry-run"]):
            assert refused.code == 1 and message in " ".join(refused.err.split()) and "Traceback" not in refused.err
    assert "me/unread" not in hub.repos
    # The same where the repository's own cannot be read.
    readme.unlink()
    hub.repos["me/broken"] = {"README.md": b"---\nlicense: [mit\n---\nwords\n"}
    (broken,) = commands(hub, ["push", checkpoint, "me/broken"])
    assert broken.code == 1 and "README.md of me/broken cannot be read" in " ".join(broken.err.split())
    assert set(hub.repos["me/broken"]) == {"README.md"}


def test_a_dropped_connection(
    pushed: tuple[LoopbackHub, Path], commands: Callable[..., list[Done]], checkpoint: Path
) -> None:
    hub, _ = pushed
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) >= 3
    (checkpoint / "calibration.json").unlink()
    hub.blobs.clear()
    hub.puts.clear()
    hub.drop = 1
    (once,) = commands(hub, ["push", checkpoint, "me/dropped"])
    assert once.code == 0, once.err  # sent again by itself
    assert len(hub.puts) == len(set(hub.puts)) == len(files)
    # A line that stays down ends the push with one error; what has arrived is not sent again.
    oids = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    hub.blobs = {oids[0]: files[0].read_bytes()}
    hub.puts.clear()
    hub.drop = 1000
    (down,) = commands(hub, ["push", checkpoint, "me/later"])
    assert down.code == 1 and "Traceback" not in down.err and "was interrupted" in down.err
    assert hub.repos["me/later"] == {}
    hub.drop = 0
    (again,) = commands(hub, ["push", checkpoint, "me/later"])
    assert again.code == 0, again.err
    assert sorted(hub.puts) == sorted(oids[1:])
    assert {file.name for file in files} < set(hub.repos["me/later"])
