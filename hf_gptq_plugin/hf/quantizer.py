"""The HfQuantizer that `from_pretrained` calls for `quant_method="gptq"`: calibrates while loading, loads, saves."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from .. import native
from ..calibrate.data import calibration_record, calibration_windows
from ..calibrate.datafree import quantize_without_data
from ..calibrate.experts import Layout, layouts, merges_into, unfuse_experts
from ..calibrate.offload import blocks_on_disk, is_offloaded
from ..calibrate.pipeline import quantize_model
from ..calibrate.plan import Plan
from ..calibrate.report import LayerReport
from ..calibrate.sources import CalibrationError, read_samples
from ..calibrate.walk import LINEAR, linear_shape
from ..config import GPTQConfig
from ..format.checkpoint import (
    TensorInfo,
    agreed_format,
    check_shapes,
    quantized_modules,
    read_headers,
    require_g_idx,
)
from ..format.spec import CheckpointError, QuantSpec
from ..nn.linear import QuantLinear
from ..train.methods import trained
from .loading import require_found
from .names import BareWeights, Renamer, renamed
from .saving import attach_saving

logger = logging.getLogger(__name__)

_STOCK: dict[str, Any] = {}


def register() -> None:
    """Take over `quant_method="gptq"` in Transformers. Done by `import hf_gptq_plugin`; harmless to repeat."""
    if auto.AUTO_QUANTIZER_MAPPING.get("gptq") is GptqQuantizer:
        return
    # `register_quantizer` refuses names that are taken.
    _STOCK["quantizer"] = auto.AUTO_QUANTIZER_MAPPING["gptq"]
    _STOCK["config"] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]
    auto.AUTO_QUANTIZER_MAPPING["gptq"] = GptqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig


def unregister() -> None:
    """Give `quant_method="gptq"` back to Transformers' own quantizer."""
    if _STOCK:
        auto.AUTO_QUANTIZER_MAPPING["gptq"] = _STOCK.pop("quantizer")
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = _STOCK.pop("config")


