"""Blocks of integers, the optimizer on them, and gradients sent as int8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from children import outputs
from safetensors.torch import load_file
from torch import nn

from hf_gptq_plugin.train.blocks import Int4Blocks, Int8Blocks, Squares8
from hf_gptq_plugin.train.comm import Int8Gradients
from hf_gptq_plugin.train.qgalore import QGaLore


@pytest.mark.parametrize("shape", [(256,), (3, 300), (1,), (5, 7, 11)])
def test_blocks_by_their_definition(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    flat = x.flatten().tolist()
    eight, four, squares = Int8Blocks.of(x), Int4Blocks.of(x), Squares8.of(x.square())
    for i, value in enumerate(flat):
        block = flat[i // 256 * 256 : i // 256 * 256 + 256]
        padded = [*block, 0.0] if len(block) < 256 else block
        scale = max(map(abs, block)) / 127
        assert float(eight.dense().flatten()[i]) == pytest.approx(round(value / scale) * scale, abs=1e-5)
        step = (max(padded) - min(padded)) / 15
        assert abs(float(four.dense().flatten()[i]) - value) <= step / 2 + 1e-6
        root = float(squares.dense().flatten()[i]) ** 0.5
        assert abs(value) - 1e-5 <= root <= abs(value) + max(map(abs, block)) / 255 + 1e-5
    assert eight.dense().shape == four.dense().shape == squares.dense().shape == shape
    for kind in (Int8Blocks, Int4Blocks, Squares8):
        assert not kind.of(torch.zeros(shape)).dense().any()


def test_bytes_of_a_known_case() -> None:
    # 256 x 256, rank 64: 8192 + 512 for the projection, 2 x (16384 + 256) for Adam.
    p = nn.Parameter(torch.randn(256, 256))
    optimizer = QGaLore([p], rank=64)
    p.grad = torch.randn(256, 256)
    optimizer.step()
    assert optimizer.state_bytes() == 41_984
    held = [getattr(part, name) for part in optimizer.state[p].values() if not isinstance(part, int)
            for name in ("codes", "scales", "low", "step") if hasattr(part, name)]  # fmt: skip
    assert sum(t.numel() * t.element_size() for t in held) == 41_984  # what the tensors really hold
    adam = Int8Blocks.of(p.grad).nbytes + Squares8.of(p.grad.square()).nbytes
    assert adam == 133_120


def test_full_precision_equals_adam_in_the_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exact:
        def __init__(self, x: torch.Tensor) -> None:
            self.x, self.nbytes = x.clone(), 0

        @classmethod
        def of(cls, x: torch.Tensor) -> Any:
            return cls(x)

        def dense(self) -> torch.Tensor:
            return self.x

    for name in ("Int4Blocks", "Int8Blocks", "Squares8"):
        monkeypatch.setattr(f"hf_gptq_plugin.train.qgalore.{name}", Exact)
    for shape in ((20, 50), (50, 20)):
        p = nn.Parameter(torch.randn(shape))
        start = p.detach().clone()
        optimizer = QGaLore([p], lr=0.1, rank=4, scale=0.5, gap=1000)
        gradients = [torch.randn(shape) for _ in range(3)]
        g0 = gradients[0] if shape[0] <= shape[1] else gradients[0].T
        basis = torch.linalg.svd(g0, full_matrices=False)[0][:, :4]
        low = nn.Parameter(torch.zeros(4, 50))
        adam = torch.optim.Adam([low], lr=0.1)
        for g in gradients:
            p.grad = g
            optimizer.step()
            low.grad = basis.T @ (g if shape[0] <= shape[1] else g.T)
            adam.step()
        moved = 0.5 * basis @ low.detach()
        wanted = start + (moved if shape[0] <= shape[1] else moved.T)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_it_learns_and_small_parameters_get_plain_adam() -> None:
    target = torch.randn(96, 8) @ torch.randn(8, 64)
    w, b = nn.Parameter(torch.zeros(96, 64)), nn.Parameter(torch.zeros(64))
    reference = nn.Parameter(torch.zeros(64))
    optimizer, adam = QGaLore([w, b], lr=0.2, rank=16, scale=1.0, gap=20), torch.optim.Adam([reference], lr=0.2)
    losses = []
    for _ in range(150):
        for o in (optimizer, adam):
            o.zero_grad()
        x = torch.randn(64, 96)
        loss = (x @ w + b - x @ target - 1).square().mean()
        loss.backward()
        reference.grad = None if b.grad is None else b.grad.clone()
        optimizer.step()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    torch.testing.assert_close(b, reference, rtol=1e-4, atol=1e-5)


def test_a_subspace_that_keeps_still_is_looked_for_less_often() -> None:
    p = nn.Parameter(torch.zeros(40, 60))
    optimizer = QGaLore([p], rank=2, gap=2, patience=2, stretch=3)
    still = torch.randn(40, 2) * torch.tensor([5.0, 1.0]) @ torch.randn(2, 60)
    gaps = []
    for _ in range(16):
        p.grad = still + 1e-4 * torch.randn(40, 60)
        optimizer.step()
        gaps.append(optimizer.state[p]["gap"])
    # Looks at steps 1, 3 (still once), 5 (twice: 2 x 3), 11, 17.
    assert gaps == [2] * 4 + [6] * 12
    moving = QGaLore([p], rank=2, gap=2, patience=2, stretch=3)
    for _ in range(12):
        p.grad = torch.randn(40, 60)
        moving.step()
    assert moving.state[p]["gap"] == 2


def test_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="rank=0 must be an integer"):
        QGaLore([nn.Parameter(torch.zeros(2, 2))], rank=0)
    with pytest.raises(ValueError, match="warmup=-1"):
        Int8Gradients([], warmup=-1)


def test_gradients_in_int8_after_the_warm_up() -> None:
    p, other = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(10))
    rounding = Int8Gradients([p], warmup=1)
    g = torch.randn(1000)
    for step in (1, 2):
        p.grad, other.grad = g.clone(), g[:10].clone()
        rounding.advance()
        assert torch.equal(p.grad, g) == (step == 1)
        assert torch.equal(other.grad, g[:10])
    error = float((p.grad - g).norm() / g.norm())
    assert 0.002 < error < 0.02
    assert float(torch.cosine_similarity(p.grad, g, dim=0)) > 0.9998


WORK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from hf_gptq_plugin.train.comm import Int8AllReduce
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
hook = Int8AllReduce()
values = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
sums = torch.zeros(5000)
for _ in range(50):
    sums += hook.reduce(values)
first = Int8AllReduce(feedback=False).reduce(values)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(40, 30))
model.register_comm_hook(None, Int8AllReduce())
x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 + rank))
model(x).square().mean().backward()
gradient = model.module.weight.grad.clone()
del model  # while its process group is there
sent = torch.tensor([hook.sent, hook.plain])
save_file({"first": first, "mean": sums / 50, "gradient": gradient, "sent": sent}, f"{folder}/{rank}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_send_int8(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORK]
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs(children)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    values = [torch.randn(5000, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    mean = (values[0] + values[1]) / 2
    for rank in range(2):
        assert torch.equal(found[rank]["first"], found[0]["first"])  # all processes get the same bits
        assert float((found[rank]["first"] - mean).norm() / mean.norm()) < 0.02
        # What one rounding takes away the next gives back; what comes back is still rounded once.
        assert float((found[rank]["mean"] - mean).norm() / mean.norm()) < 0.008
        sent, plain = found[rank]["sent"].tolist()
        assert plain == 50 * 2 * 4 * 5000 // 2
        assert 0.73 < 1 - sent / plain < 0.75  # less than 74.6 %: 5000 values fill their blocks badly
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    for rank in range(2):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 + rank))
        (model(x).square().mean() / 2).backward()
    assert model.weight.grad is not None
    assert float((found[0]["gradient"] - model.weight.grad).norm() / model.weight.grad.norm()) < 0.02
