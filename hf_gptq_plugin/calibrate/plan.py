"""What a calibration is to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..format.spec import CheckpointConfig, QuantSpec
from ..solve.gptq import SolveSettings
from ..solve.learn import TuneSettings


@dataclass(frozen=True)
class Plan:
    """What to quantize, and how.

    Args:
        checkpoint: specs of the modules.
        settings: of the solver.
        true_sequential: let every layer see its quantized predecessors within the block.
        modules: only these names within a block, in lists as the stock config has them; None for all.
        block_name: name of the list of blocks; None to find it.
        min_expert_tokens: experts that the router sends fewer tokens lean on all of their layer, see
            `expert_hessians`; None for twice a layer's in_features.
        generated: windows that the dense model writes itself, as a multiple of those given, see `generated_windows`.
        token_weights: "loss" lets tokens count by what the model's loss feels of them, see `sensitivity`; "uniform"
            alike.
        output_hessian: "loss" lets errors of outputs count together as the model's loss feels them; "identity" each by
            itself, alike.
        seed: of what is drawn for these three.
        tuning: what is learned after the solver.
        journal: folder that finished blocks are written to, and gone on from; None for no journal.
        low_memory: keep on disk whatever is not worked on: activations, large parameters that are in memory, and
            finished blocks where their weights were offloaded to begin with.
    """

    checkpoint: CheckpointConfig
    settings: SolveSettings
    true_sequential: bool = True
    modules: list[list[str]] | None = None
    block_name: str | None = None
    min_expert_tokens: int | None = None
    generated: float = 0.0
    token_weights: str = "uniform"
    output_hessian: str = "identity"
    seed: int = 0
    tuning: TuneSettings = field(default_factory=TuneSettings)
    journal: Path | None = None
    low_memory: bool = False

    def spec_of(self, block: str, local: str) -> QuantSpec | None:
        """The spec of a block's layer; None where it is not to be quantized."""
        wanted = self.modules is None or any(local in stage for stage in self.modules)
        return self.checkpoint.for_module(f"{block}.{local}") if wanted else None

    @property
    def needs_exact(self) -> bool:
        """Whether the dense model's own activations are needed."""
        return bool(self.settings.propagation or self.tuning.block_epochs or self.tuning.model_epochs)
