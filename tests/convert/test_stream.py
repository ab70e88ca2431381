"""Whole checkpoints from one layout to another: same weights, same logits, or one error and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.convert.inspect import inspect
from hf_gptq_plugin.convert.source import open_source
from hf_gptq_plugin.convert.stream import convert, relative_error
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec

IDS = torch.arange(3, 35)[None]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def quantized(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def make(**fields: Any) -> Path:
        key = str(sorted(fields.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / "q"
            config = GPTQConfig(**{"bits": 4, "group_size": 32, "method": "rtn", **fields})
            model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype=torch.float16)
            model.save_pretrained(made[key])
        return made[key]

    return make


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=IDS).logits.detach()


ROUTES = [
    ({"sym": False, "format": "gptq_v2"}, "awq", "gptq_v2"),
    ({"sym": False}, "compressed-tensors", "gptq"),
    ({"sym": True}, "awq", "gptq"),
    ({"sym": True, "bits": 3}, "compressed-tensors", "gptq"),
    ({"sym": True, "bits": 8, "group_size": -1}, "compressed-tensors", "gptq_v2"),
    ({"sym": True, "bits": 2}, "gptq_v2", "gptq"),
    ({"sym": True, "dynamic": {r"-:.*down_proj": {}, r"+:.*o_proj": {"bits": 8}}}, "compressed-tensors", "gptq"),
]


@pytest.mark.parametrize(("fields", "there", "back"), ROUTES)
def test_there_and_back(quantized: Make, tmp_path: Path, fields: dict[str, Any], there: str, back: str) -> None:
    source = quantized(**fields)
    outcomes = convert(open_source(source), tmp_path / "there", there)
    assert len(outcomes) == len(open_source(source).modules)
    assert all(outcome.exact for outcome in outcomes)
    assert open_source(tmp_path / "there").layout == there
    assert all(outcome.exact for outcome in convert(open_source(tmp_path / "there"), tmp_path / "back", back))
    assert torch.equal(logits(tmp_path / "back"), logits(source))
    assert open_source(tmp_path / "back").layout == back


def test_dense_is_the_dequantized_model(quantized: Make, tmp_path: Path) -> None:
    source = quantized(sym=True)
    outcomes = convert(open_source(source), tmp_path / "dense", "dense", dtype=torch.float32)
    assert all(outcome.exact for outcome in outcomes)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(source), rtol=1e-5, atol=1e-5)
    rounded = convert(open_source(source), tmp_path / "bf16", "dense")
    assert all(0 < outcome.error < 2**-8 and "bfloat16" in outcome.note for outcome in rounded)


def test_dense_tensors_that_are_rounded_are_told(quantized: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantized(sym=True), tmp_path / "q"))
    ones = torch.ones(64)

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            if name.endswith("scales"):
                state[name] = torch.full_like(state[name], 2**-5)  # exact in bfloat16
            elif name.endswith(("lm_head.weight", "embed_tokens.weight")):
                state[name] = torch.randn(state[name].shape)
        state["model.norm.weight"] = ones * 1.5
        state["model.layers.0.input_layernorm.weight"] = ones + 2**-10

    rewrite(source, change)
    before = load_file(source / "model.safetensors")
    outcomes = convert(open_source(source), tmp_path / "dense", "dense")
    after = load_file(tmp_path / "dense/model.safetensors")
    changed = {n: t for n, t in before.items() if n in after and not torch.equal(after[n].float(), t.float())}
    assert set(changed) >= {"lm_head.weight", "model.layers.0.input_layernorm.weight"}
    assert "model.norm.weight" not in changed
    told = {outcome.module: outcome for outcome in outcomes if not outcome.exact}
    assert set(told) == set(changed)  # and every module is exact
    for name, value in changed.items():
        expected = float((after[name].double() - value.double()).norm() / value.double().norm())
        assert told[name].error == pytest.approx(expected, rel=1e-9) and told[name].note == "rounded to bfloat16"
    assert all(outcome.exact for outcome in convert(open_source(source), tmp_path / "f", "dense", dtype=torch.float32))


def test_relative_error() -> None:
    w = QuantizedWeight(
        torch.randint(0, 16, (7, 96), dtype=torch.uint8), torch.rand(3, 7).half() + 0.1,
        torch.randint(1, 16, (3, 7), dtype=torch.int32), natural_groups(96, 32), QuantSpec(4, 32, sym=False),
    )  # fmt: skip
    assert len(list(w.slabs(200))) == 4
    assert torch.equal(torch.cat([w.rows(rows).dequantize() for rows in w.slabs(200)]), w.dequantize())
    noise = 0.01 * torch.randn(7, 96)
    exact, other = w.dequantize().double(), (w.dequantize() + noise).double()
    expected = float((other - exact).norm() / exact.norm())
    assert relative_error(w, lambda rows: other[rows].float()) == pytest.approx(expected, rel=1e-6)
    assert relative_error(w, lambda rows: w.rows(rows).dequantize()) == 0
    tiny = w.dequantize().clone()
    tiny[6, 95] *= 1 + 2**-20
    assert relative_error(w, lambda rows: tiny[rows]) > 0


def test_shards(quantized: Make, tmp_path: Path) -> None:
    source = quantized(sym=True)
    convert(open_source(source), tmp_path / "shards", "gptq", shard=20_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
    assert torch.equal(logits(tmp_path / "shards"), logits(source))


def test_bf16_scales_lose_nothing_or_say_so(quantized: Make, tmp_path: Path) -> None:
    source = shutil.copytree(quantized(sym=False, format="gptq_v2"), tmp_path / "bf16")
    tensors = load_file(source / "model.safetensors")
    changed = {n: t.bfloat16() if n.endswith("scales") else t for n, t in tensors.items()}
    name = next(n for n in sorted(changed) if n.endswith("scales"))
    changed[name][0, 0] = 2.0**-22 * 1.5  # rounds in fp16, which ends at 2**-24
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    outcomes = {o.module: o for o in convert(open_source(source), tmp_path / "awq", "awq")}
    assert all(outcome.exact for outcome in outcomes.values())  # 1.5 * 2**-22 still has a bit to spare
    changed[name][0, 0] = 2.0**-24 * 1.5
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    outcomes = {o.module: o for o in convert(open_source(source), tmp_path / "awq", "awq")}
    lossy = [o for o in outcomes.values() if not o.exact]
    assert [o.module for o in lossy] == [name.removesuffix(".scales")]
    assert "float16" in lossy[0].note
    changed[name][0, 0] = 1e6
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"cannot be written as AWQ: it has scales up to"):
        convert(open_source(source), tmp_path / "none", "awq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["awq", "bf16"]


def test_mislabelled_zeros(quantized: Make, tmp_path: Path) -> None:
    source = shutil.copytree(quantized(sym=True), tmp_path / "wrong")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = config["quantization_config"]["format"] = "gptq_v2"
    (source / "config.json").write_text(json.dumps(config))
    found = inspect(source)
    assert found.layout == "gptq"
    assert "labelled checkpoint_format=gptq_v2, but zero points are stored as gptq" in found.problems[0]
    convert(open_source(source), tmp_path / "right", "gptq")
    assert not inspect(tmp_path / "right").problems
    assert torch.equal(logits(tmp_path / "right"), logits(quantized(sym=True)))


def test_inspect_counts(quantized: Make) -> None:
    found = inspect(quantized(sym=True, dynamic={r"+:.*o_proj": {"bits": 8}}))
    names = [kind.pop("names") for kind in found.modules]
    assert found.modules == [
        {"modules": 12, "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
        {"modules": 2, "bits": 8, "group_size": 32, "sym": True, "desc_act": False},
    ]
    assert names[1] == ["model.layers.*.self_attn.o_proj"] and len(names[0]) == 6
    model = AutoModelForCausalLM.from_pretrained(quantized(sym=True), dtype=torch.float16)
    assert found.architecture == "LlamaForCausalLM"
    linear = sum(m.in_features * m.out_features for n, m in model.named_modules() if n.endswith("_proj"))
    assert found.bf16_bytes == 2 * linear
    dense = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if "_proj" not in n)
    assert found.dense_bytes == dense
    assert found.runs["hf_gptq_plugin"] == "yes"


def broken(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_damage_is_named(quantized: Make, tmp_path: Path) -> None:
    source = shutil.copytree(quantized(sym=True), tmp_path / "damaged")
    name = "model.layers.1.mlp.up_proj"

    def infinite(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.scales"][1, 2] = float("inf")

    broken(source, infinite)
    found = inspect(source)
    assert any(f"{name}.scales[1, 2] is inf" in problem for problem in found.problems)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales\[1, 2\] is inf"):
        convert(open_source(source), tmp_path / "out", "gptq_v2")
    broken(source, lambda tensors: tensors.pop(f"{name}.qzeros"))
    with pytest.raises(CheckpointError, match=r"up_proj\.qzeros is missing"):
        open_source(source)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_folders_that_are_none(quantized: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled files can run code"):
        open_source(tmp_path / "pickled")
    source = shutil.copytree(quantized(sym=True), tmp_path / "escaping")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./model\.safetensors'; accepted are plain names"):
        open_source(source)
    good = open_source(quantized(sym=True))
    with pytest.raises(ValueError, match="is the source"):
        convert(good, good.folder, "gptq_v2")
    with pytest.raises(ValueError, match=r"use one of gptq, gptq_v2, .*, gguf$"):
        convert(good, tmp_path / "out", "marlin")


def test_an_old_checkpoint_there_is_replaced_whole(quantized: Make, tmp_path: Path) -> None:
    source = open_source(quantized(sym=True))
    convert(source, tmp_path / "out", "gptq", shard=20_000)
    convert(source, tmp_path / "out", "compressed-tensors")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out/quantize_config.json").exists()
    assert open_source(tmp_path / "out").layout == "compressed-tensors"


@pytest.mark.parametrize("rules", [{}, {"-:.*(c_attn|c_fc|mlp.c_proj)": {}}])
def test_layers_of_conv1d_come_out_as_they_are_stored(tiny: Make, tmp_path: Path, rules: dict[str, Any]) -> None:
    """GPT-2's matrices lie `[K, N]`; square ones load either way."""
    config = GPTQConfig(bits=4, group_size=32, method="rtn", dynamic=rules)
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"), quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "q")
    convert(open_source(tmp_path / "q"), tmp_path / "dense", "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(tmp_path / "q"), rtol=1e-4, atol=1e-4)


def test_dense_layers_outside_of_blocks_are_named(tiny: Make, tmp_path: Path) -> None:
    """Readers take a layer that is not named for a quantized one."""
    folder = tiny("opt", word_embed_proj_dim=32)
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float16).save_pretrained(
        tmp_path / "q"
    )
    convert(open_source(tmp_path / "q"), tmp_path / "c", "compressed-tensors")
    written = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.decoder.project_in", "model.decoder.project_out", "lm_head"} <= set(written)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.0.mlp.down_proj"


