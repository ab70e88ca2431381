"""What training will take, before any weight is loaded: bytes per part, method by method, and what fits a budget.

Nothing is estimated by a formula that an architecture could break: one training step of the model itself, with the
layers that learn in place, is run on tensors that have shapes and no memory (PyTorch's fake tensors), and every
allocation and every release of the step is added up. What an optimizer keeps is arithmetic.

Not counted: what a library keeps beside PyTorch's tensors (the interpreter, a CUDA context, thread pools, scratch of
kernels), and the allocator's fragmentation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn.linear import QuantLinear
from .checkpointing import enable_checkpointing
from .layers import require_rank
from .methods import METHODS, attach, targeted
from .qgalore import planned_bytes

OPTIMIZERS = ("adamw", "q-galore")
# In the order in which they are chosen where several fit: adapters keep the base as it is and can be taken off again;
# learned scales need least; what keeps a float copy of every weight comes last.
PREFERRED = ("lora", "qa-lora", "affine", "eetq", "l4q", "shadow", "ste")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one way of training.

    Args:
        method: "lora" or one of `METHODS`.
        optimizer: one of `OPTIMIZERS`.
        checkpointing: activations are computed again in the backward pass, block by block.
        weights: the model as it is loaded: packed codes, scales, zeros, and what is not quantized.
        learned: numbers that learn, and what a method keeps beside them (unpacked codes, groups).
        gradients: of what learns.
        optimizer_states: what the optimizer keeps between steps.
        activations: most that is alive at one moment of a step beside all that: saved for the backward pass, and
            passing.
        parameters: how many numbers learn.
    """

    method: str
    optimizer: str
    checkpointing: bool
    weights: int
    learned: int
    gradients: int
    optimizer_states: int
    activations: int
    parameters: int

    @property
    def total(self) -> int:
        """Most that training takes at one moment."""
        return self.weights + self.learned + self.gradients + self.optimizer_states + self.activations

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Budget:
    """What fits.

    Args:
        budget: bytes that there are.
        plans: all that were looked at, in order of preference.
        chosen: the first that fits, or None.
        advice: one sentence: what to choose, or what to change.
    """

    budget: int
    plans: list[MemoryPlan]
    chosen: MemoryPlan | None
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        plans = [{**plan.to_dict(), "fits": plan.total <= self.budget} for plan in self.plans]
        chosen = None if self.chosen is None else self.chosen.to_dict()
        return {"budget": self.budget, "plans": plans, "chosen": chosen, "advice": self.advice}


def budgeted(
    model: nn.Module, budget: int, *, seqlen: int = 512, windows: int = 1, methods: Sequence[str] | None = None,
    optimizers: Sequence[str] = ("adamw",), target_modules: Sequence[str] | str | None = None, rank: int = 16,
    subspace: int = 64, prepare: Callable[[Any], None] | None = None,
) -> Budget:  # fmt: skip
    """What training a quantized model takes by each method, and which to choose within a budget.

    `hf.planning.tune_memory_budget` is this for models of Transformers, loaded or not.

    Args:
        model: a causal language model with `QuantLinear` layers. Its weights may be on the meta device: only shapes
            are read, and the model is not changed.
        budget: bytes.
        seqlen: tokens per window.
        windows: windows that pass through the model together (`hf-gptq train` passes one at a time).
        methods: "lora" and names of `METHODS`; all by default.
        optimizers: of `OPTIMIZERS`.
        target_modules: see `attach`.
        rank: of lora, qa-lora and l4q.
        subspace: rank of Q-GaLore's projection.
        prepare: called with the copy that has no memory, before its step is run.

    Raises:
        ValueError: an argument that cannot be, or a model whose step does not run without values (a mixture of
            experts).
    """
    for name, value in (("budget", budget), ("seqlen", seqlen), ("windows", windows), ("subspace", subspace)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    methods = PREFERRED if methods is None else methods
    for method in methods:
        if method not in PREFERRED:
            raise ValueError(f"method={method!r} is not known; use one of {', '.join(PREFERRED)}")
    for optimizer in optimizers:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r} is not known; use one of {', '.join(OPTIMIZERS)}")
    plans: list[MemoryPlan] = []
    for method in sorted(methods, key=PREFERRED.index):
        both = planned(model, method, seqlen, windows, target_modules, rank, subspace, prepare)
        plans += [plan for plan in both if plan.optimizer in optimizers]
    fitting = [plan for plan in plans if plan.total <= budget]
    if not fitting:
        least = min(plans, key=lambda plan: plan.total)
        most = max(("weights", "learned", "gradients", "optimizer_states", "activations"), key=least.to_dict().get)  # type: ignore[arg-type]
        change = {
            "weights": "the weights alone are most of it: quantize to fewer bits, or load in bfloat16",
            "activations": f"activations are most of it: shorten seqlen={seqlen} or windows={windows}",
        }.get(most, f"{most} are most of it: lower the rank or name fewer target_modules")
        advice = f"nothing fits {_gb(budget)}; {_named(least)} needs least, {_gb(least.total)}, and {change}"
        return Budget(budget, plans, None, advice)
    chosen = fitting[0]
    advice = f"choose {_named(chosen)}: {_gb(chosen.total)} of {_gb(budget)}"
    return Budget(budget, plans, chosen, advice)


