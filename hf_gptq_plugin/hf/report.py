"""The calibration report of a model that `from_pretrained` has quantized."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..calibrate import report
from ..calibrate.report import Header, Perplexity
from ..format.checkpoint import written_whole
from ..format.spec import QuantSpec
from .card import folder_card, is_own_card

_PACKED = tuple(QuantSpec().shapes(1, 1))  # leaf names of the packed tensors


def write_report(folder: str | Path, model: PreTrainedModel, perplexity: Perplexity | None = None) -> Path:
    """Write `calibration.csv`, `calibration.json` and `calibration.html` of a model just calibrated. A card of ours
    beside them tells perplexity, too.

    Args:
        folder: usually that of the checkpoint; made where it is missing.
        model: as `from_pretrained` has quantized it in this process.
        perplexity: where it was measured.

    Returns:
        The page's path.

    Raises:
        ValueError: a model that was not calibrated in this process.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    reports = getattr(quantizer, "reports", None)
    if not reports:
        raise ValueError(
            f"{type(model).__name__} was not calibrated in this process, so there is nothing to report; pass the model "
            "that from_pretrained(..., quantization_config=GPTQConfig(dataset=...)) returned"
        )
    page = report.write_report(folder, reports, header(model, perplexity))
    quantizer.reported.add(Path(folder).resolve())
    readme = Path(folder) / "README.md"
    if readme.exists() and not is_own_card(readme):  # it tells perplexity, too
        card = folder_card(Path(folder), Path(folder).resolve().name)
        with written_whole(folder) as staging:
            (staging / readme.name).write_text(card, encoding="utf-8")
    return page


def header(model: PreTrainedModel, perplexity: Perplexity | None = None) -> Header:
    """What holds for the calibration of a model that was quantized in this process."""
    config: Any = model.config.quantization_config
    quantizer: Any = model.hf_quantizer
    made_by = [entry.partition(":") for entry in config.meta["quantizer"]]
    spec, settings = asdict(config.spec), asdict(config.settings)
    return Header(
        model=_name(model),
        versions={
            **{name: version for name, _, version in made_by},
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        settings={
            "method": config.method,
            "preset": config.preset,
            **spec,
            "dynamic": config.dynamic,
            "lm_head": config.lm_head,
            "true_sequential": config.true_sequential,
            **{name: _plain(value) for name, value in settings.items()},
        },
        data=config.meta.get("calibration", {}),
        perplexity=perplexity,
        seconds=quantizer.seconds,
        other_parameters=_dense_parameters(model),
    )


def _name(model: PreTrainedModel) -> str:
    """A name on the Hub as it is, of a folder only the last part: where it lies says nothing about the model."""
    name = str(model.name_or_path or "")
    local = name and (Path(name).exists() or Path(name).is_absolute())
    return Path(name).resolve().name if local else name


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dense_parameters(model: PreTrainedModel) -> int:
    """Parameters that keep their dtype; tied ones count once."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(_PACKED))
