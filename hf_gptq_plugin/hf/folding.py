"""Fold a LoRA adapter of PEFT into the GPTQ checkpoint it was trained on, and say whether that is a good idea."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..calibrate.data import calibration_windows
from ..format.checkpoint import read_headers
from ..format.spec import CheckpointError
from ..native import NativeError
from ..nn.linear import QuantLinear
from ..solve.hessian import Hessian, SolveError
from ..train.fold import FoldReport, fold
from .adapter import CONFIG, FACTOR, WEIGHTS, check_adapter, local_adapter
from .evaluate import Comparison, compared, require_readable
from .loading import load_model
from .saving import save_checkpoint

# Hessians that are in memory at a time; with more layers, the text is run through the model more than once.
_BYTES = 2 << 30
# Folding is recommended where the folded model is this much closer to the adapted one than the base is.
_CLOSER = 0.25
_PREFIX = "base_model.model."  # of names in an adapter's file


@dataclass
class Folded:
    """What folding came to.

    Args:
        layers: by name.
        folded: the folded model beside the adapted one, on held-out windows.
        base: the base beside the adapted one, on the same.
        recommendation: "fold" or "keep the adapter".
        reason: why.
    """

    layers: dict[str, FoldReport] = field(repr=False)
    folded: Comparison
    base: Comparison
    recommendation: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@torch.no_grad()
def run(
    base: str, adapter: str, out: Path, data: Any, samples: int = 32, seqlen: int = 512, seed: int = 0,
    dtype: Any = torch.float32,
) -> Folded:  # fmt: skip
    """Write the checkpoint that BASE with ADAPTER comes closest to.

    Args:
        base: folder or Hub name of a GPTQ checkpoint.
        adapter: folder or Hub name of a LoRA adapter.
        out: folder to write.
        data: calibration data, see `calibrate.sources.read_samples`; an eighth of the windows is kept back to compare.
        samples, seqlen, seed: see `calibration_windows`.
        dtype: of the arithmetic.

    Raises:
        ValueError: an adapter that is no plain LoRA, or a layer of it that is not quantized.
    """
    try:
        import peft
    except ImportError:
        raise ImportError("adapters are read by PEFT; install it: pip install hf-gptq-plugin[peft]") from None
    if out.is_file():
        raise ValueError(f"OUT={str(out)!r} is a file; name a folder")
    for what, given in (("BASE", base), ("ADAPTER", adapter), ("ADAPTER", str(local_adapter(adapter)))):
        if out.exists() and Path(given).exists() and out.samefile(given):
            raise ValueError(f"OUT={str(out)!r} is {what} itself, which would be overwritten; name another folder")
    adapter = str(local_adapter(adapter))
    factors = check_adapter(adapter)
    _require_plain(peft.PeftConfig.from_pretrained(adapter))
    _require_factors_alone(adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    windows = calibration_windows(data, tokenizer, samples, seqlen, seed, len(tokenizer))
    kept = max(1, len(windows) // 8)
    if len(windows) <= kept:
        raise ValueError(f"the text gives {len(windows)} window; two are needed: pass more text or a smaller seqlen")
    windows, held_out = windows[:-kept], [window[None] for window in windows[-kept:]]
    plain: Any = load_model(base, dtype=dtype)
    _require_fitting(plain, factors)
    require_readable(plain, [*windows, *held_out])
    adapted: Any = load_model(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error, below
        adapted = peft.PeftModel.from_pretrained(adapted, adapter).eval()
    updates = _updated(adapted)
    for name in updates:
        if f"{_PREFIX}{name}" not in factors:
            raise CheckpointError(
                f"{CONFIG} names {name}, for which {WEIGHTS} has no lora_A and lora_B; the adapter is incomplete"
            )
    reports: dict[str, FoldReport] = {}
    folded: Any = load_model(base, dtype=dtype)
    with tqdm(total=len(updates), desc="Folding", unit="layer") as bar:
        for names in _shares(updates):
            hessians = _hessians(adapted, {name: updates[name].base_layer for name in names}, windows)
            for name in names:
                layer: Any = folded.get_submodule(name)
                delta = updates[name].get_delta_weight(adapted.active_adapter).float()
                try:
                    made, reports[name] = fold(layer.quantized_weight(), delta, hessians[name].mean())
                except (ValueError, SolveError, NativeError) as error:
                    raise type(error)(f"{name}: {error}") from None
                folded.set_submodule(name, QuantLinear.from_quantized(made, layer.bias, layer.dtype))
                bar.update()
                bar.set_postfix_str(f"{name}, residual {reports[name].residual:.2f}")
    first, second = (compared(model, adapted, held_out, progress=False) for model in (folded, plain))
    result = Folded(reports, first, second, *_recommended(first, second))
    save_checkpoint(folded, out, tokenizer=tokenizer)
    (out / "folding.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    return result


def _require_plain(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"peft_type={kind!r} is not LoRA; only LoRA adapters are folded")
    for name in (
        "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias",
        "alora_invocation_tokens", "layer_replication",
    ):  # fmt: skip
        if getattr(config, name, None):
            raise ValueError(
                f"the adapter has {name}={getattr(config, name)!r}, which a fold of linear layers would lose; serve it "
                "as an adapter"
            )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"the adapter has bias={config.bias!r}; only bias='none' is folded")


def _require_factors_alone(adapter: str) -> None:
    """PEFT loads whatever stands in an adapter's file; a fold takes its factors.

    Raises:
        CheckpointError: there is something else.
    """
    for name in read_headers([Path(adapter) / WEIGHTS]):
        if FACTOR.fullmatch(name) is None:
            raise CheckpointError(
                f"the adapter holds {name} beside lora_A and lora_B, which a fold would lose; serve it as an adapter"
            )


def _require_fitting(model: Any, factors: Mapping[str, tuple[int, int, int]]) -> None:
    """Raises CheckpointError where an adapter's module is none of the base, or of another shape there."""
    layers = dict(model.named_modules())
    for module, (_, in_features, out_features) in factors.items():
        layer = layers.get(module.removeprefix(_PREFIX)) if module.startswith(_PREFIX) else None
        if layer is None:
            raise CheckpointError(f"{module} of the adapter is no layer of the base; the adapter is another model's")
        if isinstance(layer, QuantLinear) and (layer.in_features, layer.out_features) != (in_features, out_features):
            raise CheckpointError(
                f"{module} of the adapter is for a weight {[out_features, in_features]}, and the base's is "
                f"{[layer.out_features, layer.in_features]}; the adapter is another model's"
            )


