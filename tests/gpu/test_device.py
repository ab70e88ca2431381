"""What only a GPU can show. Without one, or without the CUDA library, every test here is skipped with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_gptq_plugin import native_cuda
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn import cuda, ops
from hf_gptq_plugin.nn.linear import QuantLinear

ROOT = Path(__file__).parents[2]


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device, or this torch was built without CUDA"
    return native_cuda.problem(torch.device("cuda", 0))


pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no GPU to test on: {missing()}")


def layer(bits: int = 4, group_size: int = 128, out_features: int = 1040, in_features: int = 2048) -> QuantLinear:
    """A random layer on the CPU, act-order, asymmetric, with bias."""
    spec = QuantSpec(bits, group_size, sym=False, desc_act=True)
    groups = spec.groups(in_features)
    weight = QuantizedWeight(
        codes=torch.randint(0, spec.maxq + 1, (out_features, in_features), dtype=torch.uint8),
        scales=(torch.rand(groups, out_features) * 0.02 + 0.001).half(),
        zeros=torch.randint(1, spec.maxq + 1, (groups, out_features), dtype=torch.int32),
        group=natural_groups(in_features, group_size)[torch.randperm(in_features)],
        spec=spec,
    )
    return QuantLinear.from_quantized(weight, torch.randn(out_features), dtype=torch.bfloat16)


def dense(made: QuantLinear) -> Tensor:
    """What the codes stand for; the layer's own weight is that rounded to its dtype."""
    return made.quantized_weight().dequantize().double().cpu()


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double().cpu() - truth).norm() / truth.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_layer_that_moves_to_the_gpu_and_back(bits: int, dtype: torch.dtype) -> None:
    made = layer(bits)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    weight, bias = dense(made), made.bias.double()
    made.cuda()
    assert made.qweight.dim() == 4
    for rows in (1, 4, 5, 16, 33, 64, 200, 300):
        x = torch.randn(rows, made.in_features).to(dtype)
        truth = x.double() @ weight.T + bias
        assert error(made(x.cuda()), truth) < (1e-2 if dtype is torch.bfloat16 else 2e-3), rows
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    made.cpu()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.fixture
def invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only kernels of the package, and of those the narrow and the wide one."""
    monkeypatch.setenv("HF_GPTQ_BATCH_INVARIANT", "1")


@pytest.mark.usefixtures("invariant")
def test_rows_keep_their_bits_whatever_the_batch_and_the_run() -> None:
    made, x = layer().cuda(), torch.randn(256, 2048, device="cuda", dtype=torch.bfloat16)
    whole = made(x)
    for rows in (1, 3, 4, 5, 8, 17, 64, 100):
        for _ in range(20):
            assert torch.equal(made(x[-rows:]), whole[-rows:]), rows


@pytest.mark.usefixtures("invariant")
def test_streams_do_not_share_counters() -> None:
    made, x = layer().cuda(), torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    expected = made(x)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(made(x))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


HOPPER = pytest.param(
    3,
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="wgmma needs capability 9.0"
    ),
)


@pytest.mark.parametrize("rows", [1, 16, 64, 300])
@pytest.mark.parametrize("regime", [cuda.BY_RULE, native_cuda.DENSE, 2, HOPPER])
def test_graph_capture(rows: int, regime: int) -> None:
    weight = layer().cuda().kernel_weight.arguments
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        cuda.linear(x, None, *weight, regime=regime)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = cuda.linear(x, None, *weight, regime=regime)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, cuda.linear(x, None, *weight, regime=regime))


@pytest.mark.usefixtures("invariant")
def test_graphs_run_side_by_side() -> None:
    """All graphs are captured on one stream, and may run on several."""
    made, inputs, outputs, graphs = layer().cuda(), [], [], []
    with torch.no_grad():
        for rows in (16, 64, 64, 200):
            inputs.append(torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16))
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                outputs.append(made(inputs[-1]))
        expected = [made(x) for x in inputs]
        streams = [torch.cuda.Stream() for _ in graphs]
        for _ in range(50):
            torch.cuda.synchronize()
            for output in outputs:
                output.fill_(float("nan"))
            torch.cuda.synchronize()
            for stream, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            made(inputs[0])
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_tensors_on_several_devices_are_refused() -> None:
    made, x = layer().cuda(), torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bias is on cpu, x on cuda"):
        ops.linear(x, made.kernel_weight, torch.zeros(made.out_features, dtype=x.dtype))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler uses it
def test_torch_compile_and_gradients() -> None:
    made = layer().cuda()
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.compile(made, fullgraph=True)(x)
    assert torch.equal(y, made(x))
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert error(x.grad, gradient.double().cpu() @ dense(made)) < 1e-2


@pytest.mark.parametrize("regime", [HOPPER])
@pytest.mark.parametrize("rows", [1, 32, 100, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hopper_kernel(rows: int, dtype: torch.dtype, regime: int) -> None:
    made, x = layer().cuda(), torch.randn(rows, 2048).to(dtype)
    truth = x.double() @ dense(made).T
    got = cuda.linear(x.cuda(), None, *made.kernel_weight.arguments, regime=regime)
    assert error(got, truth) < (1e-2 if dtype is torch.bfloat16 else 2e-3)
    assert torch.equal(got, cuda.linear(x.cuda(), None, *made.kernel_weight.arguments, regime=regime))


SMALL = """
import sys, torch
sys.path.insert(0, {here!r})
from test_device import layer
from hf_gptq_plugin.nn import cuda
for shape in ((4, 32, 72, 640), (3, 64, 33, 256), (8, 16, 64, 128), (2, 128, 272, 512), (4, 128, 64, 16384)):
    made = layer(*shape).cuda()
    for regime, rows in {products}:
        x = torch.randn(rows, shape[3], device="cuda", dtype=torch.bfloat16)
        cuda.linear(x, None, *made.kernel_weight.arguments, regime=regime)
    made.cpu()
