"""QuantLinear: an nn.Linear to everyone else, canonical on every save."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import BITS, CheckpointError, QuantSpec
from hf_gptq_plugin.nn import ops
from hf_gptq_plugin.nn.linear import QuantLinear


def quantized(spec: QuantSpec, rows: int = 40, columns: int = 100, shuffled: bool = False) -> QuantizedWeight:
    groups = spec.groups(columns)
    group = natural_groups(columns, spec.group_size)
    low, high = spec.zero_range
    zeros = torch.full((groups, rows), 2 ** (spec.bits - 1), dtype=torch.int32)
    return QuantizedWeight(
        codes=torch.randint(0, spec.maxq + 1, (rows, columns), dtype=torch.uint8),
        scales=(torch.rand(groups, rows) * 0.02 + 0.001).half(),
        zeros=zeros if spec.sym else torch.randint(low, high + 1, (groups, rows), dtype=torch.int32),
        group=group[torch.randperm(columns)].contiguous() if shuffled else group,
        spec=spec,
    )


SPECS = [QuantSpec(b, 32, sym) for b in BITS for sym in (True, False)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_state_dict_is_canonical_and_comes_back(spec: QuantSpec, shuffled: bool) -> None:
    weight = quantized(spec, shuffled=shuffled)
    layer = QuantLinear.from_quantized(weight, torch.randn(40))
    state = layer.state_dict()
    for name, tensor in weight.pack().items():
        assert torch.equal(state[name], tensor), name
    assert list(state) == ["qweight", "qzeros", "scales", "g_idx", "bias"]
    x = torch.randn(3, 100)
    before = layer(x)
    # Into a fresh layer, into a finalized one that held other codes, and through safetensors.
    fresh = QuantLinear(100, 40, spec, bias=True, device="cpu")
    fresh.load_state_dict(load_bytes(save_bytes(state)))
    fresh.finalize()
    other = QuantLinear.from_quantized(quantized(spec, shuffled=not shuffled), torch.randn(40))
    other.load_state_dict(state)
    assert torch.equal(fresh(x), before)
    assert torch.equal(other(x), before)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("shuffled", [False, True])
def test_another_default_device_plays_no_part(shuffled: bool) -> None:
    weight = quantized(QuantSpec(4, 32), shuffled=shuffled)
    wanted = QuantLinear.from_quantized(weight)
    with torch.device("meta"):
        layer = QuantLinear.from_quantized(weight)
        layer.load_state_dict(wanted.state_dict())
        dense = layer.weight
    assert {value.device.type for value in layer.state_dict().values()} == {"cpu"}
    assert torch.equal(dense, weight.dequantize()) and torch.equal(layer.weight, dense)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_codes_of_another_dtype_never_reach_native_code(dtype: torch.dtype) -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)))
    state = layer.state_dict()
    with pytest.raises((ValueError, RuntimeError), match="int32"):
        layer.load_state_dict({**state, "qweight": state["qweight"].to(dtype)}, assign=True)


def test_g_idx_is_saved_even_where_the_checkpoint_had_none() -> None:
    weight = quantized(QuantSpec(4, 32))
    layer = QuantLinear(100, 40, weight.spec, has_g_idx=False, device="cpu")
    packed = weight.pack()
    g_idx = packed.pop("g_idx")
    layer.load_state_dict(packed)
    layer.finalize()
    assert torch.equal(layer.state_dict()["g_idx"], g_idx)
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.state_dict()["qweight"], packed["qweight"])


def test_is_an_nn_linear() -> None:
    weight = quantized(QuantSpec(4, 32))
    bias = nn.Parameter(torch.randn(40))
    layer = QuantLinear.from_quantized(weight, bias)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (100, 40)
    assert torch.equal(layer.weight, weight.dequantize())
    assert "bits=4, group_size=32, sym=True" in repr(layer)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    x = torch.randn(2, 3, 100)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, bias), rtol=1e-5, atol=1e-5)
    dense = layer.to_linear(torch.bfloat16)
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, weight.dequantize(torch.bfloat16)) and dense.weight.requires_grad
    assert torch.equal(layer.quantized_weight().codes, weight.codes)


def test_copies_and_pickles() -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(3, 32, sym=False), shuffled=True))
    x = torch.randn(2, 100)
    before = layer(x)
    twin = copy.deepcopy(layer)
    twin.scales.data.mul_(2)
    assert torch.equal(layer(x), before) and not torch.equal(twin(x), before)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), before)


def test_autocast_gives_the_autocast_dtype() -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)), torch.randn(40))
    x = torch.randn(2, 100)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("features", [57, 63, 65])
def test_other_features_are_refused(training: bool, features: int) -> None:
    """Those of the same number of words, too: 57 to 64 codes of 4 bits take eight."""
    layer = QuantLinear.from_quantized(quantized(QuantSpec(bits=4, group_size=-1), columns=64), None, torch.float32)
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match="the weight has in_features=64"):
        layer(torch.randn(3, features, requires_grad=training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("leaf", ["qweight", "scales", "qzeros", "bias", "all"])
def test_values_that_were_never_loaded_are_refused(leaf: str, training: bool) -> None:
    """PyTorch runs the shapes alone where anything is on `meta`, and returns memory that nobody wrote."""
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32, sym=False)), torch.randn(40))
    if leaf == "all":
        layer = QuantLinear(100, 40, QuantSpec(4, 32), bias=True)
    else:
        setattr(layer, leaf, nn.Parameter(getattr(layer, leaf).to("meta"), requires_grad=False))
    with (
        torch.set_grad_enabled(training),
        pytest.raises(ValueError, match="is on meta, x on cpu; load its values first"),
    ):
        layer(torch.randn(2, 100))
    assert layer.to("meta")(torch.empty(2, 100, device="meta")).shape == (2, 40)  # shapes alone are wanted


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_activations_of_other_dtypes_are_refused(dtype: torch.dtype, training: bool) -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)))
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=f"x has dtype {dtype}; accepted: float32"):
        layer(torch.ones(2, 100).to(dtype))


def test_a_layer_in_float64_computes_in_float64() -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32))).double()
    x = torch.randn(2, 100, dtype=torch.float64)
    expected = x @ layer.quantized_weight().dequantize(torch.float64).T
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_a_conversion_converts_the_weight_too() -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)), torch.randn(40))
    assert layer.weight.dtype == torch.float32 and layer.half().weight.dtype == layer.bias.dtype == torch.float16
    assert QuantLinear.from_quantized(quantized(QuantSpec(4, 32))).bfloat16().weight.dtype == torch.bfloat16
    assert layer.share_memory().weight.dtype == layer.to("meta").weight.dtype == torch.float16


def test_a_replica_without_parameters_of_its_own() -> None:
    """As DataParallel makes them: tensors are plain attributes."""
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter)
    x = torch.randn(2, 100)
    with torch.no_grad():
        assert torch.equal(replica(x), layer(x))


@pytest.mark.parametrize("desc_act", [False, True])
def test_finalizing_again_changes_nothing(desc_act: bool) -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32, desc_act=desc_act), shuffled=desc_act))
    weight, stored = layer.weight.clone(), {n: t.clone() for n, t in layer.state_dict().items()}
    shown = layer.zero_format()
    layer.finalize()
    assert torch.equal(layer.weight, weight)
    assert all(torch.equal(t, stored[n]) for n, t in layer.state_dict().items())
    assert layer.zero_format() == shown


def test_g_idx_may_be_there_or_not() -> None:
    made = quantized(QuantSpec(4, 32))
    full = QuantLinear.from_quantized(made).state_dict()
    without = {name: tensor for name, tensor in full.items() if name != "g_idx"}
    x = torch.randn(3, 100)
    expected = QuantLinear.from_quantized(made)(x)
    for has_g_idx in (False, True):
        for state in (full, without):
            layer = QuantLinear(100, 40, made.spec, has_g_idx=has_g_idx, device="cpu")
            layer.load_state_dict(state)
            layer.finalize()
            layer.load_state_dict(state)  # and again into the layout of the kernels
            assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*g_idx"):
        ordered = quantized(QuantSpec(4, 32, desc_act=True), shuffled=True)
        QuantLinear.from_quantized(ordered).load_state_dict(without)


def test_what_is_kept_for_calls_follows_conversions() -> None:
    """Memory may be given out again for another dtype, at the same address."""
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)))
    x = torch.randn(2, 100)
    with torch.no_grad():
        layer(x)
        layer.scales.data = layer.scales.data.view(torch.bfloat16)  # the same address for certain
        assert torch.equal(layer(x), ops.linear(x, layer.kernel_weight))
        layer.float()
        assert "_prepared" not in vars(layer)


def test_nothing_is_kept_of_an_offloaded_layer() -> None:
    from accelerate import cpu_offload

    made = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)))
    layer = QuantLinear(100, 40, QuantSpec(4, 32), device="cpu")
    layer.load_state_dict(made.state_dict())
    model = nn.Sequential(layer)
    cpu_offload(model, "cpu")
    layer.finalize()
    x = torch.randn(2, 100)
    with torch.no_grad():
        assert torch.equal(model(x), made(x))
    assert layer.qweight.is_meta and "_prepared" not in vars(layer)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, of its first use
@pytest.mark.parametrize("bias", [False, True])
def test_forward_mode_differentiation(bias: bool) -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)), torch.randn(40) if bias else None)
    x, direction = torch.randn(2, 3, 100), torch.randn(2, 3, 100)
    expected = direction @ layer.weight.T
    for watched in (True, False):
        with torch.set_grad_enabled(watched), torch.autograd.forward_ad.dual_level():
            out = layer(torch.autograd.forward_ad.make_dual(x, direction))
            y, tangent = torch.autograd.forward_ad.unpack_dual(out)
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, layer(x))
    y, tangent = torch.func.jvp(layer, (x,), (direction,))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_input_and_no_integer() -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32, sym=False), shuffled=True), torch.randn(40))
    x = torch.randn(5, 100, requires_grad=True)
    layer(x).square().sum().backward()
    dense = layer.weight.double()
    x64 = x.detach().double().requires_grad_()
    nn.functional.linear(x64, dense, layer.bias.double()).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "bias")


def test_finite_differences_of_the_input() -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(8, 32)))
    x, direction = torch.randn(1, 100, requires_grad=True), torch.randn(1, 100)
    layer(x).sum().backward()
    step = 1e-2
    with torch.no_grad():
        difference = (layer(x + step * direction).sum() - layer(x - step * direction).sum()) / (2 * step)
    assert float((x.grad * direction).sum()) == pytest.approx(float(difference), rel=1e-3)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("scales", float("nan"), r"a\.b\.scales\[0, 0\] is nan"),
        ("g_idx", 7, r"a\.b\.g_idx holds group 7; with 4 groups the accepted values are 0 to 3"),
    ],
)
def test_values_that_cannot_be_are_refused(leaf: str, value: float, message: str) -> None:
    weight = quantized(QuantSpec(4, 32))
    layer = QuantLinear(100, 40, weight.spec, device="cpu")
    layer.load_state_dict(weight.pack())
    getattr(layer, leaf).data.flatten()[0] = value
    with pytest.raises(CheckpointError, match=message):
        layer.finalize(name="a.b")


@pytest.mark.skipif(native.library() is None, reason="a shorter way to the native kernel, which is absent")
def test_outside_of_training_the_kernel_is_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as the op, also after what exchanges the layer's tensors or their memory."""
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32, sym=False)), torch.randn(40))
    x = torch.randn(3, 5, 100)
    expected = layer(x).detach()  # gradients are recorded: through the op
    original, answers = ops.PreparedWeight.multiply, []

    def multiply(*arguments: object) -> torch.Tensor | None:
        answers.append(original(*arguments))
        return answers[-1]

    monkeypatch.setattr(ops.PreparedWeight, "multiply", multiply)
    with torch.no_grad():
        for view in (x, x.transpose(0, 1), x[:, :1], x[0, 0], x[:0]):
            assert torch.equal(layer(view), ops.linear(view, layer.kernel_weight, layer.bias))
        assert len(answers) == 5 and all(answer is not None for answer in answers)
        assert torch.equal(copy.deepcopy(layer)(x), expected)

        doubled = QuantLinear.from_quantized(layer.quantized_weight(), layer.bias)
        doubled(x)
        doubled.scales.data = layer.scales.data * 2
        assert torch.equal(doubled(x), ops.linear(x, doubled.kernel_weight, layer.bias))
        assert not torch.equal(doubled(x), expected)
        doubled.scales.copy_(layer.scales)  # in place, where the layer now looks
        assert torch.equal(doubled(x), expected)
        with pytest.raises(ValueError, match="the weight has in_features=100"):
            layer(torch.randn(2, 99))
        with torch.profiler.profile() as profile:
            layer(x)
    assert any("hf_gptq::linear" in event.name for event in profile.events())


@torch.no_grad()
def test_inputs_out_of_the_ordinary_without_gradients() -> None:
    layer = QuantLinear.from_quantized(quantized(QuantSpec(4, 32)), torch.randn(40))
    x = torch.randn(3, 100)
    layer(x)  # prepared from here on
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))
    with pytest.raises(ValueError, match="x has shape"):
        layer(torch.tensor(1.0))
