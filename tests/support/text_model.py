"""A small Llama with a tokenizer of its own, for what needs text: documentation, examples."""

from __future__ import annotations

from pathlib import Path


def make_text_model(folder: Path) -> None:
    """Write it: two blocks, random weights, 768 byte-pair tokens learned from Python's help topics."""
    from pydoc_data.topics import topics

    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        [topics[name] for name in sorted(topics)[:20]], vocab_size=768, special_tokens=["<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=768, max_position_embeddings=2048, initializer_range=0.1, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
