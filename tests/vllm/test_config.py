"""Which checkpoints the plugin takes, and what it makes of each layer."""

from __future__ import annotations

import pickle
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

JSON = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
ATTENTION = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def write(folder: Path, quantized: list[str], dense: tuple[str, ...] = (), leave_out: str = "") -> Path:
    """A checkpoint of those modules, 64 × 64, without the tensor `leave_out`."""
    tensors = {f"{name}.weight": torch.zeros(64, 64) for name in dense}
    for name in quantized:
        for leaf, shape in QuantSpec(4, 32).shapes(64, 64).items():
            dtype = torch.float16 if leaf == "scales" else torch.int32
            tensors[f"{name}.{leaf}"] = torch.zeros(shape, dtype=dtype)
    tensors.pop(leave_out, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config(folder: Path | None = None, **fields: Any) -> Any:
    from vllm_plugin.config import HfGptqConfig

    made = HfGptqConfig.from_config({**JSON, **fields})
    made.packed_modules_mapping = FUSED
    if folder is not None:
        made.maybe_update_config(str(folder))
    return made


def test_vllm_finds_the_plugin() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "hf_gptq"]
    register = entry.load()
    register()
    register()
    assert QUANTIZATION_METHODS.count("hf_gptq") == 1
    assert get_quantization_config("hf_gptq").__module__ == "vllm_plugin.config"


