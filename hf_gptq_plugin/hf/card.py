"""The model card of a quantized checkpoint: from the checkpoint's own files, so that it says what is published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from ..convert.source import Source, open_source, stored_bytes
from ..format.spec import CheckpointError, QuantSpec
from .loading import auto_class, writes_text

_TAGS = ["gptq", "hf-gptq-plugin"]
_DATA_FREE = {
    "rtn": "rounded to nearest without calibration data",
    "hqq": "half-quadratic quantization without calibration data",
}
# Of the base model's card, what holds for what is made of it.
_INHERITED = ("license", "license_name", "license_link", "language")
# A card with this line is written anew when the checkpoint is published; without it, its words are its author's.
MARK = "<!-- Written by hf-gptq-plugin. Remove this line to keep your own changes. -->"


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Args:
        spec: of the modules without a rule of their own.
        kinds: modules per spec, commonest first.
        architecture: class of the model.
        meta: the checkpoint's own record of how it was made.
        size: bytes of all weights.
        bf16: what they would take in bf16.
        perplexity: of the calibration report, where it was measured: text, windows, seqlen, dense, quantized.
        base: Hub name of the base model, or "".
        inherited: license, license_name, license_link and language of the base model's card.
    """

    spec: QuantSpec
    kinds: list[tuple[QuantSpec, int]]
    architecture: str
    meta: Mapping[str, Any]
    size: int
    bf16: int
    perplexity: Mapping[str, Any] | None = None
    base: str = ""
    inherited: Mapping[str, Any] = field(default_factory=dict)


def facts(folder: Path, base: str = "", inherited: Mapping[str, Any] | None = None) -> Facts:
    """What a checkpoint's folder says.

    Args:
        folder: a GPTQ checkpoint.
        base, inherited: see `Facts`; where they are not given, what the folder's own card says.

    Raises:
        CheckpointError: no GPTQ checkpoint, or a damaged one.
    """
    source = open_source(folder)
    if source.layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{folder} holds {source.layout}; cards are written for GPTQ checkpoints")
    kinds: dict[QuantSpec, int] = {}
    for spec in source.specs.values():
        kinds[spec] = kinds.get(spec, 0) + 1
    counted = sorted(kinds.items(), key=lambda kind: -kind[1])
    quantization = source.config.get("quantization_config") or {}
    meta = quantization.get("meta")
    report = _json(folder / "calibration.json").get("perplexity")
    old = card_metadata(folder / "README.md")
    return Facts(
        spec=counted[0][0],
        kinds=counted,
        architecture=str((source.config.get("architectures") or ["?"])[0]),
        meta=meta if isinstance(meta, Mapping) else {},
        size=sum(map(stored_bytes, source.headers.values())),
        bf16=2 * _weights(source),
        perplexity=report if _measured(report) else None,
        base=base or str(old.get("base_model") or ""),
        inherited={**{k: old[k] for k in _INHERITED if k in old}, **inherited_metadata(inherited or {})},
    )


def _measured(report: Any) -> bool:
    """Whether a calibration report's perplexity is whole."""
    return (
        isinstance(report, Mapping)
        and {"text", "windows", "seqlen"} <= set(report)
        and all(type(report.get(name)) is float for name in ("dense", "quantized"))
    )


def inherited_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Of a base model's metadata, what its quantized copy carries on: the licence and the languages."""
    return {name: metadata[name] for name in _INHERITED if metadata.get(name)}


def card_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a README.md; none where there is none that can be read."""
    try:
        return dict(ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True).data.to_dict())
    except Exception:  # no such file, no UTF-8, no YAML, values that are none of a card's
        return {}


def own_card(readme: Path) -> ModelCard | None:
    """The card that somebody wrote, or changed, in a folder; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _parsed(readme.read_bytes(), str(readme)) if is_own_card(readme) else None


