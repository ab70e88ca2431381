"""What a GGUF file says about a model besides its weights: architecture, positions, tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..format.spec import CheckpointError
from .source import read_json

# Classes of Transformers to llama.cpp's name of the architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What a text is split by before merging; llama.cpp knows it by name only. Regex, or shape of the pre-tokenizer.
_LLAMA3 = r"\p{N}{1,3}"
_QWEN2 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
_NORMAL, _UNUSED, _CONTROL, _USER = 1, 5, 3, 4  # token types
# What llama.cpp computes YaRN with. GGUF has keys for the first two, which it does not read for these architectures.
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_MOST_TOKENS = 10_000_000


def architecture(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
        CheckpointError: one that is not written as GGUF, or a variant of one.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "?"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{name} cannot be written as GGUF; supported are {', '.join(ARCHITECTURES)}. For others convert to dense "
            "and use llama.cpp's own converter"
        )
    if config.get("sliding_window") and config.get("use_sliding_window", name == "MistralForCausalLM"):
        raise CheckpointError(
            f"sliding_window={config['sliding_window']} of {name} has no counterpart in GGUF's {ARCHITECTURES[name]}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act={config['hidden_act']!r} has no counterpart in GGUF; only silu has")
    return ARCHITECTURES[name]


def number(config: Mapping[str, Any], name: str, default: Any = None, least: float = 1) -> Any:
    """A field of config.json that must be a number.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 2**32:
        raise CheckpointError(f"config.json: {name}={value!r} must be a number from {least:g} to {2**32}")
    return value


