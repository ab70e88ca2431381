"""What help shows of the library: defaults and choices, so that it need not load PyTorch. A test compares all with the
library, where they are used."""

from __future__ import annotations

from typing import Any

# Fields of GPTQConfig that options set.
DEFAULT: dict[str, Any] = {
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "damp_percent": 0.01,
    "lm_head": False,
    "samples": 128,
    "seqlen": 512,
    "seed": 0,
    "method": "gptq",
    "preset": "balanced",
    "order": "hessian",
    "scale_search": "mse",
}
# Fields of train.loop.TrainSettings.
TRAINING: dict[str, Any] = {"save_every": 10, "subspace": 64, "gradient_warmup": 500}
METHODS = ("gptq", "rtn", "hqq")
PRESETS = ("fast", "balanced", "best")
TOKEN_WEIGHTS = ("uniform", "loss")
OUTPUT_HESSIANS = ("identity", "loss")
ORDERS = ("hessian", "natural")
SEARCHES = ("minmax", "mse", "percentile", "entropy")
DATASETS = ("wikitext2", "c4", "c4-new", "ptb", "pile-10k", "ultrachat")
LAYOUTS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "dense")
GGUF_TYPES = ("auto", "q4_0", "q4_1", "q8_0")
