"""Checkpoints are loaded as what they were saved from, and with every weight: what Transformers does not find it makes
up, and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..format.checkpoint import INDEX, quantization_of, read_headers, read_json, weight_files
from ..format.spec import CheckpointError

_PACKED = ("qweight", "weight_packed", "weight_scale_inv")
# Transformers' classes that load a model by its config, and its tables of what they make; of two that make the same
# class, the first is taken.
_WRITERS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
}
_READERS = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING",
    "AutoModelForTextEncoding": "MODEL_FOR_TEXT_ENCODING",
    "AutoModel": "MODEL",
}


def auto_class(architectures: Iterable[str] | None) -> Any:
    """The class of Transformers' that loads a checkpoint as what it was saved from.

    Args:
        architectures: those of its config.json. What is none of Transformers' own is taken for a causal LM.
    """
    for saved in architectures or ():
        for auto, table in (_WRITERS | _READERS).items():
            made = getattr(modeling_auto, f"{table}_MAPPING_NAMES").values()
            if any(saved == name or (isinstance(name, tuple) and saved in name) for name in made):
                return getattr(transformers, auto)
    return transformers.AutoModelForCausalLM


def writes_text(auto: Any) -> bool:
    """Whether what an `auto_class` loads continues text."""
    return auto.__name__ in _WRITERS


def text_class(model: str | Path) -> Any:
    """`auto_class` of a model that continues text.

    Raises:
        ValueError: it does not.
    """
    saved = transformers.AutoConfig.from_pretrained(model).architectures
    auto = auto_class(saved)
    if not writes_text(auto):
        raise ValueError(
            f"{model} holds {saved[0]}, which does not continue text; it can be quantized, inspected, converted and "
            f"published, and is loaded with {auto.__name__}"
        )
    return auto


def load_model(model: str | Path, **kwargs: Any) -> Any:
    """`from_pretrained` of a model that continues text, but nothing of it is random.

    Raises:
        CheckpointError: a tensor that the checkpoint does not have.
        ValueError: a model that does not continue text.
    """
    require_weights(model)
    loaded, info = text_class(model).from_pretrained(model, output_loading_info=True, **kwargs)
    require_found(loaded, info["missing_keys"])
    return loaded


def require_found(model: Any, missing: Iterable[str]) -> None:
    """Check that what a checkpoint does not have belongs to something new.

    Raises:
        CheckpointError: naming a tensor that does not.
    """
    needed = sorted(filter(needs(model), missing))
    if needed:
        raise CheckpointError(
            f"{needed[0]} is missing from the checkpoint"
            + (f" ({len(needed)} tensors in all)" if len(needed) > 1 else "")
            + "; the checkpoint is incomplete: fetch it again"
        )


def needs(model: Any) -> Callable[[str], bool]:
    """Whether a tensor of a model must be in its checkpoint.

    All of the saved architecture's must. A head that a task adds (a classifier's, a pooler) may be new; what produces
    the model's text may not.
    """
    computed = getattr(model, "_keys_to_ignore_on_save", None) or ()  # e.g. Marian's positions
    same_class = type(model).__name__ in (model.config.architectures or [])
    head = model.get_output_embeddings()
    parts = [n for n, m in model.named_modules() if n == model.base_model_prefix or (n and m is head)]
    prefixes = ("",) if model.base_model is model else tuple(f"{name}." for name in parts)
    return lambda key: (
        key not in computed and (same_class or (key.startswith(prefixes) and "pooler" not in key.split(".")))
    )


def require_weights(*models: str | Path) -> None:
    """Check that a local checkpoint of packed weights says so in its config.json.

    Transformers would drop them, and leave the layers that they belong to with random weights.

    Args:
        models: folders; what is none is passed over.

    Raises:
        CheckpointError: naming a tensor.
    """
    for model in models:
        config = local_config(model)
        if config is None:
            continue
        quantization = quantization_of(config)
        method = quantization.get("quant_method")
        known = isinstance(method, str) and method in AUTO_QUANTIZATION_CONFIG_MAPPING
        if known or any(quantization.get(f"load_in_{bits}bit") for bits in (4, 8)):
            continue
        single = Path(model) / "model.safetensors"  # which Transformers prefers to an index
        if not single.is_file() and not (Path(model) / INDEX).exists():
            continue
        headers = read_headers([single] if single.is_file() else weight_files(Path(model)))
        packed = [name for name in headers if name.rpartition(".")[2] in _PACKED]
        if packed:
            says = f"says quant_method={method!r}, not a known one" if quantization else "has no quantization_config"
            advice = "restore the config"
            if not quantization and (Path(model) / "quantize_config.json").is_file():
                advice = f"hf-gptq convert {model} OUT --to gptq writes there what quantize_config.json says"
            raise CheckpointError(f"{model}: config.json {says}, but the checkpoint holds {packed[0]}; {advice}")


def local_config(model: str | Path) -> dict[str, Any] | None:
    """A folder's config.json, or None where there is none."""
    file = Path(model) / "config.json"
    return read_json(file) if file.is_file() else None