def head_width(config: Mapping[str, Any]) -> int:
    """Channels per attention head."""
    return int(number(config, "head_dim", number(config, "hidden_size") // number(config, "num_attention_heads")))


def write_config(writer: Any, config: Mapping[str, Any], name: str, file_type: int) -> None:
    """The keys of the architecture."""
    heads = int(number(config, "num_attention_heads"))
    width = head_width(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(int(number(config, "max_position_embeddings")))
    writer.add_embedding_length(int(number(config, "hidden_size")))
    writer.add_block_count(int(number(config, "num_hidden_layers")))
    writer.add_feed_forward_length(int(number(config, "intermediate_size")))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(number(config, "num_key_value_heads", heads)))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(float(number(config, "rms_norm_eps", 1e-6, 0)))
    writer.add_vocab_size(int(number(config, "vocab_size")))
    writer.add_rope_dimension_count(width)
    rope = _rope(config)
    writer.add_rope_freq_base(float(number(rope, "rope_theta", 10000.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(number(rope, "factor")))
        if rope["rope_type"] == "yarn":
            before = number(rope, "original_max_position_embeddings", config["max_position_embeddings"])
            writer.add_rope_scaling_orig_ctx_len(int(before))
            attention = _attention_factor(rope)
            if not math.isclose(attention, 1):
                writer.add_rope_scaling_attn_factors(attention)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """By what llama.cpp has to multiply cosines and sines beside its own `1 + 0.1 ln factor` of YaRN, for what
    Transformers multiplies them by."""
    logarithm = math.log(number(rope, "factor"))
    own = 1 + 0.1 * logarithm
    one, all_dims = (float(number(rope, name, 0.0, 0)) for name in ("mscale", "mscale_all_dim"))
    usual = (1 + 0.1 * one * logarithm) / (1 + 0.1 * all_dims * logarithm) if one and all_dims else own
    return float(number(rope, "attention_factor", usual, 0)) / own


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """By what Llama 3.1's positions divide every frequency, fp32 `[head width / 2]`; None for other models.

    llama.cpp reads them from a tensor, `rope_freqs.weight`.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = head_width(config)
    theta, factor = float(number(rope, "rope_theta", 10000.0)), float(number(rope, "factor"))
    low, high = float(number(rope, "low_freq_factor", 1.0)), float(number(rope, "high_freq_factor", 4.0))
    before = float(number(rope, "original_max_position_embeddings", 8192))
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (i / width)
        if wavelength < before / high:
            factors.append(1.0)
        elif wavelength > before / low:
            factors.append(factor)
        else:
            smooth = (before / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are encoded, in the names of Transformers 5 from those of 4 too.

    Raises:
        CheckpointError: a kind that GGUF has no keys for.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: rope_parameters={given!r} must be a JSON object")
    rope = dict(given)
    rope.setdefault("rope_theta", config.get("rope_theta"))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(
            f"rope_parameters={rope!r} have no counterpart in GGUF; default, linear, yarn, llama3 have"
        )
    if rope["rope_type"] == "yarn":
        for name, usual in _YARN.items():
            value = rope.get(name, usual)
            if value != usual and (name == "truncate" or value):  # Transformers takes 0 for the usual number
                raise CheckpointError(
                    f"rope_parameters: {name}={value!r} of yarn is not read by llama.cpp, which takes {usual!r} for "
                    "these architectures"
                )
    return rope


def write_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> str:
    """The tokenizer's keys.

    Returns:
        What was not written, or "".

    Raises:
        CheckpointError: a tokenizer that llama.cpp would read differently.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        writer.add_tokenizer_model("none")
        return "no tokenizer.json: the file holds token ids only"
    tokenizer = read_json(file)
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = model.get("type") if isinstance(model, Mapping) else model
        fallback = " with byte fallback" if isinstance(model, Mapping) and model.get("byte_fallback") else ""
        raise CheckpointError(
            f"tokenizer.json holds a {kind} tokenizer{fallback}; only byte-level BPE is written as GGUF"
        )
    size = int(number(config, "vocab_size"))
    if size > _MOST_TOKENS:
        raise CheckpointError(f"config.json: vocab_size={size} must be at most {_MOST_TOKENS}")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    vocabulary, merges = model.get("vocab"), model.get("merges") or []
    added = tokenizer.get("added_tokens") or []
    if not isinstance(vocabulary, Mapping) or not isinstance(merges, list) or not _objects(added):
        raise CheckpointError("tokenizer.json: vocab, merges or added_tokens are not what a BPE tokenizer has")
    for text, place in vocabulary.items():
        _place(tokens, types, place, text, _NORMAL)
    for token in added:
        _place(tokens, types, token.get("id"), token.get("content"), _CONTROL if token.get("special") else _USER)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tokenizer.get("pre_tokenizer")))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges([_merge(merge) for merge in merges])
    _special(writer, folder, config, {text: place for place, text in enumerate(tokens)}, tokenizer)
    return ""


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)


def _merge(merge: Any) -> str:
    """A rule of two tokens, in either way that tokenizer.json has had."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) and each for each in pair):
        raise CheckpointError(f"tokenizer.json: merge {merge!r} is no pair of tokens")
    return " ".join(pair)


def _place(tokens: list[str], types: list[int], place: Any, text: Any, kind: int) -> None:
    if type(place) is not int or not 0 <= place < len(tokens) or not isinstance(text, str):
        raise CheckpointError(
            f"tokenizer.json gives token {text!r} the id {place!r}; config.json has {len(tokens)} ids"
        )
    tokens[place], types[place] = text, kind


def _special(
    writer: Any, folder: Path, config: Mapping[str, Any], places: dict[str, int], tokenizer: Mapping[str, Any]
) -> None:
    """Ids of special tokens, whether texts begin with one, and the chat template."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id}
    add["pad"] = writer.add_pad_token_id
    ids: dict[str, int] = {}
    for name, write in add.items():
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        place: Any = places.get(token) if isinstance(token, str) else None
        if place is None:  # one of several may end a text; the first is the usual one
            given = config.get(f"{name}_token_id")
            place = given[0] if isinstance(given, list) and given else given
        if type(place) is int and 0 <= place < len(places):
            ids[name] = place
            write(place)
    writer.add_add_bos_token("bos" in ids and _begins_with(tokenizer.get("post_processor"), ids["bos"]))
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template")
    if isinstance(chat, str):
        writer.add_chat_template(chat)


def _begins_with(post: Any, token: int) -> bool:
    """Whether a post-processor puts `token` before a text."""
    if not isinstance(post, Mapping):
        return False
    if post.get("type") == "Sequence":
        parts = post.get("processors")
        return isinstance(parts, list) and any(_begins_with(each, token) for each in parts)
    single = post.get("single")
    first = single[0] if isinstance(single, list) and single else None
    name = _field(_field(first, "SpecialToken"), "id")
    ids = _field(_field(post.get("special_tokens"), name), "ids")
    return isinstance(ids, list) and token in ids


def _field(value: Any, name: Any) -> Any:
    """A field of a JSON object; None of anything else."""
    return value.get(name) if isinstance(value, Mapping) and isinstance(name, str) else None


def _splitting(pre: Any) -> str:
    """llama.cpp's name of a pre-tokenizer.

    Raises:
        CheckpointError: one that it may know by a name which we do not; a wrong name gives other tokens without a word.
    """
    parts: Any = _field(pre, "pretokenizers") if _field(pre, "type") == "Sequence" else [pre]
    parts = parts if isinstance(parts, list) else []
    kinds = [_field(part, "type") for part in parts]
    plain = bool(parts) and isinstance(parts[-1], Mapping) and not parts[-1].get("add_prefix_space")
    if kinds == ["ByteLevel"] and plain and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and plain and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and plain and not parts[1].get("use_regex", True):
        pattern = str(_field(_field(parts[0], "pattern"), "Regex"))
        if _LLAMA3 in pattern:
            return "llama-bpe"
        if _QWEN2 in pattern:
            return "qwen2"
    raise CheckpointError(
        f"the tokenizer splits texts by {json.dumps(pre)[:200]}, for which no name of llama.cpp's is known here; "
        "convert to dense and use llama.cpp's own converter"
    )
