"""What commands check before they work: errors that would otherwise come late, unclear, or not at all."""

from __future__ import annotations

import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

# Names of parameters: what Transformers and accelerate call the files of offloaded weights by.
_OFFLOADED = re.compile(r"(\w+\.)+[A-Za-z_]\w*\.(dat|safetensors)|index\.json")
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_CONVERTED = ("gptq", "awq", "compressed-tensors")  # layouts that `hf-gptq convert` reads


def require_loadable(*models: str, device_map: str) -> None:
    """Check that models can be loaded where they are wanted: see those below and `hf.loading`.

    Raises:
        ValueError: one cannot.
    """
    from hf_gptq_plugin.hf.loading import require_weights

    require_exists(*models)
    require_weights(*models)
    require_device(device_map)


def require_exists(*models: str) -> None:
    """Check that what can only be a local path is there.

    Raises:
        ValueError: it is not.
    """
    for model in models:
        local = model.startswith((".", "~", "/")) or model.count("/") > 1 or "\\" in model
        if local and not Path(model).exists():
            raise ValueError(f"{model!r}: there is no such folder")


def require_device(device_map: str) -> None:
    """Check that PyTorch can use what --device-map names.

    Raises:
        ValueError: it cannot.
    """
    import torch

    if device_map in MAPS:
        return
    try:
        torch.empty(0, device=device_map)
    except Exception as error:  # an AssertionError where PyTorch was built without CUDA
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device-map={device_map!r} cannot be used ({reason}); use cpu, auto, or a device that PyTorch "
            f"{torch.__version__} finds on this machine"
        ) from None


def require_writable(out: Path, name: str = "OUT") -> None:
    """Check that OUT can be written, and files beside it: what is not finished lies there.

    Raises:
        ValueError: naming the folder that cannot be.
    """
    place = out.resolve()
    folders = [next(parent for parent in place.parents if parent.exists())]
    if place.is_dir():
        mounted = place.stat().st_dev != place.parent.stat().st_dev  # then nothing is written beside it
        folders = [place] if mounted else [*folders, place]
    for folder in folders:
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".hf-gptq-"):
                pass
        except OSError as error:
            raise ValueError(
                f"{name}={str(out)!r} cannot be written: {folder}: {error.strerror or error}; make it writable, or "
                f"name another {name}"
            ) from None


def require_own_offload(folder: Path) -> None:
    """Check that the folder for weights that wait on disk, which is emptied at the end, holds nothing else.

    Raises:
        ValueError: naming what it holds.
    """
    if not folder.exists():
        return
    inside = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    others = [path.name for path in inside if not (path.is_file() and _is_offloaded(path.name))]
    if others:
        raise ValueError(
            f"{folder} is where --low-memory keeps weights and deletes them, and holds {others[0]!r}; move that, or "
            "name another OUT"
        )


def _is_offloaded(name: str) -> bool:
    from hf_gptq_plugin.calibrate.journal import BEGUN

    return (_OFFLOADED.fullmatch(name) or BEGUN.fullmatch(name)) is not None


def discard_offload(folder: Path) -> None:
    """Remove what was offloaded, and the folder where nothing else is in it."""
    for path in folder.glob("*"):
        if _is_offloaded(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def require_dense(model: str) -> None:
    """Check that a model's config does not say that it is quantized.

    Raises:
        ValueError: it does.
    """
    from transformers import PreTrainedConfig

    from hf_gptq_plugin.format.checkpoint import quantization_of
    from hf_gptq_plugin.hf.loading import local_config

    config = local_config(model)
    if config is None:
        config, _ = PreTrainedConfig.get_config_dict(model)
    quantization = quantization_of(config)
    if not quantization:
        return
    method = str(quantization.get("quant_method", "gptq"))
    advice = (
        f"make it dense first: hf-gptq convert {model} DENSE --to dense"
        if method in _CONVERTED
        else "name the dense model that it was made from"
    )
    raise ValueError(f"MODEL={model!r} is quantized already (quant_method={method}), not dense; {advice}")


def warn_long(config: Any, tokens: int, what: str) -> None:
    """Say on stderr where windows are longer than what a model was made for: with rotary positions it reads on.

    Args:
        config: the model's, of Transformers.
        tokens: of the longest window.
        what: the option that sets it.
    """
    from hf_gptq_plugin.calibrate import processes

    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and tokens > most and processes.rank() == 0:
        print(
            f"warning: {what}: windows of {tokens} tokens are longer than the {most} that the model was made for; "
            "results beyond may be poor",
            file=sys.stderr,
        )