def _updated(adapted: Any) -> dict[str, Any]:
    """The adapter's layers by their names in the base.

    Raises:
        CheckpointError: one whose base is not quantized.
    """
    found = {}
    for name, module in adapted.get_base_model().named_modules():
        if not hasattr(module, "get_delta_weight") or not hasattr(module, "base_layer"):
            continue
        if not isinstance(module.base_layer, QuantLinear):
            raise CheckpointError(f"{name} of the adapter is not quantized in the base; it cannot be folded")
        found[name] = module
    if not found:
        raise CheckpointError("the adapter has no layer that the base has")
    return found


def _shares(updates: dict[str, Any]) -> Iterator[list[str]]:
    """Names in shares whose Hessians fit."""
    share: list[str] = []
    size = 0
    for name, module in updates.items():
        need = 4 * module.base_layer.in_features**2
        if share and size + need > _BYTES:
            yield share
            share, size = [], 0
        share.append(name)
        size += need
    yield share


def _hessians(model: nn.Module, layers: dict[str, nn.Module], windows: list[Tensor]) -> dict[str, Hessian]:
    """The Hessians of layers' inputs; one for those that read the same tensor."""
    owners: dict[str, str] = {}
    hessians: dict[str, Hessian] = {}
    held: list[tuple[Tensor, str]] = []

    def read(name: str, x: Tensor) -> None:
        if name not in owners:  # in the first window, whose inputs are held so that none takes another's place
            owners[name] = next((other for tensor, other in held if tensor is x), name)
            held.append((x, owners[name]))
        if owners[name] == name:
            # At once: the pass goes on, and may write into `x`; and of many Hessians each would hold some.
            hessians.setdefault(name, Hessian(x.shape[-1], at_once=1)).add(x)

    with _hooked(layers, read):
        for window in windows:
            model(input_ids=window[None])
            held.clear()
    return {name: hessians[owner] for name, owner in owners.items()}


@contextmanager
def _hooked(layers: dict[str, nn.Module], read: Any) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, args: read(name, args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recommended(folded: Comparison, base: Comparison) -> tuple[str, str]:
    if not base.divergence:
        return "fold", "the adapter changes nothing"
    share = folded.divergence / base.divergence
    reason = (
        f"from the adapted model, the folded one diverges by {folded.divergence:.2e} per token and the base by "
        f"{base.divergence:.2e}: {share:.0%} of the adapter's effect is lost"
    )
    return ("fold" if share <= _CLOSER else "keep the adapter"), reason
