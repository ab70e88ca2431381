"""Fixtures: tiny random models, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A dense random model saved to disk: `tiny("llama", hidden_size=96)` gives its folder."""
    import transformers

    made: dict[tuple[object, ...], Path] = {}
    defaults = {
        "llama": dict(
            hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        ),
        "gemma3_text": dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, vocab_size=256, max_position_embeddings=128, sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, bos_token_id=1, eos_token_id=2),
        "opt": dict(
            hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
            word_embed_proj_dim=64, max_position_embeddings=128,
        ),
        "gpt_neox": dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
            max_position_embeddings=128,
        ),
        "phi3": dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "qwen3": dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=256, max_position_embeddings=128,
        ),
        "falcon": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=256),
        "bloom": dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=256),
        "mixtral": dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, vocab_size=256, max_position_embeddings=128,
        ),
        "qwen3_moe": dict(
            hidden_size=64, moe_intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, vocab_size=256,
            max_position_embeddings=128,
        ),
        "qwen2_moe": dict(
            hidden_size=64, moe_intermediate_size=48, shared_expert_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=256,
            max_position_embeddings=128,
        ),
        "deepseek_v3": dict(
            hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
            n_group=1, topk_group=1, vocab_size=256, max_position_embeddings=128,
        ),
        "gpt_oss": dict(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=256, pad_token_id=0, eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    }  # fmt: skip

    def make(kind: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Path:
        key = (kind, dtype, *sorted((k, str(v)) for k, v in overrides.items()))
        if key not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **{**defaults[kind], **overrides})
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            made[key] = tmp_path_factory.mktemp(kind) / "dense"
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def windows() -> list[list[int]]:
    """Calibration token ids for models of 256 tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 256, (8, 32), generator=generator).tolist()