def _named(plan: MemoryPlan) -> str:
    return f"{plan.method} with {plan.optimizer}" + (" and checkpointing" if plan.checkpointing else "")


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def planned(
    model: nn.Module, method: str, seqlen: int, windows: int = 1,
    target_modules: Sequence[str] | str | None = None, rank: int = 16, subspace: int = 64,
    prepare: Callable[[Any], None] | None = None,
) -> list[MemoryPlan]:  # fmt: skip
    """The plans of one method: without and with checkpointing, with every optimizer; arguments as `budgeted`.

    Of a model with more than three equal blocks, two and three are run: every block more adds the same.
    """
    name, blocks = _blocks(model)

    def measured(kept: int) -> dict[str, int]:
        with _imagined(model, name, kept) as fake:
            if prepare is not None:
                prepare(fake)
            found = {"weights": _held(fake)}
            _attach(fake, method, target_modules, rank)
            learning = [p for p in fake.parameters() if p.requires_grad]
            found["learned"] = _held(fake) - found["weights"]
            found["parameters"] = sum(p.numel() for p in learning)
            found["gradients"] = sum(p.nbytes for p in learning)
            # exp_avg and exp_avg_sq in the parameter's dtype, and a count of steps.
            found["adamw"] = sum(2 * p.nbytes + 4 for p in learning)
            found["q-galore"] = sum(planned_bytes(p.shape, subspace) for p in learning)
            found["plain"] = _peak(fake, seqlen, windows)
            enable_checkpointing(fake, use_reentrant=False, preserve_rng_state=False)
            found["again"] = _peak(fake, seqlen, windows)
            return found

    if blocks <= 3:
        found = measured(blocks)
    else:
        two, three = measured(2), measured(3)
        found = {key: two[key] + (blocks - 2) * (three[key] - two[key]) for key in two}
    return [
        MemoryPlan(
            method, optimizer, checkpointing, found["weights"], found["learned"], found["gradients"], found[optimizer],
            found["again" if checkpointing else "plain"], found["parameters"],
        )
        for checkpointing in (False, True)
        for optimizer in OPTIMIZERS
    ]  # fmt: skip


def _blocks(model: nn.Module) -> tuple[str, int]:
    """Name and length of the list of blocks, where all are alike; else a length of 0."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        return "", 0
    name = max(lists, key=lambda name: len(lists[name]))
    kinds = {
        (type(block).__name__, *((leaf, p.shape, p.dtype) for leaf, p in block.named_parameters()))
        for block in lists[name]
    }
    return (name, len(lists[name])) if len(kinds) == 1 else ("", 0)


@contextmanager
def _imagined(model: nn.Module, name: str, kept: int) -> Iterator[Any]:
    """A copy of the model, with so many of its blocks, whose tensors have no memory; within the mode they need."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        memo: dict[int, Any] = {}
        left_out = list(model.get_submodule(name).children())[kept:] if kept else []
        for block in left_out:
            memo[id(block)] = nn.Module()
        gone = {id(t) for block in left_out for t in (*block.parameters(), *block.buffers())}
        for p in model.parameters():
            if id(p) not in gone:
                memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
        for b in model.buffers():
            if id(b) not in gone:
                memo[id(b)] = torch.empty(b.shape, dtype=b.dtype)
        fake: Any = copy.deepcopy(model, memo)
        if left_out:
            fake.set_submodule(name, nn.ModuleList(list(fake.get_submodule(name).children())[:kept]))
            fake.config.num_hidden_layers = kept
        for layer in fake.modules():
            if isinstance(layer, QuantLinear) and not layer.finalized:
                # Headers do not show values: zeros as the spec says, and groups in order unless it says otherwise.
                layer.finalized, layer._symmetric, layer._natural = True, layer.spec.sym, not layer.spec.desc_act
        yield fake


class _Lora(nn.Module):
    """What PEFT's LoRA does to a layer, for its memory: matrices in fp32, and inputs converted to that."""

    def __init__(self, layer: QuantLinear, rank: int) -> None:
        super().__init__()
        require_rank(rank, layer)
        self.layer = layer
        self.A = nn.Linear(layer.in_features, rank, bias=False, dtype=torch.float32)
        self.B = nn.Linear(rank, layer.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        result = result + self.B(self.A(x.to(self.A.weight.dtype))) * 2.0
        return result.to(x.dtype)


def _attach(model: Any, method: str, target_modules: Sequence[str] | str | None, rank: int) -> None:
    if method != "lora":
        attach(model, method, target_modules, **({"rank": rank} if "rank" in METHODS[method].options else {}))
        return
    for name, layer in targeted(model, target_modules).items():
        model.set_submodule(name, _Lora(layer, rank))


def _held(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _peak(model: Any, seqlen: int, windows: int) -> int:
    """Most bytes that one step allocates at a time, beside parameters and their gradients."""
    model.train()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    ids = torch.zeros(windows, seqlen, dtype=torch.int64)
    live = _Live()
    try:
        with live:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"a step of {type(model).__name__} cannot be planned: it does not run without values, as those of a "
            f"mixture of experts do not ({type(error).__name__}: {reason[0][:200]})"
        ) from error
    return live.peak


class _Live(TorchDispatchMode):
    """Adds up the storages that come into being and go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes in was there before, or has been seen already.
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += self._sizes[key]
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
