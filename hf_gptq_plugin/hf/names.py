"""Names of quantized layers in a checkpoint and in a model: Transformers renames tensors as it loads and saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from ..format.checkpoint import TENSORS
from ..format.spec import CheckpointError
from ..nn.linear import QuantLinear


class BareWeights(WeightRenaming):
    """Last step of loading, for models whose checkpoints call a layer's weight by the layer's name alone.

    Transformers adds `.weight` to that name, whatever follows it: codes, `layer.qweight`, would become
    `layer.weight.qweight`.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(rf"\.weight\.({'|'.join(TENSORS)})$", r".\1")

    def reverse_transform(self) -> WeightRenaming:
        """None: layers are saved by their own names."""
        return WeightRenaming("(?!)", "")


class Renamer:
    """How Transformers will rename a checkpoint's tensors when it loads them into a model.

    Args:
        model: the model.
        quantizer: that of the model.
        expected: the model's state.
    """

    def __init__(self, model: PreTrainedModel, quantizer: HfQuantizer, expected: dict[str, Any]) -> None:
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._prefix, self._expected = model.base_model_prefix, expected

    def first(self, key: str) -> str:
        """What `key` becomes; the first of several tensors."""
        return self._renamed(key)[0]

    def all(self, key: str) -> list[str]:
        """What `key` becomes: several where it holds one matrix of several layers (query, key and value)."""
        name, pattern = self._renamed(key)
        targets = next((c.target_patterns for c in self._converters if pattern in c.source_patterns), [])
        before, found, after = next((parts for t in targets if (parts := name.partition(t))[1]), (name, "", ""))
        return [f"{before}{target}{after}" for target in targets] if found else [name]

    def _renamed(self, key: str) -> tuple[str, str | None]:
        return rename_source_key(key, self._renamings, self._converters, self._prefix, self._expected)


def renamed(model: PreTrainedModel, modules: Iterable[str], quantizer: HfQuantizer) -> dict[str, str]:
    """Names of a checkpoint's quantized modules to those of the model that it is loaded into.

    Raises:
        CheckpointError: a module that the model does not have; its codes would be dropped and the layer that they
            belong to would be left with random weights.
    """
    expected = model.state_dict()
    renamer = Renamer(model, quantizer, expected)
    known = {name for name, _ in model.named_modules()}
    leaves = {name.rpartition(".")[2] for name in known}
    names = {}
    for source in modules:
        key = renamer.first(f"{source}.weight")
        target = key.removesuffix(".weight") if key in expected else source
        if target not in known:
            target = renamer.first(f"{source}.qweight").removesuffix(".qweight")  # see BareWeights
        if target in known:
            names[source] = target
        elif source.rpartition(".")[2] in leaves or ".experts." in source:
            raise CheckpointError(
                f"the checkpoint holds codes for {source}, but {type(model).__name__} has no module of that name to "
                "take them; load it with the class it was made from"
                + (", and with the config it was made with" if ".experts." in source else "")
            )
    return names


def keep_apart(model: PreTrainedModel) -> None:
    """Leave out the steps by which Transformers would join quantized layers as it saves (query, key and value, of
    checkpoints that hold them as one matrix): the tensors of codes do not join as weights do. Layers are saved under
    their own names, which load as they are."""
    steps = getattr(model, "_weight_conversions", None)
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if steps and quantized:
        vars(model)["_weight_conversions"] = [
            step for step in steps if not (isinstance(step, WeightConverter) and _touches(step, quantized))
        ]


def _touches(step: Any, names: list[str]) -> bool:
    back = step.reverse_transform()
    return any(back.rename_source_key(f"{name}.qweight")[1] is not None for name in names)
