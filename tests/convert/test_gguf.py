"""GGUF: blocks by their definition and by the gguf package, whole files by Transformers' GGUF loader."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.convert.gguf import write_gguf
from hf_gptq_plugin.convert.gguf_blocks import blocks, choose, rotary_order
from hf_gptq_plugin.convert.gguf_meta import rope_factors
from hf_gptq_plugin.convert.source import open_source
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec

gguf = pytest.importorskip("gguf", reason="the gguf package writes and reads GGUF files")
Make = Callable[..., Path]
IDS = torch.arange(3, 35)[None]
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "attention_factor": 0.5,
}  # fmt: skip


def weight(bits: int, sym: bool, n: int = 6, k: int = 96, group_size: int = 32) -> QuantizedWeight:
    spec = QuantSpec(bits, group_size, sym=sym)
    groups = spec.groups(k)
    zeros = torch.randint(1, spec.maxq + 1, (groups, n), dtype=torch.int32)
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
    scales = (torch.rand(groups, n) - 0.5).half()  # either sign
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, natural_groups(k, group_size), spec)


@pytest.mark.parametrize(
    ("bits", "sym", "wanted", "kind"),
    [
        (4, True, "auto", "Q4_0"), (4, False, "auto", "Q4_1"), (4, False, "q8_0", "Q8_0"), (3, False, "auto", "Q4_0"),
        (3, True, "q4_1", "Q4_1"), (2, False, "auto", "Q4_0"), (8, True, "auto", "Q8_0"),
    ],
)  # fmt: skip
def test_blocks(bits: int, sym: bool, wanted: str, kind: str) -> None:
    w = weight(bits, sym, k=192, group_size=64)
    assert choose(w, wanted).type == kind
    data = blocks(w, kind)
    back = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    for n in range(6):
        for k in range(192):
            scale, zero, code = float(w.scales[k // 64, n]), int(w.zeros[k // 64, n]), int(w.codes[n, k])
            if kind == "Q4_1":
                least = float((-torch.tensor(scale) * zero).half())
                expected = float(torch.tensor(scale * code, dtype=torch.float32) + least)
                assert back[n, k] == pytest.approx(expected, rel=1e-6, abs=1e-7)
            else:
                assert float(back[n, k]) == (code - zero) * scale
    # A block's own bytes: d, then nibble i of the low halves is weight i, of the high ones weight 16 + i.
    raw = bytes(data[2])
    if kind == "Q4_0":
        for block in range(6):
            own = raw[18 * block : 18 * block + 18]
            assert own[:2] == w.scales[block // 2, 2].numpy().tobytes()
            nibbles = [byte & 15 for byte in own[2:]] + [byte >> 4 for byte in own[2:]]
            zero = int(w.zeros[block // 2, 2])
            assert nibbles == [int(c) - zero + 8 for c in w.codes[2, 32 * block : 32 * block + 32]]


def test_what_no_block_holds() -> None:
    assert "no multiple of 32" in choose(weight(4, True, k=80)).reason
    assert "group_size=16" in choose(weight(4, True, k=96, group_size=16)).reason
    assert choose(weight(4, True, k=96, group_size=-1)).type == "Q4_0"
    w = weight(4, True)
    w.group = w.group[torch.randperm(96)]
    assert "act-order" in choose(w).reason
    w = weight(8, False)
    w.zeros[0, 0] = 1  # codes reach 254 above it
    assert choose(w).type == "F16" and "254" in choose(w).reason
    assert "Q4_0 does not hold" in choose(weight(4, False), "q4_0").reason
    w = weight(4, True)
    w.scales = w.scales.float()
    w.scales[0, 0] = 1e6
    assert "scales reach 1e+06" in choose(w).reason


def test_rows_of_a_head_are_paired() -> None:
    # Transformers rotates channel i with i + 4 of a head of 8, llama.cpp channel 2 i with 2 i + 1.
    assert rotary_order(16, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    with pytest.raises(CheckpointError, match="18 rows are not 4 heads"):
        rotary_order(18, 4)


def test_positions_of_llama_3() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    factors = rope_factors(config.to_dict())
    plain = 500000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    torch.testing.assert_close((plain / factors).float(), LlamaRotaryEmbedding(config).inv_freq, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "more",
    [
        {}, {"attention_factor": 0.5}, {"mscale": 0.7, "mscale_all_dim": 2.0}, {"mscale": 0.7},
        {"attention_factor": 1.25, "mscale": 0.7, "mscale_all_dim": 2.0}, {"beta_fast": 32.0, "beta_slow": None},
    ],
)  # fmt: skip
def test_yarn_multiplies_as_transformers_does(quantized: Make, tmp_path: Path, more: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, **more}
    folder = shutil.copytree(quantized("llama"), tmp_path / "q")
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config))
    write_gguf(open_source(folder), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    field = reader.get_field("llama.rope.scaling.attn_factor")
    # llama.cpp multiplies by 1 + 0.1 ln factor itself, whatever attn_factor is.
    given = (1.0 if field is None else field.contents()) * (1 + 0.1 * math.log(4))
    wanted = LlamaRotaryEmbedding(LlamaConfig(max_position_embeddings=128, rope_parameters=rope)).attention_scaling
    assert given == pytest.approx(wanted, rel=1e-6)


def merging_tokenizer(folder: Path) -> None:
    more = {"he": 256, "ll": 257, "hell": 258, "Ġw": 259}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]
    made = byte_tokenizer(more, merges, special=["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def quantized(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(kind: str, model: dict[str, Any] | None = None, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("gguf") / "q"
        config = GPTQConfig(**{"bits": 4, "group_size": 32, "method": "rtn", **fields})
        if kind == "qwen2":  # whose projections have biases
            source = tmp_path_factory.mktemp("dense")
            made = Qwen2ForCausalLM(Qwen2Config(vocab_size=288, **SMALL))
            for name, parameter in made.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
            made.save_pretrained(source)
        else:
            source = tiny(kind, vocab_size=288, **(model or {}))
        made = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float16)
        made.save_pretrained(folder)
        merging_tokenizer(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "model", "fields", "types"),
    [
        ("llama", {}, {}, {"Q4_0": 14, "F16": 2, "F32": 5}),
        ("llama", {"tie_word_embeddings": True}, {"sym": False, "bits": 3}, {"Q4_0": 14, "F16": 1}),
        ("llama", {}, {"dynamic": {"+:.*o_proj": {"bits": 8}, "-:.*down_proj": {}}}, {"Q8_0": 2, "Q4_0": 10}),
        # Transformers' reader knows no head_dim of Qwen3 but 128, and none of Qwen2 but that of its width.
        ("qwen3", {"head_dim": 128}, {"group_size": -1}, {"Q4_0": 14}),
        ("qwen2", {}, {"bits": 2}, {"Q4_0": 14, "F32": 5 + 6}),
    ],
)
def test_transformers_reads_the_same_weights(
    quantized: Make, tmp_path: Path, kind: str, model: dict[str, Any], fields: dict[str, Any], types: dict[str, int]
) -> None:
    folder = quantized(kind, model, **fields)
    done, notes = write_gguf(open_source(folder), tmp_path / "m.gguf")
    assert all(outcome.exact for outcome in done) and notes == []
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = [tensor.tensor_type.name for tensor in reader.tensors]
    assert {name: found.count(name) for name in types} == types
    ours: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = ours(input_ids=IDS).logits
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    dense = ours.dequantize()
    expected = dense.state_dict()
    assert set(theirs.state_dict()) == set(expected)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, expected[name]), name
    torch.testing.assert_close(theirs(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
    text = "hello world"
    there = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert there(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("kind", "model", "fields", "types"),
    [
        ("llama", {"hidden_size": 64, "intermediate_size": 96}, {}, {"Q4_0"}),
        ("llama", {"hidden_size": 64, "intermediate_size": 96}, {"sym": False}, {"Q4_1"}),
        ("qwen3", {"head_dim": 32}, {"bits": 8}, {"Q8_0"}),
        ("llama", {"hidden_size": 64, "intermediate_size": 96, "rope_parameters": YARN}, {"bits": 8}, {"Q8_0"}),
        ("qwen2", {}, {"bits": 8}, {"Q8_0"}),
    ],
)
def test_llama_cpp_computes_the_same(
    quantized: Make, tmp_path: Path, kind: str, model: dict[str, Any], fields: dict[str, Any], types: set[str]
) -> None:
    cpp = pytest.importorskip("xllamacpp", reason="the extra 'test-llama-cpp' has llama.cpp")
    folder = quantized(kind, {**model, "initializer_range": 0.2}, **fields)
    write_gguf(open_source(folder), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert types == {t.tensor_type.name for t in reader.tensors} - {"F16", "F32"}
    parameters = cpp.CommonParams()
    parameters.model.path = str(tmp_path / "m.gguf")
    parameters.n_ctx, parameters.n_parallel = 64, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = cpp.Server(parameters)
    ours: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    differences, size = [], []
    for text in ("hello world", "x = [1, 2, 3]", "The end.", "a", "hell", "Wales", "10 + 10", "why?", "( )", "\n\n"):
        ids = tokenizer(text)["input_ids"]
        answer = server.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0.0, "logprobs": 20})
        assert answer["usage"]["prompt_tokens"] == len(ids)
        # It tells nothing of a token that is only part of a character.
        expected = ours(input_ids=torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)
        for place in (answer["choices"][0]["logprobs"] or {"content": []})["content"]:
            differences += [float(expected[each["id"]]) - each["logprob"] for each in place["top_logprobs"]]
            size.append(float(expected.std()))
    assert len(size) >= 3
    # llama.cpp rounds activations to 8 bits in blocks of 32, and keeps keys and values in float16.
    assert torch.tensor(differences).square().mean().sqrt() < 0.1 * min(size)


def test_what_is_lost_is_said(quantized: Make, tmp_path: Path) -> None:
    folder = quantized("llama", sym=False)
    done, _ = write_gguf(open_source(folder), tmp_path / "out")
    assert (tmp_path / "out/model.gguf").exists()
    lossy = [outcome for outcome in done if not outcome.exact]
    assert lossy and all(outcome.note == "scale times zero rounded to float16" for outcome in lossy)
    assert all(outcome.error < 2**-10 for outcome in lossy)
    done, _ = write_gguf(open_source(folder), tmp_path / "out", "q8_0")
    assert all(outcome.exact for outcome in done)
    done, _ = write_gguf(open_source(folder), tmp_path / "out", "q4_0")
    assert any(not outcome.exact for outcome in done)
    assert all("dense float16" in outcome.note for outcome in done if not outcome.exact)


def test_refusals_leave_nothing(quantized: Make, tiny: Make, tmp_path: Path) -> None:
    folder = quantized("llama")

    def refused(match: str, change: Callable[[Path], None], target: Any = None) -> None:
        source = shutil.copytree(folder, tmp_path / "source")
        change(source)
        with pytest.raises((CheckpointError, ValueError), match=match):
            write_gguf(open_source(source), target or tmp_path / "new/out.gguf")
        shutil.rmtree(source)
        assert [p.name for p in tmp_path.iterdir()] == []

    def config(**fields: Any) -> Callable[[Path], None]:
        def change(source: Path) -> None:
            value = json.loads((source / "config.json").read_text()) | fields
            (source / "config.json").write_text(json.dumps(value))

        return change

    def tokenizer(**fields: Any) -> Callable[[Path], None]:
        def change(source: Path) -> None:
            value = json.loads((source / "tokenizer.json").read_text()) | fields
            (source / "tokenizer.json").write_text(json.dumps(value))

        return change

    refused("BloomForCausalLM cannot be written as GGUF", config(architectures=["BloomForCausalLM"]))
    refused("longrope", config(rope_parameters={"rope_type": "longrope"}))
    for name, value in (("beta_fast", 16), ("beta_slow", 2.5), ("truncate", False)):
        match = f"{name}={value} of yarn is not read by llama.cpp"
        refused(match, config(rope_parameters={**YARN, name: value}))
    refused("attention_factor='0.5' must be a number", config(rope_parameters={**YARN, "attention_factor": "0.5"}))
    refused("hidden_size=True must be a number", config(hidden_size=True, head_dim=None))
    refused("num_hidden_layers=2000000000 is more than", config(num_hidden_layers=2_000_000_000))
    refused("hidden_act='gelu'", config(hidden_act="gelu"))
    refused("holds a WordPiece tokenizer", tokenizer(model={"type": "WordPiece"}))
    refused("splits texts by", tokenizer(pre_tokenizer={"type": "Whitespace"}))
    refused("the id 999", tokenizer(added_tokens=[{"id": 999, "content": "x"}]))
    dense = open_source(tiny("llama", vocab_size=288))
    with pytest.raises(CheckpointError, match="no codes"):
        write_gguf(dense, tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="use one of auto, q4_0"):
        write_gguf(open_source(folder), tmp_path / "x.gguf", "q5_k")
