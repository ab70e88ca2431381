"""The model card of a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from ..format.spec import QuantSpec

_TAGS = ["gptq", "hf-gptq-plugin"]
_DATA_FREE = {
    "rtn": "rounded to nearest without calibration data",
    "hqq": "half-quadratic quantization without calibration data",
}


def model_card(model: PreTrainedModel, name: str) -> str:
    """README.md for a quantized model: how it was made, and how to load it in Transformers and vLLM.

    Args:
        model: a model with a GPTQ quantization_config.
        name: the repository or folder, as users will write it.
    """
    config = model.config.quantization_config
    spec: QuantSpec = config.spec
    base = getattr(model.config, "name_or_path", "") or model.name_or_path
    # A local folder is nobody else's base model.
    base = base if base and "/" in base and not Path(base).exists() and not base.startswith(("/", ".")) else ""
    data = ModelCardData(
        base_model=base or None,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        tags=[*_TAGS, f"{spec.bits}-bit"],
    )
    return f"---\n{data.to_yaml()}\n---\n{_text(config, spec, name, base)}"


def _text(config: Any, spec: QuantSpec, name: str, base: str) -> str:
    meta = config.meta or {}
    made = meta.get("calibration")
    method = (meta.get("solver") or {}).get("method")
    calibration = (
        f"calibrated on {made['tokens']:,} tokens ({made['windows']} windows of up to {made['seqlen']}, "
        f"{made['dataset']})"
        if made
        else _DATA_FREE.get(str(method), "as published")
    )
    group = "one group per output" if spec.group_size == -1 else f"groups of {spec.group_size}"
    return f"""
# {name.rpartition("/")[2]}

{base or "This model"} in {spec.bits}-bit GPTQ: {"symmetric" if spec.sym else "asymmetric"}, {group}, \
{"act-order" if spec.desc_act else "groups in natural order"}, format `{spec.checkpoint_format}`, {calibration}.

Transformers:

```python
# pip install hf-gptq-plugin
import hf_gptq_plugin
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

vLLM:

```sh
# pip install hf-gptq-plugin beside vLLM
vllm serve {name} --quantization hf_gptq
```
"""


def merged_card(api: HfApi, repo_id: str, card: str, revision: str | None, tags: list[str] | None) -> str:
    """`card`, or the repository's own card with its metadata completed from `card`."""
    new = ModelCard(card)
    try:
        old = ModelCard(Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text("utf-8"))
    except EntryNotFoundError:
        old = new
    for key, value in new.data.to_dict().items():
        if old.data.get(key) is None:
            old.data[key] = value
    merged = [*(old.data.get("tags") or []), *(new.data.get("tags") or []), *(tags or [])]
    old.data["tags"] = list(dict.fromkeys(merged))
    return str(old)
