"""Tiny random models of many architectures, and what must become of each when it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        model_type: its name in Transformers.
        config: fields of its config.
        quantized: number of linear layers to quantize in each list of blocks, counted from the config and the
            architecture's description, not from a model.
        auto: the class that loads it.
        rules: what `dynamic` must exclude for it to be quantized.
        repeated: its layers run several times in one pass, so that no input of theirs is final when they are solved.
    """

    model_type: str
    config: Mapping[str, Any]
    quantized: Mapping[str, int]
    auto: str = "AutoModelForCausalLM"
    rules: Mapping[str, Any] = field(default_factory=dict)
    repeated: bool = False


_LLAMA = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_BERT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
    max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
_T5 = dict(
    d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, vocab_size=256, pad_token_id=0, eos_token_id=1,
    decoder_start_token_id=0,
)  # fmt: skip
_FALCON = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, max_position_embeddings=128)
_VISION = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=28)

# q, k, v, o and the two or three of the feed-forward part, times the blocks; fused ones count once.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _LLAMA | dict(hidden_size=96, intermediate_size=160), {"model.layers": 2 * 7}),
    "mistral": Architecture("mistral", _LLAMA | dict(sliding_window=16), {"model.layers": 2 * 7}),
    "qwen3": Architecture("qwen3", _LLAMA | dict(head_dim=16), {"model.layers": 2 * 7}),
    "gemma3_text": Architecture("gemma3_text", dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=256, max_position_embeddings=128, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ), {"model.layers": 3 * 7}),
    "phi3": Architecture("phi3", _LLAMA | dict(pad_token_id=0), {"model.layers": 2 * 4}),
    "stablelm": Architecture("stablelm", _LLAMA, {"model.layers": 2 * 7}),
    "cohere": Architecture("cohere", _LLAMA | dict(pad_token_id=0), {"model.layers": 2 * 7}),
    "gpt2": Architecture("gpt2", dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, bos_token_id=1, eos_token_id=2,
    ), {"transformer.h": 2 * 4}),
    "opt": Architecture("opt", dict(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
        word_embed_proj_dim=64, max_position_embeddings=128,
    ), {"model.decoder.layers": 2 * 6}),
    # As opt-350m: norms behind the layers, embeddings of another width.
    "opt_post_norm": Architecture("opt", dict(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
        word_embed_proj_dim=32, max_position_embeddings=128, do_layer_norm_before=False,
    ), {"model.decoder.layers": 2 * 6}),
    "gpt_neox": Architecture("gpt_neox", dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
        max_position_embeddings=128,
    ), {"gpt_neox.layers": 2 * 4}),
    # As falcon-7b, falcon-rw (alibi, attention before the feed-forward part) and falcon-40b (two norms).
    "falcon": Architecture("falcon", _FALCON, {"transformer.h": 2 * 4}),
    "falcon_alibi": Architecture("falcon", _FALCON | dict(
        alibi=True, multi_query=False, parallel_attn=False, bias=True,
    ), {"transformer.h": 2 * 4}),
    "falcon_new": Architecture("falcon", _FALCON | dict(
        new_decoder_architecture=True, num_kv_heads=2,
    ), {"transformer.h": 2 * 4}),
    "bloom": Architecture("bloom", dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=256), {"transformer.h": 2 * 4}),
    # Four layers of a block more are for its own path and its input per layer; the last two blocks read keys and values
    # that earlier ones have put down. The mixing matrices of four by four numbers are not called as layers.
    "gemma3n": Architecture("gemma3n_text", dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=256, vocab_size_per_layer_input=256, hidden_size_per_layer_input=32,
        max_position_embeddings=128, sliding_window=16, num_kv_shared_layers=2, laurel_rank=32,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ), {"model.layers": 2 * (7 + 4) + 2 * (5 + 4)}, rules={r"-:.*altup": {}}),
    "lfm2": Architecture("lfm2", _LLAMA | dict(
        layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
    ), {"model.layers": (2 + 3) + (4 + 3)}),
    "mamba": Architecture("mamba", dict(
        hidden_size=64, state_size=8, num_hidden_layers=2, vocab_size=256, time_step_rank=32,
    ), {"backbone.layers": 2 * 3}, rules={r"-:.*dt_proj$": {}}),
    "t5": Architecture(
        "t5", _T5, {"encoder.block": 2 * (4 + 2), "decoder.block": 2 * (4 + 4 + 2)}, "AutoModelForSeq2SeqLM"
    ),
    "t5_gated": Architecture(
        "t5", _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=3),
        {"encoder.block": 2 * (4 + 3), "decoder.block": 3 * (4 + 4 + 3)}, "AutoModelForSeq2SeqLM",
    ),
    "bart": Architecture("bart", dict(
        d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=256, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    ), {"model.encoder.layers": 2 * 6, "model.decoder.layers": 2 * 10}, "AutoModelForSeq2SeqLM"),
    "bert": Architecture("bert", _BERT, {"bert.encoder.layer": 2 * 6}, "AutoModelForMaskedLM"),
    # Its positions are computed, and never saved.
    "marian": Architecture("marian", dict(
        d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=256, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=2,
    ), {"model.encoder.layers": 2 * 6, "model.decoder.layers": 2 * 10}, "AutoModelForSeq2SeqLM"),
    # Nothing enters its decoder's second attention without an encoder.
    "mvp": Architecture("mvp", dict(
        d_model=64, decoder_ffn_dim=96, decoder_layers=2, decoder_attention_heads=4, vocab_size=256,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, is_decoder=True,
        is_encoder_decoder=False,
    ), {"model.decoder.layers": 2 * 6}, rules={r"-:.*encoder_attn\.": {}}),
    # Dense checkpoints hold query, key and value as one matrix.
    "nomic_bert": Architecture(
        "nomic_bert", _BERT | dict(n_embd=64, head_dim=16), {"nomic_bert.layers": 2 * 7}, "AutoModelForMaskedLM"
    ),
    "roberta": Architecture("roberta", _BERT, {"roberta.encoder.layer": 2 * 6}, "AutoModelForMaskedLM"),
    "modernbert": Architecture("modernbert", _BERT | dict(
        bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, local_attention=16,
    ), {"model.layers": 2 * 4}, "AutoModelForMaskedLM"),
    "albert": Architecture("albert", _BERT | dict(embedding_size=32, num_hidden_layers=3), {
        "albert.encoder.albert_layer_groups": 6,
    }, "AutoModelForMaskedLM", repeated=True),
    # Its attentions and feed-forward parts are in two lists, which take turns.
    "xlm": Architecture("xlm", dict(
        emb_dim=64, n_layers=2, n_heads=4, vocab_size=256, max_position_embeddings=128, pad_token_id=0, n_words=256,
    ), {"transformer.attentions": 2 * 4, "transformer.ffns": 2 * 2}, "AutoModelForMaskedLM"),
    # Its encoder's blocks hand on the states of global tokens, too.
    "pegasus_x": Architecture("pegasus_x", dict(
        d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=256, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0, num_global_tokens=4, block_size=8,
    ), {"model.encoder.layers": 2 * 6, "model.decoder.layers": 2 * 10}, "AutoModelForSeq2SeqLM"),
    # The vision towers are larger than what reads text.
    "llava": Architecture("llava", dict(
        text_config=dict(model_type="llama", **_LLAMA), image_token_id=0,
        vision_config=dict(model_type="clip_vision_model", patch_size=14, **_VISION),
    ), {"model.language_model.layers": 2 * 7}, "AutoModelForImageTextToText"),
    "gemma3": Architecture("gemma3", dict(
        text_config=_LLAMA | dict(head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(model_type="siglip_vision_model", patch_size=14, **_VISION), mm_tokens_per_image=4,
        image_token_id=0, boi_token_index=1, eoi_token_index=2,
    ), {"model.language_model.layers": 2 * 7}, "AutoModelForImageTextToText"),
    "qwen2_vl": Architecture("qwen2_vl", dict(
        text_config=_LLAMA | dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)),
        vision_config=dict(depth=4, embed_dim=128, hidden_size=64, num_heads=4, patch_size=14),
        image_token_id=0, video_token_id=0, vision_start_token_id=1, vision_end_token_id=2,
    ), {"model.language_model.layers": 2 * 7}, "AutoModelForImageTextToText"),
    # Block 1 attends to images and is skipped on text.
    "mllama": Architecture("mllama", dict(
        text_config=_LLAMA | dict(num_hidden_layers=3, cross_attention_layers=[1], pad_token_id=0),
        vision_config=dict(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_global_layers=2, attention_heads=4,
            image_size=28, patch_size=14, intermediate_layers_indices=[0, 1], vision_output_dim=384,
        ), image_token_index=256,
    ), {"model.language_model.layers": 2 * 7}, "AutoModelForImageTextToText"),
}  # fmt: skip

# Mixtures of experts: their own tests say what must become of them.
MIXTURES: dict[str, Mapping[str, Any]] = {
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
    # Its experts run before those that all tokens share.
    "hy_v3": dict(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
        first_k_dense_replace=1, vocab_size=256, max_position_embeddings=128, pad_token_id=0,
    ),
    "gpt_oss": dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=256, pad_token_id=0, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip


def inputs(model: Any, window: list[int]) -> dict[str, torch.Tensor]:
    """A window as a model reads it: a decoder behind an encoder reads it moved by one behind its start token."""
    ids = {"input_ids": torch.tensor([window])}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *window[:-1]]])
    return ids


def load(kind: str, path: Path, **kwargs: Any) -> Any:
    """A tiny model in fp32, by the class that its architecture asks for."""
    auto = getattr(transformers, ARCHITECTURES[kind].auto)
    return auto.from_pretrained(path, dtype=torch.float32, **kwargs).eval()
