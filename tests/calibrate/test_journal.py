"""An interrupted calibration goes on where it was stopped, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import blocks, journal
from hf_gptq_plugin.calibrate.journal import Journal, JournalError, discard, fingerprint


def quantize(kind: str, path: Path, windows: list[list[int]], **fields: Any) -> Any:
    auto = getattr(transformers, getattr(ARCHITECTURES.get(kind), "auto", "AutoModelForCausalLM"))
    rules = getattr(ARCHITECTURES.get(kind), "rules", {})
    # Fused experts are in another form than the checkpoint's: Transformers writes them anew to offload them.
    loading = {"offload_folder": fields.pop("offload_folder")} if "offload_folder" in fields else {}
    config = GPTQConfig(bits=3, group_size=32, dataset=windows, samples=len(windows), dynamic=rules, **fields)
    return auto.from_pretrained(path, dtype=torch.float32, quantization_config=config, **loading)


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "mixtral", "albert", "gemma3n"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_goes_on_after_any_layer(
    kind: str, low_memory: bool, tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tiny(kind)
    usual: dict[str, Any] = {"token_weights": "loss", "output_hessian": "loss"}
    if low_memory:
        usual = {"generated": 0, "token_weights": "uniform", "output_hessian": "identity"}
    undisturbed = quantize(kind, path, windows, **usual)
    wanted, reports = saved(undisturbed, tmp_path / "undisturbed"), undisturbed.hf_quantizer.reports
    solve = blocks.solve_layer
    fields = {"journal": str(tmp_path / "journal"), "low_memory": low_memory, **usual}
    if low_memory and kind == "mixtral":
        fields["offload_folder"] = str(tmp_path / "offload")
    # Each attempt gets a third of the layers further, so that blocks are left finished, begun and untouched.
    allowed = -(-len(reports) // 3)
    interruptions = 0
    while interruptions < 8:
        left = [allowed]

        def interrupted(*args: Any, left: list[int] = left) -> Any:
            if not left[0]:
                raise Interrupted
            left[0] -= 1
            return solve(*args)

        monkeypatch.setattr(blocks, "solve_layer", interrupted)
        try:
            model = quantize(kind, path, windows, **fields)
            break
        except Interrupted:
            interruptions += 1
            allowed += 1
    assert 0 < interruptions < 8
    assert same(saved(model, tmp_path / "resumed"), wanted)
    learn = {name: p.requires_grad for name, p in undisturbed.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learn
    names = [(r.name, r.solve.relative_error, r.tokens) for r in reports]
    assert [(r.name, r.solve.relative_error, r.tokens) for r in model.hf_quantizer.reports] == names


KILLED = """
import itertools, os, signal, sys, warnings
warnings.simplefilter("ignore")
from hf_gptq_plugin.calibrate import journal
place, calls = int(sys.argv[2]), itertools.count(1)
def counted(*args, own=journal.save_file):
    if next(calls) == place:  # in one step: several threads write
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*args)
journal.save_file = counted
import torch, json
from transformers import AutoModelForCausalLM
from hf_gptq_plugin import GPTQConfig
config = GPTQConfig(bits=3, group_size=32, dataset=json.loads(sys.argv[3]), samples=8, journal=sys.argv[4])
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=config)
"""


def test_goes_on_after_sigkill(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tiny("llama"), tmp_path / "journal"
    # 8 windows and 2 written ones, two streams: the first block's files are 20 entries, 1 of codes, 20 that leave it;
    # the second's 1 and 20.
    for place in (50, 10):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(place), str(windows), str(folder)],
            capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    # The second process went on from the block that the first had finished, and was killed before the next.
    assert [b["name"] for b in json.loads((folder / "journal.json").read_text())["blocks"]] == ["model.layers.0"]
    solved: list[str] = []
    solve = blocks.solve_layer
    monkeypatch.setattr(blocks, "solve_layer", lambda name, *rest: solved.append(name) or solve(name, *rest))
    resumed = saved(quantize("llama", path, windows, journal=str(folder)), tmp_path / "b")
    assert solved and all(name.startswith("model.layers.1.") for name in solved)
    undisturbed = saved(quantize("llama", path, windows), tmp_path / "a")
    assert same(resumed, undisturbed)


def test_a_full_disk_is_named_and_nothing_is_lost(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tiny("llama"), tmp_path / "journal"
    written = itertools.count(1)
    save = journal.save_file

    def full(*args: Any) -> None:
        if next(written) == 50:  # in the second block, see above
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(journal, "save_file", full)
    with pytest.raises(JournalError, match=r"journal is on a disk that is full; free some space and run the same"):
        quantize("llama", path, windows, journal=str(folder))
    assert not list(folder.glob("*.part"))
    solved: list[str] = []
    solve = blocks.solve_layer
    monkeypatch.setattr(blocks, "solve_layer", lambda name, *rest: solved.append(name) or solve(name, *rest))
    resumed = saved(quantize("llama", path, windows, journal=str(folder)), tmp_path / "a")
    assert solved and all(name.startswith("model.layers.1.") for name in solved)
    assert same(resumed, saved(quantize("llama", path, windows), tmp_path / "b"))


def test_another_jobs_journal_is_not_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Journal(tmp_path / "j", "one")
    first.commit("model.layers.0", first.write_block({"a": torch.ones(2)}), [{"name": "x"}], {})
    again = Journal(tmp_path / "j", "one")
    assert again.blocks == ["model.layers.0"] and again.records("model.layers.0") == [{"name": "x"}]
    assert torch.equal(load_file(again.file("model.layers.0"))["a"], torch.ones(2))
    other = Journal(tmp_path / "j", "two")
    assert other.blocks == [] and "starting over" in caplog.text
    assert not list((tmp_path / "j").glob("block-*"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(JournalError, match=r"holds 'thesis.tex', which is none of a journal's files"):
        Journal(tmp_path, "x")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_a_killed_process_was_writing_is_the_journals(tmp_path: Path) -> None:
    """Safetensors writes beside, under a name of its own."""
    for name in (".tmpAbC123", "quantized-0-1.hidden"):
        (tmp_path / name).write_text("half")
    journal = Journal(tmp_path, "x")
    assert journal.blocks == []
    journal.commit("model.layers.0", journal.write_block({"a": torch.ones(2)}), [{"name": "x"}], {})
    (tmp_path / ".tmp0123zZ").write_text("half")
    discard(tmp_path)
    assert not tmp_path.exists()


def test_fingerprints(tiny: Callable[..., Path]) -> None:
    def model() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)

    windows, job = [torch.tensor([1, 2, 3])], {"bits": 4}
    first = fingerprint(model(), windows, job)
    assert fingerprint(model(), windows, dict(job)) == first
    assert fingerprint(model(), [torch.tensor([1, 2, 4])], job) != first
    assert fingerprint(model(), [torch.tensor([1, 2]), torch.tensor([3])], job) != first
    assert fingerprint(model(), windows, {"bits": 3}) != first
    changed = model()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert fingerprint(changed, windows, job) != first


def test_the_order_of_rules_is_part_of_the_job(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first rule that matches holds."""
    rules = {"+:.*q_proj": {"bits": 8}, "+:.*(q|k|v)_proj": {"bits": 2}}
    for dynamic, again in ((rules, False), (rules, False), (dict(reversed(rules.items())), True)):
        caplog.clear()
        config = GPTQConfig(
            group_size=32, dataset=windows, preset="fast", dynamic=dynamic, journal=str(tmp_path / "j"),
            samples=len(windows),
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
        assert ("starting over" in caplog.text) == again


@pytest.mark.parametrize("damage", ["cut", "gone", "hidden gone"])
def test_a_damaged_journal_is_named(
    damage: str, tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, solve = tmp_path / "j", blocks.solve_layer

    def interrupted(name: str, *rest: Any) -> Any:
        if name.startswith("model.layers.1."):
            raise Interrupted
        return solve(name, *rest)

    monkeypatch.setattr(blocks, "solve_layer", interrupted)
    with pytest.raises(Interrupted):
        quantize("llama", tiny("llama"), windows, journal=str(folder))
    monkeypatch.setattr(blocks, "solve_layer", solve)
    (block,) = folder.glob("block-*")
    hidden = sorted(folder.glob("quantized-0-1.*.hidden"))[-1]
    if damage == "cut":
        block.write_bytes(block.read_bytes()[:-100])
    else:
        (block if damage == "gone" else hidden).unlink()
    named = hidden if damage == "hidden gone" else block
    with pytest.raises(JournalError, match=f"{named.name} cannot be read .*delete the folder .* and start over"):
        quantize("llama", tiny("llama"), windows, journal=str(folder))


def test_what_is_kept_for_a_block_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(journal, "save_file", full)
    with pytest.raises(JournalError, match="is on a disk that is full"):
        journal.write_tensor(tmp_path / "kept-0.hidden", torch.ones(2))
