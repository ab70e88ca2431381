"""Checkpoints, adapters, and the two stacks that run them.

Engines are slow to start, so one at a time is kept and shared between tests.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

# Head sizes that vLLM's attention takes on a CPU begin at 32.
SHAPE = dict(
    hidden_size=128, intermediate_size=224, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip
TOLERANCE = 1e-3  # of log-probabilities in float32; about 1e-6 is seen
VOCABULARY = 264  # no multiple of 64: vLLM pads it
# The same for others: vLLM's attention wants the head size, the vocabulary is that of the prompts.
SHAPES = {
    "llama": SHAPE,
    "mixtral": dict(
        hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        initializer_range=0.1,
    ),
    "qwen3_moe": dict(hidden_size=128, moe_intermediate_size=80, head_dim=32, initializer_range=0.1),
    "phi3": dict(
        hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def quantized(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A random model quantized by this package: `quantized("mixtral", bits=3, sym=False)` gives its folder.

    `shape` are fields of the model's configuration, in place of those of `SHAPES`.
    """
    from transformers import AutoModelForCausalLM

    from hf_gptq_plugin import GPTQConfig

    made: dict[tuple[object, ...], Path] = {}

    def make(kind: str = "llama", shape: Mapping[str, int | float] | None = None, **fields: Any) -> Path:
        key = (kind, str(shape), *sorted((k, str(v)) for k, v in fields.items()))
        if key not in made:
            config = GPTQConfig(dataset=windows[:2], **fields)
            dense = tiny(kind, **(shape or SHAPES[kind]), vocab_size=VOCABULARY)
            model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32)
            made[key] = tmp_path_factory.mktemp("checkpoint") / "quantized"
            model.save_pretrained(made[key])
            _tokenizer(VOCABULARY).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def dense_llama(tiny: Callable[..., Path]) -> Path:
    """The random Llama that `quantized` begins with, and a tokenizer."""
    folder = tiny("llama", **SHAPE, vocab_size=VOCABULARY)
    _tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[None]:
    """Layers of vLLM can be made without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of three prompts of different lengths."""
    return [[(7 * i + 3 * p) % (VOCABULARY - 3) + 3 for i in range(length)] for p, length in enumerate((40, 17, 29))]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A LoRA adapter that learned on the quantized model in Transformers and PEFT: `adapter(checkpoint, seed=1)`.

    `targets` are the layers that it changes, by default all projections of a Llama; `seed` is that of its text.
    """
    peft = pytest.importorskip("peft", reason="LoRA tests need the peft extra")
    made: dict[tuple[Path, int, tuple[str, ...]], Path] = {}

    def make(checkpoint: Path, seed: int, targets: Sequence[str] = PROJECTIONS) -> Path:
        key = (checkpoint, seed, tuple(targets))
        if key not in made:
            torch.manual_seed(seed)
            # A scaling other than 1: vLLM multiplies it into B.
            config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(targets))
            model = peft.get_peft_model(Reference(checkpoint).model, config)
            _train(model)
            folder = tmp_path_factory.mktemp("adapter")
            # For an adapter on the head, PEFT would also write the head's own tensors, which vLLM refuses.
            model.save_pretrained(folder, save_embedding_layers=False)
            made[key] = folder
        return made[key]

    return make


def _train(model: Any, steps: int = 12) -> None:
    """Learn four random windows by heart; every matrix of the adapter must learn something."""
    tokens = torch.randint(3, VOCABULARY, (4, 24))
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(learned.values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1, losses
    unmoved = [name for name, p in learned.items() if "lora_B" in name and not p.abs().max() > 1e-3]
    assert not unmoved, unmoved


@dataclass
class Continuation:
    """What vLLM said after a prompt: tokens, and per token the log-probabilities of the 20 likeliest."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Reference:
    """A checkpoint in Transformers, float32, with an adapter if one is named."""

    def __init__(self, checkpoint: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        import transformers

        import hf_gptq_plugin  # noqa: F401  (registers the quantizer)

        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        if adapter is not None:
            import peft

            self.model = peft.PeftModel.from_pretrained(self.model, adapter).eval()

    def logprobs(self, prompt: list[int], continuation: list[int]) -> torch.Tensor:
        """Log-probabilities, float64 `[tokens, vocabulary]`, at each place of `continuation`."""
        with torch.no_grad():
            return (
                self.model(torch.tensor([prompt + continuation]))
                .logits[0, len(prompt) - 1 : -1]
                .double()
                .log_softmax(-1)
            )

    def perplexity(self, windows: Sequence[list[int]]) -> float:
        """Of all tokens after each window's first."""
        values = torch.cat([self.logprobs(w[:1], w[1:]).gather(1, torch.tensor(w[1:])[:, None]) for w in windows])
        return math.exp(-float(values.mean()))


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    """`reference(checkpoint, adapter)` runs in Transformers."""
    return Reference


def assert_same(
    transformers: Reference, prompts: Sequence[list[int]], said: Sequence[Continuation], atol: float = TOLERANCE
) -> None:
    """vLLM's log-probabilities are those that Transformers gives to the same tokens at the same places."""
    for prompt, continuation in zip(prompts, said, strict=True):
        expected = transformers.logprobs(prompt, continuation.tokens)
        for place, actual in zip(expected, continuation.logprobs, strict=True):
            tokens, values = list(actual), torch.tensor(list(actual.values()), dtype=torch.float64)
            torch.testing.assert_close(values, place[tokens], atol=atol, rtol=0)


@pytest.fixture
def parity(engines: Engines, prompts: list[list[int]]) -> Callable[..., Engine]:
    """`parity(checkpoint, *adapters, **arguments)`: vLLM says what Transformers says to the same tokens.

    First all prompts without an adapter; then one prompt with each adapter and without one, in one batch. Gives the
    engine, which goes on running.

    Keyword arguments: `reference`, the folder that Transformers loads, if not the checkpoint; those of `vllm.LLM`.
    """

    def check(checkpoint: Path, *adapters: Path, reference: Path | None = None, **arguments: Any) -> Engine:
        if adapters:
            # One slot more than adapters: on a CPU, vLLM 0.32 gives a request without an adapter what lies in the
            # last slot, when another of its batch has one (vllm-project/vllm#48421).
            arguments = {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": 8, **arguments}
        engine = engines(checkpoint, **arguments)
        base = Reference(reference or checkpoint)
        said, atol = engine.greedy(prompts), TOLERANCE
        if engine.dtype != torch.float32:
            # Transformers in that dtype would be another rounding of the same model, about as far from it.
            rounded = Reference(reference or checkpoint, dtype=engine.dtype)
            apart = [
                rounded.logprobs(p, c.tokens) - base.logprobs(p, c.tokens) for p, c in zip(prompts, said, strict=True)
            ]
            atol = 4 * max(float(part.abs().max()) for part in apart)
        assert_same(base, prompts, said, atol)
        if adapters:
            tuned = [Reference(reference or checkpoint, adapter) for adapter in adapters]
            models, prompt = [*tuned, base], prompts[0]
            together = engine.greedy([prompt] * len(models), [*adapters, None])
            for model, continuation in zip(models, together, strict=True):
                assert_same(model, [prompt], [continuation], atol)
            # The adapters must matter, or the comparison shows nothing.
            for one, other in combinations([model.logprobs(prompt, together[0].tokens) for model in models], 2):
                assert (one - other).abs().max() > 100 * atol
        return engine

    return check


class Engine:
    """A checkpoint in vLLM, by default float32."""

    def __init__(self, checkpoint: Path, **arguments: Any) -> None:
        import vllm

        defaults = dict(quantization="hf_gptq", dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8)
        self._adapters: dict[Path, int] = {}  # vLLM knows an adapter by its number
        self.llm: Any = None
        try:
            self.llm = vllm.LLM(str(checkpoint), **{**defaults, **arguments})
        finally:
            if self.llm is None:
                self.end()

    @property
    def method(self) -> str:
        """The quantization method in use."""
        return self.llm.llm_engine.model_config.quantization

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.llm.llm_engine.model_config.dtype

    def greedy(self, prompts: Sequence[list[int]], adapters: Sequence[Path | None] = ()) -> list[Continuation]:
        """Eight tokens after each prompt, all prompts in one batch, `adapters[i]` (or None) on prompt `i`."""
        import vllm
        from vllm.lora.request import LoRARequest

        numbers = {path: self._adapters.setdefault(path, len(self._adapters) + 1) for path in adapters if path}
        requests = [LoRARequest(str(path), numbers[path], str(path)) if path else None for path in adapters]
        outputs = self.llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=8, logprobs=20),
            lora_request=requests or None,
            use_tqdm=False,
        )
        return [
            Continuation(
                list(output.outputs[0].token_ids),
                [{token: p.logprob for token, p in place.items()} for place in output.outputs[0].logprobs],
            )
            for output in outputs
        ]

    def perplexity(self, windows: Sequence[list[int]]) -> float:
        """Of all tokens after each window's first."""
        import vllm

        outputs = self.llm.generate(
            [{"prompt_token_ids": tokens} for tokens in windows],
            vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
        values = [
            place[token].logprob
            for tokens, output in zip(windows, outputs, strict=True)
            for token, place in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        ]
        return math.exp(-sum(values) / len(values))

    def end(self) -> None:
        """Give everything back, so that another engine can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


class Engines:
    """`engines(checkpoint, **arguments)` gives a running engine; asking for another ends the one before."""

    def __init__(self) -> None:
        self._running: dict[tuple[object, ...], Engine] = {}

    def __call__(self, checkpoint: Path, **arguments: Any) -> Engine:
        key = (checkpoint, *sorted((k, str(v)) for k, v in arguments.items()))
        if key not in self._running:
            self.end()
            self._running[key] = Engine(checkpoint, **arguments)
        return self._running[key]

    def end(self) -> None:
        """End the engine that runs, if one does."""
        while self._running:
            self._running.popitem()[1].end()


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Engines in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # other tests of this process want all cores
        engines = Engines()
        yield engines
        engines.end()


def _tokenizer(vocab_size: int) -> Any:
    """One word per token id; vLLM wants a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