def _parsed(content: bytes, where: str) -> ModelCard:
    # Decoded here: reading as text would change the author's line ends.
    try:
        card = ModelCard(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is no UTF-8 text ({error}); save it as UTF-8, or remove it") from None
    except Exception as error:  # no YAML, no mapping, values that are none of a card's
        raise CheckpointError(
            f"the metadata at the top of {where} cannot be read ({' '.join(str(error).split())}); correct what stands "
            "between its first two lines of ---, or remove it"
        ) from None
    return card


def model_card(found: Facts, name: str) -> str:
    """README.md: how the checkpoint was made, how well it does, and how to load it in Transformers and vLLM.

    Args:
        found: see `facts`.
        name: the repository or folder, as users will write it.
    """
    quality = found.perplexity
    results = None
    if quality:
        results = [
            EvalResult(
                task_type="text-generation", dataset_type="text", dataset_name=str(quality["text"]),
                metric_type="perplexity", metric_value=round(float(quality["quantized"]), 4),
            )
        ]  # fmt: skip
    data = ModelCardData(
        base_model=found.base or None,
        base_model_relation="quantized" if found.base else None,
        library_name="transformers",
        pipeline_tag="text-generation" if found.architecture.endswith("ForCausalLM") else None,
        tags=[*_TAGS, f"{found.spec.bits}-bit"],
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results,
        **found.inherited,
    )
    return f"---\n{data.to_yaml()}\n---\n{MARK}\n{_text(found, name)}"


def is_own_card(readme: Path) -> bool:
    """Whether somebody wrote, or changed, a folder's card."""
    return readme.exists() and not (readme.is_file() and MARK.encode() in readme.read_bytes())


def folder_card(
    folder: Path, name: str, base: str = "", stated: Mapping[str, Any] | None = None,
    inherited: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The card that a folder is published with: one of its files' facts, or its own with its metadata completed.

    Args:
        folder: a GPTQ checkpoint.
        name: the repository or folder, as users will write it.
        base: Hub name of the base model, in place of what the folder's card says.
        stated: metadata in place of what the folder's card says.
        inherited: of the base model's card; for what the folder's own card leaves out.

    Raises:
        CheckpointError: no GPTQ checkpoint, or a card of somebody's own that cannot be read.
    """
    stated = stated or {}
    own = own_card(folder / "README.md")
    card = model_card(facts(folder, base, {**(inherited or {}), **stated}), name)
    return card if own is None else _completed(own, card, _stated(base, stated))


def _stated(base: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    return {**stated, **({"base_model": base} if base else {})}


def _completed(own: ModelCard, card: str, stated: Mapping[str, Any], tags: Sequence[str] = ()) -> str:
    """`own` with its text as it is: its metadata are those of `card` where it has none, and what is stated."""
    new = ModelCard(card).data.to_dict()
    for key, value in new.items():
        if own.data.get(key) is None and key != "model-index":
            own.data[key] = value
    for key, value in stated.items():
        own.data[key] = value
    there = own.data.get("tags") or []
    merged = [*([there] if isinstance(there, str) else there), *(new.get("tags") or []), *tags]
    own.data["tags"] = list(dict.fromkeys(merged))
    return str(own)


def _text(found: Facts, name: str) -> str:
    spec, quality = found.spec, found.perplexity
    rows = []
    if quality:
        protocol = f"{quality['windows']} windows of {quality['seqlen']} tokens of {quality['text']}"
        rows.append(f"| perplexity, {protocol} | {quality['dense']:.3f} | {quality['quantized']:.3f} |")
    rows.append(f"| weights | {found.bf16 / 1e6:,.1f} MB (bf16) | {found.size / 1e6:,.1f} MB |")
    others = "".join(
        f"- {count} module{'s' * (count > 1)}: {other.bits} bit, {_groups(other)}, "
        f"{'symmetric' if other.sym else 'asymmetric'}\n"
        for other, count in found.kinds[1:]
    )
    others = f"\nModules with settings of their own:\n\n{others}" if others else ""
    licence = found.inherited.get("license_name") or found.inherited.get("license")
    terms = f"\nThe base model's licence ({licence}) holds for this copy too.\n" if licence and found.base else ""
    table = "\n".join(rows)
    auto = auto_class([found.architecture])
    served = f"""
vLLM:

```sh
# pip install hf-gptq-plugin beside vLLM
vllm serve {name} --quantization hf_gptq
```
"""
    return f"""
# {name.rpartition("/")[2]}

{found.base or "This model"} in {spec.bits}-bit GPTQ: {"symmetric" if spec.sym else "asymmetric"}, {_groups(spec)}, \
{"act-order" if spec.desc_act else "groups in natural order"}, format `{spec.checkpoint_format}`, {_made(found.meta)}.

| | before | quantized |
|---|---|---|
{table}
{others}{terms}
Transformers:

```python
# pip install hf-gptq-plugin
import hf_gptq_plugin
from transformers import {auto.__name__}

model = {auto.__name__}.from_pretrained("{name}")
```
{served if writes_text(auto) else ""}"""


def _groups(spec: QuantSpec) -> str:
    return "one group per output" if spec.group_size == -1 else f"groups of {spec.group_size}"


def _made(meta: Mapping[str, Any]) -> str:
    """How the codes were found, in half a sentence."""
    data, solver = meta.get("calibration"), meta.get("solver")
    method = solver.get("method") if isinstance(solver, Mapping) else None
    if not isinstance(data, Mapping) or not {"tokens", "windows", "seqlen", "dataset"} <= set(data):
        return _DATA_FREE.get(str(method), "as published")
    return (
        f"calibrated on {data['tokens']:,} tokens ({data['windows']} windows of up to {data['seqlen']}, "
        f"{data['dataset']})"
    )


def _weights(source: Source) -> int:
    """Weights of the whole checkpoint, those that codes stand for and those that are dense."""
    count = 0
    belonging = set()
    for module, tensors in source.modules.items():
        belonging |= {f"{module}.{leaf}" for leaf in tensors}
        rows, columns = tensors["qweight"].shape
        spec = source.specs[module]
        count += columns * (tensors["g_idx"].shape[0] if "g_idx" in tensors else rows * 32 // spec.bits)
    for name, info in source.headers.items():
        if name not in belonging:
            size = 1
            for length in info.shape:
                size *= length
            count += size
    return count


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def merged_card(
    api: HfApi, repo_id: str, card: str, revision: str | None, tags: Sequence[str] | None = None, base: str = "",
    stated: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """`card`, or the repository's own card with its metadata completed from `card`.

    A card there that this package wrote is replaced; one with words of its own keeps them. `base` and `stated` hold
    in place of what it says.

    Raises:
        CheckpointError: the card there cannot be read.
    """
    try:
        there = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_bytes()
    except (EntryNotFoundError, RevisionNotFoundError):
        there = b""
    ours = not there or MARK.encode() in there
    old = ModelCard(card) if ours else _parsed(there, f"README.md of {repo_id}")
    return _completed(old, card, _stated(base, stated or {}), tags or ())
