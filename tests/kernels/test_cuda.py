"""The CUDA kernels' own source on the CPU (`kernels/cuda/emulate`): layout, arithmetic, order of sums, and what Python
makes of it. A GPU's timing and its tensor cores' rounding are not in here; `tests/gpu` is for those."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import references
import torch
from emulated_cuda import make
from torch import Tensor

from hf_gptq_plugin import native_cuda
from hf_gptq_plugin.format import packing, tiles
from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn import cuda, moe, ops
from hf_gptq_plugin.nn.linear import QuantLinear
from hf_gptq_plugin.nn.ops import KernelWeight

BITS = (2, 3, 4, 8)
NARROW, WIDE = 1, 2
Configure = Callable[..., None]


def packed(weight: QuantizedWeight) -> KernelWeight:
    kernel = KernelWeight.from_canonical(**weight.pack(), spec=weight.spec, in_features=weight.codes.shape[1]).packed()
    assert kernel.qweight.dim() == 4
    return kernel


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """As float64, but for fp32 sums and one rounding to y's dtype."""
    truth = x.double() @ dense.T
    bound = x.double().abs() @ dense.abs().T
    if bias is not None:
        truth, bound = truth + bias.double(), bound + bias.double().abs()
    tolerance = truth.abs() * torch.finfo(y.dtype).eps / 2 * 1.001 + bound * 2**-22
    wrong = ~((y.double() - truth).abs() <= tolerance)
    assert not wrong.any(), f"first at {wrong.nonzero()[0].tolist()} of {list(wrong.shape)}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(64, 64), (37, 100), (130, 72)])
