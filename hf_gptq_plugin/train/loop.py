"""Train what is trainable of a causal language model, and go on where an earlier process was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .layers import LearnedCodes
from .methods import advance, parameter_groups, trained

STATE = "training.safetensors"


class TrainingError(RuntimeError):
    """Training cannot go on. The message says what to do."""


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast.

    Args:
        steps: optimizer steps.
        batch: windows per step.
        rate: learning rate after warm-up; it falls to 0 along a cosine.
        warmup: share of the steps in which the rate rises.
        clip: largest norm of all gradients together.
        seed: of the order of windows, and of dropout.
        save_every: steps between two saves of the state.
    """

    steps: int = 100
    batch: int = 4
    rate: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        for name, most in (("rate", math.inf), ("clip", math.inf), ("warmup", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most or (name != "warmup" and value == 0):
                raise ValueError(f"{name}={value!r} must be positive" + (" and at most 1" if name == "warmup" else ""))

    def factor(self, step: int) -> float:
        """Of the learning rate at a step, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


def train(
    model: Any, windows: Sequence[Tensor], settings: TrainSettings, folder: Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:  # fmt: skip
    """Minimise the next-token loss with AdamW.

    Args:
        model: a causal language model of Transformers with something trainable. Left in the state of the last step.
        windows: token ids, int64 `[tokens]` each.
        settings: how.
        folder: where the state is kept; the same job goes on from there.
        progress: called with the number of steps done and the step's mean loss.

    Returns:
        The loss of every step, those of an earlier process included.

    Raises:
        TrainingError: a loss that is not finite; the state before the step is kept.
        ValueError: nothing to train, or no windows.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{type(model).__name__} has nothing trainable; attach a method or an adapter first")
    if not windows:
        raise ValueError("there are no windows to train on")
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.rate), betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimizer.param_groups]
    state = _State(folder, _job(named, windows, settings), model, named, optimizer)
    losses = state.read()
    was_training = model.training
    model.train()
    order: list[int] = []
    for step in range(settings.steps):
        order = order or _shuffled(len(windows), settings, step)
        chosen, order = order[: settings.batch], order[settings.batch :]
        if step < len(losses):
            continue
        torch.manual_seed(settings.seed + step)  # dropout does not depend on what ran before
        loss = _step(model, [windows[i] for i in chosen])
        norm = float(torch.nn.utils.clip_grad_norm_(list(named.values()), settings.clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            state.write(losses)
            raise TrainingError(
                f"step {step + 1} of {settings.steps}: the loss is {loss} and its gradient's norm {norm}; the state "
                "before it is kept. Use a lower learning rate, more warm-up, or look for damaged windows"
            )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * settings.factor(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        advance(model)
        losses.append(loss)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            state.write(losses)
        if progress is not None:
            progress(step + 1, loss)
    model.train(was_training)
    return losses


def _shuffled(count: int, settings: TrainSettings, step: int) -> list[int]:
    """A new order of all windows, known from the step at which it begins."""
    generator = torch.Generator().manual_seed(settings.seed + step)
    return torch.randperm(count, generator=generator).tolist()


def _step(model: Any, windows: list[Tensor]) -> float:
    """Gradients of the mean loss over windows, one after the other: a window needs no padding."""
    sum_ = 0.0
    for window in windows:
        ids = window[None].to(model.device)
        loss = model(input_ids=ids, labels=ids).loss / len(windows)
        loss.backward()
        sum_ += float(loss.detach())
    return sum_


@torch.no_grad()
def mean_loss(model: Any, windows: Sequence[Tensor]) -> float:
    """The next-token loss, mean over windows."""
    was_training = model.training
    model.eval()
    values = [float(model(input_ids=w[None].to(model.device), labels=w[None].to(model.device)).loss) for w in windows]
    model.train(was_training)
    return sum(values) / len(values)


def _job(named: dict[str, nn.Parameter], windows: Sequence[Tensor], settings: TrainSettings) -> str:
    """What must be the same for a state to be gone on from."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numpy().tobytes())
    shapes = {name: list(p.shape) for name, p in named.items()}
    kept = {k: v for k, v in asdict(settings).items() if k != "save_every"}
    return hashlib.sha256(json.dumps([digest.hexdigest(), shapes, kept]).encode()).hexdigest()


class _State:
    """What training needs to go on, in one safetensors file: parameters, Adam's moments, codes, losses."""

    def __init__(
        self, folder: Path | None, job: str, model: nn.Module, named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:  # fmt: skip
        self._path = None if folder is None else folder / STATE
        self._job, self._model, self._named, self._optimizer = job, model, named, optimizer

    def write(self, losses: list[float]) -> None:
        """Save, beside and then renamed."""
        if self._path is None:
            return
        tensors = {f"parameter.{name}": p.detach().contiguous() for name, p in self._named.items()}
        for name, p in self._named.items():
            for kind, value in self._optimizer.state.get(p, {}).items():
                tensors[f"{kind}.{name}"] = torch.as_tensor(value).detach().clone().contiguous()
        for name, layer in self._with_codes().items():
            tensors[f"codes.{name}"] = layer.codes.contiguous()
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        save_file(tensors, beside, metadata={"job": self._job})
        os.replace(beside, self._path)

    def read(self) -> list[float]:
        """Take up an earlier state. Returns its losses; none where there is no state, or it is of another job."""
        if self._path is None or not self._path.exists():
            return []
        with safe_open(self._path, framework="pt") as handle, torch.no_grad():
            if (handle.metadata() or {}).get("job") != self._job:
                raise TrainingError(
                    f"{self._path} is the state of another training (other data, settings or layers); remove it or "
                    "name another folder"
                )
            keys = set(handle.keys())
            for name, p in self._named.items():
                p.copy_(handle.get_tensor(f"parameter.{name}"))
                kinds = [kind for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{name}" in keys]
                if kinds:
                    self._optimizer.state[p] = {kind: handle.get_tensor(f"{kind}.{name}") for kind in kinds}
            losses: list[float] = handle.get_tensor("losses").tolist()
            for name, layer in self._with_codes().items():
                layer.codes.copy_(handle.get_tensor(f"codes.{name}"))
                layer.steps = len(losses)
        return losses

    def _with_codes(self) -> dict[str, Any]:
        """The layers whose codes in use are not a function of their parameters."""
        return {name: layer for name, layer in trained(self._model).items() if isinstance(layer, LearnedCodes)}
