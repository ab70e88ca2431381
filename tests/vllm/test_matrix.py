"""Every variant of the format gives the same bits in Transformers and in vLLM, layer by layer.

Both call one op on the same packed bytes; what is compared here is everything before it: reading, checking, cutting
and laying out the tensors. That the op computes what the format says is shown in tests/nn and test_layers.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from vllm_layers import finish, load, make, random_weight, tensor_parallel

from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn.linear import QuantLinear

pytest.importorskip("vllm.version", reason="these tests need vLLM")

pytestmark = [
    # vLLM, and what it imports, warn about themselves.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("vllm_config"),
]

IN_FEATURES, OUT_FEATURES, TOKENS = 160, 72, 5
GROUPS = (16, 32, 64, 128, 48, -1)  # of 160 inputs: whole groups, and last groups of 32, 32 and 16


def in_transformers(weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> QuantLinear:
    """The layer as a checkpoint is loaded into it."""
    layer = QuantLinear(
        IN_FEATURES, OUT_FEATURES, weight.spec, bias is not None, weight.scales.dtype, dtype, device="cpu"
    )
    state = weight.pack() if bias is None else {**weight.pack(), "bias": bias}
    layer.load_state_dict(state)
    layer.finalize()
    return layer


def in_vllm(weight: QuantizedWeight) -> Any:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    with tensor_parallel():
        layer = make(ReplicatedLinear, weight.spec, IN_FEATURES, OUT_FEATURES, prefix="layer")
        load(layer, weight)
        return finish(layer)


@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_bits_are_the_same_in_both_stacks(bits: int, sym: bool, desc_act: bool) -> None:
    for fmt, group_size in product(("gptq", "gptq_v2"), GROUPS):
        weight = random_weight(OUT_FEATURES, QuantSpec(bits, group_size, sym, desc_act, fmt), IN_FEATURES)
        served = in_vllm(weight)
        for dtype, with_bias in product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
            bias = torch.randn(OUT_FEATURES, dtype=dtype) if with_bias else None
            x = torch.randn(TOKENS, IN_FEATURES, dtype=dtype)
            expected = in_transformers(weight, bias, dtype)(x)
            actual = served.quant_method.apply(served, x, bias)
            assert torch.equal(actual, expected), (fmt, group_size, dtype, with_bias)
            assert actual.dtype == dtype and expected.abs().max() > 0
