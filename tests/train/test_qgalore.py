"""Blocks of integers, the optimizer on them, and gradients sent as int8."""

from __future__ import annotations

import io
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

from hf_gptq_plugin.train.blocks import Int4Blocks, Int8Blocks, Squares8, flattened
from hf_gptq_plugin.train.comm import Int8Gradients
from hf_gptq_plugin.train.qgalore import QGaLore


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(256,), (3, 300), (1,), (5, 7, 11)])
def test_blocks_by_their_definition(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    flat = x.flatten().tolist()
    eight, four, squares = Int8Blocks.of(x), Int4Blocks.of(x), Squares8.of(x.square(), drawn())
    for i, value in enumerate(flat):
        block = flat[i // 256 * 256 : i // 256 * 256 + 256]
        padded = [*block, 0.0] if len(block) < 256 else block
        scale = max(map(abs, block)) / 127
        assert float(eight.dense().flatten()[i]) == pytest.approx(round(value / scale) * scale, abs=1e-5)
        step = (max(padded) - min(padded)) / 15
        assert abs(float(four.dense().flatten()[i]) - value) <= step / 2 + 1e-6
        root = float(squares.dense().flatten()[i]) ** 0.5
        largest = max(map(abs, block))
        assert abs(root - abs(value)) <= largest / 255 + 1e-5 and root >= largest / 255 - 1e-5
    assert eight.dense().shape == four.dense().shape == squares.dense().shape == shape
    for zeros in (
        Int8Blocks.of(x * 0),
        Int8Blocks.of(x * 0, drawn()),
        Int4Blocks.of(x * 0),
        Squares8.of(x * 0, drawn()),
    ):
        assert not zeros.dense().any()


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
    adam = Int8Blocks.of(p.grad).nbytes + Squares8.of(p.grad.square(), drawn()).nbytes
    assert adam == 133_120


def test_full_precision_equals_adam_in_the_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exact:
        def __init__(self, x: torch.Tensor) -> None:
            self.x, self.nbytes = x.clone(), 0

        @classmethod
        def of(cls, x: torch.Tensor, draw: torch.Generator | None = None) -> Any:
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


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Parameter(torch.zeros(512)), nn.Parameter(torch.zeros(512))

    def forward(self, a, b):
        return (self.small * a).sum() + (self.large * b).sum()


# After the first backward pass DDP lays its buckets out anew.
moved = nn.parallel.DistributedDataParallel(Two())
moved.register_comm_hook(None, Int8AllReduce())
draw, lost = torch.Generator().manual_seed(rank), []
for _ in range(4):
    given = torch.randn(512, generator=draw) * 1e-4, torch.randn(512, generator=draw)
    moved.zero_grad()
    moved(*given).backward()
    for gradient_of, parameter in zip(given, (moved.module.small, moved.module.large)):
        wanted = gradient_of.clone()
        dist.all_reduce(wanted)
        lost.append((parameter.grad - wanted / 2).norm() / (wanted / 2).norm())
del model, moved  # while their process group is there
sent = torch.tensor([hook.sent, hook.plain])
save_file({"first": first, "mean": sums / 50, "gradient": gradient, "sent": sent,
    "lost": torch.stack(lost)}, f"{folder}/{rank}.safetensors")
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
        assert float(found[rank]["lost"].max()) < 0.03  # of every parameter, at every step
        assert 0.73 < 1 - sent / plain < 0.75  # less than 74.6 %: 5000 values fill their blocks badly
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    for rank in range(2):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 + rank))
        (model(x).square().mean() / 2).backward()
    assert model.weight.grad is not None
    assert float((found[0]["gradient"] - model.weight.grad).norm() / model.weight.grad.norm()) < 0.02


@pytest.mark.parametrize("kind", ["first", "second"])
def test_rounding_by_chance_has_the_right_mean(kind: str) -> None:
    """One rounding is off by p (1 - p) <= 1/4 of a code's square in variance, its mean over n by 1 / (2 sqrt n)."""
    draw, n = drawn(), 2000
    codes = torch.rand(256) * 100 + 1
    codes[0] = 127 if kind == "first" else 255  # makes a code 1
    if kind == "first":
        mean = sum(Int8Blocks.of(codes, draw).dense() for _ in range(n)) / n
    else:
        mean = sum(Squares8.of(codes.square(), draw).dense().sqrt() for _ in range(n)) / n
    assert float((mean - codes).abs().max()) < 5 / (2 * n**0.5)


def test_moments_decay() -> None:
    """Of what gets no gradient, beside a value that keeps the block's scale where it is."""
    draw, steps = drawn(), 2000
    second = torch.full((256,), 0.25)
    for _ in range(steps):
        second = second * 0.999
        second[0] = 1.0
        second = Squares8.of(second, draw).dense()
    # A root of c codes lies c (1 - a) from one after a step, a = sqrt 0.999: so much variance it gets. All that is left
    # of it at the end is at most as much as the root has codes.
    exact = 255 * 0.5 * 0.999 ** (steps / 2)
    assert float(second[1:].sqrt().mean()) * 255 == pytest.approx(exact, abs=5 * (exact / 255) ** 0.5)

    first = torch.full((256,), 64.0)
    for _ in range(30):
        first = first * 0.9
        first[0] = 127.0
        first = Int8Blocks.of(first, draw).dense()
    # At most a quarter of a code's square at each step, of which 0.81 are left after the next.
    exact = 64 * 0.9**30
    assert float(first[1:].mean()) == pytest.approx(exact, abs=5 * (0.25 / 0.19 / 255) ** 0.5)