def test_layout_is_the_loops_and_back(emulated: Configure, bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    canonical = packing.pack_codes(codes, bits)
    got, order = cuda.pack(canonical, bits, 64, None, -(-shape[1] // 64), shape[1])
    assert order is None
    assert torch.equal(got, torch.from_numpy(references.pack_tiles(codes.numpy(), bits).view("int32")))
    assert torch.equal(cuda.unpack(got, bits, None, shape[1], shape[0]), canonical)
    assert torch.equal(tiles.unpack_tiles(got, bits)[: shape[0], : shape[1]], codes)


@pytest.mark.parametrize(
    ("order", "group_size"), [("natural", 48), ("shuffled", 32), ("natural", 40), ("shuffled", 24), ("irregular", 32)]
)
def test_row_order_puts_each_input_into_its_group(order: str, group_size: int) -> None:
    in_features = 200
    group = make(QuantSpec(4, group_size), 16, in_features, order)[0].group
    groups = -(-in_features // group_size)
    found = tiles.row_order(None if order == "natural" else group, in_features, group_size, groups)
    if order == "natural" and group_size == 48:
        assert found is None
        return
    inputs, runs = tiles.split_order(found, in_features)
    assert sorted(i for i in inputs.tolist() if i >= 0) == list(range(in_features))
    for row, feature in enumerate(inputs.tolist()):
        if feature >= 0:
            assert group[feature] == (row // group_size if runs is None else runs[row // 16])
    assert [int(inputs[row]) for row in tiles.row_of(inputs, in_features)] == list(range(in_features))


# (M, N, K, group size): ragged in every way; 4 chunks, many groups, groups that cross tiles and chunks.
SHAPES = [(1, 33, 208, 16), (3, 72, 640, 128), (4, 16, 520, -1), (7, 272, 336, 48), (40, 40, 272, 32), (70, 24, 96, 64)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sym", [True, False])
def test_linear_against_float64(emulated: Configure, bits: int, dtype: torch.dtype, sym: bool) -> None:
    for seed, (rows, out_features, in_features, group_size) in enumerate(SHAPES):
        emulated(seed, resident=1 + seed % 4)
        fmt = ("gptq", "gptq_v2")[seed % 2]
        scales_dtype = (torch.float16, torch.bfloat16, torch.float32)[seed % 3]
        spec = QuantSpec(bits, group_size, sym, checkpoint_format=fmt)
        weight, dense = make(spec, out_features, in_features, scales_dtype=scales_dtype)
        kernel = packed(weight)
        x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features).to(dtype)
        check(ops.linear(x, kernel, bias), x, dense, bias)
        exact = ops.dequantize(kernel, in_features, torch.float32)
        assert torch.equal(exact.double(), dense.float().double())
        assert torch.equal(ops.dequantize(kernel, in_features, dtype), dense.float().to(dtype))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("order", "group_size"), [("shuffled", 32), ("natural", 40), ("shuffled", 24), ("irregular", 32)]
)
def test_any_order_of_groups(emulated: Configure, bits: int, order: str, group_size: int) -> None:
    for rows, in_features in ((2, 200), (11, 256)):
        weight, dense = make(QuantSpec(bits, group_size, False), 48, in_features, order)
        kernel = packed(weight)
        x = torch.randn(rows, in_features).bfloat16()
        check(ops.linear(x, kernel), x, dense)
        assert torch.equal(ops.dequantize(kernel, in_features), dense.float())
        assert torch.equal(kernel.canonical_qweight(), weight.pack()["qweight"])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_hot_rows_give_the_decoded_weight(emulated: Configure, bits: int, dtype: torch.dtype) -> None:
    weight, dense = make(QuantSpec(bits, 32, False), 32, 80)
    kernel, x = packed(weight), torch.eye(80, dtype=dtype)
    expected = dense.float().to(dtype).T
    assert torch.equal(ops.linear(x, kernel), expected)
    for row in (0, 17, 79):
        assert torch.equal(ops.linear(x[row : row + 1], kernel), expected[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_the_batch(emulated: Configure, dtype: torch.dtype) -> None:
    weight, _ = make(QuantSpec(4, 48, False), 80, 1040)  # 17 tiles in 4 chunks, none of them at a group's edge
    kernel, x = packed(weight), torch.randn(90, 1040).to(dtype)
    whole = ops.linear(x, kernel)
    for seed, rows in enumerate((1, 2, 4, 5, 9, 17, 33, 64)):
        emulated(seed + 1, resident=1 + seed % 5)
        first = 90 - rows
        assert torch.equal(ops.linear(x[first:], kernel), whole[first:]), rows
    assert torch.equal(cuda.linear(x[:4], None, *kernel.arguments, regime=WIDE), whole[:4])
    assert torch.equal(cuda.linear(x[:4], None, *kernel.arguments, regime=NARROW), whole[:4])


def planned(rows: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float16, **fields: int) -> int:
    """The regime that the rules choose; a plan reads no tensors."""
    weight = {"bits": 4, "group_size": 128, "scale_dtype": 1, "zero_offset": 1, **fields}
    described, plan = native_cuda.Weight(N=out_features, K=in_features, rows=in_features, **weight), native_cuda.Plan()
    described.G = -(-in_features // described.group_size)
    call = native_cuda.library(torch.device("cpu")).hf_gptq_cuda_plan
    native_cuda.check(call(described, native_cuda.DTYPES[dtype], rows, 1, -1, plan))
    return plan.regime


DENSE, HOPPER = 0, 3


def test_rules(emulated: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (4096, 4096)
    assert [planned(m, *size) for m in (1, 4, 5, 256, 257)] == [NARROW, NARROW, WIDE, WIDE, DENSE]
    assert planned(1, *size, torch.float32) == DENSE
    # Scales and zeros of many groups leave no room for rows.
    emulated(capability=86, shared_bytes=99 * 1024)
    assert planned(4, *size) == NARROW
    assert planned(4, *size, group_size=16, scale_dtype=0) == WIDE
    emulated(capability=75, shared_bytes=64 * 1024)
    assert [planned(m, *size) for m in (3, 4, 64, 65)] == [NARROW, WIDE, WIDE, DENSE]
    assert planned(1, *size, torch.bfloat16) == DENSE
    emulated(capability=90, shared_bytes=227 * 1024, multiprocessors=132)
    monkeypatch.setenv("HF_GPTQ_BATCH_INVARIANT", "1")
    assert [planned(m, *size) for m in (1, 64, 5000)] == [NARROW, WIDE, WIDE]


# What was fastest on an H200, by 8 % or more: every regime timed, Hopper's with every number of tokens and chunks.
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "fastest"),
    [
        (1, 4096, 4096, NARROW), (4, 4096, 4096, NARROW), (8, 4096, 4096, WIDE), (16, 4096, 4096, WIDE),
        (32, 4096, 4096, HOPPER), (64, 4096, 4096, HOPPER),
        (1024, 4096, 4096, DENSE), (1, 4096, 14336, NARROW), (4, 4096, 14336, NARROW), (8, 4096, 14336, HOPPER),
        (16, 4096, 14336, HOPPER), (64, 4096, 14336, HOPPER), (256, 4096, 14336, HOPPER),
        (1024, 4096, 14336, DENSE), (4096, 4096, 14336, DENSE), (16, 8192, 28672, HOPPER), (64, 8192, 28672, HOPPER),
        (128, 8192, 28672, HOPPER), (4096, 8192, 28672, DENSE),
    ],
)  # fmt: skip
def test_rules_of_hopper(emulated: Configure, rows: int, in_features: int, out_features: int, fastest: int) -> None:
    emulated(capability=90, shared_bytes=227 * 1024, multiprocessors=132)
    assert planned(rows, in_features, out_features) == fastest


def test_what_no_kernel_takes_goes_through_the_dense_weight(emulated: Configure) -> None:
    weight, dense = make(QuantSpec(4, 32), 64, 64)
    x = torch.randn(3, 64)
    y = ops.linear(x, packed(weight)).double()
    torch.testing.assert_close(y, x.double() @ dense.T, rtol=1e-5, atol=1e-6)


def test_more_rows_than_one_launch_takes(emulated: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_GPTQ_BATCH_INVARIANT", "1")
    weight, dense = make(QuantSpec(4, 64), 24, 256)
    kernel, x = packed(weight), torch.randn(520, 256).half()
    y = ops.linear(x, kernel)
    check(y, x, dense)
    for row in (0, 511, 512, 519):
        assert torch.equal(ops.linear(x[row : row + 1], kernel), y[row : row + 1])


def test_little_shared_memory(emulated: Configure) -> None:
    emulated(shared_bytes=64 * 1024, capability=75)
    weight, dense = make(QuantSpec(8, 16, False), 48, 200, scales_dtype=torch.float32)
    for rows in (1, 8, 64):
        x = torch.randn(rows, 200).half()
        check(ops.linear(x, packed(weight)), x, dense)


def test_activations_as_they_come(emulated: Configure) -> None:
    weight, dense = make(QuantSpec(4, 32), 48, 96)
    kernel = packed(weight)
    base = torch.randn(6, 300).half()
    for x in (base[:, 1:97], base[:, :96], base[::2, 8:104], base[:, ::3][:, :96], base[:, :96].reshape(2, 3, 96)):
        y = ops.linear(x, kernel)
        assert y.shape == (*x.shape[:-1], 48)
        check(y.reshape(-1, 48), x.reshape(-1, 96), dense)
    assert ops.linear(base[:0, :96], kernel).shape == (0, 48)


def test_what_does_not_belong_together_is_refused(emulated: Configure) -> None:
    weight, _ = make(QuantSpec(4, 32, False), 48, 96)
    kernel, x = packed(weight), torch.randn(2, 96).half()
    refused = (ValueError, RuntimeError)  # the native op of the CPU hands on errors as the latter
    for field, value, message in (
        ("scales", kernel.scales[:2], "scales has 2 groups"),
        ("scales", kernel.scales.double(), "float64"),
        ("qweight", kernel.qweight[:, :1], "qweight is torch.int32"),
        ("qzeros", kernel.qzeros[:, :-1], "qzeros is torch.int32"),
        ("perm", torch.zeros(70, dtype=torch.int32), "perm has 70 entries"),
    ):
        with pytest.raises(refused, match=message):
            ops.linear(x, KernelWeight(**{**vars(kernel), field: value}))
    with pytest.raises(refused, match="bias has shape"):
        ops.linear(x, kernel, torch.zeros(47).half())
    with pytest.raises(native_cuda.NativeError, match="out of range"):
        cuda.linear(torch.randn(9, 96).half(), None, *kernel.arguments, regime=NARROW)


def test_experts(emulated: Configure) -> None:
    ups, downs = ([make(QuantSpec(4, 32, False), *size) for _ in range(2)] for size in ((64, 48), (48, 32)))
    x, ids = torch.randn(5, 48).bfloat16(), torch.tensor([[0], [1], [1], [0], [1]])
    y = moe.moe(
        x, torch.ones(5, 1), ids, *(moe.stack([packed(weight) for weight, _ in side]) for side in (ups, downs)), "silu"
    )
    for row, expert in enumerate(ids[:, 0].tolist()):
        gate, value = (x[row].double() @ ups[expert][1].T).chunk(2)
        truth = (torch.nn.functional.silu(gate) * value) @ downs[expert][1].T
        torch.testing.assert_close(y[row].double(), truth, rtol=2**-5, atol=2**-6 * float(truth.abs().max()))
    with pytest.raises(ValueError, match="in_features"):
        KernelWeight.from_canonical(**ups[0][0].pack(), spec=ups[0][0].spec, in_features=32).packed()


@pytest.mark.parametrize(("bits", "order"), list(itertools.product((3, 4), ("natural", "shuffled", "irregular"))))
def test_layer_saves_the_checkpoint_and_learns(emulated: Configure, bits: int, order: str) -> None:
    weight, dense = make(QuantSpec(bits, 32, False), 48, 96, order)
    layer = QuantLinear.from_quantized(weight, dtype=torch.bfloat16)
    assert layer.qweight.dim() == 4
    state = layer.state_dict()
    for name, tensor in weight.pack().items():
        assert torch.equal(state[name], tensor), name
    x = torch.randn(5, 96, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    check(y.detach(), x.detach(), dense)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected = gradient.double() @ layer.weight.double()
    torch.testing.assert_close(x.grad.double(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))
    other = QuantLinear.from_quantized(make(QuantSpec(bits, 32, False), 48, 96, order)[0], dtype=torch.bfloat16)
    other.load_state_dict(state)
    assert torch.equal(other(x), y)


def test_a_layer_follows_its_device(emulated: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = make(QuantSpec(4, 32, False), 48, 96, "shuffled")
    layer = QuantLinear.from_quantized(weight)
    on_gpu, x = layer.state_dict(), torch.randn(3, 96)
    y = layer(x)
    monkeypatch.setenv("HF_GPTQ_CUDA_LIBRARY", "none")
    for cached in (native_cuda._load, native_cuda.problem):
        cached.cache_clear()
    torch.testing.assert_close(layer(x), y)  # tiles where there is no GPU any more
    layer.float()  # moves and casts lay out anew
    assert layer.qweight.dim() != 4
    torch.testing.assert_close(layer(x), y)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, on_gpu[name]), name


def test_tensors_elsewhere_never_reach_a_kernel(emulated: Configure) -> None:
    weight = packed(make(QuantSpec(4, 32), 64, 64)[0])
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="bias is on meta, x on cpu"):
        ops._linear_cuda(x, torch.zeros(64, device="meta"), *weight.arguments)
    arguments = [t.to("meta") if isinstance(t, Tensor) else t for t in weight.arguments]
    with pytest.raises(ValueError, match="qweight is on meta, x on cpu"):
        ops._linear_cuda(x, None, *arguments)


def test_streams_have_counters_of_their_own(emulated: Configure) -> None:
    """Threads that come for the first time at the same moment, too."""
    found: dict[int, int] = {}
    start = threading.Barrier(8)

    def come(stream: int) -> None:
        start.wait()
        address, _ = cuda._counters(torch.device("cpu"), stream, 1024)
        assert address is not None
        found[stream] = address

    threads = [threading.Thread(target=come, args=(1000 + i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    addresses = sorted(found.values())  # of 1024 counters of 4 bytes each, all of one tensor
    assert all(later - earlier >= 4096 for earlier, later in itertools.pairwise(addresses))
    address, arena = cuda._counters(torch.device("cpu"), 1003, 4)
    assert address == found[1003] and arena is not None
    first = arena.data_ptr()
    assert all(first <= each <= first + arena.nbytes - 4096 for each in addresses) and not bool(arena.any())


@pytest.mark.parametrize("order", ["natural", "shuffled"])
def test_a_layer_describes_its_weight_once(emulated: Configure, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Outside of training: the bits of the op, and of another weight's once its values or tensors are exchanged."""
    weight, dense = make(QuantSpec(4, 32, sym=False, desc_act=order != "natural"), 40, 96, order)
    layer = QuantLinear.from_quantized(weight, torch.randn(40), dtype=torch.half)
    x = torch.randn(3, 5, 96).half()
    described, original = [], cuda._describe

    def describe(*arguments: Any) -> Any:
        described.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(cuda, "_describe", describe)
    bias = layer.bias.detach().half()
    with torch.no_grad():
        for view in (x, x.transpose(0, 1), x[:, :1], x[0, 0], x[:0], x[..., :96].clone()):
            y = layer(view)
            assert torch.equal(y, cuda.linear(view, bias, *layer.kernel_weight.arguments))
            check(y.reshape(-1, 40), view.reshape(-1, 96), dense, bias)
        assert len(described) == 1 + 6  # the layer's one, and one of each that it is compared with
        layer.scales.mul_(2)
        check(layer(x).reshape(-1, 40), x.reshape(-1, 96), 2 * dense, bias)
        layer.scales.data = layer.scales / 2
        check(layer(x).reshape(-1, 40), x.reshape(-1, 96), dense, bias)
        with pytest.raises(ValueError, match=r"x has shape \(2, 95\); the weight has in_features=96"):
            layer(x.new_zeros(2, 95))
