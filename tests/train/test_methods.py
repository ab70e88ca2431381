"""Methods on a whole model: what they leave alone, what they refuse, and going on after an interruption."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_gptq_plugin import GPTQConfig, QuantLinear
from hf_gptq_plugin.train.layers import LearnedCodes, LearnedGrid, LowRankCodes, PooledLora
from hf_gptq_plugin.train.loop import STATE, TrainingError, TrainSettings, mean_loss, train
from hf_gptq_plugin.train.methods import METHODS, advance, attach, export, parameter_groups, trained

Load = Callable[[], Any]


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "q"
    config = GPTQConfig(bits=4, group_size=32, method="rtn", sym=False)
    AutoModelForCausalLM.from_pretrained(
        tiny("llama", initializer_range=0.1), quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def load(base: Path) -> Load:
    return lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def corpus() -> list[torch.Tensor]:
    """Windows with something to learn: a few tokens that follow each other."""
    starts = torch.randint(0, 7, (24,), generator=torch.Generator().manual_seed(0))
    return [torch.tensor([3 + (int(s) + 2 * i) % 7 for i in range(24)]) for s in starts]


@pytest.mark.parametrize("method", METHODS)
def test_no_training_changes_no_byte(load: Load, base: Path, tmp_path: Path, method: str) -> None:
    model = load()
    assert len(attach(model, method)) == 14
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, load()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    export(model)
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_learning_is_kept(load: Load, corpus: list[torch.Tensor], tmp_path: Path, method: str) -> None:
    model = load()
    options = {"every": 2, "cap": 0.5} if method == "shadow" else {}
    attach(model, method, ["q_proj", "o_proj", "up_proj", "down_proj"], **options)
    integers = {name: t.clone() for name, t in model.named_parameters() if not t.is_floating_point()}
    assert integers and not any(t.requires_grad for name, t in model.named_parameters() if name in integers)
    before = mean_loss(model, corpus)
    rate = {"l4q": 2e-2, "qa-lora": 1e-2, "affine": 1e-2, "eetq": 1e-2, "ste": 2e-2, "shadow": 2e-2}[method]
    losses = train(model, corpus, TrainSettings(steps=20, batch=4, rate=rate))
    after = mean_loss(model, corpus)
    assert len(losses) == 20 and after < before - 0.1
    for name, t in model.named_parameters():
        if name in integers:
            assert torch.equal(t, integers[name]) and t.grad is None
    wanted = model(input_ids=corpus[0][None]).logits.detach()
    adapters = export(model)
    assert not trained(model)
    assert (len(adapters) == 8) == (method == "qa-lora")
    if method == "qa-lora":
        return
    model.save_pretrained(tmp_path / "learned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "learned", dtype=torch.float32)
    torch.testing.assert_close(again(input_ids=corpus[0][None]).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [{}, {".*q_proj": {"sym": True}, ".*v_proj": {"sym": False}}])
def test_what_is_saved_says_what_layers_have_become(
    tiny: Callable[..., Path], corpus: list[torch.Tensor], tmp_path: Path, dynamic: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = GPTQConfig(bits=4, group_size=32, method="rtn", dynamic=dynamic)
    model: Any = AutoModelForCausalLM.from_pretrained(
        tiny("llama", initializer_range=0.1), quantization_config=config, dtype=torch.float32
    )

    def saved(name: str) -> dict[str, Any]:
        model.save_pretrained(tmp_path / name)
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]

    assert saved("base")["sym"] is True and saved("base").get("dynamic", {}) == dynamic
    attach(model, "eetq")
    train(model, corpus, TrainSettings(steps=8, batch=4, rate=2e-2))
    assert not caplog.text
    saved("learning")
    assert "model.layers.0.self_attn.q_proj (of 14 layers) is still learning" in caplog.text
    wanted = model(input_ids=corpus[0][None]).logits.detach()
    export(model)
    said = saved("learned")
    assert said["sym"] is False and all(rule["sym"] is False for rule in said.get("dynamic", {}).values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "learned", dtype=torch.float32)
    torch.testing.assert_close(again(input_ids=corpus[0][None]).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "fields"),
    [
        ("eetq", {}, {}),
        ("shadow", {"every": 3}, {}),
        ("ste", {}, {"optimizer": "q-galore", "subspace": 8, "gradients": "int8-block", "gradient_warmup": 5}),
    ],
)
@pytest.mark.filterwarnings("ignore:gradients are compressed twice")
def test_going_on_gives_the_same_curve(
    load: Load, corpus: list[torch.Tensor], tmp_path: Path, method: str, options: dict[str, Any], fields: dict[str, Any]
) -> None:
    def run(folder: Path | None, stop: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = load()
        attach(model, method, **options)

        def progress(done: int, loss: float) -> None:
            if done == stop:
                raise KeyboardInterrupt

        settings = TrainSettings(steps=10, batch=5, rate=1e-2, save_every=4, **fields)
        try:
            losses = train(model, corpus, settings, folder, progress)
        except KeyboardInterrupt:
            losses = []
        export(model)
        return losses, {n: p.detach() for n, p in model.named_parameters()}

    wanted, parameters = run(None, None)
    assert run(tmp_path, 7)[0] == []
    assert len(load_file(tmp_path / STATE)["losses"]) == 4
    losses, resumed = run(tmp_path, None)
    assert losses == wanted
    assert all(torch.equal(resumed[name], value) for name, value in parameters.items())
    with pytest.raises(TrainingError, match="the state of another training"):
        model = load()
        attach(model, method)
        train(model, corpus, TrainSettings(steps=11), tmp_path)


def test_a_loss_that_is_not_finite(load: Load, corpus: list[torch.Tensor], tmp_path: Path) -> None:
    """What is kept is the state before the step that broke the model, not the one after it."""
    model = load()
    attach(model, "affine")
    seen: dict[int, list[torch.Tensor]] = {}

    def progress(done: int, loss: float) -> None:
        seen[done] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        if done == 3:
            model.model.norm.weight.fill_(float("nan"))

    settings = TrainSettings(steps=8, save_every=1)
    with pytest.raises(TrainingError, match=r"step 4 of 8: the loss is nan .* the state after step 2, the last from"):
        train(model, corpus, settings, tmp_path, progress)
    kept = load_file(tmp_path / STATE)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(kept[f"parameter.{n}"], value) for n, value in zip(names, seen[2], strict=True))
    assert len(kept["losses"]) == 2
    model = load()
    attach(model, "affine")
    with pytest.raises(TrainingError, match="the state of another training"):
        train(model, corpus, replace(settings, rate=1e-4, batch=2), tmp_path)
    losses = train(model, corpus, replace(settings, rate=1e-4), tmp_path)
    assert losses[:2] == kept["losses"].tolist() and len(losses) == 8
    with pytest.raises(TrainingError, match="the state of another training"):  # it is in order again
        train(model, corpus, settings, tmp_path)


def test_a_rate_that_breaks_the_model_at_once(load: Load, corpus: list[torch.Tensor], tmp_path: Path) -> None:
    def run(rate: float, job: str = "") -> list[float]:
        model = load()
        attach(model, "qa-lora", ["q_proj", "down_proj"])
        return train(model, corpus, TrainSettings(steps=4, rate=rate), tmp_path, job=job)

    with pytest.raises(TrainingError, match=r"step 2 of 4: .* It was so before the first state was saved .*begin anew"):
        run(1e36)
    assert not (tmp_path / STATE).exists()
    assert len(run(1e-3)) == 4
    with pytest.raises(TrainingError, match="another model, data"):
        run(1e-3, "another base")


def test_what_is_refused(load: Load, corpus: list[torch.Tensor], tiny: Callable[..., Path]) -> None:
    model = load()
    with pytest.raises(ValueError, match="method='lisa' is not known; use one of affine, eetq"):
        attach(model, "lisa")
    with pytest.raises(ValueError, match="target_modules names 'query'; the quantized layers are down_proj, gate_proj"):
        attach(model, "affine", ["query"])
    with pytest.raises(ValueError, match=r"target_modules='\.\*query' matches no quantized layer"):
        attach(model, "affine", ".*query")
    with pytest.raises(ValueError, match="method 'affine' has no option 'rank'; its options: none"):
        attach(model, "affine", rank=4)
    with pytest.raises(ValueError, match="has nothing trainable"):
        for p in model.parameters():
            p.requires_grad_(False)
        train(model, corpus, TrainSettings(steps=1))
    assert attach(model, "affine", r".*layers\.1\..*q_proj") == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(ValueError, match="already learns"):
        attach(model, "affine")
    with pytest.raises(ValueError, match="has no quantized layer"):
        attach(AutoModelForCausalLM.from_pretrained(tiny("llama")), "affine")
    with pytest.raises(ValueError, match="steps=0 must be an integer of at least 1"):
        TrainSettings(steps=0)
    with pytest.raises(ValueError, match=r"warmup=2 must be positive and at most 1"):
        TrainSettings(warmup=2)


@pytest.mark.parametrize("method", ["ste", "shadow", "l4q"])
def test_codes_change_within_a_few_steps_at_the_usual_rate(load: Load, corpus: list[torch.Tensor], method: str) -> None:
    model = load()
    attach(model, method, ["down_proj"])
    layers = trained(model)
    before = {name: layer.quantized().codes for name, layer in layers.items()}  # type: ignore[union-attr]
    train(model, corpus, TrainSettings(steps=8, batch=1, rate=METHODS[method].rate))
    for name, layer in layers.items():
        share = float((layer.quantized().codes != before[name]).float().mean())  # type: ignore[union-attr]
        assert 1e-4 < share < 0.1


def test_q_galore_learns_codes(load: Load, corpus: list[torch.Tensor]) -> None:
    model = load()
    attach(model, "ste", ["q_proj", "o_proj", "up_proj", "down_proj"])
    before = mean_loss(model, corpus)
    train(model, corpus, TrainSettings(steps=20, batch=4, rate=8e-2, optimizer="q-galore", subspace=16))
    assert mean_loss(model, corpus) < before - 0.1


def test_gradients_in_int8_learn(load: Load, corpus: list[torch.Tensor]) -> None:
    def run(**fields: Any) -> list[float]:
        model = load()
        attach(model, "affine", ["q_proj", "up_proj"])
        return train(model, corpus, TrainSettings(steps=6, batch=4, rate=1e-2, **fields))

    plain = run()
    rounded = run(gradients="int8-block", gradient_warmup=2)
    chosen = run(gradients="int8-block", gradient_warmup=2, gradient_modules=("q_proj",))
    # Through the warm-up the same bits, and the step after it still begins from them; then close, not equal.
    assert rounded[:3] == chosen[:3] == plain[:3]
    for losses in (rounded, chosen):
        assert losses[3:] != plain[3:]
        assert losses == pytest.approx(plain, abs=0.02)
    assert chosen[3:] != rounded[3:]


def test_what_compresses_twice_or_not_at_all(load: Load, corpus: list[torch.Tensor]) -> None:
    def run(method: str, **fields: Any) -> None:
        model = load()
        attach(model, method, ["q_proj"])
        train(model, corpus, TrainSettings(steps=1, batch=1, **fields))

    with pytest.warns(UserWarning, match="gradients are compressed twice: int8-block rounds them, and q-galore"):
        run("ste", gradients="int8-block", gradient_warmup=0, optimizer="q-galore", subspace=8)
    with pytest.warns(UserWarning, match="the exchange between processes rounds them again"):
        run("affine", gradients="int8-block", gradient_warmup=0, exchange="int8-block")
    with pytest.warns(UserWarning, match="q-galore projects matrices with both sides above subspace=64"):
        run("affine", optimizer="q-galore")
    with pytest.warns(UserWarning, match="gradient_warmup=500 steps, and there are only 1"):
        run("affine", gradients="int8-block")
    with pytest.raises(ValueError, match=r"gradient_modules=\['query'\] names nothing that learns; parts .* q_proj"):
        run("affine", gradients="int8-block", gradient_warmup=0, gradient_modules=("query",))
    for name in ("optimizer", "gradients", "exchange"):
        with pytest.raises(ValueError, match=f"{name}='int4' is not known; use one of"):
            TrainSettings(**{name: "int4"})  # type: ignore[arg-type]


def test_zeros_step_in_a_group_of_their_own(load: Load) -> None:
    model = load()
    attach(model, "eetq", ["q_proj"])
    first, second = parameter_groups(model, 1e-3)
    assert len(first["params"]) == len(second["params"]) == 2
    assert second["lr"] == pytest.approx(2e-2)
    assert first["weight_decay"] == second["weight_decay"] == 0


def test_a_method_that_cannot_be_attached_changes_nothing(load: Load) -> None:
    model = load()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    kinds = [type(module) for module in model.modules()]
    for method, options in (
        ("shadow", {"every": 0}), ("shadow", {"cap": 2}), ("l4q", {"rank": 1000}), ("ste", {"cap": 2}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            attach(model, method, **options)
        assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
        assert [type(module) for module in model.modules()] == kinds
    assert attach(model, "affine")


@pytest.mark.parametrize("method", METHODS)
def test_models_that_ask_for_a_layers_weight(method: str, tiny: Callable[..., Path]) -> None:
    """T5 looks at its layers' dtype on the way."""
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny("t5"), quantization_config=config, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    names = attach(model, method, rank=4) if "rank" in METHODS[method].options else attach(model, method)
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    layer = model.get_submodule(names[0])
    torch.testing.assert_close(layer.weight, layer.layer.weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", ["mlp", "mlp.up_proj"])
def test_a_layer_of_two_names_learns_under_both(load: Load, method: str, shared: str) -> None:
    def tied() -> Any:
        model = load()
        model.set_submodule(f"model.layers.1.{shared}", model.get_submodule(f"model.layers.0.{shared}"))
        return model

    model, ids = tied(), torch.arange(3, 20)[None]
    assert len(attach(model, method)) == len(trained(model)) == (11 if shared == "mlp" else 13)
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in range(2))
    assert first is second and type(first) in (LearnedGrid, LearnedCodes, LowRankCodes, PooledLora)
    export(model)
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in range(2))
    assert first is second and isinstance(first, QuantLinear) and not trained(model)
    assert torch.equal(model(input_ids=ids).logits, tied()(input_ids=ids).logits)
    # By its second name alone it is found, too.
    model = tied()
    assert attach(model, method, r".*layers\.1\.mlp\.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert model.model.layers[0].mlp.up_proj is model.model.layers[1].mlp.up_proj


def test_other_windows_of_the_same_tokens_are_another_job(load: Load, tmp_path: Path) -> None:
    tokens = torch.arange(3, 99)

    def run(windows: list[torch.Tensor]) -> list[float]:
        model = load()
        attach(model, "affine", ["q_proj"])
        return train(model, windows, TrainSettings(steps=1, batch=1), tmp_path)

    first = run(list(tokens.view(4, 24)))
    assert run(list(tokens.view(4, 24))) == first
    for windows in (list(tokens.view(2, 48)), [tokens[:30], *tokens[30:].view(3, 22)]):
        with pytest.raises(TrainingError, match="the state of another training"):
            run(windows)


def test_shadow_weights_go_on_from_a_state_dict(load: Load, corpus: list[torch.Tensor]) -> None:
    """In a loop of one's own, stopped between two roundings."""

    def run(stop: int | None) -> list[float]:
        def made() -> tuple[Any, torch.optim.Optimizer]:
            model = load().train()
            attach(model, "shadow", ["down_proj"], every=4, cap=1.0, decay=0.0)
            return model, torch.optim.AdamW(parameter_groups(model, 0.1))

        model, optimizer = made()
        losses = []
        for step in range(9):
            if step == stop:
                states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model, optimizer = made()
                model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
            loss = model(input_ids=corpus[0][None], labels=corpus[0][None]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            advance(model)
            losses.append(float(loss.detach()))
        return losses

    whole = run(None)
    assert whole[3] == whole[0] != whole[4]
    assert run(2) == run(4) == run(6) == whole


@pytest.mark.parametrize("rate", [float("inf"), float("nan")])
def test_rates_that_cannot_be(rate: float) -> None:
    with pytest.raises(ValueError, match=f"rate={rate} must be"):
        TrainSettings(rate=rate)