def test_moments_of_a_long_run_are_adams() -> None:
    """In float64, from the same gradients in the same subspace."""
    shape, betas, steps = (48, 256), (0.9, 0.99), 1500
    p = nn.Parameter(torch.zeros(shape))
    optimizer = QGaLore([p], rank=32, gap=10**6, betas=betas)
    first = torch.zeros(32, 256, dtype=torch.float64)
    second = torch.zeros_like(first)
    for _ in range(steps):
        p.grad = torch.randn(shape)
        optimizer.step()
        low = (optimizer.state[p]["projection"].dense().T @ p.grad).double()
        first = first * betas[0] + low * (1 - betas[0])
        second = second * betas[1] + low.square() * (1 - betas[1])
    state = optimizer.state[p]
    error = state["first"].dense() - first
    # Each rounding adds at most a quarter of a code's square, of which beta squared is left after the next.
    most = float(state["first"].scales.max()) * (0.25 / (1 - betas[0] ** 2)) ** 0.5
    assert abs(float(error.mean())) < 5 * most / first.numel() ** 0.5
    assert float(error.square().mean()) ** 0.5 < most
    # A root c codes long moves by (1 - b) |g² - c²| / 2c, which is the variance that rounding it adds to its square's
    # mean; 1 - b of that mean is left behind at every step, and E |g² - c²| = 0.97 c² for normal g: 0.48 c remains. The
    # same variance times 4 c² is the square's, over 1 - b²: about c³. Both relative, halved for roots, here of c > 150.
    assert int(state["second"].codes.min()) > 150
    ratio = float(state["second"].dense().sqrt().mean() / second.sqrt().mean())
    assert ratio == pytest.approx(1, abs=0.24 / 150 + 5 * 0.5 * (1 / 150 / first.numel()) ** 0.5)


def test_what_gets_no_gradient_stops_moving() -> None:
    p = nn.Parameter(torch.zeros(32, 64))
    optimizer = QGaLore([p], rank=16, gap=10**6, betas=(0.9, 0.99))
    for step in range(400):
        p.grad = torch.randn(32, 64) + 1
        if step >= 50:
            p.grad[:, ::2] = 0
        if step == 350:  # 300 steps leave at most 127 · 0.9^300 = 2e-12 codes in the mean
            before = p.detach().clone()
        optimizer.step()
    moved = (p.detach() - before).abs()
    assert not moved[:, ::2].any() and moved[:, 1::2].all()


def test_parameters_draw_by_themselves_and_alike_every_time() -> None:
    def run(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(seed)  # that of the process plays no part
        pair = [nn.Parameter(torch.zeros(40, 64)) for _ in range(2)]
        optimizer = QGaLore(pair, rank=8)
        for gradient in gradients:
            for p in pair:
                p.grad = gradient
            optimizer.step()
        states = [optimizer.state[p] for p in pair]
        return [s["first"].codes for s in states], [s["second"].codes for s in states]

    gradients = [torch.randn(40, 64) for _ in range(3)]
    firsts, seconds = run(1)
    for pair in (firsts, seconds):
        assert not torch.equal(*pair) and int((pair[0].int() - pair[1].int()).abs().max()) <= 5
    again = run(2)
    assert all(torch.equal(a, b) for a, b in zip([*firsts, *seconds], [*again[0], *again[1]], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_was_saved_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def step(optimizer: QGaLore, pair: list[nn.Parameter], seed: int) -> None:
        for p in pair:
            p.grad = torch.randn(p.shape, generator=drawn(seed)).to(dtype)
        optimizer.step()

    pair = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((40, 64), (40,))]
    optimizer = QGaLore(pair, rank=8, gap=3)
    for seed in range(4):
        step(optimizer, pair, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in pair]
    resumed = QGaLore(others, rank=8, gap=3)
    resumed.load_state_dict(torch.load(file))  # as Trainer does: weights_only
    assert resumed.state[others[1]]["first"].dtype == torch.float32
    for seed in range(4, 8):
        step(optimizer, pair, seed)
        step(resumed, others, seed)
    for p, other in zip(pair, others, strict=True):
        assert torch.equal(p, other)
        for key, value in optimizer.state[p].items():
            for part, own in flattened(value).items():
                assert torch.equal(flattened(resumed.state[other][key])[part], own), (key, part)


def test_rates_that_cannot_be() -> None:
    for name, value in (("lr", float("inf")), ("lr", float("nan")), ("scale", float("inf"))):
        with pytest.raises(ValueError, match=f"{name}={value}.* both finite"):
            QGaLore([nn.Parameter(torch.zeros(2, 2))], **{name: value})  # type: ignore[arg-type]
