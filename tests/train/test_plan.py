"""Plans against what PyTorch's allocator does, and the arithmetic of the documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.hf.planning import skeleton, tune_memory_budget
from hf_gptq_plugin.train.methods import attach, parameter_groups
from hf_gptq_plugin.train.plan import PREFERRED, planned
from hf_gptq_plugin.train.qgalore import QGaLore, planned_bytes

# PEFT 0.21 uses names that Transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

TOKENS = 150


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks: of more than three, the plan runs two and three."""
    folder = tmp_path_factory.mktemp("base") / "q"
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    dense = tiny("llama", num_hidden_layers=4)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32).save_pretrained(folder)
    return folder


def held(model: Any) -> int:
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def measured(model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(bytes of the optimizer's states, most that the allocator gave out at a time during a second step)."""
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    states = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels of PyTorch take memory for each of theirs
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        torch.set_num_threads(threads)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return states, peak


# The others use the same layers: affine those of eetq, ste those of shadow.
@pytest.mark.parametrize("method", sorted({*PREFERRED} - {"affine", "ste"}))
def test_a_plan_is_what_the_allocator_gives(base: Path, method: str) -> None:
    plans = tune_memory_budget(base, 10**9, methods=[method], seqlen=TOKENS, rank=8).plans
    assert [plan.checkpointing for plan in plans] == [False, True]
    for plan in plans:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert plan.weights == pytest.approx(held(model), rel=0.02)  # codes in the kernels' order may be padded
        before = held(model)
        if method == "lora":
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        else:
            attach(model, method, **({"rank": 8} if method in ("qa-lora", "l4q") else {}))
        assert plan.learned == held(model) - before
        model.train()
        if plan.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        learning = [p for p in model.parameters() if p.requires_grad]
        assert plan.parameters == sum(p.numel() for p in learning)
        states, peak = measured(model, torch.optim.AdamW(parameter_groups(model, 1e-3)))
        assert plan.gradients == sum(p.grad.nbytes for p in learning if p.grad is not None)
        assert plan.optimizer_states == states
        assert plan.activations == pytest.approx(peak, rel=0.05)


def test_a_loaded_model_gives_the_same_plan(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    codes = {n: p.clone() for n, p in model.named_parameters()}
    options: dict[str, Any] = {"methods": ["affine"], "seqlen": TOKENS}
    found = tune_memory_budget(model, 10**9, **options)
    assert found == tune_memory_budget(base, 10**9, **options)
    assert all(torch.equal(p, codes[n]) and not p.is_meta for n, p in model.named_parameters())
    assert model.config._attn_implementation == "sdpa" and not model.is_gradient_checkpointing
    # Every block by itself comes to the same.
    model.model.layers[0].unlike_the_others = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    assert tune_memory_budget(model, 10**9, **options).plans[0].activations == found.plans[0].activations


def test_half_the_bytes_in_bfloat16(base: Path) -> None:
    full, half = (
        tune_memory_budget(base, 10**9, methods=["affine"], seqlen=TOKENS, dtype=dtype).plans[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.gradients == full.gradients  # factors of scales stay in float32
    assert 0.5 < half.activations / full.activations < 0.75


@pytest.mark.parametrize("shape", [(256, 256), (300, 70), (40, 500), (64, 1000), (77,)])
def test_bytes_of_q_galore(shape: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = QGaLore([p], rank=64)
    p.grad = torch.randn(shape)
    optimizer.step()
    assert planned_bytes(shape, 64) == optimizer.state_bytes()


def test_what_to_choose(base: Path) -> None:
    options: dict[str, Any] = {"seqlen": 64, "methods": ["qa-lora", "lora"], "optimizers": ["q-galore", "adamw"]}
    every = tune_memory_budget(base, 10**9, **options)
    assert [(p.method, p.checkpointing, p.optimizer) for p in every.plans[:3]] == [
        ("lora", False, "adamw"), ("lora", False, "q-galore"), ("lora", True, "adamw"),
    ]  # fmt: skip
    assert every.chosen is every.plans[0] and every.advice.startswith("choose lora with adamw: ")
    for plan in every.plans:
        parts = plan.weights + plan.learned + plan.gradients + plan.optimizer_states + plan.activations
        assert plan.total == parts
    least = min(plan.total for plan in every.plans)
    tight = tune_memory_budget(base, least, **options)
    assert tight.chosen is not None and tight.chosen.total == least and tight.chosen.checkpointing
    none = tune_memory_budget(base, 1000, seqlen=TOKENS, methods=["lora"])
    assert none.chosen is None and "nothing fits 0.0 MB; lora with adamw and checkpointing needs least" in none.advice
    assert "shorten seqlen=150" in none.advice
    assert not any(plan["fits"] for plan in none.to_dict()["plans"])


def test_what_is_refused(base: Path, tiny: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="budget=0 must be an integer of at least 1"):
        tune_memory_budget(base, 0)
    with pytest.raises(ValueError, match="method='lisa' is not known; use one of lora, qa-lora"):
        tune_memory_budget(base, 1, methods=["lisa"])
    with pytest.raises(ValueError, match="optimizer='sgd' is not known; use one of adamw, q-galore"):
        tune_memory_budget(base, 1, optimizers=["sgd"])
    with pytest.raises(ValueError, match="target_modules names 'query'"):
        tune_memory_budget(base, 1, target_modules=["query"])
    with pytest.raises(ValueError, match="rank=4000 must be an integer from 1 to"):
        tune_memory_budget(base, 1, methods=["lora"], rank=4000)
    with pytest.raises(ValueError, match="MixtralForCausalLM cannot be planned: it does not run without values"):
        tune_memory_budget(tiny("mixtral"), 1, methods=["affine"], seqlen=16)
    with pytest.raises(ValueError, match="has no quantized layer"):
        tune_memory_budget(AutoModelForCausalLM.from_pretrained(tiny("llama")), 1)


def seven_billion(group_size: int) -> tuple[Any, int]:
    """A Llama of 7B that exists as shapes only, and the bytes of its linear weights in 16 bits."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    from hf_gptq_plugin.hf.planning import as_quantized

    linear = sum(m.weight.nbytes for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    return as_quantized(model, QuantSpec(4, group_size)), linear


@pytest.mark.parametrize(("group_size", "saved"), [(128, 74.0), (64, 73.0), (32, 71.1)])
def test_the_documents_on_weights(group_size: int, saved: float) -> None:
    model, dense = seven_billion(group_size)
    names = ("qweight", "qzeros", "scales")
    packed = sum(p.nbytes for n, p in model.named_parameters() if n.rpartition(".")[2] in names)
    assert 100 * (1 - packed / dense) == pytest.approx(saved, abs=0.05)


def test_the_documents_on_lora() -> None:
    # Rank 64 on q_proj and v_proj of 7B: 33.55 M numbers, whose Adam states are 268 MB, not 80.
    model, _ = seven_billion(128)
    plan = planned(model, "lora", seqlen=16, target_modules=["q_proj", "v_proj"], rank=64)[0]
    assert plan.parameters == 33_554_432
    assert plan.optimizer_states == pytest.approx(268e6, rel=2e-3)


def test_a_dense_checkpoint_is_planned_as_it_will_be(tiny: Callable[..., Path], base: Path) -> None:
    dense = skeleton(tiny("llama", num_hidden_layers=4), torch.float32, QuantSpec(4, 32))
    made = skeleton(base, torch.float32, QuantSpec())
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
