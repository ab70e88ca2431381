"""Look at a LoRA adapter's files before PEFT does: what is wrong with them is one error that names the tensor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..convert.source import load, read_json
from ..format.checkpoint import TensorInfo, read_headers
from ..format.spec import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FLOATS = ("F16", "BF16", "F32")
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.weight)?")


def check_adapter(folder: str | Path) -> dict[str, tuple[int, int, int]]:
    """Check an adapter's config and tensors.

    Args:
        folder: as PEFT's `save_pretrained` writes it.

    Returns:
        Module to `(rank, in_features, out_features)`.

    Raises:
        CheckpointError: a file that is missing or damaged, a rank that is none, a factor without its partner, shapes
            that do not fit each other, values that are not finite.
    """
    path = Path(folder)
    config = read_json(path / CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise CheckpointError(f"{CONFIG}: r={rank!r} must be an integer of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 2**31:
        raise CheckpointError(f"{CONFIG}: lora_alpha={alpha!r} must be a number")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    ):
        raise CheckpointError(f"{CONFIG}: target_modules={targets!r} must be a name, a regex or a list of names")
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{WEIGHTS} is missing from the adapter; pickled files can run code and are not read")
    factors: dict[str, dict[str, TensorInfo]] = {}
    for name, info in read_headers([path / WEIGHTS]).items():
        match = FACTOR.fullmatch(name)
        if match is None:
            continue
        if info.dtype not in _FLOATS or len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(
                f"{name} has dtype {info.dtype} and shape {list(info.shape)}; it must be a float matrix"
            )
        if not bool(torch.isfinite(load(info, name)).all()):
            raise CheckpointError(f"{name} holds values that are not finite; the adapter is damaged: train it again")
        factors.setdefault(match["module"], {})[match["factor"]] = info
    if not factors:
        raise CheckpointError(f"{WEIGHTS} has no lora_A or lora_B")
    found = {}
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{module} has lora_{next(iter(pair))} alone; the adapter is incomplete")
        (inner, in_features), (out_features, outer) = pair["A"].shape, pair["B"].shape
        if inner != outer:
            raise CheckpointError(f"{module}: lora_A has rank {inner} and lora_B {outer}; they must be one")
        if not isinstance(config.get("rank_pattern") or {}, dict) or (not config.get("rank_pattern") and inner != rank):
            raise CheckpointError(f"{module}: its factors have rank {inner}, and {CONFIG} says r={rank}")
        found[module] = (inner, in_features, out_features)
    return found


def local_adapter(adapter: str) -> Path:
    """A folder as it is, or its `adapter` where training wrote that; a Hub name as the folder of its snapshot, its two
    files only.

    Raises:
        ValueError: neither.
    """
    path = Path(adapter)
    if path.is_dir():
        inner = path / "adapter"
        return inner if (inner / CONFIG).is_file() and not (path / CONFIG).is_file() else path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        options: dict[str, Any] = {"allow_patterns": [CONFIG, WEIGHTS]}
        return Path(snapshot_download(adapter, **options))
    except HFValidationError:
        raise ValueError(f"{adapter!r} is neither a folder nor a Hub name") from None
