"""What `save_pretrained` and `push_to_hub` add to Transformers' own: whole writes, `quantize_config.json`, a card."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..calibrate.report import FILES
from ..format.checkpoint import write_json, written_whole
from ..nn.linear import QuantLinear
from ..train.methods import trained
from .card import card_metadata, facts, inherited_metadata, is_own_card, model_card
from .names import keep_apart
from .push import push_folder

logger = logging.getLogger(__name__)

_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
OFFLOADED_SHARD = "500MB"  # of a model on disk: one shard is in memory at a time


def attach_saving(model: PreTrainedModel) -> None:
    """Give this one model the methods below; classes of Transformers stay as they are."""
    vars(model)["save_pretrained"] = types.MethodType(save_pretrained, model)
    vars(model)["push_to_hub"] = types.MethodType(push_to_hub, model)


def save_pretrained(
    model: PreTrainedModel, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """As `PreTrainedModel.save_pretrained`; files are written beside the folder and moved in when complete.

    Adds `quantize_config.json` (other readers of GPTQ look for it) and a README.md, unless there is one of your own.
    With adapters attached, only they are saved, by Transformers' own method.
    """
    stock: Any = type(model).save_pretrained
    if getattr(model, "_hf_peft_config_loaded", False):
        stock(model, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        return
    target = Path(save_directory)
    if target.is_file():
        raise ValueError(f"save_directory={str(target)!r} is a file; name a folder")
    hub = {
        name: kwargs.pop(name)
        for name in ("repo_id", "commit_message", "private", "create_pr", "revision", "tags")
        if name in kwargs
    }
    main = kwargs.get("is_main_process", True)
    if not main:
        stock(model, save_directory, *args, **kwargs)
        return
    save_checkpoint(model, target, *args, **kwargs)
    if push_to_hub:
        repo_id = hub.pop("repo_id", target.name)
        model.push_to_hub(repo_id, token=kwargs.get("token"), **hub)


def save_checkpoint(model: PreTrainedModel, target: Path, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
    """Write a whole checkpoint, the tokenizer with it where one is given, or nothing."""
    if learning := trained(model):
        logger.warning(
            "%s (of %d layers) is still learning: %s can go on with training, but is no GPTQ checkpoint. "
            "hf_gptq_plugin.train.methods.export(model) first makes it one.",
            next(iter(learning)), len(learning), target,
        )  # fmt: skip
    _relabel(model)
    keep_apart(model)
    with written_whole(target) as staging:
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            kwargs.setdefault("max_shard_size", OFFLOADED_SHARD)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # the size is set
            type(model).save_pretrained(model, staging, *args, **kwargs)
        written = model.config.quantization_config.to_dict()
        write_json(staging / "quantize_config.json", written)
        if "dynamic" in written:  # Transformers has sorted the rules
            config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
            write_json(staging / "config.json", {**config, "quantization_config": written})
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
            _copy_processor(model, staging)
        _describe(model, staging, target)
    if _is_news(model, target):
        for name in FILES:
            (target / name).unlink(missing_ok=True)


def _relabel(model: PreTrainedModel) -> None:
    """Say asymmetric in a model's config where a layer has become so."""
    config = model.config.quantization_config
    labels = config.checkpoint
    now = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and not m.spec.sym]
    if any((label := labels.for_module(name)) is None or label.sym for name in now):
        config.sym = False
        config.dynamic = {k: {**rule, "sym": False} if "sym" in rule else rule for k, rule in config.dynamic.items()}


def _copy_processor(model: PreTrainedModel, staging: Path) -> None:
    """What makes numbers of images and sound, as it lies beside the dense model."""
    source = model.name_or_path
    if not source or model.config.get_text_config() is model.config:
        return
    for name in _PROCESSOR:
        try:
            file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):  # offline, or the dense model is gone: no reason to lose the quantized one
            logger.warning("%s of %s could not be read; copy it beside the checkpoint yourself.", name, source)
            return
        if file is not None:
            shutil.copyfile(file, staging / name)


def _is_news(model: PreTrainedModel, target: Path) -> bool:
    """Whether card and report in a folder tell of other weights: the model was calibrated in this process, and its
    report is not there."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return bool(getattr(quantizer, "reports", None)) and target.resolve() not in quantizer.reported


def _describe(model: PreTrainedModel, staging: Path, target: Path) -> None:
    """A card, unless there is one of these weights or of somebody's own, and the base model's licence files."""
    base = str(getattr(model.config, "name_or_path", "") or model.name_or_path or "")
    local = Path(base) if base and Path(base).is_dir() else None
    if local is not None:
        for path in local.iterdir():
            if path.is_file() and path.name.upper().startswith(("LICENSE", "NOTICE")):
                shutil.copyfile(path, staging / path.name)
    readme = target / "README.md"
    if readme.exists() and (is_own_card(readme) or not _is_news(model, target)):
        return
    inherited = inherited_metadata(card_metadata(local / "README.md")) if local is not None else {}
    # A local folder is nobody else's base model.
    name = "" if local is not None or "/" not in base or base.startswith(("/", ".")) else base
    (staging / "README.md").write_text(model_card(facts(staging, name, inherited), target.name), encoding="utf-8")


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    tags: list[str] | None = None,
) -> str:
    """As `PreTrainedModel.push_to_hub`, with a card that says how the model was quantized and how to load it.

    A card that the repository already has keeps its text; only its metadata are completed. See `push.push_folder`.

    Returns:
        The commit's address, or that of the pull request.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return type(model).push_to_hub(
            model, repo_id, commit_message=commit_message, commit_description=commit_description, private=private,
            token=token, revision=revision, create_pr=create_pr, max_shard_size=max_shard_size, tags=tags,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder) / repo_id.rpartition("/")[2]
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        pushed = push_folder(
            staging, repo_id, private=private, revision=revision, create_pr=create_pr, message=commit_message,
            description=commit_description, token=token, tags=tags,
        )  # fmt: skip
    return pushed.pull_request or pushed.url
