"""A tokenizer of single bytes, for tiny models that read text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    more: Mapping[str, int] | None = None,
    merges: list[tuple[str, str]] | None = None,
    special: list[str] | None = None,
    **tokens: Any,
) -> PreTrainedTokenizerFast:
    """256 tokens, one per byte; `more` tokens with the merges that make them, special ones, and which token is what."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab={**vocabulary, **(more or {})}, merges=merges or []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special or [])
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens)
