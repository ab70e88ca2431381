"""Folding: against an exhaustive search, and never worse than leaving the update out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec
from hf_gptq_plugin.hf import folding
from hf_gptq_plugin.native import NativeError
from hf_gptq_plugin.nn.linear import QuantLinear
from hf_gptq_plugin.solve.hessian import SolveError
from hf_gptq_plugin.train.fold import fold

# PEFT 0.21 uses names that Transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def weight(n: int, k: int, **fields: Any) -> QuantizedWeight:
    spec = QuantSpec(**{"bits": 4, "group_size": 32, **fields})
    group = natural_groups(k, spec.group_size)
    if spec.desc_act:
        group = group[torch.randperm(k)]
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(spec.groups(k), n) * 0.02 + 0.02).half()
    return QuantizedWeight(codes, scales, torch.full(scales.shape, 2 ** (spec.bits - 1)).int(), group, spec)


def inputs(k: int) -> Tensor:
    x = torch.randn(512, k) @ (torch.randn(k, k) * 0.3 + torch.eye(k))
    return x.T @ x / 512


def error(difference: Tensor, hessian: Tensor, damp: float = 0.01) -> float:
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    return float((difference.double() @ h * difference.double()).sum())


@pytest.mark.parametrize("size", [0.01, 0.1, 0.3])
@pytest.mark.parametrize(
    "fields", [{}, {"desc_act": True}, {"bits": 2, "group_size": -1}, {"bits": 3, "group_size": 24}]
)
def test_residual_is_what_it_says_and_at_most_one(size: float, fields: dict[str, Any]) -> None:
    w, h = weight(48, 64, **fields), inputs(64)
    delta = torch.randn(48, 4) @ torch.randn(4, 64)
    delta *= size * w.dequantize().norm() / delta.norm()
    made, report = fold(w, delta, h)
    residual = error(w.dequantize() + delta - made.dequantize(), h) / error(delta, h)
    assert report.residual == pytest.approx(residual, rel=1e-3)
    assert residual <= 1 + 1e-6
    if size == 0.3 and w.spec.bits == 4:
        assert residual < 0.3  # most of a large update fits
    assert torch.equal(made.zeros, w.zeros) and torch.equal(made.group, w.group)
    assert report.codes == pytest.approx(float((made.codes != w.codes).float().mean()))


def test_close_to_the_best_of_all() -> None:
    # One row, two bits, four columns: all 256 codes can be tried; scales stay.
    w, h = weight(1, 4, bits=2, group_size=4), inputs(4)
    delta = torch.randn(1, 4) * 0.05
    wanted = w.dequantize() + delta
    made, report = fold(w, delta, h)
    every = []
    for codes in itertools.product(range(4), repeat=4):
        w.codes[0] = torch.tensor(codes, dtype=torch.uint8)
        every.append(error(wanted - w.dequantize(), h))
    given = error(wanted - made.dequantize(), h)
    assert given <= min(every) * 1.25
    assert report.residual <= 1


def test_nothing_to_fold() -> None:
    w = weight(16, 64)
    made, report = fold(w, torch.zeros(16, 64), inputs(64))
    assert made is w and report.chosen == "unchanged" and report.residual == 1


def test_updates_that_cannot_be() -> None:
    w = weight(16, 64)
    with pytest.raises(ValueError, match=r"the update is \(16, 60\) and the weight \(16, 64\)"):
        fold(w, torch.zeros(16, 60), inputs(64))
    with pytest.raises(ValueError, match="not finite"):
        fold(w, torch.full((16, 64), float("nan")), inputs(64))


def adapter(base: Path, out: Path, scale: float, **fields: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], **fields})
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * scale)
    peft.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "q"
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    AutoModelForCausalLM.from_pretrained(
        tiny("llama", initializer_range=0.1), quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder)
    vocabulary = {str(i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_a_whole_adapter(base: Path, windows: list[list[int]], tmp_path: Path) -> None:
    large = adapter(base, tmp_path / "large", 0.3)
    result = folding.run(str(base), str(large), tmp_path / "folded", windows, samples=8, seqlen=32)
    assert len(result.layers) == 6 and all(report.residual < 0.5 for report in result.layers.values())
    assert result.recommendation == "fold" and result.folded.divergence < 0.25 * result.base.divergence
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    layer = again.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, QuantLinear)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untouched = "model.layers.1.mlp.down_proj"
    assert torch.equal(again.get_submodule(untouched).weight, plain.get_submodule(untouched).weight)


def test_a_small_adapter_is_better_kept(base: Path, windows: list[list[int]], tmp_path: Path) -> None:
    small = adapter(base, tmp_path / "small", 1e-4)
    result = folding.run(str(base), str(small), tmp_path / "folded", windows, samples=8, seqlen=32)
    assert result.recommendation == "keep the adapter"
    assert all(report.residual <= 1 for report in result.layers.values())


def test_one_hessian_for_layers_that_read_the_same(base: Path, windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj"]
    layers = {n: model.get_submodule(f"model.layers.0.self_attn.{n}") for n in names}
    layers["o_proj"] = model.get_submodule("model.layers.0.self_attn.o_proj")
    seen: list[Tensor] = []
    handle = layers["q_proj"].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()[0]))
    found = folding._hessians(model, layers, [torch.tensor(w) for w in windows[:3]])
    handle.remove()
    assert found["q_proj"] is found["k_proj"] is found["v_proj"] is not found["o_proj"]
    x = torch.cat(seen).double()
    torch.testing.assert_close(found["q_proj"].mean().double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_adapters_that_are_more_than_lora(
    base: Path, windows: list[list[int]], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    made = adapter(base, tmp_path / "adapter", 0.1, **fields)
    with pytest.raises(ValueError, match=message):
        folding.run(str(base), str(made), tmp_path / "folded", windows)
    assert not (tmp_path / "folded").exists()


def renamed(state: dict[str, Tensor]) -> None:
    for name in list(state):
        state[name.replace("base_model.model.", "base_model.")] = state.pop(name)


def without_a_layer(state: dict[str, Tensor]) -> None:
    for name in [n for n in state if ".layers.1." in n]:
        del state[name]


def with_an_embedding(state: dict[str, Tensor]) -> None:
    state["base_model.model.model.norm.weight"] = torch.ones(64)


def of_another_width(state: dict[str, Tensor]) -> None:
    for name in list(state):
        if "q_proj.lora_A" in name:
            state[name] = torch.ones(4, 48)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (renamed, r"base_model\.model\.layers\..* is no layer of the base; the adapter is another model's"),
        (without_a_layer, r"adapter_config\.json names model\.layers\.1\..*the adapter is incomplete"),
        (with_an_embedding, r"the adapter holds base_model\.model\.model\.norm\.weight beside lora_A and lora_B"),
        (of_another_width, r"q_proj of the adapter is for a weight \[96, 48\], and the base's is \[96, 96\]"),
    ],
)
def test_what_an_adapters_file_holds_is_what_is_folded(
    damage: Callable[..., None], message: str, base: Path, windows: list[list[int]], tmp_path: Path
) -> None:
    made = adapter(base, tmp_path / "adapter", 0.3)
    state = load_file(made / "adapter_model.safetensors")
    damage(state)
    save_file(state, made / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        folding.run(str(base), str(made), tmp_path / "folded", windows, samples=8, seqlen=32)
    assert not (tmp_path / "folded").exists()


def test_a_fold_overwrites_neither_of_its_sources(base: Path, windows: list[list[int]], tmp_path: Path) -> None:
    made = adapter(base, tmp_path / "adapter", 0.3)
    for out, what in ((base, "BASE"), (made, "ADAPTER")):
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        with pytest.raises(ValueError, match=f"is {what} itself, which would be overwritten"):
            folding.run(str(base), str(made), out, windows, samples=8, seqlen=32)
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    with pytest.raises(ValueError, match="seqlen=200 is more than the 128 tokens"):
        folding.run(str(base), str(made), tmp_path / "o", [list(range(200))] * 4, samples=4, seqlen=200)


@pytest.mark.parametrize("fields", [{}, {"desc_act": True}])
def test_rows_with_a_scale_of_zero_stay_and_others_are_folded_as_without_them(fields: dict[str, Any]) -> None:
    w, h, delta = weight(48, 64, **fields), inputs(64), torch.randn(48, 64) * 0.05
    w.scales[0, 3] = 0
    w.scales[:, 40] = 0
    made, report = fold(w, delta, h)
    others = [n for n in range(48) if n not in (3, 40)]
    parts = QuantizedWeight(w.codes[others], w.scales[:, others], w.zeros[:, others], w.group, w.spec)
    wanted, _ = fold(parts, delta[others], h)
    assert torch.equal(made.codes[others], wanted.codes) and torch.equal(made.scales[:, others], wanted.scales)
    assert torch.equal(made.codes[[3, 40]], w.codes[[3, 40]])
    assert torch.equal(made.scales[:, [3, 40]], w.scales[:, [3, 40]])
    residual = error(w.dequantize() + delta - made.dequantize(), h) / error(delta, h)
    assert report.residual == pytest.approx(residual, rel=1e-3) and residual < 1


@pytest.mark.parametrize("kind", [ValueError, SolveError, NativeError])
def test_an_error_names_the_layer(
    kind: type[Exception], base: Path, windows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any) -> Any:
        raise kind("it cannot be")

    monkeypatch.setattr(folding, "fold", refuses)
    made = adapter(base, tmp_path / "adapter", 0.3)
    with pytest.raises(kind, match=r"model\.layers\.0\.\S+_proj: it cannot be"):
        folding.run(str(base), str(made), tmp_path / "folded", windows, samples=8, seqlen=32)
