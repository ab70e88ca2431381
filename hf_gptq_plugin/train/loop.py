"""Train what is trainable of a causal language model, and go on where an earlier process was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .blocks import flattened, restored
from .comm import WARMUP, Exchange, Int8Gradients, process
from .layers import LearnedCodes
from .methods import advance, parameter_groups, trained
from .qgalore import QGaLore

STATE = "training.safetensors"
NOT_FINITE = "not-finite"
OPTIMIZERS = ("adamw", "q-galore")
GRADIENTS = ("float", "int8-block")


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
        save_every: steps between two saves of the state, each written once the next step's loss is known to be finite.
        optimizer: one of `OPTIMIZERS`.
        subspace: rank of Q-GaLore's projection.
        gradients: one of `GRADIENTS`; "int8-block" rounds them to int8 in blocks of 256 with a scale of their own, at
            every step after `gradient_warmup`.
        gradient_warmup: steps in which gradients stay as they are.
        gradient_modules: parts of the names of the layers whose gradients are rounded; none for all.
        exchange: one of `GRADIENTS`; how several processes send each other their gradients.
    """

    steps: int = 100
    batch: int = 4
    rate: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 10
    optimizer: str = "adamw"
    subspace: int = 64
    gradients: str = "float"
    gradient_warmup: int = WARMUP
    gradient_modules: tuple[str, ...] = ()
    exchange: str = "float"

    def __post_init__(self) -> None:
        for name, accepted in (("optimizer", OPTIMIZERS), ("gradients", GRADIENTS), ("exchange", GRADIENTS)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; use one of {', '.join(accepted)}")
        for name in ("steps", "batch", "save_every", "subspace"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        for name, most in (("rate", math.inf), ("clip", math.inf), ("warmup", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most or (name != "warmup" and value == 0):
                raise ValueError(f"{name}={value!r} must be positive" + (" and at most 1" if name == "warmup" else ""))
        if not math.isfinite(self.rate):  # a clip may be infinite: none
            raise ValueError(f"rate={self.rate!r} must be finite")

    def factor(self, step: int) -> float:
        """Of the learning rate at a step, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


def train(
    model: Any, windows: Sequence[Tensor], settings: TrainSettings, folder: Path | None = None,
    progress: Callable[[int, float], None] | None = None, job: str = "",
) -> list[float]:  # fmt: skip
    """Minimise the next-token loss.

    Where `torch.distributed` is initialized, processes share the windows of a step and add up their gradients; all go
    through the same steps, and the first keeps the state.

    Args:
        model: a causal language model of Transformers with something trainable. Left in the state of the last step.
        windows: token ids, int64 `[tokens]` each.
        settings: how.
        folder: where the state is kept; the same job goes on from there.
        progress: called with the number of steps done and the step's mean loss, first with those of an earlier process.
        job: what else must be the same for a state to be gone on from, beside windows, settings and what learns.

    Returns:
        The loss of every step, those of an earlier process included.

    Raises:
        TrainingError: a loss that is not finite, or a state of another job. The last state from which a finite loss
            came is kept, and the same job with another rate, warm-up or clip goes on from it.
        ValueError: nothing to train, or no windows.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{type(model).__name__} has nothing trainable; attach a method or an adapter first")
    if not windows:
        raise ValueError("there are no windows to train on")
    optimizer = _optimizer(model, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = _State(folder, named, windows, settings, job, model, optimizer)
    losses = state.read()
    if losses and progress is not None:
        progress(len(losses), losses[-1])
    saved = len(losses)
    rounding = _rounding(named, settings)
    if rounding is not None:
        rounding.steps = len(losses)
    exchange = Exchange(list(named.values()), settings.exchange == "int8-block")
    was_training = model.training
    model.train()
    order: list[int] = []
    for step in range(settings.steps):
        order = order or _shuffled(len(windows), settings, step)
        chosen, order = order[: settings.batch], order[settings.batch :]
        if step < len(losses):
            continue
        torch.manual_seed(settings.seed + step)  # dropout does not depend on what ran before
        loss = _step(model, [windows[i] for i in chosen], exchange)
        if rounding is not None:
            rounding.advance()
        norm = float(torch.nn.utils.clip_grad_norm_(list(named.values()), settings.clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"step {step + 1} of {settings.steps}: the loss is {loss} and its gradient's norm {norm}. "
                f"{state.stopped(saved)}. Use a lower learning rate or more warm-up, or look for damaged windows"
            )
        if step % settings.save_every == 0 and step > saved:
            state.write(losses)
            saved = step
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * settings.factor(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        advance(model)
        losses.append(loss)
        if step + 1 == settings.steps:
            state.write(losses)
        if progress is not None:
            progress(step + 1, loss)
    model.train(was_training)
    return losses


def _shuffled(count: int, settings: TrainSettings, step: int) -> list[int]:
    """A new order of all windows, known from the step at which it begins."""
    generator = torch.Generator().manual_seed(settings.seed + step)
    return torch.randperm(count, generator=generator).tolist()


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings.rate)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.99))
    small = not any(p.dim() == 2 and min(p.shape) > settings.subspace for group in groups for p in group["params"])
    if small:
        warnings.warn(
            f"q-galore projects matrices with both sides above subspace={settings.subspace}, and nothing that learns "
            "has them: all gets plain Adam, and nothing is saved. Adapters are compressed already; use adamw, or a "
            "method that learns whole matrices (ste, shadow)",
            stacklevel=3,
        )
    return QGaLore(groups, lr=settings.rate, rank=settings.subspace, betas=(0.9, 0.99))


def _rounding(named: dict[str, nn.Parameter], settings: TrainSettings) -> Int8Gradients | None:
    if settings.gradients == "float":
        return None
    others = [
        text
        for asked, text in (
            (settings.optimizer == "q-galore", "q-galore projects them to 8 bits"),
            (settings.exchange == "int8-block", "the exchange between processes rounds them"),
        )
        if asked
    ]
    if others:
        warnings.warn(
            f"gradients are compressed twice: int8-block rounds them, and {' and '.join(others)} again; what both take "
            "away adds up, and the second saves no memory. Leave one out",
            stacklevel=3,
        )
    if settings.steps <= settings.gradient_warmup:
        warnings.warn(
            f"gradients stay as they are for gradient_warmup={settings.gradient_warmup} steps, and there are only "
            f"{settings.steps}: no step is rounded",
            stacklevel=3,
        )
    chosen = {name: p for name, p in named.items() if _belongs(name, settings.gradient_modules)}
    if not chosen:
        parts = sorted({part for name in named for part in name.split(".") if not part.isdigit()})
        raise ValueError(
            f"gradient_modules={list(settings.gradient_modules)} names nothing that learns; parts of the names that do "
            f"are {', '.join(parts)}"
        )
    return Int8Gradients(chosen.values(), settings.gradient_warmup)


def _belongs(name: str, modules: tuple[str, ...]) -> bool:
    return not modules or any(part in name.split(".") for part in modules)


def _step(model: Any, windows: list[Tensor], exchange: Exchange) -> float:
    """Gradients of the mean loss over windows, one after the other: a window needs no padding."""
    sum_ = 0.0
    for window in exchange.share(windows):
        ids = window[None].to(model.device)
        loss = model(input_ids=ids, labels=ids).loss / len(windows)
        loss.backward()
        sum_ += float(loss.detach())
    return exchange.added(sum_)


@torch.no_grad()
def mean_loss(model: Any, windows: Sequence[Tensor]) -> float:
    """The next-token loss, mean over windows."""
    was_training = model.training
    model.eval()
    values = [float(model(input_ids=w[None].to(model.device), labels=w[None].to(model.device)).loss) for w in windows]
    model.train(was_training)
    return sum(values) / len(values)


def _job(
    named: dict[str, nn.Parameter],
    windows: Sequence[Tensor],
    settings: TrainSettings,
    job: str,
    left_out: Sequence[str],
) -> str:
    """What must be the same for a state to be gone on from."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{len(window)} ".encode())  # other windows may be of the same tokens
        digest.update(window.cpu().numpy().tobytes())
    shapes = {name: list(p.shape) for name, p in named.items()}
    kept = {k: v for k, v in asdict(settings).items() if k not in left_out}
    return hashlib.sha256(json.dumps([digest.hexdigest(), shapes, kept, job]).encode()).hexdigest()


class _State:
    """What training needs to go on, in one safetensors file: parameters, Adam's moments, codes, losses."""

    def __init__(
        self, folder: Path | None, named: dict[str, nn.Parameter], windows: Sequence[Tensor], settings: TrainSettings,
        job: str, model: nn.Module, optimizer: torch.optim.Optimizer,
    ) -> None:  # fmt: skip
        self._path = None if folder is None else folder / STATE
        # Beside the state of a training whose loss was not finite: it goes on at other rates, too.
        self._mark = None if folder is None else folder / NOT_FINITE
        self._job = _job(named, windows, settings, job, ["save_every"])
        self._mended = _job(named, windows, settings, job, ["save_every", "rate", "warmup", "clip"])
        self._model, self._named, self._optimizer = model, named, optimizer

    def stopped(self, saved: int) -> str:
        """Note that the loss was not finite. Returns what is kept, as a sentence."""
        if self._path is None or self._mark is None:
            return "No state is kept"
        if not saved:
            return f"It was so before the first state was saved in {self._path.parent}: begin anew"
        if process() == 0:
            self._mark.touch()
        return (
            f"{self._path.parent} keeps the state after step {saved}, the last from which a finite loss came: the same "
            "job with another rate goes on from there; without that folder it begins anew"
        )

    def write(self, losses: list[float]) -> None:
        """Save, beside and then renamed."""
        if self._path is None or process() != 0:
            return
        tensors = {f"parameter.{name}": p.detach().contiguous() for name, p in self._named.items()}
        for name, p in self._named.items():
            for kind, value in self._optimizer.state.get(p, {}).items():
                for part, tensor in flattened(value).items():
                    tensors[f"{kind}{part}|{name}"] = tensor
        for name, layer in self._with_codes().items():
            tensors[f"codes.{name}"] = layer.codes.contiguous()
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        save_file(tensors, beside, metadata={"job": self._job, "mended": self._mended})
        os.replace(beside, self._path)
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)

    def read(self) -> list[float]:
        """Take up an earlier state. Returns its losses; none where there is no state.

        Raises:
            TrainingError: it is of another job, or damaged.
        """
        if self._path is None or not self._path.exists():
            return []
        try:
            return self._taken_up(self._path)
        except (SafetensorError, KeyError, RuntimeError) as error:
            if isinstance(error, TrainingError):
                raise
            raise TrainingError(
                f"{self._path} is damaged ({error}); remove {self._path.parent} to begin anew"
            ) from None

    def _taken_up(self, path: Path) -> list[float]:
        with safe_open(path, framework="pt") as handle, torch.no_grad():
            found = handle.metadata() or {}
            mended = self._mark is not None and self._mark.exists() and found.get("mended") == self._mended
            if found.get("job") != self._job and not mended:
                raise TrainingError(
                    f"{path.parent} is the state of another training (another model, data, settings or layers): "
                    "repeat that one's arguments to go on with it, remove the folder, or name another"
                )
            parts: dict[str, dict[str, dict[str, Tensor]]] = {}
            for key in handle.keys():
                kind, bar, name = key.partition("|")
                if bar:
                    kind, slash, rest = kind.partition("/")
                    parts.setdefault(name, {}).setdefault(kind, {})[slash + rest] = handle.get_tensor(key)
            for name, p in self._named.items():
                p.copy_(handle.get_tensor(f"parameter.{name}"))
                if name in parts:
                    self._optimizer.state[p] = {
                        # A number, as AdamW's step, stays on the CPU, where optimizers keep it.
                        kind: restored({part: t.to(p.device) if t.dim() else t for part, t in value.items()})
                        for kind, value in parts[name].items()
                    }
            losses: list[float] = handle.get_tensor("losses").tolist()
            for name, layer in self._with_codes().items():
                layer.codes.copy_(handle.get_tensor(f"codes.{name}"))
                layer.steps = len(losses)
        return losses

    def _with_codes(self) -> dict[str, Any]:
        """The layers whose codes in use are not a function of their parameters."""
        return {name: layer for name, layer in trained(self._model).items() if isinstance(layer, LearnedCodes)}
