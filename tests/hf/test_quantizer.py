"""from_pretrained quantizes, saves, reloads, offloads and dequantizes."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import GPTQConfig as StockConfig

import hf_gptq_plugin
from hf_gptq_plugin import CheckpointError, GPTQConfig, QuantLinear
from hf_gptq_plugin.calibrate.data import CalibrationError
from hf_gptq_plugin.calibrate.walk import WalkError
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.hf.quantizer import GptqQuantizer
from hf_gptq_plugin.solve.gptq import SolveSettings, solve
from hf_gptq_plugin.solve.hessian import SolveError
from hf_gptq_plugin.solve.learn import TuneSettings
from hf_gptq_plugin.train.methods import attach, export

Tiny = Callable[..., Path]
IDS = torch.arange(3, 35)[None]


def quantize(path: Path, windows: list[list[int]], **fields: Any) -> Any:
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": windows, "samples": 8, "seqlen": 32, **fields})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit asymmetric llama on disk."""
    out = tmp_path_factory.mktemp("gptq") / "model"
    quantize(tiny("llama"), windows, sym=False).save_pretrained(out)
    return out


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with its tensors or its config changed."""

    def make(tensors: Callable[[dict[str, torch.Tensor]], object] | None = None, **config: Any) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoint, folder)
        if tensors is not None:
            state = load_file(folder / "model.safetensors")
            tensors(state)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        data = json.loads((folder / "config.json").read_text())
        data["quantization_config"].update(config)
        (folder / "config.json").write_text(json.dumps(data))
        return folder

    return make


def load(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **kwargs})


@pytest.mark.parametrize("fields", [
    {"bits": 2}, {"bits": 3, "sym": False}, {"bits": 8, "group_size": -1}, {"group_size": 40},
    {"desc_act": True}, {"desc_act": True, "sym": False, "format": "gptq_v2"}, {"format": "gptq_v2"},
    {"true_sequential": False}, {"scale_search": "minmax", "order": "natural"}, {"group_size": 1000},
])  # fmt: skip
def test_every_variant_of_the_format(
    fields: dict[str, Any], tiny: Tiny, windows: list[list[int]], tmp_path: Path
) -> None:
    model = quantize(tiny("llama"), windows, **fields)
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    spec = QuantSpec(**{
        "group_size": 32, **{k: v for k, v in fields.items() if k in ("bits", "sym", "group_size", "desc_act")},
        "checkpoint_format": fields.get("format", "gptq"),
    })  # fmt: skip
    assert layer.spec == spec
    for leaf, shape in spec.shapes(160, 96).items():
        assert state[f"{name}.{leaf}"].shape == shape
    natural = torch.arange(160) // spec.width(160)
    assert torch.equal(state[f"{name}.g_idx"].long(), natural) != spec.desc_act
    again = load(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    again.save_pretrained(tmp_path / "again")
    for key, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, state[key]), key


def test_stock_config_works_unchanged(tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    config = StockConfig(bits=4, group_size=32, dataset=windows, tokenizer=None)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written == json.loads((tmp_path / "quantize_config.json").read_text())
    assert (written["quant_method"], written["checkpoint_format"], written["backend"]) == ("gptq", "gptq", "auto")
    assert not {"dataset", "tokenizer", "samples"} & set(written)
    assert written["damp_percent"] == 0.01  # its own default is none of the user's
    assert GPTQConfig.from_stock(StockConfig(bits=4, damp_percent=0.05)).damp_percent == 0.05
    assert written["meta"]["calibration"]["tokens"] == 256
    # A stock config for loading attributes is accepted beside the checkpoint's own.
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute"):
        load(tmp_path, quantization_config=StockConfig(bits=4, backend="auto"))


def test_config_class_goes_by_the_stock_name() -> None:
    # A checkpoint's config and the caller's are taken for the same kind only then.
    assert GPTQConfig.__name__ == StockConfig.__name__ and issubclass(GPTQConfig, StockConfig)


def test_copies_of_a_config_share_what_is_large() -> None:
    class Tokenizer:
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise AssertionError("copied")

    config = GPTQConfig(bits=3, dataset=["text"], tokenizer=Tokenizer(), dynamic={"x": {"bits": 8}})
    twin = copy.deepcopy(config)
    assert twin.tokenizer is config.tokenizer and twin.dataset is config.dataset
    twin.dynamic["x"]["bits"] = 2
    assert config.dynamic == {"x": {"bits": 8}} and twin.bits == 3


def test_registering_twice_and_giving_back() -> None:
    from transformers.quantizers import auto

    ours = auto.AUTO_QUANTIZER_MAPPING["gptq"]
    hf_gptq_plugin.register()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is ours
    hf_gptq_plugin.unregister()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers.")
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is StockConfig
    hf_gptq_plugin.register()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is ours


def test_scales_keep_their_dtype_and_never_train(checkpoint: Path) -> None:
    model = load(checkpoint, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.scales.dtype == torch.float16
    assert layer.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters())
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offload_and_save_again(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    expected = load(checkpoint)(input_ids=IDS).logits
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": kind}
    model = load(checkpoint, device_map=device_map, offload_folder=tmp_path / "offload")
    on_meta = model.model.layers[1].mlp.up_proj.qweight.device.type == "meta"
    assert on_meta == (kind == "disk")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    state = load_file(checkpoint / "model.safetensors")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(state)
    assert all(torch.equal(again[k], state[k]) for k in state)


def test_quantize_an_offloaded_model(
    tiny: Tiny, windows: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dict(bits=4, group_size=32, dataset=windows, samples=8, seqlen=32)
    # An offloaded one writes no text, takes no backward pass and learns nothing as a whole, whatever is asked for.
    plain = load(tiny("llama"), quantization_config=GPTQConfig(**config, generated=0, output_hessian="identity"))
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    asked = GPTQConfig(**config, token_weights="loss", model_epochs=1)
    model = load(tiny("llama"), quantization_config=asked, device_map=device_map, offload_folder=tmp_path)
    assert "(generated, token_weights, output_hessian, model_epochs)" in caplog.text
    solver = model.config.quantization_config.meta["solver"]
    assert solver == plain.config.quantization_config.meta["solver"]
    assert model.model.layers[1].mlp.up_proj.qweight.is_meta and not model.model.layers[0].mlp.up_proj.qweight.is_meta
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_dequantize(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    logits = model(input_ids=IDS).logits
    dense = model.dequantize()
    assert dense is model
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dequantize_after_saving(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """In the layers that the model's class has, which GPT-2 stores transposed."""
    config = GPTQConfig(bits=8, group_size=32, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(tiny(kind), quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantized")
    logits = model(input_ids=IDS).logits
    model.dequantize().save_pretrained(tmp_path / "dense")
    again = load(tmp_path / "dense")
    assert not any(isinstance(m, QuantLinear) for m in again.modules())
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"])
@pytest.mark.parametrize("dense", [False, True])
def test_tensors_of_another_shape(name: str, dense: bool, tiny: Tiny, tmp_path: Path) -> None:
    """Which Transformers 5.19 looks at only where there is no quantizer, and 5.24 always."""
    folder, fields = tmp_path / "model", {"tie_word_embeddings": False}
    shutil.copytree(tiny("llama", **fields), folder)
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    if not dense:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = "ignore_mismatched_sizes"
    with pytest.raises((CheckpointError, RuntimeError), match=rf"{re.escape(name)} has shape \(1,.*needs \(|{theirs}"):
        AutoModelForCausalLM.from_pretrained(folder, **({"quantization_config": config} if dense else {}))


def test_deep_copies_and_state_dicts_are_whole(checkpoint: Path) -> None:
    model = load(checkpoint)
    logits = model(input_ids=IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=IDS).logits, logits)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(input_ids=IDS).logits, logits)
    state = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_shards_of_a_chosen_size(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(load(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model.save_pretrained(tmp_path)  # over the shards
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_per_module_rules(tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    dynamic = {r"-:.*layers\.0\.mlp": {}, r"+:.*v_proj": {"bits": 8, "group_size": 16}, r".*o_proj": {"sym": False}}
    model = quantize(tiny("llama"), windows, dynamic=dynamic)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for found in (model, again):
        attention = found.model.layers[1].self_attn
        assert attention.v_proj.spec == QuantSpec(8, 16) and attention.o_proj.spec.sym is False
        zeros = attention.o_proj.quantized_weight().zeros
        assert int(zeros.min()) < int(zeros.max())  # free, where symmetric ones are all 8
        assert set(attention.q_proj.quantized_weight().zeros.unique().tolist()) == {8}
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    chosen = quantize(tiny("llama"), windows, modules_in_block_to_quantize=[["self_attn.o_proj"], ["mlp.up_proj"]])
    names = {n.split(".", 3)[3] for n, m in chosen.named_modules() if isinstance(m, QuantLinear)}
    assert names == {"self_attn.o_proj", "mlp.up_proj"}


@pytest.mark.parametrize("tied", [False, True])
def test_lm_head(tied: bool, tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    model = quantize(tiny("llama", tie_word_embeddings=tied), windows, lm_head=True)
    assert isinstance(model.lm_head, QuantLinear)
    assert type(model.model.embed_tokens) is nn.Embedding
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_layers_see_their_quantized_predecessors(tiny: Tiny, windows: list[list[int]]) -> None:
    model = quantize(tiny("llama"), windows, bits=2, preset="fast")
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for window in windows:
        model(input_ids=torch.tensor([window]), use_cache=False)
    handle.remove()
    rows = torch.cat(seen, 1)[0].double()
    hessian = rows.T @ rows / len(rows)
    # Solving the layer again on what it meets in the finished model gives the codes that it has.
    dense = load(tiny("llama")).model.layers[1].mlp.down_proj.weight.detach()
    solved, _ = solve(dense, hessian.float(), layer.spec, SolveSettings(descent=0, refit=False))
    same = (solved.codes == layer.quantized_weight().codes).float().mean()
    assert same > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.0.mlp.up_proj.scales"), r"layers\.0\.mlp\.up_proj\.scales is missing"),
        (lambda s: s.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda s: s.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (
            lambda s: [s.pop(f"model.layers.0.mlp.up_proj.{t}") for t in ("qweight", "qzeros", "scales", "g_idx")],
            r"model\.layers\.0\.mlp\.up_proj\.weight is missing",
        ),
        (
            lambda s: s.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(3, 3, dtype=torch.int32)}),
            r"up_proj\.qweight has shape \(3, 3\).*need \(12, 160\)",
        ),
        (
            lambda s: s["model.layers.0.mlp.up_proj.g_idx"].fill_(9),
            r"model\.layers\.0\.mlp\.up_proj\.g_idx holds group 9",
        ),
        (
            lambda s: s["model.layers.0.mlp.up_proj.scales"].fill_(float("nan")),
            r"model\.layers\.0\.mlp\.up_proj\.scales\[0, 0\] is nan",
        ),
        (
            lambda s: s.update({
                f"model.layers.0.mlp.moved.up_proj.{t}": s.pop(f"model.layers.0.mlp.up_proj.{t}")
                for t in ("qweight", "qzeros", "scales", "g_idx")
            }),
            r"codes for model\.layers\.0\.mlp\.moved\.up_proj, but LlamaForCausalLM has no module",
        ),
    ],
)  # fmt: skip
def test_damaged_tensors(damaged: Callable[..., Path], change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(damaged(change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, r"bits=8.*bits=4 would fit"),
        ({"group_size": 16}, r"group_size=16.*group_size=32 would fit"),
        ({"bits": 5}, "bits=5 is not supported"),
        ({"bits": "four"}, "bits='four'"),
        ({"group_size": None}, "group_size=None"),
        ({"dynamic": {"[": {}}}, r"dynamic\['\['\]"),
    ],
)
def test_wrong_config(damaged: Callable[..., Path], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(damaged(**fields))


def test_a_base_model_and_a_task_head(checkpoint: Path, tmp_path: Path) -> None:
    whole = load(checkpoint)
    base = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    expected = whole.model(input_ids=IDS).last_hidden_state
    assert torch.equal(base(input_ids=IDS).last_hidden_state, expected)
    base.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(input_ids=IDS).last_hidden_state, expected)
    # A classifier's head is made to be trained; an output embedding made up at random would talk nonsense.
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2, dtype=torch.float32)
    assert torch.equal(classifier.model(input_ids=IDS).last_hidden_state, expected)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load(tmp_path)


def test_act_order_needs_its_group_index(damaged: Callable[..., Path]) -> None:
    drop = lambda s: s.pop("model.layers.1.mlp.up_proj.g_idx")  # noqa: E731
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.g_idx is missing.*desc_act=True needs it"):
        load(damaged(drop, desc_act=True))


def test_no_group_index_means_natural_order(damaged: Callable[..., Path], checkpoint: Path) -> None:
    def drop(state: dict[str, torch.Tensor]) -> None:
        for name in [n for n in state if n.endswith(".g_idx")]:
            del state[name]

    assert torch.equal(load(damaged(drop))(input_ids=IDS).logits, load(checkpoint)(input_ids=IDS).logits)


def test_truncated_file(damaged: Callable[..., Path]) -> None:
    folder = damaged()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        load(folder)


def test_unquantized_weights_under_a_gptq_config(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no tensor of the checkpoint ends in \.qweight"):
        load(tmp_path / "m")


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_mislabelled_zeros(
    sym: bool, written: str, label: str, tiny: Tiny, windows: list[list[int]], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model = quantize(tiny("llama"), windows, sym=sym, format=written)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(checkpoint_format=label, format=label)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load(tmp_path)
    assert f"labelled checkpoint_format={label} but its zero points are stored as {written}" in caplog.text
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert again.config.quantization_config.format == written  # a resave carries the true label


def test_fields_of_other_writers_are_ignored(damaged: Callable[..., Path]) -> None:
    folder = damaged(
        damp_percent=None, static_groups=False, model_name_or_path="x", dataset=["a" * 100], tokenizer="missing/model",
        quantizer={"a": 1}, modules_in_block_to_quantize=None, use_cuda_fp16=True, format=None,
    )  # fmt: skip
    model = load(folder)
    assert model.config.quantization_config.dataset is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dataset": None}, CalibrationError, "needs calibration text"),
        ({"dataset": [[1, 999]]}, CalibrationError, "token id 999; this model takes 0 to 255"),
        ({"dataset": ["text"]}, CalibrationError, "no tokenizer could be loaded"),
        ({"block_name_to_quantize": "model.blocks"}, WalkError, "'model.blocks' is not a list of modules"),
        ({"modules_in_block_to_quantize": ["q"]}, WalkError, "names 'q'; the blocks of model.layers have"),
        ({"dynamic": {"-:.*": {}}}, WalkError, "no linear layer of model.layers is left"),
    ],
)
def test_calibration_that_cannot_be(
    fields: dict[str, Any], error: type[Exception], message: str, tiny: Tiny, windows: list[list[int]]
) -> None:
    with pytest.raises(error, match=message):
        quantize(tiny("llama"), windows, **fields)


def test_activations_that_are_not_finite_name_the_layer(tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SolveError, match=r"model\.layers\.1\.self_attn\.q_proj: the layer's inputs are not finite"):
        quantize(tmp_path / "m", windows)


@pytest.mark.parametrize(
    "fields", [{"bits": 5}, {"group_size": 0}, {"damp_percent": 1.5}, {"samples": 0}, {"seqlen": 1}, {"order": "x"}]
)
def test_impossible_configs(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        GPTQConfig(**fields)
    with pytest.raises(TypeError, match="unexpected"):
        GPTQConfig(unknown_field=1)


def test_a_failed_save_leaves_the_old_checkpoint(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = load(checkpoint)
    out = tmp_path / "out"
    model.save_pretrained(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_gptq_plugin.hf.saving.write_json", disk_full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_saving_onto_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        load(checkpoint).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_presets_decide_what_is_not_said() -> None:
    assert GPTQConfig(preset="fast").tuning == TuneSettings() == GPTQConfig().tuning
    assert GPTQConfig().settings == SolveSettings()
    best = GPTQConfig(preset="best", block_epochs=1, descent=4)
    assert best.block_epochs == 1 and best.settings.descent == 4
    assert best.model_epochs > 0 and best.settings.alternations > SolveSettings().alternations
    # By bits: what takes time, and at 4 bits changes nothing.
    for bits, alternations, descent, generated in ((3, 3, 3, 0.25), (4, 1, 1, 0.125)):
        config = GPTQConfig(bits=bits)
        assert (config.alternations, config.descent, config.generated) == (alternations, descent, generated)
    for bits, preset, weights in (
        (3, "balanced", "loss"),
        (4, "balanced", "uniform"),
        (2, "fast", "uniform"),
        (4, "best", "loss"),
    ):
        assert GPTQConfig(bits=bits, preset=preset).token_weights == weights
    assert GPTQConfig(bits=2, token_weights="uniform").token_weights == "uniform"
    assert GPTQConfig(bits=2, low_memory=True).token_weights == "uniform"


def test_low_memory_leaves_blocks_on_disk(tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path) -> None:
    config = GPTQConfig(group_size=32, dataset=windows, samples=8, low_memory=True)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14 and all(p.is_meta for layer in layers for p in layer.parameters())
    ids = torch.tensor(windows[:1])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, logits)


def test_low_memory_refuses_what_contradicts_it(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    for name, asked, without in (
        ("model_epochs", 1, 0), ("generated", 1, 0), ("token_weights", "loss", "uniform"),
        ("output_hessian", "loss", "identity"),
    ):  # fmt: skip
        assert getattr(GPTQConfig(preset="best"), name) != without
        assert getattr(GPTQConfig(preset="best", low_memory=True), name) == without
        with pytest.raises(ValueError, match=f"{name}={asked!r} needs the whole model at once, and low_memory=True"):
            GPTQConfig(low_memory=True, **{name: asked})
    config = GPTQConfig(group_size=32, dataset=windows, samples=8, low_memory=True)
    with pytest.raises(ValueError, match="device_map='auto' and low_memory=True both say where blocks go"):
        AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, device_map="auto")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("damp_percent", "a"), ("damp_percent", None), ("propagation", "x"), ("dynamic", "abc"), ("dynamic", [1]),
        ("preset", []), ("seed", "x"), ("seed", 1.5), ("seed", 2**70), ("seed", -1), ("generated", 1e300),
        ("modules_in_block_to_quantize", 5), ("modules_in_block_to_quantize", [5]), ("meta", 5), ("low_memory", "no"),
        ("true_sequential", "no"), ("lm_head", 1), ("format", 5),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{re.escape(repr(value))}|{re.escape(repr(value))}.*{field}"):
        GPTQConfig(bits=4, **{field: value})


def test_a_plain_mapping_is_a_config(tiny: Tiny, windows: list[list[int]]) -> None:
    """As Transformers takes one; a finished checkpoint's text is not read back."""
    fields = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dataset": windows, "samples": 2, "preset": "fast"}
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=fields)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert GPTQConfig.from_dict({**fields, "checkpoint_format": "gptq"}).dataset is None


@pytest.mark.parametrize("fields", [{"preset": "balanced", "descent": 1}, {"method": "hqq", "sym": False}])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_the_callers_defaults_play_no_part(
    default: torch.dtype | torch.device, fields: dict[str, Any], tiny: Tiny, windows: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Default dtype and default device of the thread that calibrates: the same codes and scales."""

    def made() -> dict[str, Tensor]:
        config = GPTQConfig(bits=3, group_size=32, dataset=windows, **fields)
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype=torch.bfloat16)
        return {name: value.clone() for name, value in model.state_dict().items()}

    wanted = made()
    assert any(name.endswith("qweight") for name in wanted)
    calibrate, before = GptqQuantizer._calibrate, torch.get_default_dtype()

    def elsewhere(self: Any, model: Any) -> None:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
            calibrate(self, model)
            assert torch.get_default_dtype() == default
        else:
            with default:
                calibrate(self, model)

    monkeypatch.setattr(GptqQuantizer, "_calibrate", elsewhere)
    try:
        found = made()
    finally:
        torch.set_default_dtype(before)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_base_model_is_whole(tiny: Tiny, checkpoint: Path, tmp_path: Path) -> None:
    """The class without a head initialises nothing either."""
    shutil.copytree(checkpoint, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    expected = AutoModel.from_pretrained(tmp_path / "m").norm.weight
    assert torch.equal(expected, state["model.norm.weight"])
    del state["model.norm.weight"]
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing from the checkpoint"):
        AutoModel.from_pretrained(tmp_path / "m")


def test_trainer_hears_whether_something_is_attached(checkpoint: Path) -> None:
    """Of this model, or of its copy."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert not model.hf_quantizer.is_qat_trainable
    attach(model, "affine", ["q_proj"])
    copied = copy.deepcopy(model)
    export(model)
    assert copied.hf_quantizer.is_qat_trainable and not model.hf_quantizer.is_qat_trainable
    export(copied)
    assert not copied.hf_quantizer.is_qat_trainable