class GptqQuantizer(HfQuantizer):
    """GPTQ for Transformers.

    Not pre-quantized: after the dense weights are loaded, calibrates and replaces the linear layers in place.
    Pre-quantized: replaces exactly the modules for which the checkpoint has codes, checks the headers before
    anything is loaded and the values after.
    """

    quantization_config: GPTQConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(GPTQConfig.from_stock(quantization_config), **kwargs)
        self._separated: list[Layout] = []
        self.reports: list[LayerReport] = []  # of the calibration; empty where a quantized checkpoint was loaded
        self.reported: set[Path] = set()  # folders that tell of it
        self.seconds = 0.0  # that it took
        self._model: PreTrainedModel | None = None  # once it is loaded; it holds its quantizer anyway
        self._device_map: dict[str, Any] | None = None
        self._windows: list[Tensor] = []
        self._record: dict[str, Any] | None = None
        self._scales_dtypes: dict[str, torch.dtype] = {}  # by module
        self._shapes: dict[str, torch.Size] = {}  # of what is to be loaded
        self._missing: set[str] = set()  # what was not found for it

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the quantized model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Asked by Trainer: whether something learns that `train.methods.attach` has put onto the model."""
        return self._model is not None and bool(trained(self._model))

    @property
    def is_compileable(self) -> bool:
        """The ops have fakes and trace."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes a GPTQ checkpoint."""
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """In low memory: a map that is filled in once the model's structure is known, before weights are loaded."""
        if self.pre_quantized or not self.quantization_config.low_memory:
            return device_map
        devices = {"": "cpu"} if device_map is None else device_map
        if not isinstance(devices, dict) or set(devices) != {""}:
            raise ValueError(
                f"device_map={device_map!r} and low_memory=True both say where blocks go; pass one device or none"
            )
        self._device_map = dict(devices)
        return self._device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            with torch.device("cpu"):  # Transformers has made "meta" the default device here
                self._read_calibration_data(model)
            if self._device_map is not None:
                device = self._device_map.pop("")
                self._device_map |= blocks_on_disk(model, device)
            self._note_shapes(model)
            self._note_missing(model)
            return
        if not checkpoint_files:
            raise CheckpointError("a GPTQ model can only be loaded from safetensors files")
        headers = read_headers(checkpoint_files)
        modules = quantized_modules(headers)
        if not modules:
            raise CheckpointError(
                "config.json says quant_method=gptq, but no tensor of the checkpoint ends in .qweight; "
                "the weights are not quantized: remove quantization_config from config.json"
            )
        self._separate_experts(model, modules)
        names = renamed(model, modules, self)
        checkpoint = self.quantization_config.checkpoint
        for source, target in names.items():
            spec = checkpoint.for_module(source) or checkpoint.for_module(target) or checkpoint.spec
            self._replace_by_empty(model, source, target, spec, modules[source])
        _require_all_tensors(model, headers, self)
        self._note_shapes(model)

    def _note_shapes(self, model: nn.Module) -> None:
        self._shapes = {name: value.shape for name, value in model.state_dict().items()}

    def _note_missing(self, model: Any) -> None:
        """Transformers tells a quantizer nothing of what it has not found: listen where it makes up its list."""
        adjust = model._adjust_missing_and_unexpected_keys

        def adjusted(loading_info: Any) -> None:
            adjust(loading_info)
            self._missing = set(loading_info.missing_keys)

        model._adjust_missing_and_unexpected_keys = adjusted

    def _require_shapes(self, model: nn.Module) -> None:
        """Beside a quantizer, older Transformers (5.19) take tensors of any shape."""
        for name, value in model.state_dict().items():
            wanted = self._shapes.get(name, value.shape)
            if value.shape != wanted:
                raise CheckpointError(
                    f"{name} has shape {tuple(value.shape)} in the checkpoint; {type(model).__name__} with this config "
                    f"needs {tuple(wanted)}: config.json and weights do not belong together; fetch both again"
                )
        self._shapes = {}

    def _separate_experts(self, model: PreTrainedModel, modules: Mapping[str, Any]) -> None:
        """Take fused experts apart where the checkpoint has codes for any of them."""
        known = [layout for layout in layouts(model).values() if layout is not None]
        fused = {f"{layout.name}.{parameter}" for layout in known for parameter in layout.fused}
        renamer = Renamer(model, self, model.state_dict())
        if any(renamer.first(f"{module}.weight") in fused for module in modules):
            unfuse_experts(model, known)
            self._separated = known

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Called by Transformers before it loads: the steps that would merge separated experts are left out, and one
        that codes need is added."""
        kept = [c for c in weight_conversions if not any(merges_into(c, layout) for layout in self._separated)]
        return [*super().update_weight_conversions(kept, *args), BareWeights()]

    def _replace_by_empty(
        self, model: nn.Module, source: str, target: str, spec: QuantSpec, tensors: Mapping[str, TensorInfo]
    ) -> None:
        layer: Any = model.get_submodule(target)
        if not isinstance(layer, LINEAR):
            raise CheckpointError(
                f"the checkpoint holds codes for {source}, which is {type(layer).__name__} in this model; only linear "
                "layers can be quantized"
            )
        in_features, out_features = linear_shape(layer)
        check_shapes(source, {leaf: t.shape for leaf, t in tensors.items()}, spec, in_features, out_features)
        require_g_idx(source, spec, tensors, spec.groups(in_features))
        self._scales_dtypes[target] = tensors["scales"].torch_dtype
        new = QuantLinear(
            in_features,
            out_features,
            spec,
            bias=layer.bias is not None,
            scales_dtype=tensors["scales"].torch_dtype,
            dtype=_planned_dtype(model, f"{target}.weight", layer.weight.dtype),
            has_g_idx="g_idx" in tensors,
        )
        model.set_submodule(target, new)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._require_shapes(model)
        if self.pre_quantized:
            self._finalize(model)
        else:
            vars(model).pop("_adjust_missing_and_unexpected_keys", None)
            require_found(model, self._missing)
            self._calibrate(model)
        model.config.quantization_config = self.quantization_config
        attach_saving(model)
        self._model = model
        return model

    def _finalize(self, model: nn.Module) -> None:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        for name, layer in layers.items():
            # Models that keep some modules in float32 (T5's wo) get their scales so, too.
            if layer.scales.dtype != self._scales_dtypes[name]:
                layer.scales.data = layer.scales.data.to(self._scales_dtypes[name])
        label = self.quantization_config.format
        fmt = agreed_format(label, {name: layer.zero_format() for name, layer in layers.items()})
        for name, layer in layers.items():
            layer.finalize(replace(layer.spec, checkpoint_format=fmt), name)
        self.quantization_config.format = fmt

    def _read_calibration_data(self, model: Any) -> None:
        """Before any weight is loaded, so that data that cannot be used are refused at once."""
        config = self.quantization_config
        if config.method == "gptq":
            found = read_samples(config.dataset, config.seed)
            tokenizer = None if found.kind == "tokens" else _tokenizer(config.tokenizer, model)
            vocab_size = _vocab_size(model)
            self._windows = calibration_windows(
                found, tokenizer, config.samples, config.seqlen, config.seed, vocab_size, config.packing
            )
            self._record = calibration_record(found, self._windows, config.seqlen, config.seed, config.packing)
        elif config.dataset is not None:
            logger.warning("method=%r needs no calibration data; dataset is not used.", config.method)

    def _calibrate(self, model: Any) -> None:
        config = self.quantization_config
        if config.method == "gptq" and is_offloaded(model):
            left_out = config.leave_out_whole_model()
            if left_out:
                logger.warning(
                    "A part of %s is offloaded: it is calibrated without what needs all of it in memory (%s).",
                    type(model).__name__, ", ".join(left_out),
                )  # fmt: skip
        modules = config.modules_in_block_to_quantize
        if modules is not None:
            modules = [[m] if isinstance(m, str) else list(m) for m in modules]
        plan = Plan(
            checkpoint=config.checkpoint,
            settings=config.settings,
            true_sequential=config.true_sequential,
            modules=modules,
            block_name=config.block_name_to_quantize,
            min_expert_tokens=config.min_expert_tokens,
            generated=config.generated,
            token_weights=config.token_weights,
            output_hessian=config.output_hessian,
            seed=config.seed,
            tuning=config.tuning,
            journal=None if config.journal is None else Path(config.journal),
            low_memory=config.low_memory,
        )
        start = time.perf_counter()
        with _usual_defaults(), native.exact_activations():
            if config.method == "gptq":
                self.reports = quantize_model(model, self._windows, plan)
            else:
                self.reports = quantize_without_data(model, plan, config.method)
        self.seconds = time.perf_counter() - start
        if config.lm_head:
            _untie(model)
        config.record_calibration(self._record)
        self._windows = []
        # The text and the tokenizer have served; keeping them would write them into every copy of the config.
        config.dataset = config.tokenizer = config.journal = None

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # A config that was saved has its name.
        wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        with torch.device("meta"):
            transposed = {n for n, m in type(model)(model.config).named_modules() if isinstance(m, Conv1D)}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                dense = layer.to_linear(wanted)
                model.set_submodule(name, _conv1d(dense) if name in transposed else dense)
        for method in ("save_pretrained", "push_to_hub"):
            vars(model).pop(method, None)
        return model


def _conv1d(dense: nn.Linear) -> Conv1D:
    """The same layer as GPT-2 has it: its weight is `[K, N]`."""
    with torch.device("meta"):
        layer = Conv1D(dense.out_features, dense.in_features)
    layer.weight = nn.Parameter(dense.weight.detach().T.contiguous())
    bias = dense.weight.new_zeros(dense.out_features) if dense.bias is None else dense.bias.detach()
    layer.bias = nn.Parameter(bias)
    return layer


@contextmanager
def _usual_defaults() -> Iterator[None]:
    """PyTorch's own default dtype and device, whatever the caller has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # A mode that every call of PyTorch goes through: only where there is another one.
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _planned_dtype(model: Any, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that Transformers loads a parameter in: that of the model, but for those it keeps in float32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return dtype
    matcher, globs, _ = build_glob_alternation(list(plan))
    match = matcher.search(key)
    return plan[globs[str(match.lastgroup)]] if match else dtype


def _require_all_tensors(model: PreTrainedModel, headers: Mapping[str, TensorInfo], quantizer: HfQuantizer) -> None:
    """What must be in the files is there (`loading.needs`): nothing is left to be initialised."""
    expected = model.state_dict()
    renamer = Renamer(model, quantizer, expected)
    present = {name for key in headers for name in renamer.all(key)} | set(headers)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, origin in tied.items():
        if origin in present or target in present:
            present |= {target, origin}
    require_found(model, set(expected) - present)


def _vocab_size(model: Any) -> int:
    """Rows of the embedding of text tokens.

    Raises:
        CalibrationError: there is none.
    """
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        raise CalibrationError(
            f"{type(model).__name__} has no embedding of text tokens; only models that run on token ids alone can be "
            "quantized: load the part that reads text with a class of its own"
        ) from None


def _tokenizer(tokenizer: Any, model: PreTrainedModel) -> Any:
    """The tokenizer to calibrate with: the caller's, or the one that lies beside the model."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from transformers import AutoTokenizer

    source = tokenizer or model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"no tokenizer could be loaded from {source!r} ({error}); pass GPTQConfig(tokenizer=...)"
        ) from None


def _untie(model: PreTrainedModel) -> None:
    """A quantized output embedding no longer shares the input embedding's weight."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