def test_sources_that_contradict_themselves(quantized: Make, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(quantized(), tmp_path / name))

    both = copy("both")
    rewrite(both, lambda s: s.update({f"{DOWN}.weight": torch.zeros(64, 64)}))
    with pytest.raises(CheckpointError, match=rf"holds both {DOWN}\.qweight and {DOWN}\.weight"):
        open_source(both)
    empty = copy("empty")
    rewrite(empty, lambda s: s.update({f"{DOWN}.g_idx": torch.zeros(0, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.g_idx has shape \[0\], which holds nothing"):
        open_source(empty)
    absent = copy("absent")
    names = {n: "model.safetensors" for n in [*load_file(absent / "model.safetensors"), "model.extra.weight"]}
    (absent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"names model\.extra\.weight, and no file holds it"):
        open_source(absent)
    odd = copy("odd")
    config = json.loads((odd / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq_v2"
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quant_method='gptq_v2' is not known"):
        open_source(odd)


def test_act_order_without_a_group_index_is_refused(quantized: Make, tmp_path: Path) -> None:
    """As `from_pretrained` does, in the same words: natural groups would be wrong weights."""
    source = Path(shutil.copytree(quantized(), tmp_path / "q"))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (source / "config.json").write_text(json.dumps(config))
    open_source(source)
    rewrite(source, lambda s: s.pop(f"{DOWN}.g_idx"))
    with pytest.raises(CheckpointError) as loading:
        AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.g_idx is missing .* desc_act=True needs it") as converting:
        convert(open_source(source), tmp_path / "out", "dense")
    assert str(converting.value) == str(loading.value)
    assert inspect(source).problems == [str(loading.value)]
    assert not (tmp_path / "out").exists()


def test_act_order_of_one_group_needs_no_index(quantized: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantized(group_size=-1), tmp_path / "q"))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (source / "config.json").write_text(json.dumps(config))
    rewrite(source, lambda s: s.pop(f"{DOWN}.g_idx"))
    convert(open_source(source), tmp_path / "out", "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(quantized(group_size=-1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", [{"-:.*down_proj": {}}, {"-:.*down_proj": {}, "+:.*down_proj": {"bits": 8}}])
def test_codes_of_an_excluded_module_are_read_as_loaders_do(
    quantized: Make, tmp_path: Path, rules: dict[str, Any]
) -> None:
    """What is quantized is decided by the tensors."""
    source = Path(shutil.copytree(quantized(), tmp_path / "q"))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["dynamic"] = rules
    (source / "config.json").write_text(json.dumps(config))
    assert inspect(source).problems == []
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(loaded(input_ids=IDS).logits, logits(quantized()))  # as without the rule
    convert(open_source(source), tmp_path / "dense", "dense", dtype=torch.float32)
    written = load_file(tmp_path / "dense/model.safetensors")[f"{DOWN}.weight"]
    assert torch.equal(written, loaded.dequantize().get_submodule(DOWN).weight)
    convert(open_source(source), tmp_path / "v2", "gptq_v2")
    assert torch.equal(logits(tmp_path / "v2"), logits(quantized()))


def test_names_with_signs_of_regular_expressions(quantized: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantized(), tmp_path / "q"))
    odd = "a(b.[c"
    rewrite(source, lambda s: s.update({f"{odd}.weight": torch.ones(4, 4)}))
    convert(open_source(source), tmp_path / "v2", "gptq_v2")
    open_source(tmp_path / "v2")
    rules = json.loads((tmp_path / "v2/config.json").read_text())["quantization_config"]["dynamic"]
    assert [rule for rule in rules if re.match(rule.removeprefix("-:"), odd)]


def test_an_int64_group_index_is_compressed_tensors_alone(quantized: Make, tmp_path: Path) -> None:
    """GPTQ's loader refuses it."""
    source = Path(shutil.copytree(quantized(), tmp_path / "q"))
    group = load_file(source / "model.safetensors")[f"{DOWN}.g_idx"]
    convert(open_source(source), tmp_path / "c", "compressed-tensors")
    rewrite(tmp_path / "c", lambda s: s.update({f"{DOWN}.weight_g_idx": group.long()}))
    convert(open_source(tmp_path / "c"), tmp_path / "out", "gptq_v2")
    written = load_file(tmp_path / "out" / "model.safetensors")[f"{DOWN}.g_idx"]
    assert written.dtype == torch.int32 and torch.equal(written, group)
    rewrite(source, lambda s: s.update({f"{DOWN}.g_idx": group.long()}))
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.g_idx has dtype I64; accepted: I32$"):
        open_source(source)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_index_that_is_too_short(quantized: Make, tmp_path: Path, bits: int) -> None:
    """As many words hold one input less."""
    source = Path(shutil.copytree(quantized(bits=bits), tmp_path / "q"))
    rewrite(source, lambda s: s.update({f"{DOWN}.g_idx": s[f"{DOWN}.g_idx"][:-1].clone()}))
    message = rf"{DOWN}\.g_idx has 159 entries, but {DOWN}\.qweight holds codes of more inputs"
    with pytest.raises(CheckpointError, match=message):
        convert(open_source(source), tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()
    (problem,) = inspect(source).problems
    assert re.match(message, problem)


@pytest.mark.parametrize(
    ("leaf", "shape", "wanted"), [("qweight", [1920], "2 dimensions"), ("g_idx", [160, 1], "1 dimension")]
)
def test_a_tensor_of_other_dimensions(
    quantized: Make, tmp_path: Path, leaf: str, shape: list[int], wanted: str
) -> None:
    source = Path(shutil.copytree(quantized(), tmp_path / "q"))
    rewrite(source, lambda s: s.update({f"{DOWN}.{leaf}": s[f"{DOWN}.{leaf}"].reshape(shape)}))
    (problem,) = inspect(source).problems
    assert problem == f"{DOWN}.{leaf} has shape {shape}; it must have {wanted}: fetch it again"


@pytest.mark.parametrize(
    ("target", "scale", "dtype"), [("dense", 1e5, torch.float16), ("dense", 1e-9, torch.float16), ("awq", 1e-9, None)]
)
def test_what_would_be_lost_is_not_written(
    quantized: Make, tmp_path: Path, target: str, scale: float, dtype: torch.dtype | None
) -> None:
    source = Path(shutil.copytree(quantized(), tmp_path / "q"))
    rewrite(source, lambda s: s.update({f"{DOWN}.scales": torch.full_like(s[f"{DOWN}.scales"].float(), scale)}))
    with pytest.raises(CheckpointError, match=rf"{DOWN} would be lost: its relative error is (inf|nan|1) as {target}"):
        convert(open_source(source), tmp_path / "out", target, dtype=dtype or torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_a_dense_tensor_that_would_overflow_is_named(quantized: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantized(), tmp_path / "q"))
    rewrite(source, lambda s: s.update({"model.norm.weight": torch.full((64,), 1e6)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds values that torch\.float16 cannot"):
        convert(open_source(source), tmp_path / "out", "dense", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