torch.cuda.synchronize()
"""
HOPPER_ONLY = "linear_kernel"
PRODUCTS = {  # a part of the kernels' names, and (regime, rows) that run them
    "narrow_kernel": ((1, 1), (1, 4)), "wide_kernel": ((2, 9), (2, 33)), HOPPER_ONLY: ((3, 9), (3, 33)),
    "dequantize_kernel": ((native_cuda.DENSE, 300),),
}  # fmt: skip
# Racecheck (2026.4) does not see a __syncwarp for which the compiler leaves no instruction, as in the Hopper kernel.
RACECHECKED = [kernel for kernel in PRODUCTS if kernel != HOPPER_ONLY]
for _kernel in PRODUCTS:  # a name that is none would filter everything out, and pass
    assert any(f" {_kernel}(" in path.read_text() for path in (ROOT / "kernels" / "cuda").glob("*.h")), _kernel


@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    ("tool", "kernel"),
    [*((tool, "hf_gptq") for tool in ("memcheck", "initcheck", "synccheck")), *(("racecheck", k) for k in RACECHECKED)],
)
def test_sanitizer(tool: str, kernel: str, tmp_path: Path) -> None:
    """Our kernels alone (`kernel` is a part of their names). HF_GPTQ_SANITIZER_LOGS names a folder that keeps what the
    tool has written."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer of the CUDA toolkit is not on PATH")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    log = Path(os.environ.get("HF_GPTQ_SANITIZER_LOGS") or tmp_path) / f"{tool}-{kernel}.log"
    products = PRODUCTS.get(kernel) or [p for k, some in PRODUCTS.items() if hopper or k != HOPPER_ONLY for p in some]
    done = subprocess.run(
        [
            sanitizer, "--tool", tool, "--error-exitcode", "77", "--kernel-name", f"kns={kernel}", "--show-backtrace",
            "no", "--log-file", str(log), sys.executable, "-c",
            SMALL.format(here=str(Path(__file__).parent), products=products),
        ],
        capture_output=True, text=True, timeout=1800, cwd=ROOT,
    )  # fmt: skip
    found = log.read_text() if log.exists() else ""
    if "SUMMARY" not in found and "not supported" in (found + done.stdout).lower():
        pytest.skip(f"compute-sanitizer does not work on this machine: {(found + done.stdout)[-200:]}")
    assert done.returncode == 0 and "SUMMARY: 0 " in found, found[:6000] + done.stderr[-2000:]


def test_checks_of_the_benchmark() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda_kernels", "--check-only"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout


def test_what_is_not_on_one_device() -> None:
    made = layer().cuda()
    weight = made.kernel_weight
    with pytest.raises(ValueError, match="scales is on cpu, x on cuda:0"):
        ops.linear(
            torch.randn(2, 2048, device="cuda", dtype=torch.half),
            type(weight)(**{**vars(weight), "scales": weight.scales.cpu()}),
        )
