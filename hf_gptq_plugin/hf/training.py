"""The whole loop: find out what a model is, quantize it if need be, train, evaluate, export, and check the export."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from ..calibrate import processes
from ..calibrate.data import calibration_windows
from ..calibrate.sources import CalibrationError
from ..config import GPTQConfig
from ..convert.source import open_source
from ..convert.stream import convert
from ..format.checkpoint import written_whole
from ..nn.experts import Experts
from ..nn.linear import QuantLinear
from ..train.checkpointing import disable_checkpointing, enable_checkpointing
from ..train.layers import require_gamma, require_rank
from ..train.loop import NOT_FINITE, STATE, TrainingError, TrainSettings, mean_loss, train
from ..train.methods import METHODS, attach, export, narrowest, targeted, trained
from .evaluate import require_readable
from .loading import load_model, text_class
from .saving import save_checkpoint

logger = logging.getLogger(__name__)

LORA_RATE = 2e-4
# Q-GaLore's step comes back from its subspace scaled by a quarter.
GALORE_FACTOR = 4.0
TRAINABLE = ("lora", *METHODS)
ADAPTER = "adapter"
_DIGESTED = 1 << 16  # bytes at either end of a file that tell it from others
# Of the exported model's logits to the trained one's, relative to the largest: the same weights, summed in another
# order and, below float32, rounded elsewhere.
_CLOSE, _CLOSE_HALF = 1e-3, 5e-2


def usual_rate(method: str, optimizer: str = "adamw") -> float:
    """The learning rate that suits what a method learns."""
    rate = LORA_RATE if method == "lora" else METHODS[method].rate
    return rate * (GALORE_FACTOR if optimizer == "q-galore" else 1.0)


@dataclass(frozen=True)
class Data:
    """What to train and to evaluate on.

    Args:
        train: see `calibrate.sources.read_samples`.
        held_out: the same, for evaluation; None keeps a tenth of the windows of `train` back.
        samples: most windows.
        seqlen: tokens per window.
        packing: see `calibration_windows`.
    """

    train: Any
    held_out: Any = None
    samples: int = 256
    seqlen: int = 256
    packing: str = "auto"


@dataclass
class Outcome:
    """What a training came to.

    Args:
        method: its name.
        layers: how many layers learn.
        parameters: how many numbers.
        before, after: held-out loss per token.
        losses: of every step.
        difference: largest difference of the exported model's logits from the trained one's, relative to the largest.
        folder: the checkpoint; for adapters, where it was made here, else the model's own.
        adapter: the adapter's folder, or None.
    """

    method: str
    layers: int
    parameters: int
    before: float
    after: float
    losses: list[float] = field(repr=False)
    difference: float
    folder: str
    adapter: str | None


def run(
    model: str, out: Path, method: str, data: Data, settings: TrainSettings, quantization: Mapping[str, Any],
    target_modules: list[str] | None = None, options: Mapping[str, Any] | None = None, dtype: Any = torch.float32,
    progress: Callable[[int, float], None] | None = None, checkpointing: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Outcome:  # fmt: skip
    """Train MODEL by one method and write the result to OUT.

    Args:
        model: folder or Hub name of a GPTQ or dense model; folder of an AWQ or compressed-tensors one.
        out: folder to write. While training goes on, its state is beside it; the same job goes on from there.
        method: "lora", or one of `train.methods.METHODS`.
        data: what on.
        settings: how.
        quantization: fields of `GPTQConfig` for a dense model, which is calibrated on the windows it trains on.
        target_modules: see `attach`.
        options: the method's.
        dtype: of the arithmetic.
        progress: see `train`.
        checkpointing: compute activations again in the backward pass, block by block: less memory, more time.
        tell: called with a sentence before every part that takes time.

    Where `torch.distributed` is initialized, processes share the windows of every step, and the first one writes.

    Raises:
        ValueError: a method, option or target that does not exist.
        TrainingError: a loss that is not finite, or an export that does not answer as the trained model does.
    """
    if method not in TRAINABLE:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(TRAINABLE)}")
    if out.is_file():
        raise ValueError(f"OUT={str(out)!r} is a file; name a folder")
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise ValueError(f"OUT={str(out)!r} is MODEL itself, which would be overwritten; name another folder")
    options = dict(options or {})
    if "gamma" in options:  # before anything is loaded
        require_gamma(options["gamma"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows, held_out = _windows(data, tokenizer, settings.seed)
    tell(
        f"{len(windows)} windows of up to {data.seqlen} tokens to train on, {settings.batch} at each of "
        f"{settings.steps} steps; {len(held_out)} held out to evaluate on."
    )
    place = out.resolve() if out.name in ("", "..") else out  # of a name of its own
    state = place.with_name(f"{place.name}.training")
    _require_own(state)
    base = state / "base"
    job = json.dumps(
        [model, _digest(model), method, options, target_modules, str(dtype), dict(quantization)], default=str
    )
    with ExitStack() as stack:
        loaded, made = _quantized(model, base, tokenizer, quantization, windows, dtype, stack, tell)
        require_readable(loaded, [*windows, *held_out])
        torch.manual_seed(settings.seed)
        given = _attached(loaded, method, target_modules, options, tell)
        if checkpointing:
            enable_checkpointing(given, use_reentrant=False)
        trainable = sum(p.numel() for p in given.parameters() if p.requires_grad)
        layers = sum(name.endswith(".lora_A") for name, _ in given.named_modules()) or len(trained(loaded))
        tell(f"{method}: {trainable / 1e6:.2f} M numbers learn in {layers} layers. Evaluating the base.")
        before = mean_loss(given, held_out)
        tell(f"Held-out loss before: {before:.4f} per token. An interrupted training goes on from {state}.")
        losses = train(given, windows, settings, state, progress, job)
        after = mean_loss(given, held_out)
        tell(f"Held-out loss after: {after:.4f}. Writing {out}, and loading it again to compare logits.")
        wanted = _logits(given, held_out[0])
        if checkpointing:
            disable_checkpointing(given)
        adapter = out / ADAPTER if method == "lora" or METHODS[method].exported == "adapter" else None
        if processes.rank() == 0:
            _write(given, loaded, method, options, out, adapter, made, tokenizer, model)
        processes.wait()
        folder = str(out) if adapter is None or made else model
        del given, loaded
        difference = _difference(wanted, folder, adapter, held_out[0], dtype)
    if not difference <= (_CLOSE if dtype == torch.float32 else _CLOSE_HALF):
        raise TrainingError(
            f"{out} does not answer as the trained model did: logits differ by {difference:.2e} of the largest. It is "
            "kept for inspection; please report this"
        )
    if processes.rank() == 0:
        shutil.rmtree(state, ignore_errors=True)
    where = None if adapter is None else str(adapter)
    return Outcome(method, layers, trainable, before, after, losses, difference, folder, where)


def _require_own(state: Path) -> None:
    """Check that the folder for a training's state, which is deleted at the end, holds nothing else.

    Raises:
        ValueError: it does.
    """
    if not state.exists():
        return
    ours = {"base", "journal", STATE, NOT_FINITE}
    inside = sorted(path.name for path in state.iterdir()) if state.is_dir() else [state.name]
    others = [name for name in inside if name not in ours and not name.endswith(".part")]
    if others:
        raise ValueError(
            f"{state} is where the state of this training goes, and holds {others[0]!r}; name another OUT, or move that"
        )


def _digest(model: str) -> str:
    """What tells the weights in a folder from others: sizes, beginnings and ends of their files."""
    digest = hashlib.sha256()
    for file in sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as handle:
            for start in (0, max(0, size - _DIGESTED)):
                handle.seek(start)
                digest.update(handle.read(_DIGESTED))
    return digest.hexdigest()


def _windows(data: Data, tokenizer: Any, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    def read(source: Any, count: int) -> list[Tensor]:
        return calibration_windows(source, tokenizer, count, data.seqlen, seed, len(tokenizer), data.packing)

    windows = read(data.train, data.samples)
    if data.held_out is not None:
        return windows, read(data.held_out, max(1, data.samples // 8))
    kept = max(1, len(windows) // 10)
    if len(windows) <= kept:
        raise CalibrationError(
            f"the text gives {len(windows)} window of {data.seqlen} tokens, and one is kept back to evaluate on: pass "
            "more text, shorter windows, or text to evaluate on"
        )
    return windows[:-kept], windows[-kept:]


def _quantized(
    model: str, base: Path, tokenizer: Any, quantization: Mapping[str, Any], windows: list[Tensor], dtype: Any,
    stack: ExitStack, tell: Callable[[str], None],
) -> tuple[Any, bool]:  # fmt: skip
    """The quantized model, and whether its checkpoint was made here."""
    source = open_source(model) if Path(model).is_dir() else None
    kind = "gptq" if source is None else source.layout
    if source is not None and kind in ("awq", "compressed-tensors"):
        tell(f"{model} is {kind}: converting it to GPTQ.")
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        convert(source, temporary / "gptq", "gptq_v2")
        return load_model(temporary / "gptq", dtype=dtype), True
    if kind in ("gptq", "gptq_v2"):
        found = load_model(model, dtype=dtype)
        if any(isinstance(module, QuantLinear) for module in found.modules()):
            return found, False
        kind = "dense"
    if kind != "dense":
        raise ValueError(f"{model} is {kind}; training starts from GPTQ, AWQ, compressed-tensors or a dense model")
    config = GPTQConfig(tokenizer=tokenizer, **quantization)
    if config.method == "gptq":  # on nothing that is held out
        ids: Any = [window.tolist() for window in windows]
        config.dataset = ids
        config.samples, config.seqlen = len(windows), max(map(len, windows))
    read = hashlib.sha256(json.dumps(config.dataset).encode()).hexdigest()
    asked = json.dumps([model, _digest(model), dict(quantization), read], default=str)
    record = base / "asked.json"
    if (base / "config.json").exists():  # an interrupted run has already quantized it
        if record.read_text(encoding="utf-8") != asked:
            raise TrainingError(
                f"{base} is a model that an interrupted training has quantized from other arguments; repeat those to "
                f"go on with it, or remove {base.parent} to begin anew"
            )
        return load_model(base, dtype=dtype), True
    tell(f"{model} is dense: quantizing it to {config.bits} bits by {config.method}.")
    journal = base.with_name("journal")
    if config.method == "gptq":
        config.journal = str(journal)
    quantized = text_class(model).from_pretrained(model, quantization_config=config, dtype="auto")
    if processes.rank() == 0:
        with written_whole(base) as staging:
            save_checkpoint(quantized, staging, tokenizer=tokenizer)
            (staging / record.name).write_text(asked, encoding="utf-8")
        shutil.rmtree(journal, ignore_errors=True)
    processes.wait()
    return load_model(base, dtype=dtype), True


def _attached(
    model: Any, method: str, targets: list[str] | None, options: dict[str, Any], tell: Callable[[str], None]
) -> Any:
    """The model with something that learns."""
    if method == "lora" or METHODS[method].exported == "adapter":
        targets = _addressable(model, targets, tell)
    if method != "lora":
        attach(model, method, targets, **options)
        return model
    peft = _peft()
    unknown = set(options) - {"rank", "gamma"}
    if unknown:
        raise ValueError(f"method 'lora' has no option {min(unknown)!r}; its options: rank, gamma")
    rank = options.get("rank", 16)
    layers = targeted(model, targets)
    require_rank(rank, narrowest(layers))
    config = peft.LoraConfig(
        r=rank, lora_alpha=options.get("gamma", 2.0) * rank, target_modules=sorted(layers),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def _addressable(model: Any, targets: list[str] | None, tell: Callable[[str], None]) -> list[str] | None:
    """Targets that an adapter's file can name. PEFT takes the names of a mixture's experts for those of fused ones.

    Raises:
        ValueError: experts were asked for, or there is nothing else.
    """
    mixtures = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Experts))
    layers = targeted(model, targets)
    experts = [name for name in layers if name.startswith(mixtures)]
    if not experts:
        return targets
    others = [name for name in layers if name not in experts]
    if targets is not None or not others:
        raise ValueError(
            f"{experts[0]} is an expert of a mixture, which PEFT's adapters cannot name; choose other layers by "
            "target_modules, or another method"
        )
    tell(f"{len(experts)} layers of experts are left out: PEFT's adapters cannot name them.")
    return others


def _write(
    given: Any, loaded: Any, method: str, options: dict[str, Any], out: Path, adapter: Path | None, made: bool,
    tokenizer: Any, model: str,
) -> None:  # fmt: skip
    """Write the checkpoint, the adapter, or both."""
    if method == "lora":
        for config in given.peft_config.values():
            config.base_model_name_or_path = str(out) if made else model  # not where it was made
        with written_whole(out / ADAPTER) as staging:
            given.save_pretrained(staging, save_embedding_layers=False)  # else PEFT looks for the base, not there yet
        if made:
            save_checkpoint(given.unload(), out, tokenizer=tokenizer)
        return
    adapters = export(loaded)
    if adapters:
        _write_adapter(adapters, out / ADAPTER, options, str(out) if made else model)
    if adapter is None or made:
        save_checkpoint(loaded, out, tokenizer=tokenizer)


def _write_adapter(adapters: dict[str, dict[str, Tensor]], folder: Path, options: dict[str, Any], base: str) -> None:
    """As PEFT writes one."""
    rank = options.get("rank", 16)
    config = _peft().LoraConfig(
        r=rank, lora_alpha=options.get("gamma", 2.0) * rank, target_modules=sorted(adapters), task_type="CAUSAL_LM",
        base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    tensors = {
        f"base_model.model.{name}.{leaf}.weight": value.contiguous()
        for name, pair in adapters.items()
        for leaf, value in pair.items()
    }
    with written_whole(folder) as staging:
        config.save_pretrained(staging)
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def _logits(model: Any, window: Tensor) -> Tensor:
    model.eval()
    return model(input_ids=window[None].to(model.device)).logits.float().cpu()


def _difference(wanted: Tensor, folder: str, adapter: Path | None, window: Tensor, dtype: Any) -> float:
    """Of a fresh load to the logits at the end of training."""
    loaded: Any = load_model(folder, dtype=dtype)
    if adapter is not None:
        loaded = _peft().PeftModel.from_pretrained(loaded, adapter)
    given = _logits(loaded, window)
    largest = float(wanted.abs().max())
    return float((given - wanted).abs().max()) / largest if largest else math.inf


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("adapters are written by PEFT; install it: pip install hf-gptq-plugin[peft]") from None
    return peft
