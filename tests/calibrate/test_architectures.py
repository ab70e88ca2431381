"""Every architecture is quantized: the right layers, on the inputs they will meet, in a checkpoint that loads again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, inputs, load
from safetensors.torch import load_file
from torch import nn

from hf_gptq_plugin import GPTQConfig, QuantLinear
from hf_gptq_plugin.calibrate import blocks, pipeline
from hf_gptq_plugin.calibrate.plan import Plan
from hf_gptq_plugin.calibrate.sources import CalibrationError
from hf_gptq_plugin.calibrate.stream import Stream
from hf_gptq_plugin.calibrate.walk import WalkError
from hf_gptq_plugin.format.spec import CheckpointConfig, QuantSpec
from hf_gptq_plugin.solve.gptq import SolveSettings
from hf_gptq_plugin.solve.hessian import Hessian

Rows = dict[str, list[torch.Tensor]]


def module_inputs(model: nn.Module, windows: list[list[int]]) -> Rows:
    """The hidden states that enter every module in a plain forward pass, `[tokens, K]`, in order of its calls."""
    rows: Rows = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        entered = args[0] if args else kwargs.get("hidden_states")
        if isinstance(entered, torch.Tensor):
            rows.setdefault(name, []).append(entered.flatten(0, -2).clone())

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        for window in windows:
            model(**inputs(model, window))
    for handle in handles:
        handle.remove()
    return rows


@contextmanager
def calibration_inputs() -> Iterator[tuple[Rows, Rows, dict[str, str | None]]]:
    """What every layer is solved on: inputs in the quantized model, and in the dense one; in their place what layers
    are to return, which are named, with what that is added to."""
    seen: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    quantized: Rows = {}
    dense: Rows = {}
    added: dict[str, str | None] = {}
    add, solve, gather = Hessian.add, blocks.solve_layer, blocks.layer_hessian

    def spied_add(
        self: Hessian, x: torch.Tensor, exact: torch.Tensor | None = None, weights: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        goal = exact if target is None else target
        assert goal is not None and (exact is None or target is None)
        pair = seen.setdefault(id(self), ([], []))
        pair[0].append(x.flatten(0, -2).clone())
        pair[1].append(goal.flatten(0, -2).clone())
        kept.append(self)  # so that no id is given twice
        assert weights is None or len(weights) == len(pair[0][-1])
        add(self, x, exact, weights, target)

    def spied_solve(name: str, layer: nn.Module, hessian: Hessian, *args: Any) -> Any:
        quantized[name], dense[name] = seen[id(hessian)]
        return solve(name, layer, hessian, *args)

    def spied_gather(stream: Stream, exact: Stream | None, layer: str, *args: Any) -> Hessian:
        hessian = gather(stream, exact, layer, *args)
        if hessian.has_target:
            part = stream.added_to(layer)
            added[stream.full(layer)] = None if part is None else stream.full(part).removesuffix(".")
        return hessian

    kept: list[Hessian] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hessian, "add", spied_add)
        patch.setattr(blocks, "solve_layer", spied_solve)
        patch.setattr(blocks, "layer_hessian", spied_gather)
        yield quantized, dense, added


@dataclass
class Quantized:
    """A quantized model, the dense one, and what the layers were solved on."""

    model: Any
    dense: Any
    rows: Rows
    dense_rows: Rows
    added: dict[str, str | None]


@pytest.fixture(scope="module")
def quantized(tiny: Callable[..., Path], windows: list[list[int]]) -> Callable[[str], Quantized]:
    made: dict[str, Quantized] = {}

    def make(kind: str) -> Quantized:
        if kind not in made:
            rules = ARCHITECTURES[kind].rules
            config = GPTQConfig(
                bits=4,
                group_size=32,
                dataset=windows[:4],
                samples=4,
                seqlen=24,
                dynamic=rules,
                generated=0,
                token_weights="loss",
                output_hessian="loss",
            )
            with calibration_inputs() as (rows, dense_rows, added):
                model = load(kind, tiny(kind), quantization_config=config)
            made[kind] = Quantized(model, load(kind, tiny(kind)), rows, dense_rows, added)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_the_right_layers_are_quantized(kind: str, quantized: Callable[[str], Quantized]) -> None:
    model = quantized(kind).model
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    counts = {where: sum(n.startswith(f"{where}.") for n in names) for where in ARCHITECTURES[kind].quantized}
    assert counts == ARCHITECTURES[kind].quantized
    assert len(names) == sum(counts.values()) == len(model.hf_quantizer.reports)
    vision = [m for n, m in model.named_modules() if ("vision" in n or "visual" in n) and isinstance(m, nn.Linear)]
    assert len(vision) >= 2 * 4 * (ARCHITECTURES[kind].auto == "AutoModelForImageTextToText")


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_saved_and_loaded_again(
    kind: str, quantized: Callable[[str], Quantized], windows: list[list[int]], tmp_path: Path
) -> None:
    made = quantized(kind)
    with torch.no_grad():
        logits = made.model(**inputs(made.model, windows[4])).logits
        exact = made.dense(**inputs(made.dense, windows[4])).logits
        # Random weights carry errors on without damping them; but what has nothing to do with it is off by 1.4.
        assert 0 < (logits - exact).norm() / exact.norm() < 0.6
        made.model.save_pretrained(tmp_path)
        again = load(kind, tmp_path)
        assert torch.equal(again(**inputs(again, windows[4])).logits, logits)


@pytest.mark.parametrize("kind", [k for k, a in ARCHITECTURES.items() if not a.repeated])
def test_every_layer_is_solved_on_what_it_meets(
    kind: str, quantized: Callable[[str], Quantized], windows: list[list[int]]
) -> None:
    made = quantized(kind)
    texts = [window[:24] for window in windows[:4]]
    met, met_dense = module_inputs(made.model, texts), module_inputs(made.dense, texts)
    assert len(made.rows) == sum(ARCHITECTURES[kind].quantized.values())
    for name, rows in made.rows.items():
        assert torch.equal(torch.cat(rows), torch.cat(met[name])), name
        expected = torch.cat(met_dense[name])
        if name in made.added:
            layer = made.dense.get_submodule(name)
            with torch.no_grad():
                expected = layer(expected) - (0 if layer.bias is None else layer.bias)
            if (part := made.added[name]) is not None:
                expected += torch.cat(met_dense[part]) - torch.cat(met[part])
        # The dense stream multiplies with a product of its own, which adds up in another order.
        torch.testing.assert_close(torch.cat(made.dense_rows[name]), expected, rtol=1e-3, atol=1e-3, msg=name)


def test_a_shared_block_is_solved_on_all_of_its_runs(
    quantized: Callable[[str], Quantized], windows: list[list[int]]
) -> None:
    made = quantized("albert")
    met = module_inputs(made.dense, [window[:24] for window in windows[:4]])
    for name, rows in made.dense_rows.items():
        assert len(met[name]) == 3 * 4  # runs × windows
        torch.testing.assert_close(torch.cat(rows), torch.cat(met[name]), rtol=1e-3, atol=1e-3, msg=name)
    # In the quantized model, those solved before it are quantized in every run, and no others.
    half = copy.deepcopy(made.dense)
    for name in made.rows:
        if name.endswith(("attention.dense", "ffn", "ffn_output")):
            met = module_inputs(half, [window[:24] for window in windows[:4]])
            assert torch.equal(torch.cat(made.rows[name]), torch.cat(met[name])), name
        half.set_submodule(name, made.model.get_submodule(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_that_a_model_keeps_in_float32(
    dtype: torch.dtype, tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    config = GPTQConfig(bits=4, group_size=32, dataset=windows[:2], samples=2, seqlen=24)
    auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(tiny("t5_gated"), dtype=dtype, quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    again = auto.from_pretrained(tmp_path / "out", dtype=dtype)
    for one in (model, again):
        feed_forward = one.decoder.block[0].layer[2].DenseReluDense
        # Transformers keeps it so in float16, which it overflows.
        assert feed_forward.wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert feed_forward.wi_0.weight.dtype == dtype and feed_forward.wo.scales.dtype == torch.float16
    with torch.no_grad():
        logits = model(**inputs(model, windows[4])).logits
        assert torch.equal(again(**inputs(again, windows[4])).logits, logits)
    again.save_pretrained(tmp_path / "again")
    state = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key


def test_one_of_two_chains(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    config = GPTQConfig(
        bits=4, group_size=32, dataset=windows[:2], samples=2, seqlen=24, block_name_to_quantize="model.decoder.layers"
    )
    model = load("bart", tiny("bart"), quantization_config=config)
    assert {type(m) for n, m in model.model.encoder.named_modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert sum(isinstance(m, QuantLinear) for m in model.model.decoder.modules()) == 2 * 10


def test_a_layer_that_is_not_called_as_one_is_named(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    config = GPTQConfig(bits=4, group_size=32, dataset=windows[:2], samples=2, seqlen=24)
    message = (
        r'backbone\.layers\.0\.mixer\.dt_proj is not called .*; exclude it with dynamic={"-:\.\*mixer\\\\\.dt_proj\$"'
    )
    with pytest.raises(WalkError, match=message):
        load("mamba", tiny("mamba"), quantization_config=config)


def test_all_layers_that_are_not_called_are_named_at_once(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    """The rules that the error gives are JSON, and enough."""
    path = tiny("mvp")
    fields: dict[str, Any] = {"bits": 4, "group_size": 32, "dataset": windows[:2], "samples": 2, "seqlen": 24}
    with pytest.raises(WalkError, match=r"k_proj is not called .* \(4 such in its block\)") as error:
        load("mvp", path, quantization_config=GPTQConfig(**fields))
    rules = json.loads(str(error.value).partition("dynamic=")[2])
    model = load("mvp", path, quantization_config=GPTQConfig(**fields, dynamic=rules))
    dense = {n for n, m in model.model.decoder.layers.named_modules() if isinstance(m, nn.Linear)} - {
        n for n, m in model.model.decoder.layers.named_modules() if isinstance(m, QuantLinear)
    }
    assert dense == {f"{i}.encoder_attn.{p}" for i in range(2) for p in ("q_proj", "k_proj", "v_proj", "out_proj")}


def test_an_encoder_decoders_output_embedding_stays_dense(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    config = GPTQConfig(bits=4, group_size=32, dataset=windows[:2], samples=2, seqlen=24, lm_head=True)
    for kind in ("bart", "t5"):
        with pytest.raises(
            WalkError, match=r"lm_head=True: the output embedding of an encoder-decoder .* leave lm_head"
        ):
            load(kind, tiny(kind), quantization_config=config)


def test_models_without_text_are_refused(windows: list[list[int]], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    transformers.ViTForImageClassification(vision).save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="ViTForImageClassification has no embedding of text tokens"):
        transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path, quantization_config=GPTQConfig(bits=4, group_size=32, dataset=windows[:2])
        )


def test_layers_that_share_a_weight_are_named(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = load("llama", tiny("llama"))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    plan = Plan(CheckpointConfig(QuantSpec(4, 32), {}, False), SolveSettings())
    with pytest.raises(WalkError, match=r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj share one weight"):
        pipeline.quantize_model(model, [torch.tensor(windows[0])], plan)