@pytest.mark.parametrize(
    ("fields", "user", "ours"),
    [
        ({}, "hf_gptq", True),
        ({}, None, False),
        ({}, "gptq", False),
        ({"bits": 3}, "gptq", False),
        ({"bits": 2}, None, True),
        ({"bits": 3}, None, True),
        ({"sym": False}, None, True),
        ({"desc_act": True}, None, True),
        ({"desc_act": True, "group_size": -1}, None, False),
        ({"checkpoint_format": "gptq_v2"}, None, True),
        ({"group_size": 48}, None, True),
        ({"group_size": -1}, None, False),
        ({"dynamic": {"+:.*down_proj": {"bits": 3}}}, None, True),
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, None, True),
        ({"dynamic": {"+:.*down_proj": {"bits": 4}}}, None, False),
        ({"dynamic": {r"+:language_model\.layers\.7\.self_attn\.[qkv]_proj": {"group_size": 64}}}, None, True),
        ({"dynamic": {"-:.*down_proj": {"bits": 3}}}, None, False),
        ({"dynamic": {r"+:.*\.(q|k|v)_proj": {"group_size": 64}}}, None, True),  # vLLM asks for qkv_proj
        ({"dynamic": {r"-:model\.layers\.7\.mlp\.(gate|up)_proj": {}}}, None, True),
        ({"dynamic": {r"-:model\.layers\.7\.": {}}}, None, False),
        ({"dynamic": {r"-:.*\.q_proj": {}}}, None, True),
        ({"dynamic": {r"-:(?!.*\.(q_proj|k_proj|v_proj)$).*": {}}}, None, True),  # which leaves qkv_proj out
        ({"dynamic": {r"-:.*\.experts\..*": {}}}, None, True),  # vLLM asks for mlp.experts
        ({"dynamic": {r"-:.*\.experts": {}}}, None, False),
        ({"quant_method": "awq", "bits": 3}, "hf_gptq", False),
        ({"bits": 5}, None, False),
        ({"bits": 5}, "hf_gptq", True),
    ],
)
def test_checkpoints_that_the_plugin_takes(
    fields: dict[str, Any], user: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm_plugin.config as module

    monkeypatch.setattr(module, "_own_bits", lambda: (4, 8))
    chosen = module.HfGptqConfig.override_quantization_method({**JSON, **fields}, user)
    assert chosen == ("hf_gptq" if ours else None)


@pytest.mark.parametrize("field", ["group_size", "desc_act", "sym"])
def test_a_config_without_what_vllm_has_no_default_for(field: str) -> None:
    from vllm_plugin.config import HfGptqConfig

    assert HfGptqConfig.override_quantization_method({k: v for k, v in JSON.items() if k != field}, None) == "hf_gptq"


def test_without_vllms_own_kernel_every_checkpoint_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm_plugin.config as module

    monkeypatch.setattr(module, "_own_bits", lambda: ())
    assert module.HfGptqConfig.override_quantization_method(JSON, None) == "hf_gptq"
    assert module.HfGptqConfig.override_quantization_method(JSON, "gptq") is None


def test_what_vllm_itself_refuses_today() -> None:
    """The plugin offers itself exactly where vLLM's own method fails. When this fails, vLLM has changed: change
    `_refused_by_vllm` with it."""
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
    from vllm.platforms import current_platform

    from vllm_plugin.config import HfGptqConfig

    if not current_platform.is_cpu():
        pytest.skip("on a GPU what vLLM takes also depends on its compute capability")
    has_kernel = hasattr(torch.ops._C, "cpu_gemm_wna16")

    def vllm_takes(json: dict[str, Any]) -> bool:
        try:
            made = AutoGPTQConfig.from_config(json)
            AutoGPTQLinearMethod(made)
        except ValueError:
            return False
        return True

    fields = {"bits": (2, 3, 4, 8), "sym": (True, False), "desc_act": (False, True), "group_size": (16, 48, 128, -1)}
    disagreements = []
    for values in product(*fields.values()):
        json = {**JSON, **dict(zip(fields, values, strict=True))}
        chosen = HfGptqConfig.override_quantization_method(json, None)
        if (chosen is None) != (vllm_takes(json) and has_kernel):
            disagreements.append(json)
    assert not disagreements, "vLLM's own method takes other checkpoints than _refused_by_vllm says"
    # It does not look at the format, and so reads every zero one too high.
    assert vllm_takes({**JSON, "checkpoint_format": "gptq_v2"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits=5 is not supported; use one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0"),
        ({"dynamic": {"+:(": {}}}, r"dynamic\['\+:\('\]"),
        ({"lm_head": "yes"}, "lm_head='yes'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config(**fields)


def test_no_tensor_of_the_checkpoint_is_dropped() -> None:
    (kept,) = config().get_checkpoint_weight_mapper().apply([("a.g_idx", torch.zeros(1))])
    assert kept[0] == "a.g_idx"


def test_it_survives_the_way_to_a_worker(tmp_path: Path) -> None:
    made = pickle.loads(pickle.dumps(config(write(tmp_path, ATTENTION))))
    assert made.scheme("model.layers.0.self_attn.o_proj").spec == QuantSpec(4, 32)


def test_a_layer_is_quantized_where_the_checkpoint_has_codes(tmp_path: Path) -> None:
    made = config(write(tmp_path, ATTENTION, dense=("model.layers.0.mlp.down_proj", "lm_head")))
    fused = made.scheme("model.layers.0.self_attn.qkv_proj")
    assert fused.names == tuple(ATTENTION[:3])
    assert fused.spec == QuantSpec(4, 32) and fused.scales_dtype == torch.float16
    assert made.scheme("model.layers.0.mlp.down_proj") is None
    assert made.scheme("lm_head") is None


def test_rules_are_matched_with_the_parts_of_a_fused_layer(tmp_path: Path) -> None:
    made = config(write(tmp_path, ATTENTION), dynamic={r"+:.*\.[qkv]_proj": {"bits": 8}})
    assert made.scheme("model.layers.0.self_attn.qkv_proj").spec.bits == 8
    assert made.scheme("model.layers.0.self_attn.o_proj").spec.bits == 4


def test_parts_that_differ_are_named(tmp_path: Path) -> None:
    made = config(write(tmp_path, ATTENTION), dynamic={r"+:.*\.v_proj": {"bits": 8}})
    with pytest.raises(CheckpointError, match=r"self_attn\.v_proj: bits=8.*quantize them with one setting"):
        made.scheme("model.layers.0.self_attn.qkv_proj")


def test_a_part_that_is_dense_is_named(tmp_path: Path) -> None:
    made = config(write(tmp_path, ATTENTION[:2], dense=(ATTENTION[2],)))
    with pytest.raises(CheckpointError, match=r"self_attn\.v_proj: not quantized"):
        made.scheme("model.layers.0.self_attn.qkv_proj")


def test_a_module_that_is_not_in_the_checkpoint_is_named(tmp_path: Path) -> None:
    made = config(write(tmp_path, ATTENTION[:3]))
    with pytest.raises(CheckpointError, match=r"neither model\.layers\.0\.self_attn\.o_proj\.qweight nor"):
        made.scheme("model.layers.0.self_attn.o_proj")


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
def test_an_incomplete_checkpoint_is_refused_before_it_is_loaded(tmp_path: Path, leaf: str) -> None:
    folder = write(tmp_path, ATTENTION, leave_out=f"{ATTENTION[3]}.{leaf}")
    with pytest.raises(CheckpointError, match=rf"self_attn\.o_proj\.{leaf} is missing from the checkpoint"):
        config(folder)


def test_files_that_cannot_be_served_are_named(tmp_path: Path) -> None:
    """Pickles, damaged headers, a tensor twice."""
    folder = write(tmp_path, ATTENTION)
    save_file({f"{ATTENTION[0]}.scales": torch.ones(2, 64)}, folder / "zz.safetensors")
    with pytest.raises(CheckpointError, match=r"zz\.safetensors"):
        config(folder)
    (folder / "zz.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"zz\.safetensors cannot be read as safetensors"):
        config(folder)
    for file in folder.iterdir():
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors|pickle"):
        config(folder)


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor of the checkpoint ends in \.qweight"):
        config(write(tmp_path, [], dense=("lm_head",)))


def test_renamed_modules_keep_the_rules_of_their_own_names(tmp_path: Path) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    made = config(write(tmp_path, ATTENTION), dynamic={r"+:model\.layers\.0\..*": {"bits": 8}})
    made.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    scheme = made.scheme("language_model.model.layers.0.self_attn.qkv_proj")
    assert scheme.names == tuple(ATTENTION[:3]) and scheme.spec.bits == 8


def test_a_layer_that_is_fused_on_disk(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.qkv_proj"
    assert config(write(tmp_path, [name])).scheme(name).names == (name,)


def test_without_headers_the_rules_decide() -> None:
    made = config(dynamic={r"-:.*\.o_proj": {}})
    assert made.scheme("model.layers.0.self_attn.qkv_proj").scales_dtype == torch.float32
    assert made.scheme("model.layers.0.self_attn.o_proj") is None


def routed(gate: str = "gate_proj", down: str = "down_proj", up: str | None = "up_proj", count: int = 2) -> Any:
    """What a layer of routed experts tells about its checkpoint."""
    from types import SimpleNamespace

    return SimpleNamespace(
        ckpt_gate_proj_name=gate, ckpt_down_proj_name=down, ckpt_up_proj_name=up, global_num_experts=count
    )


EXPERTS = "model.layers.0.mlp.experts"


def expert_modules(*leaves: str) -> list[str]:
    return [f"{EXPERTS}.{expert}.{leaf}" for expert in range(2) for leaf in leaves]


@pytest.mark.parametrize("leaves", [("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3")])
def test_experts_by_either_names(tmp_path: Path, leaves: tuple[str, str, str]) -> None:
    made = config(write(tmp_path, expert_modules(*leaves)), dynamic={rf"+:.*\.{leaves[1]}": {"bits": 8}})
    scheme = made.experts_scheme(routed(*leaves), EXPERTS)
    assert (scheme.up, scheme.down) == (QuantSpec(4, 32), QuantSpec(8, 32))
    assert scheme.scales_dtype == torch.float16
    assert scheme.names[1, "w3"] == f"{EXPERTS}.1.{leaves[2]}"


def test_experts_without_a_gate(tmp_path: Path) -> None:
    made = config(write(tmp_path, expert_modules("up_proj", "down_proj")))
    scheme = made.experts_scheme(routed("up_proj", "down_proj", None), EXPERTS)
    assert sorted(scheme.names) == [(0, "w1"), (0, "w2"), (1, "w1"), (1, "w2")]


def test_renamed_experts_keep_the_rules_of_their_own_names(tmp_path: Path) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    made = config(write(tmp_path, expert_modules("w1", "w2", "w3")), dynamic={r"+:.*\.w2": {"bits": 8}})
    made.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    scheme = made.experts_scheme(routed("w1", "w2", "w3"), f"language_model.{EXPERTS}")
    assert scheme.down.bits == 8 and scheme.names[0, "w1"] == f"{EXPERTS}.0.w1"


def test_dense_experts_of_a_quantized_model(tmp_path: Path) -> None:
    made = config(write(tmp_path, ATTENTION))
    assert made.experts_scheme(routed(), EXPERTS) is None


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({r"+:.*\.1\..*": {"bits": 8}}, r"experts\.0\.gate_proj: bits=4.*experts\.1\.gate_proj: bits=8"),
        ({r"+:.*up_proj": {"group_size": 64}}, r"experts\.0\.gate_proj.*experts\.0\.up_proj.*group_size=64"),
    ],
)
def test_experts_that_differ_are_named(tmp_path: Path, dynamic: dict[str, Any], message: str) -> None:
    made = config(write(tmp_path, expert_modules("gate_proj", "down_proj", "up_proj")), dynamic=dynamic)
    with pytest.raises(CheckpointError, match=message):
        made.experts_scheme(routed(), EXPERTS)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    made = config(write(tmp_path, expert_modules("gate_proj", "down_proj", "up_proj")))
    with pytest.raises(CheckpointError, match=r"neither .*experts\.2\.gate_proj\.qweight nor"):
        made.experts_scheme(routed(count=3), EXPERTS)


def test_experts_that_are_quantized_in_part(tmp_path: Path) -> None:
    down = tuple(f"{EXPERTS}.{expert}.down_proj" for expert in range(2))
    made = config(write(tmp_path, expert_modules("gate_proj", "up_proj"), dense=down))
    with pytest.raises(CheckpointError, match="only some of their matrices are quantized"):
        made.experts_scheme(routed(), EXPERTS)


def test_experts_under_other_names(tmp_path: Path) -> None:
    made = config(write(tmp_path, expert_modules("gate_up_proj", "down_projection")))
    with pytest.raises(CheckpointError, match=r"none is named as vLLM expects .*experts\.0\.gate_proj"):
        made.experts_scheme(routed(), EXPERTS)
